"""The MQTT 5 properties [MQTT-2.2.2] as a table, and their bytes.

Properties are a mapping from name to value: an int, str or bytes; ``user_properties`` is a tuple of pairs and
``subscription_identifiers`` a tuple of ints, because these two may occur more than once in a packet.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TypeAlias

import attrs

PropertyValue: TypeAlias = int | str | bytes | tuple[int, ...] | tuple[tuple[str, str], ...]
Properties: TypeAlias = Mapping[str, PropertyValue]

MALFORMED_PACKET = 0x81
PROTOCOL_ERROR = 0x82
MAXIMUM_VARIABLE_BYTE_INTEGER = 268_435_455


class WireError(Exception):
    """The peer sent bytes that MQTT does not allow; ``reason_code`` is what MQTT 5 calls it."""

    def __init__(self, message: str, reason_code: int = MALFORMED_PACKET) -> None:
        super().__init__(message, reason_code)
        self.reason_code = reason_code

    def __str__(self) -> str:
        return f"{self.args[0]} (0x{self.reason_code:02x})"


class Kind(enum.IntEnum):
    """The control packet types [MQTT-2.1.2]."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


WILL = 0
"""Stands for the Will Properties in CONNECT, which have a list of their own."""


class Cursor:
    """Reads the fields of one packet, in order; whatever is missing is a ``WireError``."""

    __slots__ = ("_data", "_end", "position")

    def __init__(self, data: bytes, end: int | None = None) -> None:
        self._data = data
        self._end = len(data) if end is None else end
        self.position = 0

    @property
    def left(self) -> int:
        return self._end - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise WireError(f"the packet ends {count - self.left} bytes too early")
        start = self.position
        self.position += count
        return self._data[start : self.position]

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def binary(self) -> bytes:
        return self.take(self.u16())

    def string(self) -> str:
        return decode_string(self.take(self.u16()))

    def pair(self) -> tuple[str, str]:
        return self.string(), self.string()

    def variable(self) -> int:
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise WireError("a Variable Byte Integer is not in its shortest form")
                return value
        raise WireError("a Variable Byte Integer is longer than 4 bytes")

    def rest(self) -> bytes:
        return self.take(self.left)

    def finish(self) -> None:
        if self.left:
            raise WireError(f"{self.left} bytes follow the end of the packet's fields")


