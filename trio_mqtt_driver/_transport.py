"""From an endpoint to a ``trio.abc.Stream``, and the one seam where OSError and SSLError become our errors."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import sys
from typing import cast

import trio

from ._cancelled import without_errors
from ._config import DriverConfig
from ._errors import ConnectionLostError, MQTTDriverError, OptionsError, TLSError, TransportError
from ._tls import TLSConfig

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

_WRONG_HOST = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH, which Python's ``ssl`` does not name."""
_NOT_UNDERSTOOD = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING")
"""OpenSSL's reasons when the other side does not speak TLS; the second one is that of OpenSSL 3.2."""
_NO_TLS = "; does this port speak TLS? mqtts:// does, mqtt:// does not"


@trio.lowlevel.disable_ki_protection
async def open_stream(config: DriverConfig, elsewhere: random.Random | None = None) -> trio.abc.Stream:
    """Open the byte stream of one connection. Cancellable; the caller sets the deadline.

    With ``elsewhere`` any address of the host may be the first that is tried: see ``_open_tcp``.

    Raises ``TransportError``, ``TLSError`` or, for TLS files that cannot be used, ``OptionsError``.
    """
    endpoint = config.endpoint
    if config.open_stream is not None:
        try:
            opened = await config.open_stream(endpoint)
        except Exception as exc:  # whatever the application's code raises is one failed attempt
            raise lost(exc, f"connecting to {endpoint}", config.tls) from exc
        except BaseExceptionGroup as exc:
            raise without_errors(exc, "open_stream") from None
        if not isinstance(opened, trio.abc.Stream):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionsError(f"open_stream must return a trio.abc.Stream, not {type(opened).__name__}")
        return opened
    try:
        if endpoint.scheme == "unix":
            return await trio.open_unix_socket(endpoint.path)
        # Made before the connection, so that a bad file costs the broker nothing.
        context = await _make_context(config.tls or TLSConfig()) if endpoint.scheme == "mqtts" else None
        stream = await _open_tcp(config, elsewhere)
    except (OSError, UnicodeError) as exc:  # a host name that IDNA cannot encode
        raise lost(exc, f"connecting to {endpoint}") from exc
    if context is None:
        return stream
    hostname = config.tls.server_hostname if config.tls is not None else None
    try:
        # Brokers rarely send close_notify, and DISCONNECT says the same: https_compatible reads a bare EOF as EOF.
        secure = trio.SSLStream(stream, context, server_hostname=hostname or endpoint.host, https_compatible=True)
        await secure.do_handshake()
    except (trio.BrokenResourceError, OSError, ValueError) as exc:  # ValueError: no name that SNI can carry
        await trio.aclose_forcefully(stream)
        raise lost(exc, f"TLS handshake with {endpoint}", config.tls, _NO_TLS) from exc
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secure


async def open_stream_by(
    config: DriverConfig, deadline: float, elsewhere: random.Random | None = None
) -> trio.abc.Stream:
    """The same until ``deadline`` on Trio's clock."""
    with trio.move_on_at(deadline):
        return await open_stream(config, elsewhere)
    what = (
        "could not be reached, or did not end the TLS handshake,"
        if config.endpoint.scheme == "mqtts"
        else "could not be reached"
    )
    raise TransportError(f"{config.endpoint} {what} within connect_timeout={config.connect_timeout:g} s")


async def _open_tcp(config: DriverConfig, elsewhere: random.Random | None) -> trio.SocketStream:
    """Trio takes the first address that accepts, and happy eyeballs pass by those that do not.

    One that accepts and has no broker behind it would thus be taken for ever. So ``elsewhere``, given after a failure,
    picks one that has a quarter of the time for itself: the lookup too, for two slow ones could take all of it.
    """
    host, port = config.endpoint.host, config.endpoint.port
    family = _family_of(host)
    if family is not None:
        return await _open_address(family, host, port)
    if elsewhere is not None:
        with trio.move_on_after(config.connect_timeout / 4):
            found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            if len(addresses) > 1:
                try:
                    return await trio.open_tcp_stream(elsewhere.choice(addresses), port)
                except OSError:
                    pass  # it is among those that are tried now, and has its say in the error
    return await trio.open_tcp_stream(host, port)


