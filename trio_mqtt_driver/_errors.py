"""The exceptions of the driver: one paragraph each, saying who is at fault and what to do.

Bad arguments are plain ``ValueError`` and ``TypeError``: they are found at the call, before anything is sent.
"""

from __future__ import annotations

import trio

from ._types import Diagnosis, ReasonCode


class MQTTDriverError(Exception):
    """Base of everything that this package raises on purpose."""


class ConnectError(MQTTDriverError):
    """An attempt to get a usable connection failed: the network, the broker or the settings are at fault.

    The driver tries again by itself; the error is in ``status()``, the history and the log, not raised. Only where it
    is ``terminal``, the driver stops, and the error leaves the ``async with``.
    """

    terminal: bool = False
    """Whether the driver has stopped with it, since trying again would not help."""


class TransportError(ConnectError):
    """The byte stream could not be opened: name not found, connection refused, unreachable, too slow."""


class TLSError(ConnectError):
    """TLS failed: an expired, rotated or foreign certificate, a wrong host name, no common protocol version.

    The next attempt builds its TLS material afresh, at once. Only a wrong host name is terminal, if
    ``TLSConfig(wrong_host="stop")`` says so.
    """

    def __init__(self, message: str, *, terminal: bool = False) -> None:
        super().__init__(message)
        self.terminal = terminal


class OptionsError(ConnectError):
    """The application's own ``options_factory`` or TLS files failed for this attempt; see ``__cause__``."""


class ProtocolVersionError(ConnectError):
    """The broker does not speak the MQTT version of this attempt; ``protocol="auto"`` then tries 3.1.1."""


class ProbeError(ConnectError):
    """CONNECT was accepted but the test publish was not acknowledged in time, or was refused.

    If the broker's ACL forbids the probe topic, choose another ``probe_topic`` or ``probe="ping"``.
    """


class RefusedError(ConnectError):
    """The broker answered CONNECT with a refusal (``reason_code``).

    Where the code cannot heal by waiting (bad credentials, not authorised, banned, …) it is *terminal*: the driver
    stops and this error leaves the ``async with``. Correct the credentials, or name the code in
    ``retry_refusals`` where the broker is known to refuse for a while only.
    """

    def __init__(
        self, message: str, reason_code: ReasonCode, terminal: bool = False, server_reference: str | None = None
    ) -> None:
        super().__init__(message, reason_code, terminal, server_reference)
        self.reason_code = reason_code
        self.terminal = terminal
        self.server_reference = server_reference

    def __str__(self) -> str:
        return str(self.args[0])


class ConnectionLostError(MQTTDriverError):
    """A connection that was up has ended; the message says how. The driver reconnects by itself."""


class ServerDisconnectedError(ConnectionLostError):
    """The broker sent DISCONNECT with a reason code (MQTT 5): session taken over, shutting down, quota, …"""

    def __init__(self, message: str, reason_code: ReasonCode, server_reference: str | None = None) -> None:
        super().__init__(message, reason_code, server_reference)
        self.reason_code = reason_code
        self.server_reference = server_reference

    @property
    def taken_over(self) -> bool:
        """Whether another client with our client ID has taken our place."""
        return self.reason_code == ReasonCode.SESSION_TAKEN_OVER

    def __str__(self) -> str:
        return str(self.args[0])


class KeepAliveError(ConnectionLostError):
    """PINGREQ was not answered within ``ping_timeout`` and nothing else arrived: the link is half-open."""


class SuspendedError(ConnectionLostError):
    """The machine was suspended for longer than the broker waits for us, and the connection did not survive it.

    ``__cause__`` is what was seen of that: the end of the connection, or a PINGREQ without an answer.
    """


class AckTimeoutError(ConnectionLostError):
    """A PUBLISH, SUBSCRIBE or UNSUBSCRIBE was not acknowledged in time, so the connection was given up.

    For a PUBLISH the message says whether the broker answers PINGREQ all the same, or nothing at all.
    """


class ProtocolError(ConnectionLostError, ConnectError):
    """The peer sent bytes that MQTT does not allow, with the rule that they break.

    The broker, or something that is not a broker on that port, is at fault. The connection ends; what was accepted
    before stays accepted.
    """