def decode_string(data: bytes) -> str:
    """A UTF-8 Encoded String [MQTT-1.5.4]: no surrogates, no U+0000."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise WireError(f"a string is not UTF-8: {exc.reason} at byte {exc.start}") from None
    if "\0" in text:
        raise WireError("a string contains U+0000")
    return text


def encode_variable(value: int) -> bytes:
    if not 0 <= value <= MAXIMUM_VARIABLE_BYTE_INTEGER:
        raise ValueError(f"{value} is not in 0 … {MAXIMUM_VARIABLE_BYTE_INTEGER}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_binary(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def encode_string(value: str) -> bytes:
    return encode_binary(value.encode())


def _flag(value: int) -> bool:
    return value in (0, 1)


def _positive(value: int) -> bool:
    return value > 0


@attrs.frozen
class _Property:
    identifier: int
    name: str
    form: str
    packets: tuple[int, ...]
    valid: Callable[[int], bool] | None = None


_PUBLISHED = (Kind.PUBLISH, WILL)
_REASONED = (
    Kind.CONNACK,
    Kind.PUBACK,
    Kind.PUBREC,
    Kind.PUBREL,
    Kind.PUBCOMP,
    Kind.SUBACK,
    Kind.UNSUBACK,
    Kind.DISCONNECT,
    Kind.AUTH,
)
_USER = (*_REASONED, Kind.CONNECT, Kind.PUBLISH, Kind.SUBSCRIBE, Kind.UNSUBSCRIBE, WILL)
_AUTHENTICATED = (Kind.CONNECT, Kind.CONNACK, Kind.AUTH)
_BOTH_CONNECTS = (Kind.CONNECT, Kind.CONNACK)

_TABLE = (
    _Property(0x01, "payload_format", "u8", _PUBLISHED, _flag),
    _Property(0x02, "message_expiry", "u32", _PUBLISHED),
    _Property(0x03, "content_type", "string", _PUBLISHED),
    _Property(0x08, "response_topic", "string", _PUBLISHED),
    _Property(0x09, "correlation_data", "binary", _PUBLISHED),
    _Property(0x0B, "subscription_identifiers", "variable", (Kind.PUBLISH, Kind.SUBSCRIBE), _positive),
    _Property(0x11, "session_expiry", "u32", (*_BOTH_CONNECTS, Kind.DISCONNECT)),
    _Property(0x12, "assigned_client_id", "string", (Kind.CONNACK,)),
    _Property(0x13, "server_keep_alive", "u16", (Kind.CONNACK,)),
    _Property(0x15, "authentication_method", "string", _AUTHENTICATED),
    _Property(0x16, "authentication_data", "binary", _AUTHENTICATED),
    _Property(0x17, "request_problem_information", "u8", (Kind.CONNECT,), _flag),
    _Property(0x18, "will_delay", "u32", (WILL,)),
    _Property(0x19, "request_response_information", "u8", (Kind.CONNECT,), _flag),
    _Property(0x1A, "response_information", "string", (Kind.CONNACK,)),
    _Property(0x1C, "server_reference", "string", (Kind.CONNACK, Kind.DISCONNECT)),
    _Property(0x1F, "reason_string", "string", _REASONED),
    _Property(0x21, "receive_maximum", "u16", _BOTH_CONNECTS, _positive),
    _Property(0x22, "topic_alias_maximum", "u16", _BOTH_CONNECTS),
    _Property(0x23, "topic_alias", "u16", (Kind.PUBLISH,), _positive),
    _Property(0x24, "maximum_qos", "u8", (Kind.CONNACK,), _flag),
    _Property(0x25, "retain_available", "u8", (Kind.CONNACK,), _flag),
    _Property(0x26, "user_properties", "pair", _USER),
    _Property(0x27, "maximum_packet_size", "u32", _BOTH_CONNECTS, _positive),
    _Property(0x28, "wildcard_available", "u8", (Kind.CONNACK,), _flag),
    _Property(0x29, "identifiers_available", "u8", (Kind.CONNACK,), _flag),
    _Property(0x2A, "shared_available", "u8", (Kind.CONNACK,), _flag),
)
_BY_IDENTIFIER = {entry.identifier: entry for entry in _TABLE}
_BY_NAME = {entry.name: entry for entry in _TABLE}


def decode_properties(cursor: Cursor, packet: int) -> Properties:
    """Read the property length and the properties; ``packet`` is a ``Kind`` or ``WILL``."""
    length = cursor.variable()
    if not length:
        return {}
    inner = Cursor(cursor.take(length))
    values: dict[str, PropertyValue] = {}
    users: list[tuple[str, str]] = []
    identifiers: list[int] = []
    while inner.left:
        number = inner.variable()
        entry = _BY_IDENTIFIER.get(number)
        if entry is None:
            raise WireError(f"unknown property 0x{number:02x}")
        if packet not in entry.packets:
            where = Kind(packet).name if packet else "a Will"
            raise WireError(f"property {entry.name} is not allowed in {where}", PROTOCOL_ERROR)
        if entry.form == "pair":
            users.append(inner.pair())
            continue
        value: int | str | bytes
        if entry.form == "u8":
            value = inner.u8()
        elif entry.form == "u16":
            value = inner.u16()
        elif entry.form == "u32":
            value = inner.u32()
        elif entry.form == "variable":
            value = inner.variable()
        elif entry.form == "string":
            value = inner.string()
        else:
            value = inner.binary()
        if isinstance(value, int) and entry.valid is not None and not entry.valid(value):
            raise WireError(f"property {entry.name} must not be {value}", PROTOCOL_ERROR)
        if entry.form == "variable" and isinstance(value, int):
            identifiers.append(value)
        elif entry.name in values:
            raise WireError(f"property {entry.name} occurs twice", PROTOCOL_ERROR)
        else:
            values[entry.name] = value
    topic = values.get("response_topic")
    if isinstance(topic, str) and (not topic or "+" in topic or "#" in topic):
        raise WireError(f"the Response Topic {topic!r} is not a Topic Name", PROTOCOL_ERROR)
    if users:
        values["user_properties"] = tuple(users)
    if identifiers:
        if packet == Kind.SUBSCRIBE and len(identifiers) > 1:
            raise WireError("SUBSCRIBE has more than one Subscription Identifier", PROTOCOL_ERROR)
        values["subscription_identifiers"] = tuple(identifiers)
    return values


def encode_properties(properties: Properties) -> bytes:
    """The property length and the properties. What is legal in which packet is left to the caller."""
    if not properties:
        return b"\0"
    out = bytearray()
    for name, value in properties.items():
        entry = _BY_NAME[name]
        for single in value if isinstance(value, tuple) else (value,):
            out.append(entry.identifier)
            if isinstance(single, int):
                if entry.form == "variable":
                    out += encode_variable(single)
                else:
                    out += single.to_bytes({"u8": 1, "u16": 2, "u32": 4}[entry.form], "big")
            elif isinstance(single, str):
                out += encode_string(single)
            elif isinstance(single, bytes):
                out += encode_binary(single)
            else:
                out += encode_string(single[0]) + encode_string(single[1])
    return encode_variable(len(out)) + bytes(out)


def integer(properties: Properties, name: str, default: int) -> int:
    """The value of a number property, or ``default``."""
    value = properties.get(name, default)
    assert isinstance(value, int)
    return value


def text(properties: Properties, name: str) -> str | None:
    value = properties.get(name)
    assert value is None or isinstance(value, str)
    return value


def binary(properties: Properties, name: str) -> bytes | None:
    value = properties.get(name)
    assert value is None or isinstance(value, bytes)
    return value