def _family_of(host: str) -> socket.AddressFamily | None:
    """Of an address; None for what has to be looked up: a name, or an address with a scope (``fe80::1%eth0``)."""
    if "%" in host:  # there are systems whose ``inet_pton`` takes it, and the scope would be lost
        return None
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # the latter: what can be neither a name nor an address
            socket.inet_pton(family, host)
            return family
    return None


async def _open_address(family: socket.AddressFamily, host: str, port: int) -> trio.SocketStream:
    """Without happy eyeballs: a nursery and a task, which for a single address are for nothing."""
    sock = trio.socket.socket(family)
    try:
        await sock.connect((host, port))
        return trio.SocketStream(sock)
    except OSError as exc:  # Trio's words have the address in them once more
        sock.close()
        raise OSError(exc.errno, os.strerror(exc.errno or 0)) from exc
    except BaseException:
        sock.close()
        raise


async def _make_context(tls: TLSConfig) -> ssl.SSLContext:
    try:
        return await trio.to_thread.run_sync(tls.make_context)
    except ssl.SSLError as exc:
        raise TLSError(f"TLS material: {_words(exc)}; look at {tls.material}") from exc
    except (OSError, ValueError, TypeError) as exc:  # the latter two: a path with a NUL, a PEM text that is not ASCII
        raise OptionsError(f"TLS material cannot be read: {exc}; look at {tls.material}") from exc


def lost(exc: BaseException, doing: str, tls: TLSConfig | None = None, advice: str = "") -> MQTTDriverError:
    """The error for what Trio's stream raised while ``doing`` something on it; ``tls`` decides what is terminal.

    ``advice`` is for a peer that ends the connection, or says what is not TLS.

    An ``ssl.SSLError`` hides behind ``BrokenResourceError``, and is itself an ``OSError``: it is looked for first.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            if getattr(cause, "verify_code", None) in _WRONG_HOST:
                return _wrong_host(cause, doing, "retry" if tls is None else tls.wrong_host)
            words = _words(cause)
            return TLSError(f"{doing}: {words}{advice if words in _NOT_UNDERSTOOD else ''}")
        cause = cause.__cause__
    if isinstance(exc, Exception) and not isinstance(exc, trio.BrokenResourceError | trio.ClosedResourceError):
        return TransportError(f"{doing}: {_words(exc)}")
    return ConnectionLostError(f"{doing}: {_words(exc.__cause__ or exc)}{advice}")


def _wrong_host(exc: ssl.SSLError, doing: str, decision: str) -> TLSError:
    # OpenSSL's words tell the name that was asked for. Those in the certificate Python keeps to itself.
    other, outcome = ("retry", "try again") if decision == "stop" else ("stop", "end the driver")
    return TLSError(
        f"{doing}: {_words(exc).rstrip('.')}; set server_hostname to a name that the certificate has "
        f'(wrong_host="{other}" would {outcome})',
        terminal=decision == "stop",
    )


def _words(exc: BaseException) -> str:
    # An error that a stream of the application's made by itself lacks what Python's ssl module adds.
    if isinstance(exc, ssl.SSLCertVerificationError) and hasattr(exc, "verify_message"):
        return f"certificate verify failed: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        return getattr(exc, "reason", None) or str(exc)
    cause: BaseException | None = exc.__cause__
    if isinstance(exc, OSError) and isinstance(cause, BaseExceptionGroup):
        # "All attempts failed": Trio tries each address of a host and keeps the reasons in a group.
        group = cast("BaseExceptionGroup[BaseException]", cause)
        reasons = [os.strerror(one.errno) for one in group.exceptions if isinstance(one, OSError) and one.errno]
        return "; ".join(dict.fromkeys(reasons)) or str(exc)
    return (exc.strerror if isinstance(exc, OSError) else "") or str(exc) or type(exc).__name__
