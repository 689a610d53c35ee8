"""Values that every layer speaks of: MQTT's own words, as enums and attrs classes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import attrs

T = TypeVar("T")


class _Word(str, enum.Enum):
    """A word of a fixed set: equal to its text, and written as it."""

    def __str__(self) -> str:
        return str(self.value)


class QoS(enum.IntEnum):
    """Quality of Service of a PUBLISH or a subscription [MQTT-4.3]."""

    AT_MOST_ONCE = 0
    AT_LEAST_ONCE = 1
    EXACTLY_ONCE = 2


class RetainHandling(enum.IntEnum):
    """When the broker sends retained messages for a SUBSCRIBE [MQTT-3.8.3.1]; MQTT 3.1.1 always sends them."""

    SEND = 0
    SEND_IF_NEW = 1
    DO_NOT_SEND = 2


class PayloadFormat(enum.IntEnum):
    """MQTT 5 Payload Format Indicator."""

    BYTES = 0
    UTF8 = 1


class Overflow(_Word):
    """What a subscription does with a message that finds its queue full. Every drop is counted.

    The drop policies take QoS 0 messages only: those of QoS 1 and 2 are bounded by the Receive Maximum and
    ``receive_bytes`` instead, so that none is acknowledged unseen. What is not to be acknowledged any more goes like
    QoS 0: it was on receipt (``Acknowledge.RECEIVED``), or the connection that brought it is over.
    """

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    LATEST = "latest"
    """Of each topic only the newest message stays, whatever the QoS: an older one is acknowledged, since whoever asks
    for this wants the newest only. If that is not enough, as ``DROP_OLDEST``."""
    BLOCK = "block"
    """Stop reading the socket until there is room: nothing is lost here, and *every* subscription waits. A handler
    that awaits ``publish(qos=1)``, ``subscribe()``, ``unsubscribe()`` or ``ping()`` may then wait for an answer that
    is not being read. At twice its bound the queue lets messages go that a connection brought which is over."""


class Acknowledge(_Word):
    """When a message of QoS 1 or 2 is acknowledged. If several subscriptions match it, when all of them have done so.

    A dead letter is acknowledged when its handler has returned, or the log has it, whatever is chosen.
    """

    PROCESSED = "processed"
    """When its handler has returned or raised, or the iterator is asked for the next one."""
    RECEIVED = "received"
    """As soon as it is in the queue: from there on it is delivered at most once, and may be dropped like QoS 0."""
    MANUAL = "manual"
    """When ``Message.ack()`` or ``Message.refuse()`` is called, in whatever task, also after the subscription has
    ended. What is never acknowledged takes up the Receive Maximum for as long as the connection lasts."""


class OfflinePolicy(_Word):
    """What becomes of a publish while the link is down."""

    WAIT = "wait"
    """It waits in the outbox, and ``publish()`` with it, until the QoS guarantee is met."""
    QUEUE = "queue"
    """It waits in the outbox, and ``publish()`` returns as soon as it is there (with ``outbox_path``: on the disk)."""
    LATEST = "latest"
    """As ``QUEUE``, but only the newest one per topic waits: for state, where an older message is worth nothing."""
    FAIL = "fail"
    """``publish()`` raises ``NotConnectedError``, also if the link is lost before the acknowledgement."""


class State(_Word):
    """Where the driver is in the life of its connections; see ``_states`` for the transitions."""

    NEW = "new"
    CONNECTING = "connecting"
    VALIDATING = "validating"
    REPLAYING = "replaying"
    LIVE = "live"
    BACKING_OFF = "backing off"
    PAUSED = "paused"
    CLOSING = "closing"
    CLOSED = "closed"


class ReasonCode(enum.IntEnum):
    """MQTT 5 reason codes [MQTT-2.4]; the CONNACK return codes of 3.1.1 are mapped to them."""

    SUCCESS = 0x00
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    CONTINUE_AUTHENTICATION = 0x18
    REAUTHENTICATE = 0x19
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_IDENTIFIER_IN_USE = 0x91
    PACKET_IDENTIFIER_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    MESSAGE_RATE_TOO_HIGH = 0x96
    QUOTA_EXCEEDED = 0x97
    ADMINISTRATIVE_ACTION = 0x98
    PAYLOAD_FORMAT_INVALID = 0x99
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    USE_ANOTHER_SERVER = 0x9C
    SERVER_MOVED = 0x9D
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2

    @property
    def is_failure(self) -> bool:
        """Whether it says that something was refused or went wrong: 0x80 and above."""
        return self >= 0x80

    def __str__(self) -> str:
        return f"{self.name.lower().replace('_', ' ')} (0x{self.value:02x})"


UserProperties = Sequence[tuple[str, str]]


@attrs.frozen(kw_only=True)
class PublishProperties:
    """The MQTT 5 properties of a PUBLISH [MQTT-3.3.2.3]; all unset with 3.1.1."""

    payload_format: PayloadFormat | None = None
    message_expiry: int | None = None
    """Seconds after which the broker no longer delivers the message."""
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_properties: tuple[tuple[str, str], ...] = ()
    subscription_identifiers: tuple[int, ...] = ()
    """Incoming only."""
    topic_alias: int | None = None


NO_PROPERTIES = PublishProperties()


class UndecodedProperties(Protocol):
    """The properties of an incoming PUBLISH as a message keeps them until somebody asks for them."""

    @property
    def subscription_identifiers(self) -> tuple[int, ...]: ...

    def decode(self) -> PublishProperties: ...


class Acknowledger(Protocol):
    """The connection that a message came from, as far as a message knows it."""

    @property
    def ended(self) -> bool: ...

    @property
    def overtakes(self) -> bool:
        """Whether any of its messages has been overtaken yet: else nobody has to look."""
        ...

    def keeps(self, message: Message[Any]) -> bool: ...

    def acknowledge(self, message: Message[Any]) -> bool: ...

    @property
    def note(self) -> Callable[[Message[Any]], object]:
        """The half of ``acknowledge`` for a message of QoS 1 that nobody refused; ``noted`` is to follow."""
        ...

    def noted(self) -> None:
        """Call it at the latest when others may run."""
        ...

    def overtake(self, message: Message[Any]) -> None: ...


class Reader(Protocol):
    """The subscription that handed a message out, as far as a message knows it."""

    def _note_refused(self) -> None: ...


_REFUSALS = (
    ReasonCode.UNSPECIFIED_ERROR,
    ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR,
    ReasonCode.NOT_AUTHORIZED,
    ReasonCode.TOPIC_NAME_INVALID,
    ReasonCode.PACKET_IDENTIFIER_IN_USE,
    ReasonCode.QUOTA_EXCEEDED,
    ReasonCode.PAYLOAD_FORMAT_INVALID,
)
"""What PUBACK and PUBREC may say [MQTT-3.4.2.1], [MQTT-3.5.2.1]."""


class _UsualMessage(Generic[T]):
    """What stays as it is for most messages, which is kept here and not in each of them: one is made per packet."""

    replayed: bool = False
    _overtaken: bool = False
    """Whether it has lost its place in the order of acknowledgements; of copies, the original knows."""
    _code: int = 0
    """With which it is acknowledged; of copies, the original knows."""


class Message(_UsualMessage[T]):
    """An application message as a handler or an iterator gets it.

    ``value`` is the payload as the subscription's message class; ``replayed`` tells a retained message that came
    again because the subscription was replayed after a reconnect.
    """

    # What each one has is in slots: instances whose attributes come after many others were made get a dict of their
    # own, which costs more than all the rest of handing a message over.
    __slots__ = (
        "_open",
        "_original",
        "_properties",
        "_reader",
        "_source",
        "dup",
        "generation",
        "packet_id",
        "payload",
        "qos",
        "retain",
        "topic",
        "value",
    )

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int
    generation: int
    replayed: bool
    value: T  # set before user code sees the message
    _properties: PublishProperties | UndecodedProperties
    _source: Acknowledger | None
    _original: Message[T] | None
    """The one that this is a copy of, for one of several subscriptions."""
    _open: int
    """How many subscriptions are not done with it; of a copy, whether its own is not."""
    _reader: Reader | None

    def __init__(
        self,
        topic: str,
        payload: bytes,
        qos: int = 0,
        retain: bool = False,
        dup: bool = False,
        properties: PublishProperties | UndecodedProperties = NO_PROPERTIES,
        packet_id: int = 0,
        generation: int = 0,
        source: Acknowledger | None = None,
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.dup = dup
        self.packet_id = packet_id
        self.generation = generation
        self._properties = properties
        self._source = source
        self._open = 1
        self.value = self._original = self._reader = None  # type: ignore[assignment]  # value comes later

    @property
    def properties(self) -> PublishProperties:
        """The MQTT 5 properties [MQTT-3.3.2.3]; they are decoded when they are first asked for."""
        found = self._properties
        return found if isinstance(found, PublishProperties) else found.decode()

    def ack(self) -> bool:
        """Acknowledge it now, whatever ``acknowledge`` its subscription has; what would do it later does nothing then.

        Never blocks. If several subscriptions match it, this is the word of one of them, and the last one's sends
        PUBACK or PUBREC; its turn may come later, see ``DriverConfig.ack_patience``.

        True if this call did it, and always with QoS 0, where there is nothing to do. False if it was done before,
        and, counted in ``stale_acknowledgements``, if the connection that brought it is over.
        """
        return self._done()

    def refuse(self, reason_code: ReasonCode) -> bool:
        """Acknowledge it now as ``ack()`` does, with a ``reason_code`` that says why it was not taken: 0x80, 0x83,
        0x87, 0x90, 0x91, 0x97 or 0x99 [MQTT-3.4.2.1]. The broker does not send it again.

        If several subscriptions match it, the first refusal is the one that is sent. MQTT 3.1.1 has no reason codes:
        there it is acknowledged without, and the log has a warning, once per connection.

        Returns what ``ack()`` returns, but False with QoS 0, where nobody can be told. Raises ``ValueError`` for
        another code.
        """
        if reason_code not in _REFUSALS:
            allowed = ", ".join(f"0x{int(code):02x}" for code in _REFUSALS)
            raise ValueError(f"reason_code is {reason_code!r}, allowed are {allowed}")
        if not self.qos or not self._open:
            return False
        original = self._original or self
        original._code = original._code or int(reason_code)
        reader = self._reader
        taken = self._done()
        if taken and reader is not None:
            reader._note_refused()  # pyright: ignore[reportPrivateUsage]
        return taken

    @property
    def _stale(self) -> bool:
        """Whether nobody can acknowledge it any more, since the connection that it came from is over."""
        return self._source is not None and not self._source.keeps(self._original or self)

    @property
    def _owed(self) -> bool:
        """Whether it has to be acknowledged, and still can be."""
        return self.qos > 0 and self._open > 0 and self._source is not None and not self._stale

    @property
    def _holds_up(self) -> bool:
        """Whether it is not done with and was overtaken: what queues behind it will be, too."""
        return self._open > 0 and (self._original or self)._overtaken

    def _for_one_of(self) -> Message[T]:
        """A copy for one of several subscriptions, each with a value of its own."""
        copy = Message[T](
            self.topic,
            self.payload,
            self.qos,
            self.retain,
            self.dup,
            self._properties,
            self.packet_id,
            self.generation,
            self._source,
        )
        copy.replayed = self.replayed
        copy.value = self.value
        if self.qos:
            copy._original = self
        return copy

    def _done(self) -> bool:
        """One subscription is done with it; the last one acknowledges it on the connection that it came from.

        It forgets that connection, since an application may keep a message for as long as it likes. Returns what
        ``ack()`` returns.
        """
        source = self._source
        self._source = None
        if not self.qos:
            return True
        self._reader = None
        if not self._open:
            return False
        self._open = 0
        if source is None:
            return False
        original = self._original
        if original is None:
            return source.acknowledge(self)
        self._original = None
        original._open -= 1
        return source.keeps(original) if original._open else source.acknowledge(original)

    def __repr__(self) -> str:
        payload = self.payload if len(self.payload) <= 64 else self.payload[:61] + b"..."
        retained = ", retain" if self.retain else ""
        return f"<Message {self.topic!r} {payload!r} qos={self.qos}{retained}>"


class PlainQoS1Message(Message[Any]):
    """One of QoS 1 that has a topic, properties and a payload, and is else as usual.

    ``PacketReader`` makes it without ``__init__``, and the next one: that call would cost an eighth of the reading.
    """

    __slots__ = ()

    retain = dup = False


class PlainQoS0Message(Message[Any]):
    """The same of QoS 0: of what is for acknowledgements, the class has what there is to know."""

    __slots__ = ()

    retain = dup = False
    packet_id = 0
    _open = 1
    _original = _reader = None


# Without slots, and not kw_only: one is made per receipt that is waited for, and this halves what it costs.
@attrs.frozen(slots=False)
class PublishResult:
    """What became of a publish whose QoS guarantee is met."""

    reason_code: ReasonCode
    generation: int
    """The generation of the connection that carried it."""
    attempts: int
    """How many connections it was sent on; 1 unless the link was lost meanwhile."""
    latency: float
    """Seconds from the call to the acknowledgement; 0 if a live link took a message of QoS 0 at once."""
    queued: bool = False
    """The link is down, and the message is in the outbox: accepted, not acknowledged (``offline="queue"`` and
    ``"latest"`` only; with the latter, a newer one may have taken its place). Then ``reason_code`` is 0,
    ``generation`` that of the last link, and ``latency`` the time until it was accepted."""


@attrs.frozen(kw_only=True)
class ServerLimits:
    """What the broker said in CONNACK; the defaults are MQTT's own [MQTT-3.2.2.3]."""

    receive_maximum: int = 65535
    maximum_qos: int = 2
    retain_available: bool = True
    maximum_packet_size: int | None = None
    topic_alias_maximum: int = 0
    wildcard_available: bool = True
    identifiers_available: bool = True
    shared_available: bool = True
    server_keep_alive: int | None = None
    assigned_client_id: str | None = None
    server_reference: str | None = None
    reason_string: str | None = None
    response_information: str | None = None
    session_expiry: int | None = None


NO_LIMITS = ServerLimits()


@attrs.frozen(kw_only=True)
class Diagnosis:
    """What the driver knew when a publish failed."""

    state: State
    generation: int
    since_last_byte: float | None
    """Seconds since anything arrived from the broker; None without a connection."""
    queued: int
    in_flight: int
    last_error: str | None

    def __str__(self) -> str:
        heard = "no connection" if self.since_last_byte is None else f"last byte {self.since_last_byte:.1f} s ago"
        return (
            f"{self.state.value}, generation {self.generation}, {heard}, "
            f"{self.queued} queued, {self.in_flight} in flight, last error: {self.last_error or 'none'}"
        )