class PublishError(MQTTDriverError):
    """A message did not reach the broker and never will. ``diagnosis`` tells what the driver knew."""

    def __init__(self, message: str, diagnosis: Diagnosis | None = None) -> None:
        super().__init__(message, diagnosis)
        self.diagnosis = diagnosis

    def __str__(self) -> str:
        text = str(self.args[0])
        return text if self.diagnosis is None else f"{text} ({self.diagnosis})"


class PublishRefusedError(PublishError):
    """The broker acknowledged the message with a refusal (MQTT 5): not authorised, quota, topic invalid, …"""

    def __init__(self, message: str, reason_code: ReasonCode) -> None:
        super().__init__(message)
        self.reason_code = reason_code

    def __reduce__(self) -> tuple[type[PublishRefusedError], tuple[str, ReasonCode]]:
        return type(self), (str(self.args[0]), self.reason_code)


class PublishTimeoutError(PublishError):
    """``publish_timeout`` passed without an acknowledgement: the message may or may not have arrived.

    The driver goes on reconnecting; the message is no longer sent.
    """


class MessageLostError(PublishError):
    """The driver closed before the message was acknowledged: it may or may not have arrived."""


class OutboxFullError(PublishError):
    """The bounds of the outbox (``outbox_messages``, ``outbox_bytes``) are reached.

    ``publish()`` waits instead, unless ``outbox_full`` says otherwise.
    """


class OutboxFileError(MQTTDriverError):
    """The outbox file (``outbox_path``) cannot be opened or written; the message says what to do.

    When the driver is entered: the file is damaged, in use, from a newer version, or not an outbox. It stays as it is.
    Later: the disk is full or failing. What is accepted is sent all the same, but a crash would lose it.
    """


class MessageDroppedError(PublishError):
    """The message was dropped for newer ones, since the outbox was full: ``outbox_full="drop_oldest"``."""


class SupersededError(PublishError):
    """A newer message to the same topic took its place while it waited: ``offline="latest"``."""


class MessageExpiredError(PublishError):
    """``message_expiry`` passed before the message was acknowledged; it is no longer sent.

    Whether it arrived is not known, unless it was never sent.
    """


class QuarantinedError(PublishError):
    """The broker ended one connection after the other when it got the message, which is no longer sent.

    See ``quarantine_after``. What the broker has against it, it does not say: its size, topic or properties, perhaps.
    """


class NotConnectedError(MQTTDriverError):
    """The call needs a live link and there is none now: wait with ``wait_live()``, or let ``publish()`` wait.

    Of ``publish(offline="fail")`` also if the link was lost meanwhile; then the message may or may not have arrived.
    """


class StaleDataError(MQTTDriverError):
    """A `StateView` has nothing that is live: the driver is not started, the link is down, or data is still missing.

    The message says which. Show the user that the state is unknown, and read again later, or use ``changes()``.
    """


class ServerLimitError(MQTTDriverError, ValueError):
    """The call asks for what the broker ruled out in its CONNACK (Maximum QoS, packet size, retain, wildcards, …)."""


class SubscribeError(MQTTDriverError):
    """The broker refused a subscription (``reason_code``, ``topic_filter``): mostly its access list."""

    def __init__(self, message: str, topic_filter: str, reason_code: ReasonCode) -> None:
        super().__init__(message, topic_filter, reason_code)
        self.topic_filter = topic_filter
        self.reason_code = reason_code

    def __str__(self) -> str:
        return str(self.args[0])


class UnsubscribeError(SubscribeError):
    """The broker refused to end a subscription; locally it is gone all the same."""


class PayloadError(MQTTDriverError, ValueError):
    """A payload does not fit the subscription's message class: the sender is at fault; see ``__cause__``."""


class DriverClosedError(MQTTDriverError, trio.ClosedResourceError):
    """The driver was left (or never entered). Make a new one: a driver is not reusable."""


class DriverInternalError(MQTTDriverError):
    """A bug in this package; please report it with the traceback of ``__cause__``."""
