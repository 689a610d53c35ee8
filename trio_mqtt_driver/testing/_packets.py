"""The MQTT control packets as values; what the fields mean is what the specification says."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import attrs

from ._properties import Kind, Properties

NO_PROPERTIES: Properties = {}


@attrs.frozen(kw_only=True)
class Will:
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Connect:
    kind: ClassVar[Kind] = Kind.CONNECT
    client_id: str
    version: int = 5
    clean_start: bool = True
    keep_alive: int = 0
    will: Will | None = None
    username: str | None = None
    password: bytes | None = attrs.field(default=None, repr=False)
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Connack:
    kind: ClassVar[Kind] = Kind.CONNACK
    session_present: bool = False
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Publish:
    kind: ClassVar[Kind] = Kind.PUBLISH
    topic: str
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Ack:
    """PUBACK, PUBREC, PUBREL or PUBCOMP."""

    kind: Kind
    packet_id: int
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class SubscriptionRequest:
    """One Topic Filter of a SUBSCRIBE with its Subscription Options [MQTT-3.8.3.1]."""

    topic_filter: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@attrs.frozen(kw_only=True)
class Subscribe:
    kind: ClassVar[Kind] = Kind.SUBSCRIBE
    packet_id: int
    requests: tuple[SubscriptionRequest, ...]
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Suback:
    kind: ClassVar[Kind] = Kind.SUBACK
    packet_id: int
    reason_codes: tuple[int, ...]
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Unsubscribe:
    kind: ClassVar[Kind] = Kind.UNSUBSCRIBE
    packet_id: int
    topic_filters: tuple[str, ...]
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Unsuback:
    """``reason_codes`` is empty with 3.1.1, which has none."""

    kind: ClassVar[Kind] = Kind.UNSUBACK
    packet_id: int
    reason_codes: tuple[int, ...] = ()
    properties: Properties = NO_PROPERTIES


@attrs.frozen
class Pingreq:
    kind: ClassVar[Kind] = Kind.PINGREQ


@attrs.frozen
class Pingresp:
    kind: ClassVar[Kind] = Kind.PINGRESP


@attrs.frozen(kw_only=True)
class Disconnect:
    kind: ClassVar[Kind] = Kind.DISCONNECT
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


@attrs.frozen(kw_only=True)
class Auth:
    kind: ClassVar[Kind] = Kind.AUTH
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


Packet: TypeAlias = (
    Connect
    | Connack
    | Publish
    | Ack
    | Subscribe
    | Suback
    | Unsubscribe
    | Unsuback
    | Pingreq
    | Pingresp
    | Disconnect
    | Auth
)
