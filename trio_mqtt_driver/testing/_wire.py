"""MQTT 3.1.1 and 5 on the wire, both directions, written from the specification alone.

It shares no line with the driver's codec or with paho, so that a mistake in either shows up as a disagreement.
Packets are attrs values with a ``kind``; :class:`Decoder` is strict and raises :class:`WireError`; :func:`encode`
writes what it is told, legal or not, so that a test can send nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator

from ._filters import check_filter, check_topic
from ._packets import (
    NO_PROPERTIES,
    Ack,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Publish,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
    Will,
)
from ._properties import (
    MAXIMUM_VARIABLE_BYTE_INTEGER,
    PROTOCOL_ERROR,
    WILL,
    Cursor,
    Kind,
    Properties,
    WireError,
    decode_properties,
    decode_string,
    encode_binary,
    encode_properties,
    encode_string,
    encode_variable,
)

UNSUPPORTED_PROTOCOL_VERSION = 0x84
CLIENT_IDENTIFIER_NOT_VALID = 0x85
PACKET_TOO_LARGE = 0x95

_PUBLISH_REASONS = frozenset((0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99))
_RELEASE_REASONS = frozenset((0x00, 0x92))
_ALLOWED_REASONS: dict[Kind, frozenset[int]] = {
    Kind.PUBACK: _PUBLISH_REASONS,
    Kind.PUBREC: _PUBLISH_REASONS,
    Kind.PUBREL: _RELEASE_REASONS,
    Kind.PUBCOMP: _RELEASE_REASONS,
    Kind.SUBACK: frozenset((0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)),
    Kind.UNSUBACK: frozenset((0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91)),
    Kind.AUTH: frozenset((0x00, 0x18, 0x19)),
}
_CLIENT_DISCONNECTS = frozenset((0, 4, 0x80, 0x81, 0x82, 0x83, 0x90, *range(0x93, 0x9A)))
_SERVER_DISCONNECTS = frozenset((0, *range(0x80, 0x84), 0x87, 0x89, 0x8B, *range(0x8D, 0x91), *range(0x93, 0xA3)))

_TO_SERVER = frozenset(
    (
        Kind.CONNECT,
        Kind.PUBLISH,
        Kind.PUBACK,
        Kind.PUBREC,
        Kind.PUBREL,
        Kind.PUBCOMP,
        Kind.SUBSCRIBE,
        Kind.UNSUBSCRIBE,
        Kind.PINGREQ,
        Kind.DISCONNECT,
        Kind.AUTH,
    )
)
_TO_CLIENT = frozenset(Kind) - {Kind.CONNECT, Kind.SUBSCRIBE, Kind.UNSUBSCRIBE, Kind.PINGREQ}
_FLAGS_0010 = (Kind.PUBREL, Kind.SUBSCRIBE, Kind.UNSUBSCRIBE)
_ACKS = (Kind.PUBACK, Kind.PUBREC, Kind.PUBREL, Kind.PUBCOMP)
_KINDS: dict[int, Kind] = {int(kind): kind for kind in Kind}


# ---- encoding -------------------------------------------------------------------------------------------------------


def encode(packet: Packet, version: int) -> bytes:
    """The bytes of ``packet`` for protocol version 4 (3.1.1) or 5. Properties are left out with version 4."""
    if isinstance(packet, Publish):
        flags = packet.dup << 3 | packet.qos << 1 | packet.retain
        body = encode_string(packet.topic)
        if packet.qos:
            body += packet.packet_id.to_bytes(2, "big")
        if version == 5:
            body += encode_properties(packet.properties)
        body += packet.payload
        return bytes((Kind.PUBLISH << 4 | flags,)) + encode_variable(len(body)) + body
    body = _body(packet, version)
    flags = 0b0010 if packet.kind in _FLAGS_0010 else 0
    return bytes((packet.kind << 4 | flags,)) + encode_variable(len(body)) + body


def _body(packet: Packet, version: int) -> bytes:
    if isinstance(packet, Ack):
        body = packet.packet_id.to_bytes(2, "big")
        return body if version == 4 else body + _reasoned(packet.reason_code, packet.properties)
    if isinstance(packet, (Pingreq, Pingresp)):
        return b""
    if isinstance(packet, (Disconnect, Auth)):
        return b"" if version == 4 else _reasoned(packet.reason_code, packet.properties)
    if isinstance(packet, Connect):
        return _connect_body(packet)
    properties = encode_properties(packet.properties) if version == 5 else b""
    if isinstance(packet, Connack):
        return bytes((packet.session_present, packet.reason_code)) + properties
    assert not isinstance(packet, Publish)
    body = packet.packet_id.to_bytes(2, "big") + properties
    if isinstance(packet, Suback):
        return body + bytes(packet.reason_codes)
    if isinstance(packet, Unsuback):
        return body + bytes(packet.reason_codes) if version == 5 else body
    if isinstance(packet, Subscribe):
        return body + b"".join(_request_bytes(request) for request in packet.requests)
    return body + b"".join(encode_string(topic_filter) for topic_filter in packet.topic_filters)


def _reasoned(reason_code: int, properties: Properties) -> bytes:
    if properties:
        return bytes((reason_code,)) + encode_properties(properties)
    return bytes((reason_code,)) if reason_code else b""


def _request_bytes(request: SubscriptionRequest) -> bytes:
    options = request.qos | request.no_local << 2 | request.retain_as_published << 3 | request.retain_handling << 4
    return encode_string(request.topic_filter) + bytes((options,))


def _connect_body(packet: Connect) -> bytes:
    will = packet.will
    flags = packet.clean_start << 1 | (packet.username is not None) << 7 | (packet.password is not None) << 6
    if will is not None:
        flags |= 0b100 | will.qos << 3 | will.retain << 5
    body = encode_string("MQTT") + bytes((packet.version, flags)) + packet.keep_alive.to_bytes(2, "big")
    if packet.version == 5:
        body += encode_properties(packet.properties)
    body += encode_string(packet.client_id)
    if will is not None:
        if packet.version == 5:
            body += encode_properties(will.properties)
        body += encode_string(will.topic) + encode_binary(will.payload)
    if packet.username is not None:
        body += encode_string(packet.username)
    if packet.password is not None:
        body += encode_binary(packet.password)
    return body


# ---- decoding -------------------------------------------------------------------------------------------------------


class Decoder:
    """Cuts a byte stream into packets.

    A server's decoder (``server=True``) takes what clients send and learns the version from CONNECT, which must come
    first; a client's decoder takes what servers send in ``version``. A packet of more than ``maximum_packet_size``
    bytes is refused as soon as its length is known.
    """

    def __init__(
        self, *, server: bool, version: int = 0, maximum_packet_size: int = MAXIMUM_VARIABLE_BYTE_INTEGER + 5
    ) -> None:
        if not server and version not in (4, 5):
            raise ValueError(f"version must be 4 or 5 for a client's decoder, not {version}")
        self.version: int = version
        self.maximum_packet_size = maximum_packet_size
        self._server = server
        self._buffer = bytearray()

    def packets(self, data: bytes) -> Iterator[Packet]:
        """Every packet that ``data`` completes. After a :class:`WireError` the decoder is of no further use."""
        buffer = self._buffer
        buffer += data
        position = 0
        try:
            while True:
                if position == len(buffer):
                    return
                # Before the rest is there: a peer that sent nonsense may wait for an answer and send no more.
                kind = self._kind(buffer[position] >> 4)
                bounds = self._bounds(position)
                if bounds is None:
                    return
                start, end = bounds
                flags, body = buffer[position] & 0x0F, bytes(buffer[start:end])
                position = end
                yield self._decode(kind, flags, body)
        finally:
            del buffer[:position]

    def _bounds(self, position: int) -> tuple[int, int] | None:
        """Where the body of the packet at ``position`` starts and ends; None if it is not all there."""
        buffer = self._buffer
        length = 0
        for index in range(1, 5):
            if position + index >= len(buffer):
                return None
            byte = buffer[position + index]
            length |= (byte & 0x7F) << 7 * (index - 1)
            if byte < 0x80:
                if byte == 0 and index > 1:
                    raise WireError("the Remaining Length is not in its shortest form")
                start = position + index + 1
                if start - position + length > self.maximum_packet_size:
                    raise WireError(
                        f"a packet of {start - position + length} bytes; the maximum is {self.maximum_packet_size}",
                        PACKET_TOO_LARGE,
                    )
                return (start, start + length) if start + length <= len(buffer) else None
        raise WireError("the Remaining Length is longer than 4 bytes")

    def _kind(self, number: int) -> Kind:
        kind = _KINDS.get(number)
        if kind is None:
            raise WireError("packet type 0 is reserved")
        if kind not in (_TO_SERVER if self._server else _TO_CLIENT):
            raise WireError(f"{kind.name} comes from the wrong side", PROTOCOL_ERROR)
        if (kind is Kind.CONNECT) != (self.version == 0):
            raise WireError("CONNECT must come first and only once", PROTOCOL_ERROR)
        if self.version == 4 and (kind is Kind.AUTH or (kind is Kind.DISCONNECT and not self._server)):
            raise WireError(f"{kind.name} does not exist in 3.1.1 in this direction", PROTOCOL_ERROR)
        return kind

    def _decode(self, kind: Kind, flags: int, body: bytes) -> Packet:
        if kind is Kind.PUBLISH:
            return _decode_publish(flags, body, self.version, self._server)
        if flags != (0b0010 if kind in _FLAGS_0010 else 0):
            raise WireError(f"{kind.name} with flags 0b{flags:04b}")
        cursor = Cursor(body)
        packet: Packet
        if kind in _ACKS:
            packet_id = _packet_id(cursor)
            reason_code, properties = _decode_reason(cursor, kind, self.version, self._server)
            packet = Ack(kind=kind, packet_id=packet_id, reason_code=reason_code, properties=properties)
        elif kind is Kind.PINGREQ:
            packet = Pingreq()
        elif kind is Kind.PINGRESP:
            packet = Pingresp()
        elif kind is Kind.CONNECT:
            packet = _decode_connect(cursor)
            self.version = packet.version
        elif kind is Kind.CONNACK:
            packet = self._decode_connack(cursor)
        elif kind is Kind.DISCONNECT:
            reason_code, properties = _decode_reason(cursor, kind, self.version, self._server)
            packet = Disconnect(reason_code=reason_code, properties=properties)
        elif kind is Kind.AUTH:
            reason_code, properties = _decode_reason(cursor, kind, self.version, self._server)
            if "authentication_method" not in properties:
                raise WireError("AUTH without an Authentication Method", PROTOCOL_ERROR)
            packet = Auth(reason_code=reason_code, properties=properties)
        else:
            packet = self._decode_subscription(cursor, kind)
        cursor.finish()
        return packet

    def _decode_connack(self, cursor: Cursor) -> Connack:
        flags, code = cursor.u8(), cursor.u8()
        if flags > 1:
            raise WireError(f"CONNACK with flags 0b{flags:b}")
        if flags and code:
            raise WireError("a refusing CONNACK says Session Present", PROTOCOL_ERROR)
        properties = decode_properties(cursor, Kind.CONNACK) if self.version == 5 else NO_PROPERTIES
        return Connack(session_present=bool(flags), reason_code=code, properties=properties)

    def _decode_subscription(self, cursor: Cursor, kind: Kind) -> Packet:
        packet_id = _packet_id(cursor)
        properties = decode_properties(cursor, kind) if self.version == 5 else NO_PROPERTIES
        if kind is Kind.SUBACK:
            codes = tuple(cursor.rest())
            legal = _ALLOWED_REASONS[kind] if self.version == 5 else (0, 1, 2, 0x80)
            if not codes or not all(code in legal for code in codes):
                raise WireError(f"SUBACK with reason codes {codes}", PROTOCOL_ERROR)
            return Suback(packet_id=packet_id, reason_codes=codes, properties=properties)
        if kind is Kind.UNSUBACK:
            codes = tuple(cursor.rest()) if self.version == 5 else ()
            if not all(code in _ALLOWED_REASONS[kind] for code in codes):
                raise WireError(f"UNSUBACK with reason codes {codes}", PROTOCOL_ERROR)
            return Unsuback(packet_id=packet_id, reason_codes=codes, properties=properties)
        if not cursor.left:
            raise WireError(f"{kind.name} without a Topic Filter", PROTOCOL_ERROR)
        if kind is Kind.UNSUBSCRIBE:
            filters: list[str] = []
            while cursor.left:
                filters.append(check_filter(cursor.string()))
            return Unsubscribe(packet_id=packet_id, topic_filters=tuple(filters), properties=properties)
        requests: list[SubscriptionRequest] = []
        while cursor.left:
            requests.append(_decode_request(cursor, self.version))
        return Subscribe(packet_id=packet_id, requests=tuple(requests), properties=properties)


def _packet_id(cursor: Cursor) -> int:
    packet_id = cursor.u16()
    if not packet_id:
        raise WireError("Packet Identifier 0", PROTOCOL_ERROR)
    return packet_id


def _decode_publish(flags: int, body: bytes, version: int, server: bool) -> Publish:
    qos = flags >> 1 & 3
    if qos == 3:
        raise WireError("PUBLISH with QoS 3")
    if flags & 8 and not qos:
        raise WireError("PUBLISH with DUP and QoS 0")
    size = len(body)
    if size < 2:
        raise WireError("PUBLISH is too short for a topic")
    position = 2 + int.from_bytes(body[:2], "big")
    if position > size:
        raise WireError("PUBLISH is too short for its topic")
    topic = decode_string(body[2:position])
    packet_id = 0
    if qos:
        packet_id = int.from_bytes(body[position : position + 2], "big")
        position += 2
        if position > size:
            raise WireError("PUBLISH is too short for its Packet Identifier")
        if not packet_id:
            raise WireError("Packet Identifier 0", PROTOCOL_ERROR)
    properties = NO_PROPERTIES
    if version == 5:
        cursor = Cursor(body)
        cursor.position = position
        properties = decode_properties(cursor, Kind.PUBLISH)
        position = cursor.position
        if server and "subscription_identifiers" in properties:
            raise WireError("a client's PUBLISH has a Subscription Identifier", PROTOCOL_ERROR)
    if topic:
        check_topic(topic)
    elif "topic_alias" not in properties:
        raise WireError("PUBLISH with neither a topic nor a Topic Alias", PROTOCOL_ERROR)
    return Publish(
        topic=topic,
        payload=body[position:],
        qos=qos,
        retain=bool(flags & 1),
        dup=bool(flags & 8),
        packet_id=packet_id,
        properties=properties,
    )


def _decode_reason(cursor: Cursor, kind: Kind, version: int, server: bool) -> tuple[int, Properties]:
    """The reason code and properties that end most packets of version 5, and may be left out."""
    if version == 4 or not cursor.left:
        return 0, NO_PROPERTIES
    code = cursor.u8()
    if kind is Kind.DISCONNECT:
        legal = _CLIENT_DISCONNECTS if server else _SERVER_DISCONNECTS
    else:
        legal = _ALLOWED_REASONS[kind]
    if code not in legal:
        raise WireError(f"{kind.name} with reason code 0x{code:02x}", PROTOCOL_ERROR)
    return code, decode_properties(cursor, kind) if cursor.left else NO_PROPERTIES


def _decode_request(cursor: Cursor, version: int) -> SubscriptionRequest:
    topic_filter = check_filter(cursor.string())
    options = cursor.u8()
    if options & (0xC0 if version == 5 else 0xFC) or options & 3 == 3 or options >> 4 & 3 == 3:
        raise WireError(f"Subscription Options 0x{options:02x}", PROTOCOL_ERROR)
    if options & 4 and topic_filter.startswith("$share/"):
        raise WireError("No Local on a shared subscription", PROTOCOL_ERROR)
    return SubscriptionRequest(
        topic_filter=topic_filter,
        qos=options & 3,
        no_local=bool(options & 4),
        retain_as_published=bool(options & 8),
        retain_handling=options >> 4 & 3,
    )


def _decode_connect(cursor: Cursor) -> Connect:
    name = cursor.binary()
    version = cursor.u8()
    if name != b"MQTT" or version not in (4, 5):
        raise WireError(f"protocol {name!r} version {version}", UNSUPPORTED_PROTOCOL_VERSION)
    flags = cursor.u8()
    has_will, will_qos, will_retain = bool(flags & 4), flags >> 3 & 3, bool(flags & 0x20)
    has_username, has_password = bool(flags & 0x80), bool(flags & 0x40)
    if flags & 1:
        raise WireError("CONNECT with its reserved flag set")
    if will_qos == 3 or (not has_will and (will_qos or will_retain)):
        raise WireError("CONNECT with contradicting Will flags")
    if version == 4 and has_password and not has_username:
        raise WireError("CONNECT with a password but no user name")
    keep_alive = cursor.u16()
    properties = decode_properties(cursor, Kind.CONNECT) if version == 5 else NO_PROPERTIES
    if "authentication_data" in properties and "authentication_method" not in properties:
        raise WireError("Authentication Data without a Method", PROTOCOL_ERROR)
    client_id = cursor.string()
    will: Will | None = None
    if has_will:
        will_properties = decode_properties(cursor, WILL) if version == 5 else NO_PROPERTIES
        topic = check_topic(cursor.string())
        will = Will(topic=topic, payload=cursor.binary(), qos=will_qos, retain=will_retain, properties=will_properties)
    return Connect(
        client_id=client_id,
        version=version,
        clean_start=bool(flags & 2),
        keep_alive=keep_alive,
        will=will,
        username=cursor.string() if has_username else None,
        password=cursor.binary() if has_password else None,
        properties=properties,
    )
