"""The properties of PUBLISH and of its acknowledgements, as bytes [MQTT-2.2.2].

A malformed property must end the connection when it arrives, not surprise whoever looks at it later. But few look, so
the properties of an incoming PUBLISH are *scanned* when they arrive, and decoded when somebody asks for them.

Hazard: two readers of one format can differ. So the scan finds no faults: it only knows blocks that are good, and
leaves every other one to the decoder, whose word is final. What the scan lets pass the decoder must take (the tests
hold one against the other).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

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
_REPEATED = {"content_type", "response_topic", "user_properties"}
"""Of those that a publish takes; the others belong to one message."""
_CACHED_BLOCKS = 256
_CACHED_LENGTH = 256
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


@attrs.define(eq=False)
class PropertyBlock:
    """The properties of a PUBLISH as they came, known to be good; decoded once, for all messages that have the same.

    Routing needs the identifiers and the alias of every message, so these are values from the beginning.
    """

    _block: bytes = attrs.field(repr=False)
    subscription_identifiers: tuple[int, ...]
    topic_alias: int | None
    _decoded: PublishProperties | None = attrs.field(default=None, init=False, repr=False)

    def decode(self) -> PublishProperties:
        if self._decoded is None:
            self._decoded = decode_publish_properties(self._block, 0, len(self._block))
        return self._decoded


def read_publish_properties(block: bytes) -> PropertyBlock | PublishProperties:
    """The properties of a PUBLISH, without their length. Raises ``ProtocolError``.

    ``block`` is kept: it must be bytes of its own.
    """
    return _scan(block) or decode_publish_properties(block, 0, len(block))


def _scan(block: bytes) -> PropertyBlock | None:
    """The block if it is good; None to let the decoder say what is wrong.

    A length that points beyond the block is found where the next read is: at an index that is not there, or because
    the properties do not end where the block does.
    """
    identifiers: list[int] = []
    alias = None
    seen: set[int] = set()
    pos = 0
    end = len(block)
    try:
        while pos < end:
            identifier = block[pos]
            pos += 1
            if identifier == _USER_PROPERTY:
                pos = _skip_text(block, _skip_text(block, pos))
                continue
            if identifier == _SUBSCRIPTION_IDENTIFIER:
                value, pos = _scan_varint(block, pos)
                identifiers.append(value)
                continue
            if identifier in seen:
                return None
            seen.add(identifier)
            if identifier == _CORRELATION_DATA:
                pos += 2 + (block[pos] << 8 | block[pos + 1])
            elif identifier == _CONTENT_TYPE:
                pos = _skip_text(block, pos)
            elif identifier == _RESPONSE_TOPIC:
                start = pos + 2
                pos = _skip_text(block, pos)
                topic = block[start:pos]
                if not topic or b"+" in topic or b"#" in topic:
                    return None
            elif identifier == _MESSAGE_EXPIRY:
                pos += 4
            elif identifier == _TOPIC_ALIAS:
                alias = block[pos] << 8 | block[pos + 1]
                if not alias:
                    return None
                pos += 2
            elif identifier == _PAYLOAD_FORMAT:
                if block[pos] > 1:
                    return None
                pos += 1
            else:
                return None
    except (IndexError, ValueError):
        return None
    return PropertyBlock(block, tuple(identifiers), alias) if pos == end else None


def _skip_text(block: bytes, pos: int) -> int:
    """Where the text at ``pos`` ends. Raises ``ValueError`` if it is none."""
    start = pos + 2
    pos = start + (block[pos] << 8 | block[pos + 1])
    raw = block[start:pos]
    if b"\0" in raw:
        raise ValueError("U+0000")
    if not raw.isascii():
        raw.decode()
    return pos


def _scan_varint(block: bytes, pos: int) -> tuple[int, int]:
    """A variable byte integer and where it ends. Raises ``ValueError`` if it is 0 or not in its shortest form."""
    value = 0
    for shift in (0, 7, 14, 21):
        byte = block[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if not byte:
                break
            return value, pos
    raise ValueError("0 or too long")


def decode_publish_block(block: bytes) -> PublishProperties:
    """The same of a whole block that we have encoded."""
    reader = _Reader(block, 0, len(block))
    length = reader.varint()
    if reader.pos + length != len(block):
        raise ProtocolError("malformed properties: their length is wrong [MQTT-2.2.2.1]")
    return decode_publish_properties(block, reader.pos, len(block))


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


def check_utf8(payload: bytes) -> None:
    """``ValueError`` if a payload is not the UTF-8 that ``payload_format`` calls it [MQTT-3.3.2.3.2]."""
    if payload.isascii():
        return
    try:
        payload.decode()
    except UnicodeDecodeError as exc:
        raise ValueError(f"payload_format is 1 (UTF-8), but payload is not UTF-8: {payload[:60]!r}") from exc


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


class PropertyBlocks:
    """Property blocks of publishes that have the same properties again and again, as keywords of ``publish()``.

    To encode one costs more than all the rest of a publish.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[tuple[str, object], ...], bytes] = {}
        self._last: Mapping[str, Any] = {}
        self._last_block = b""

    def find(self, properties: Mapping[str, Any]) -> bytes | None:
        """None for those that do not repeat, or are bad. Raises ``ValueError`` for bad values."""
        try:
            if properties == self._last:  # quicker than a key that must be made and hashed
                return self._last_block
        except Exception:  # noqa: BLE001  # what is compared may be anything
            return None
        key = tuple(properties.items())
        try:
            block = self._blocks.get(key)
            if block is None:
                return self._learn(key, properties)
        except TypeError:  # not hashable, or of a wrong type
            return None
        self._last, self._last_block = properties, block
        return block

    def _learn(self, key: tuple[tuple[str, object], ...], properties: Mapping[str, Any]) -> bytes | None:
        if not properties.keys() <= _REPEATED:
            return None
        block = encode_publish_properties(PublishProperties(**properties))
        if len(block) <= _CACHED_LENGTH:
            if len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.clear()
            self._blocks[key] = block
        return block


def check_message_expiry(value: int) -> int:
    """Seconds as Message Expiry can carry them [MQTT-3.3.2.3.3]. Raises ``ValueError``."""
    return _integer(value, "message_expiry", 0, 0xFFFFFFFF)


def extend_block(block: bytes, *, message_expiry: int | None = None, topic_alias: int | None = None) -> bytes:
    """A whole property block of PUBLISH with these added; it must not hold them yet."""
    added = b""
    if message_expiry is not None:
        added += bytes((_MESSAGE_EXPIRY,)) + message_expiry.to_bytes(4, "big")
    if topic_alias is not None:
        added += bytes((_TOPIC_ALIAS,)) + topic_alias.to_bytes(2, "big")
    if not added:
        return block
    start = 1
    while block[start - 1] > 127:
        start += 1
    return encode_varint(len(block) - start + len(added)) + added + block[start:]
