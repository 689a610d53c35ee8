"""Every option of the driver, validated where it is written down, with the rule that it would break.

Times are in seconds on Trio's clock; ``math.inf`` switches a deadline off.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import attrs
import trio

from ._backoff import BackoffConfig
from ._client_id import default_base
from ._endpoints import FailoverConfig
from ._properties import check_utf8, encode_binary
from ._tls import TLSConfig
from ._topics import check_topic
from ._types import OfflinePolicy, PayloadFormat, ReasonCode, UserProperties
from ._url import from_env, parse_url
from ._validators import (
    between,
    freeze,
    instance,
    is_callable,
    number,
    offline_policy,
    one_of,
    optional_callable,
    optional_path,
    pairs,
    path,
    positive,
    seconds,
    text,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Refusals that no amount of waiting heals [MQTT-3.2.2.2].
TERMINAL_REFUSALS = frozenset(
    {
        ReasonCode.BAD_USER_NAME_OR_PASSWORD,
        ReasonCode.NOT_AUTHORIZED,
        ReasonCode.BANNED,
        ReasonCode.BAD_AUTHENTICATION_METHOD,
        ReasonCode.CLIENT_IDENTIFIER_NOT_VALID,
    }
)


@attrs.frozen(kw_only=True, cache_hash=True)
class Endpoint:
    """Where a broker listens: ``mqtt`` (TCP), ``mqtts`` (TLS over TCP) or ``unix`` (a socket path)."""

    scheme: str = attrs.field(default="mqtt", validator=one_of("mqtt", "mqtts", "unix"))
    host: str = attrs.field(default="", validator=instance(str))
    port: int = attrs.field(default=0, validator=between(0, 65535))
    path: str = attrs.field(default="", validator=instance(str))

    def __attrs_post_init__(self) -> None:
        if self.scheme == "unix":
            if not self.path or self.host or self.port:
                raise ValueError("endpoint: scheme 'unix' takes a path, and neither host nor port")
        elif not self.host or not self.port or self.path:
            raise ValueError(f"endpoint: scheme {self.scheme!r} takes a host and a port (1 to 65535), and no path")

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def _as_endpoints(values: Iterable[Endpoint | str]) -> tuple[Endpoint, ...]:
    if isinstance(values, str):
        raise TypeError("fallbacks must hold endpoints or URLs, not be one")
    if not isinstance(values, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"fallbacks must hold endpoints or URLs, not be {type(values).__name__}")
    return tuple(_as_endpoint(value) if isinstance(value, str) else value for value in values)


def _as_endpoint(url: str) -> Endpoint:
    parsed: dict[str, Any] = dict(parse_url(url, "fallbacks"))
    place = {key: parsed.pop(key) for key in ("scheme", "host", "port", "path") if key in parsed}
    if parsed:
        raise ValueError(f"fallbacks: {', '.join(sorted(parsed))} in a URL, which may say where only")
    return Endpoint(**place)


def _endpoints(instance: object, attribute: attrs.Attribute[Any], values: tuple[object, ...]) -> None:
    for value in values:
        if not isinstance(value, Endpoint):
            raise TypeError(f"{attribute.name} must hold endpoints or URLs, not {type(value).__name__}")


def _will_topic(instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
    check_topic(value, f"will.{attribute.name}")


def _will_payload(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bytes):
        raise TypeError(f"will.payload must be bytes or str, not {type(value).__name__}")
    if len(value) > 65535:
        raise ValueError(f"will.payload has {len(value)} bytes, allowed are 0 to 65535 [MQTT-3.1.3.3]")


def _availability_payload(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bytes):
        raise TypeError(f"availability.{attribute.name} must be bytes or str, not {type(value).__name__}")
    if not 1 <= len(value) <= 65535:
        raise ValueError(f"availability.{attribute.name} has {len(value)} bytes, allowed are 1 to 65535")


def _password(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str | bytes):
        raise TypeError(f"password must be str or bytes, not {type(value).__name__}")
    raw = value.encode(errors="replace") if isinstance(value, str) else value  # UnicodeEncodeError would quote it
    if isinstance(value, str) and raw is not None and raw.decode() != value:
        raise ValueError("password cannot be encoded as UTF-8")
    if raw is not None and len(raw) > 65535:
        raise ValueError(f"password has {len(raw)} bytes, allowed are 0 to 65535 [MQTT-3.1.3.6]")


def _correlation_data(instance: object, attribute: attrs.Attribute[Any], value: bytes | None) -> None:
    if value is not None:
        encode_binary(value, f"will.{attribute.name}")


def _frozenset(codes: Iterable[ReasonCode]) -> frozenset[ReasonCode]:
    return frozenset(codes) if isinstance(codes, Iterable) else codes


def _reason_codes(instance: object, attribute: attrs.Attribute[Any], value: frozenset[ReasonCode]) -> None:
    if not isinstance(value, frozenset) or not all(isinstance(code, ReasonCode) for code in value):
        raise TypeError(f"{attribute.name} must hold members of ReasonCode, not {value!r:.100}")


def _payload_bytes(payload: bytes | str) -> bytes:
    return payload.encode() if isinstance(payload, str) else payload


@attrs.frozen(kw_only=True)
class Will:
    """The message that the broker publishes when this client is lost without a DISCONNECT [MQTT-3.1.2.5].

    ``delay`` (seconds) and the properties exist in MQTT 5 only.
    """

    topic: str = attrs.field(validator=_will_topic)
    payload: bytes = attrs.field(default=b"", converter=_payload_bytes, validator=_will_payload)
    qos: int = attrs.field(default=0, validator=one_of(0, 1, 2))
    retain: bool = attrs.field(default=False, validator=instance(bool))
    delay: int = attrs.field(default=0, validator=between(0, 0xFFFFFFFF))
    payload_format: PayloadFormat | None = attrs.field(default=None, validator=one_of(None, 0, 1))
    message_expiry: int | None = attrs.field(default=None, validator=attrs.validators.optional(between(0, 0xFFFFFFFF)))
    content_type: str | None = attrs.field(default=None, validator=text)
    response_topic: str | None = attrs.field(default=None, validator=attrs.validators.optional(_will_topic))
    correlation_data: bytes | None = attrs.field(default=None, validator=_correlation_data)
    user_properties: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=freeze, validator=pairs)

    def __attrs_post_init__(self) -> None:
        if self.payload_format == PayloadFormat.UTF8:
            check_utf8(self.payload)


def _availability_topic(instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
    check_topic(value, f"availability.{attribute.name}")


@attrs.frozen(kw_only=True)
class Availability:
    """Tells others on a topic whether this client is there.

    ``online`` is published after each connect, when the subscriptions are there and before anything else. ``offline``
    is the last will, and published whenever the driver gives a link up on purpose: when it is left, also by
    cancellation, paused, or reconnects. If that is not acknowledged within ``disconnect_timeout``, the will says it.
    The driver subscribes to the topic, and says ``online`` again, at most once a second, if the will of a dead
    connection comes late. A subscription of yours to the same topic may have another ``qos`` and no other options.

    ``delay`` (seconds, MQTT 5) holds the will back: with ``stable_id`` it does not come at all if the driver is back
    by then [MQTT-3.1.3.2.2].
    """

    topic: str = attrs.field(validator=_availability_topic)
    online: bytes = attrs.field(default=b"online", converter=_payload_bytes, validator=_availability_payload)
    offline: bytes = attrs.field(default=b"offline", converter=_payload_bytes, validator=_availability_payload)
    qos: int = attrs.field(default=1, validator=one_of(0, 1))
    retain: bool = attrs.field(default=True, validator=instance(bool))
    delay: int = attrs.field(default=0, validator=between(0, 0xFFFFFFFF))

    def __attrs_post_init__(self) -> None:
        if self.online == self.offline:
            raise ValueError(f"availability.online and offline are both {self.online!r:.100}; they must differ")


class Authenticator(Protocol):
    """Enhanced authentication [MQTT-4.12], made anew for each connection by ``DriverConfig.authenticator``.

    The methods may do I/O; ``connect_timeout`` bounds the whole exchange. An exception in one is a failed attempt.
    """

    @property
    def method(self) -> str:
        """The Authentication Method, e.g. ``"SCRAM-SHA-256"``."""
        ...

    async def start(self) -> bytes | None:
        """The Authentication Data of CONNECT."""
        ...

    async def answer(self, challenge: bytes | None) -> bytes | None:
        """The data that answers an AUTH packet of the broker."""
        ...

    async def finish(self, data: bytes | None) -> None:
        """Check the data of the CONNACK; raise if the broker did not prove itself."""
        ...


@attrs.frozen(kw_only=True)
class Attempt:
    """What ``options_factory`` and rebuild callbacks are told of the attempt that begins."""

    config: DriverConfig
    number: int
    """1 for the first attempt since the link was last up."""
    generation: int
    """The generation that this attempt becomes if it succeeds."""
    last_error: str | None


OptionsFactory = Callable[[Attempt], Awaitable["DriverConfig"]]
StreamOpener = Callable[[Endpoint], Awaitable[trio.abc.Stream]]


class DriverArguments(TypedDict, total=False):
    """The options that ``MQTTDriver(url, ...)`` and the methods of `DriverConfig` take as keywords: its fields."""

    endpoint: Endpoint
    fallbacks: Iterable[Endpoint | str]
    failover: FailoverConfig
    client_id: str
    client_id_factory: Callable[[str, int, float], str] | None
    stable_id: bool
    session_expiry: int
    protocol: Literal["auto", "5", "3.1.1"]
    username: str | None
    password: str | bytes | None
    authenticator: Callable[[], Authenticator] | None
    tls: TLSConfig | None
    will: Will | None
    availability: Availability | None
    options_factory: OptionsFactory | None
    factory_timeout: float
    open_stream: StreamOpener | None
    keep_alive: int
    ping_timeout: float
    connect_timeout: float
    probe: Literal["publish", "echo", "ping"]
    probe_topic: str
    probe_timeout: float
    ack_timeout: float
    subscribe_timeout: float
    publish_timeout: float
    disconnect_timeout: float
    drain_timeout: float
    backoff: BackoffConfig
    retry_refusals: Iterable[ReasonCode]
    receive_maximum: int
    receive_bytes: int
    ack_patience: float
    maximum_packet_size: int
    topic_alias_maximum: int
    topic_aliases: int
    request_response_information: bool
    request_problem_information: bool
    connect_user_properties: UserProperties
    in_flight: int
    offline: OfflinePolicy | Literal["wait", "queue", "latest", "fail"]
    outbox_messages: int
    outbox_bytes: int
    outbox_full: Literal["wait", "fail", "drop_oldest"]
    outbox_path: str | os.PathLike[str] | None
    refill_rate: float
    quarantine_after: int
    write_buffer: int
    read_delay: float
    queue_messages: int
    queue_bytes: int
    replay_batch: int
    subscription_identifiers: bool
    on_handler_error: Literal["log", "raise"]
    history_events: int
    wall_clock: Callable[[], float]


@attrs.frozen(kw_only=True)
class DriverConfig:
    """All options of an ``MQTTDriver``. Immutable; ``evolve()`` makes a changed copy."""

    endpoint: Endpoint = attrs.field(validator=instance(Endpoint))
    fallbacks: tuple[Endpoint, ...] = attrs.field(default=(), converter=_as_endpoints, validator=_endpoints)
    """Where else to go, in order of preference, when ``endpoint`` cannot be had; endpoints, or URLs without options.
    Everything else, credentials and TLS too, is the same there unless an ``options_factory`` says otherwise."""
    failover: FailoverConfig = attrs.field(factory=FailoverConfig, validator=instance(FailoverConfig))
    client_id: str = attrs.field(factory=lambda: default_base(random.Random()), validator=[instance(str), text])
    """Base of the client ID; each connection gets ``{base}_{ms}``, later ones ``{base}_reconnect_{ms}``."""
    client_id_factory: Callable[[str, int, float], str] | None = attrs.field(default=None, validator=optional_callable)
    """``(base, generation, wall-clock seconds) -> client ID``, for brokers with rules of their own."""
    stable_id: bool = attrs.field(default=False, validator=instance(bool))
    """Use ``client_id`` itself for all connections, with a session that the broker keeps in between, instead of a
    fresh ID and a clean session for each; see ``docs/howto/stable-id.md``."""
    session_expiry: int = attrs.field(default=3600, validator=between(1, 0xFFFFFFFF))
    """Seconds for which the broker keeps that session without a connection; 4294967295 is for ever. 3.1.1 brokers
    have a limit of their own [MQTT-3.1.2.11.2]."""
    protocol: Literal["auto", "5", "3.1.1"] = attrs.field(default="auto", validator=one_of("auto", "5", "3.1.1"))
    """``auto`` tries MQTT 5 first and remembers a downgrade to 3.1.1."""
    username: str | None = attrs.field(default=None, validator=text)
    password: str | bytes | None = attrs.field(default=None, repr=False, validator=_password)
    authenticator: Callable[[], Authenticator] | None = attrs.field(
        default=None, validator=optional_callable, repr=False
    )
    tls: TLSConfig | None = None
    """For ``mqtts``; None trusts the system's certificate authorities."""
    will: Will | None = None
    availability: Availability | None = None
    """Instead of ``will``: birth, will and farewell on one topic."""
    options_factory: OptionsFactory | None = attrs.field(default=None, validator=optional_callable)
    """Called before each attempt; returns the options of that connection (endpoint, credentials, TLS, will, …).

    It must return them and not apply them: ``apply_settings()`` in it begins another attempt each time, at once."""
    factory_timeout: float = attrs.field(default=10.0, validator=seconds)
    open_stream: StreamOpener | None = attrs.field(default=None, validator=optional_callable)
    """Replaces how the byte stream is opened: for transports that this package does not know, and for tests."""

    keep_alive: int = attrs.field(default=30, validator=between(0, 65535))
    """Seconds without traffic in either direction; PINGREQ is sent one second, at most a quarter of the time, before
    they are over. 0 switches it off [MQTT-3.1.2.10]."""
    ping_timeout: float = attrs.field(default=10.0, validator=seconds)
    connect_timeout: float = attrs.field(default=10.0, validator=seconds)
    """For opening the stream, TLS and CONNECT/CONNACK together."""
    probe: Literal["publish", "echo", "ping"] = attrs.field(
        default="publish", validator=one_of("publish", "echo", "ping")
    )
    """How a connection is tested: a QoS 1 publish, that and its echo, or (where the ACL allows neither) PINGREQ."""
    probe_topic: str = attrs.field(default="trio_mqtt_driver/probe/{client_id}", validator=instance(str))
    """May hold ``{client_id}`` and ``{base}``; characters that a topic cannot hold become ``_`` in them."""
    probe_timeout: float = attrs.field(default=5.0, validator=seconds)
    ack_timeout: float = attrs.field(default=5.0, validator=seconds)
    """A PUBLISH on the wire that is not acknowledged in this time makes the driver reconnect."""
    subscribe_timeout: float = attrs.field(default=10.0, validator=seconds)
    """The same for SUBSCRIBE and UNSUBSCRIBE."""
    publish_timeout: float = attrs.field(default=math.inf, validator=seconds)
    """How long ``publish()`` waits in all, outages included, before it gives the message up."""
    disconnect_timeout: float = attrs.field(default=2.0, validator=seconds)
    drain_timeout: float = attrs.field(default=5.0, validator=seconds)
    """How long leaving a live link waits for handlers and acknowledgements, and how long ``drain()`` does."""
    backoff: BackoffConfig = attrs.field(factory=BackoffConfig, validator=instance(BackoffConfig))
    retry_refusals: frozenset[ReasonCode] = attrs.field(
        default=frozenset[ReasonCode](), converter=_frozenset, validator=_reason_codes
    )
    """Refusals that are terminal by default and shall be retried all the same."""

    receive_maximum: int = attrs.field(default=1000, validator=between(1, 65535))
    """How many unacknowledged QoS 1 and 2 messages this client takes at a time."""
    receive_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=between(1024, 2**40))
    """Bytes of payload of unacknowledged QoS 1 and 2 messages above which reading pauses."""
    ack_patience: float = attrs.field(default=0.5, validator=seconds)
    """Acknowledgements go out in the order of arrival [MQTT-4.6.0-2]. One that is due waits so long for those before
    it, whose handlers have not finished; then these lose their place. ``math.inf`` keeps to the order for ever."""
    maximum_packet_size: int = attrs.field(default=64 * 1024 * 1024, validator=between(1024, 268_435_455))
    topic_alias_maximum: int = attrs.field(default=32, validator=between(0, 65535))
    """How many topic aliases the broker may use."""
    topic_aliases: int = attrs.field(default=0, validator=between(0, 65535))
    """How many topic aliases this client uses, at most the broker's Topic Alias Maximum; MQTT 5 only."""
    request_response_information: bool = attrs.field(default=False, validator=instance(bool))
    request_problem_information: bool = attrs.field(default=True, validator=instance(bool))
    connect_user_properties: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=freeze, validator=pairs)
    in_flight: int = attrs.field(default=100, validator=between(1, 32767))
    """How many QoS 1 and 2 publishes may be unacknowledged; the broker's Receive Maximum (20 for 3.1.1) caps it."""

    offline: OfflinePolicy = attrs.field(default=OfflinePolicy.WAIT, converter=offline_policy)
    """What becomes of a publish while the link is down, unless the call says otherwise."""
    outbox_messages: int = attrs.field(default=10_000, validator=between(1, 10_000_000))
    outbox_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=between(1024, 2**40))
    outbox_full: Literal["wait", "fail", "drop_oldest"] = attrs.field(
        default="wait", validator=one_of("wait", "fail", "drop_oldest")
    )
    """What ``publish()`` does when the outbox is full: wait for room, raise ``OutboxFullError``, or drop what waits
    longest, of a priority that is not higher. ``publish_nowait()`` cannot wait, and raises."""
    outbox_path: str | None = attrs.field(default=None, converter=path, validator=optional_path)
    """A file that keeps what is accepted over a crash; see ``docs/howto/outbox.md``. It belongs to one driver."""
    refill_rate: float = attrs.field(default=math.inf, validator=positive)
    """How many messages per second go out of what has waited for the link; ``math.inf`` leaves it to the window."""
    quarantine_after: int = attrs.field(default=10, validator=between(0, 1000))
    """A message that was next to be acknowledged on so many connections in a row when the broker ended them is given
    up with ``QuarantinedError``: else one that a broker cannot stand would keep the driver from ever delivering
    another. 0 switches that off, and what is done about a Topic Filter over which a broker ends connections; see
    ``docs/delivery.md``."""
    write_buffer: int = attrs.field(default=1024 * 1024, validator=between(1024, 2**32))
    """Bytes waiting for the socket above which ``publish()`` waits."""
    read_delay: float = attrs.field(default=0.001, validator=number(0, maximum=0.02))
    """Seconds that a read waits, so that it brings more, on a link without TLS that takes thousands of reads a second:
    a fraction of the CPU time for so much latency. Not if less comes then. 0: never. See ``docs/backpressure.md``."""
    queue_messages: int = attrs.field(default=10_000, validator=between(1, 10_000_000))
    """Bound of each subscription's queue, unless the subscription names its own."""
    queue_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=between(1024, 2**40))
    """The same in bytes of payload. One message is let in whatever its size."""
    replay_batch: int = attrs.field(default=500, validator=between(1, 10_000))
    """Topic filters per SUBSCRIBE packet, at most; fewer for a broker that ended connections over so many: AWS IoT
    Core takes 8, and does not say so."""
    subscription_identifiers: bool = attrs.field(default=True, validator=instance(bool))
    """Let MQTT 5 brokers tell which subscription a message is for, so that overlapping ones never get it twice."""
    on_handler_error: Literal["log", "raise"] = attrs.field(default="log", validator=one_of("log", "raise"))
    """``raise`` ends the driver with the handler's exception."""
    history_events: int = attrs.field(default=200, validator=between(1, 1_000_000))
    wall_clock: Callable[[], float] = attrs.field(default=time.time, validator=is_callable, repr=False)
    """Seconds since the epoch, for client IDs and the history."""

    def __attrs_post_init__(self) -> None:
        if self.stable_id and self.client_id_factory is not None:
            raise ValueError("stable_id is True, so there is one client ID, but client_id_factory makes others")
        if self.password is not None and self.username is None:
            raise ValueError("password needs a username [MQTT-3.1.2-22]")
        if not self.client_id:
            raise ValueError("client_id is empty; leave it out for the default, or give a base of 1 to 65000 bytes")
        if len(self.client_id.encode()) > 65000:
            raise ValueError(f"client_id has {len(self.client_id.encode())} bytes, allowed are 1 to 65000")
        for field, kind in (("tls", TLSConfig), ("will", Will), ("availability", Availability)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{field} must be {kind.__name__} or None, not {type(value).__name__}")
        if self.tls is not None and all(one.scheme != "mqtts" for one in (self.endpoint, *self.fallbacks)):
            raise ValueError(f"tls is set but the endpoint is {self.endpoint}: use mqtts://")
        if self.will is not None and self.availability is not None:
            raise ValueError("will and availability are both set; availability brings a will of its own")
        if self.authenticator is not None and self.protocol == "3.1.1":
            raise ValueError("authenticator needs MQTT 5, but protocol is '3.1.1'")
        if self.probe != "ping":
            check_topic(self.probe_topic_for(self.client_id), "probe_topic")

    @classmethod
    def from_url(cls, url: str, **options: Unpack[DriverArguments]) -> DriverConfig:
        """``mqtt://``, ``mqtts://`` or ``unix://`` with optional user info; see ``docs/howto``. ``options`` win."""
        return cls._from_parsed(parse_url(url), options)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, prefix: str = "MQTT_", **options: Unpack[DriverArguments]
    ) -> DriverConfig:
        """From ``MQTT_URL``, ``MQTT_USERNAME``, ``MQTT_PASSWORD`` or ``MQTT_PASSWORD_FILE``, … ``options`` win."""
        return cls._from_parsed(from_env(os.environ if environ is None else environ, prefix), options)

    @classmethod
    def _from_parsed(cls, parsed: Mapping[str, Any], options: Mapping[str, object]) -> DriverConfig:
        values: dict[str, Any] = dict(parsed)
        place = {key: values.pop(key) for key in ("scheme", "host", "port", "path") if key in values}
        files = {key: values.pop(key) for key in ("ca_file", "cert_file", "key_file") if key in values}
        if files:
            values["tls"] = TLSConfig(**files)
        values["endpoint"] = Endpoint(**place)
        values.update(options)
        return cls(**values)

    def evolve(self, **changes: Unpack[DriverArguments]) -> DriverConfig:
        """A copy with ``changes``, validated again."""
        return attrs.evolve(self, **changes)

    @property
    def last_will(self) -> Will | None:
        """``will``, or that of ``availability``."""
        told = self.availability
        if told is None:
            return self.will
        return Will(topic=told.topic, payload=told.offline, qos=told.qos, retain=told.retain, delay=told.delay)

    def probe_topic_for(self, client_id: str) -> str:
        """The probe topic of the connection with this client ID."""

        def safe(text: str) -> str:
            return re.sub(r"[+#/\x00]", "_", text)

        return self.probe_topic.replace("{client_id}", safe(client_id)).replace("{base}", safe(self.client_id))
