"""CONNECT to CONNACK [MQTT-3.1], [MQTT-3.2], with enhanced authentication in between [MQTT-4.12]."""

from __future__ import annotations

import sys

import trio

from ._cancelled import without_errors
from ._config import TERMINAL_REFUSALS
from ._connection import Connection
from ._errors import OptionsError, ProtocolError, ProtocolVersionError, RefusedError, TransportError
from ._paho import AuthPacket, ConnAck
from ._types import ReasonCode

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

_ADVICE = {
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: "check username and password",
    ReasonCode.NOT_AUTHORIZED: "check the credentials and the broker's access list",
    ReasonCode.CLIENT_IDENTIFIER_NOT_VALID: "choose another client_id or a client_id_factory",
    ReasonCode.BANNED: "the broker's administrator has banned this client",
    ReasonCode.BAD_AUTHENTICATION_METHOD: "choose an authenticator that the broker knows",
}


@trio.lowlevel.disable_ki_protection
async def handshake(connection: Connection) -> None:
    """Connect the session; returns when CONNACK was good. The caller sets the deadline.

    Raises ``RefusedError``, ``ProtocolVersionError``, ``ProtocolError`` or, for an exception in the application's
    authenticator, ``OptionsError``.
    """
    config = connection.config
    try:
        authenticator = (
            config.authenticator() if config.authenticator is not None and connection.version == 5 else None
        )
        start = None if authenticator is None else (authenticator.method, await authenticator.start())
        answer = await connection.connect(start).wait()
        while isinstance(answer, AuthPacket):
            if authenticator is None or answer.method != authenticator.method:
                raise ProtocolError(f"protocol error: AUTH with method {answer.method!r} [MQTT-4.12.0-5]")
            if answer.reason_code != ReasonCode.CONTINUE_AUTHENTICATION:
                raise ProtocolError(f"protocol error: AUTH with {answer.reason_code} before CONNACK [MQTT-4.12.0-2]")
            data = await authenticator.answer(answer.data)
            answer = await connection.authenticate(authenticator.method, data).wait()
        _check(connection, answer)
        if authenticator is not None:
            await authenticator.finish(answer.authentication_data)
    except (ProtocolError, ProtocolVersionError, RefusedError):
        raise
    except Exception as exc:
        raise OptionsError(f"the authenticator failed: {exc!r}") from exc
    except BaseExceptionGroup as exc:
        raise without_errors(exc, "authenticator") from None
    connection.connected(answer.limits, session_present=answer.session_present)


async def handshake_by(connection: Connection, deadline: float) -> None:
    """The same until ``deadline`` on Trio's clock; then ``TransportError``.

    That is not left to the connection's timer, as other answers are: the application's authenticator is bounded, too,
    and so is a handshake whose end lies behind messages for which there is no room.
    """
    with trio.move_on_at(deadline):
        return await handshake(connection)
    config = connection.config
    raise TransportError(f"no CONNACK from {config.endpoint} in connect_timeout={config.connect_timeout:g} s")


def _check(connection: Connection, answer: ConnAck) -> None:
    code = answer.reason_code
    if code == ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
        version, other = ("5", "3.1.1") if connection.version == 5 else ("3.1.1", "5")
        advice = "" if connection.config.protocol == "auto" else f"; set protocol='auto' or {other!r}"
        raise ProtocolVersionError(f"the broker does not speak MQTT {version}{advice}")
    if code.is_failure:
        terminal = code in TERMINAL_REFUSALS and code not in connection.config.retry_refusals
        words = f": {answer.limits.reason_string}" if answer.limits.reason_string else ""
        advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
        raise RefusedError(
            f"{connection.config.endpoint} refused the connection: {code}{words}{advice}",
            code,
            terminal,
            answer.limits.server_reference,
        )
    if code != ReasonCode.SUCCESS:
        raise ProtocolError(f"protocol error: CONNACK with reason code {code} [MQTT-3.2.2-8]")
    if answer.session_present and not connection.session.established:
        raise ProtocolError(
            "protocol error: Session Present, although the session was to begin clean [MQTT-3.2.2-2]; "
            "does another client use this client ID?"
        )
