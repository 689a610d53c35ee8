"""The properties of PUBLISH and of its acknowledgements, as bytes [MQTT-2.2.2].

Decoding is eager: a malformed property must end the connection, not surprise whoever looks at it later. What makes
that cheap is that peers send the same few blocks again and again, so ``_packets`` keeps the decoded values by block.
"""

from __future__ import annotations

from ._errors import ProtocolError
from ._topics import check_topic
from ._types import NO_PROPERTIES, PayloadFormat, PublishProperties

_PAYLOAD_FORMAT = 0x01
_MESSAGE_EXPIRY = 0x02
_CONTENT_TYPE = 0x03
_RESPONSE_TOPIC = 0x08
_CORRELATION_DATA = 0x09
_SUBSCRIPTION_IDENTIFIER = 0x0B
_REASON_STRING = 0x1F
_TOPIC_ALIAS = 0x23
_USER_PROPERTY = 0x26

_PUBLISH = {
    _PAYLOAD_FORMAT,
    _MESSAGE_EXPIRY,
    _CONTENT_TYPE,
    _RESPONSE_TOPIC,
    _CORRELATION_DATA,
    _SUBSCRIPTION_IDENTIFIER,
    _TOPIC_ALIAS,
    _USER_PROPERTY,
}
_ACK = {_REASON_STRING, _USER_PROPERTY}


def encode_varint(value: int) -> bytes:
    """A Variable Byte Integer [MQTT-1.5.5]."""
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Takes typed values off ``data[pos:end]``; anything that does not fit is a ``ProtocolError``."""

    def __init__(self, data: bytes, pos: int, end: int) -> None:
        self.data = data
        self.pos = pos
        self.end = end

    def take(self, length: int) -> bytes:
        start = self.pos
        self.pos += length
        if self.pos > self.end:
            raise ProtocolError("malformed packet: a property is longer than its packet [MQTT-2.2.2]")
        return self.data[start : self.pos]

    def integer(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def varint(self) -> int:
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if shift and not byte:
                    break
                return value
        raise ProtocolError("malformed packet: a variable byte integer is not in its shortest form [MQTT-1.5.5-1]")

    def binary(self) -> bytes:
        return self.take(self.integer(2))

    def text(self) -> str:
        return decode_text(self.binary(), "a property")


def decode_text(raw: bytes, what: str) -> str:
    """An UTF-8 Encoded String [MQTT-1.5.4-1], [MQTT-1.5.4-2]."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ProtocolError(f"malformed packet: {what} is not UTF-8 [MQTT-1.5.4-1]: {raw[:60]!r}") from exc
    if "\0" in text:
        raise ProtocolError(f"malformed packet: {what} contains U+0000 [MQTT-1.5.4-2]: {raw[:60]!r}")
    return text


def _decode(data: bytes, pos: int, end: int, allowed: set[int]) -> dict[int, object]:
    reader = _Reader(data, pos, end)
    found: dict[int, object] = {}
    # Lists until the end: tuples that grow would make a long block take time quadratic to its length.
    users: list[tuple[str, str]] = []
    identifiers: list[int] = []
    while reader.pos < end:
        identifier = reader.varint()
        if identifier not in allowed:
            raise ProtocolError(f"malformed packet: property 0x{identifier:02x} is not allowed here [MQTT-2.2.2.2]")
        if identifier in found:
            raise ProtocolError(f"protocol error: property 0x{identifier:02x} occurs twice [MQTT-2.2.2.2]")
        if identifier == _USER_PROPERTY:
            users.append((reader.text(), reader.text()))
        elif identifier == _SUBSCRIPTION_IDENTIFIER:
            value = reader.varint()
            if not value:
                raise ProtocolError("protocol error: a Subscription Identifier of 0 [MQTT-3.3.2.3.8]")
            identifiers.append(value)
        elif identifier == _PAYLOAD_FORMAT:
            value = reader.integer(1)
            if value > 1:
                raise ProtocolError(f"protocol error: a Payload Format Indicator of {value} [MQTT-3.3.2.3.2]")
            found[identifier] = PayloadFormat(value)
        elif identifier == _MESSAGE_EXPIRY:
            found[identifier] = reader.integer(4)
        elif identifier == _TOPIC_ALIAS:
            value = reader.integer(2)
            if not value:
                raise ProtocolError("protocol error: a Topic Alias of 0 [MQTT-3.3.2-8]")
            found[identifier] = value
        elif identifier == _CORRELATION_DATA:
            found[identifier] = reader.binary()
        else:
            found[identifier] = reader.text()
    found[_USER_PROPERTY] = tuple(users)
    found[_SUBSCRIPTION_IDENTIFIER] = tuple(identifiers)
    return found


def decode_publish_properties(data: bytes, pos: int, end: int) -> PublishProperties:
    """The properties of a PUBLISH in ``data[pos:end]`` (their length already taken off). Raises ``ProtocolError``."""
    found = _decode(data, pos, end, _PUBLISH)
    response_topic = found.get(_RESPONSE_TOPIC)
    if isinstance(response_topic, str) and (not response_topic or "+" in response_topic or "#" in response_topic):
        raise ProtocolError(f"protocol error: a Response Topic of {response_topic!r} [MQTT-3.3.2-14]")
    return PublishProperties(
        payload_format=found.get(_PAYLOAD_FORMAT),  # type: ignore[arg-type]  # _decode gives each its type
        message_expiry=found.get(_MESSAGE_EXPIRY),  # type: ignore[arg-type]
        content_type=found.get(_CONTENT_TYPE),  # type: ignore[arg-type]
        response_topic=response_topic,  # type: ignore[arg-type]
        correlation_data=found.get(_CORRELATION_DATA),  # type: ignore[arg-type]
        user_properties=found[_USER_PROPERTY],  # type: ignore[arg-type]
        subscription_identifiers=found[_SUBSCRIPTION_IDENTIFIER],  # type: ignore[arg-type]
        topic_alias=found.get(_TOPIC_ALIAS),  # type: ignore[arg-type]
    )


def decode_publish_block(block: bytes) -> PublishProperties:
    """The same of a whole block that we have encoded."""
    reader = _Reader(block, 0, len(block))
    length = reader.varint()
    return decode_publish_properties(block, len(block) - length, len(block))


def decode_reason_string(data: bytes, pos: int, end: int) -> str | None:
    """The Reason String among the properties of an acknowledgement, length included; None if there is none."""
    reader = _Reader(data, pos, end)
    length = reader.varint()
    if reader.pos + length != end:
        raise ProtocolError("malformed packet: the property length of an acknowledgement is wrong [MQTT-2.2.2.1]")
    text = _decode(data, reader.pos, end, _ACK).get(_REASON_STRING)
    return text if isinstance(text, str) else None


def _binary(value: bytes, field: str) -> bytes:
    if len(value) > 65535:
        raise ValueError(f"{field} has {len(value)} bytes, allowed are 0 to 65535")
    return len(value).to_bytes(2, "big") + value


def _integer(value: int, field: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field} is {value!r}, allowed are whole numbers from {low} to {high}")
    return value


def encode_binary(value: bytes, field: str) -> bytes:
    """Bytes with their length in front; ``field`` is named in the error for what is no bytes or too long."""
    if not isinstance(value, bytes | bytearray):
        raise TypeError(f"{field} must be bytes, not {type(value).__name__}")
    return _binary(value, field)


def encode_text(value: str, field: str) -> bytes:
    """A text with its length in front; ``ValueError`` names ``field`` when it is none that MQTT can carry."""
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"{field} must be str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{field} contains U+0000, which MQTT does not allow: {value[:60]!r}")
    try:
        raw = value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ValueError(f"{field} cannot be encoded as UTF-8: {value[:60]!r}") from exc
    return _binary(raw, field)


def encode_publish_properties(properties: PublishProperties) -> bytes:
    """The property block of an outgoing PUBLISH, its length in front; ``b"\\0"`` if none is set.

    Raises ``ValueError`` or ``TypeError`` naming the field, the value and the allowed range.
    """
    if properties is NO_PROPERTIES:
        return b"\0"
    out = bytearray()
    if properties.payload_format is not None:
        if isinstance(properties.payload_format, bool) or properties.payload_format not in (0, 1):
            raise ValueError(f"payload_format is {properties.payload_format!r}, allowed are 0 (bytes) and 1 (UTF-8)")
        out += bytes((_PAYLOAD_FORMAT, properties.payload_format))
    if properties.message_expiry is not None:
        out.append(_MESSAGE_EXPIRY)
        out += _integer(properties.message_expiry, "message_expiry", 0, 0xFFFFFFFF).to_bytes(4, "big")
    if properties.content_type is not None:
        out.append(_CONTENT_TYPE)
        out += encode_text(properties.content_type, "content_type")
    if properties.response_topic is not None:
        out.append(_RESPONSE_TOPIC)
        out += _binary(check_topic(properties.response_topic, "response_topic"), "response_topic")
    if properties.correlation_data is not None:
        out.append(_CORRELATION_DATA)
        out += encode_binary(properties.correlation_data, "correlation_data")
    if properties.topic_alias is not None:
        out.append(_TOPIC_ALIAS)
        out += _integer(properties.topic_alias, "topic_alias", 1, 65535).to_bytes(2, "big")
    for pair in properties.user_properties:
        if not isinstance(pair, tuple) or len(pair) != 2:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(f"user_properties must hold (name, value) pairs, not {pair!r:.60}")
        out.append(_USER_PROPERTY)
        out += encode_text(pair[0], "user_properties")
        out += encode_text(pair[1], "user_properties")
    return encode_varint(len(out)) + bytes(out)
