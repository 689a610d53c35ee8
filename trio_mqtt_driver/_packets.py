"""Bytes only: split what a broker sends into packets, and decode and encode the PUBLISH family.

Nearly all traffic is PUBLISH, PUBACK, PUBREC, PUBREL and PUBCOMP, and paho needs ten times longer for them, so these
five are handled here, in one pass over what one ``receive_some`` brought; the tests hold them against paho's own
codec. Every other packet is handed on whole, for paho.

Hazards this module must keep out: an index that runs from a truncated packet into the next one (every read is bounded
by ``stop``, never by the end of the data); quadratic work on a packet that trickles in (nothing is parsed again until
the length that its header names is there); memory that a peer decides on (the length is checked before it is awaited).
"""

# A message's fields are set here one by one.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from ._errors import ProtocolError
from ._properties import PropertyBlock, decode_reason_string, decode_text, encode_varint, read_publish_properties
from ._types import NO_PROPERTIES, Acknowledger, Message, PlainQoS0Message, PlainQoS1Message, PublishProperties

CONNACK = 0x20
PUBACK = 0x40
PUBREC = 0x50
PUBREL = 0x62
PUBCOMP = 0x70
SUBACK = 0x90
UNSUBACK = 0xB0
PINGRESP = 0xD0
DISCONNECT = 0xE0
AUTH = 0xF0

PINGREQ_PACKET = b"\xc0\x00"

Ack = tuple[int, int, int, "str | None"]
"""(first byte, packet identifier, reason code, reason string)"""

PubAcks = list[int]
"""The Packet Identifiers of PUBACKs that say success."""

_Shape = tuple[int, int, int, Callable[[bytes, int], tuple[Any, ...]]]
"""Of a PUBLISH: its size, its QoS, the size of its payload, and what takes it apart: into the Topic Name, the
Packet Identifier or nothing, the property length or nothing, and the payload."""

Packet = Message[Any] | PubAcks | Ack | bytes

_NAMES = {
    1: "CONNECT",
    2: "CONNACK",
    3: "PUBLISH",
    4: "PUBACK",
    5: "PUBREC",
    6: "PUBREL",
    7: "PUBCOMP",
    8: "SUBSCRIBE",
    9: "SUBACK",
    10: "UNSUBSCRIBE",
    11: "UNSUBACK",
    12: "PINGREQ",
    13: "PINGRESP",
    14: "DISCONNECT",
    15: "AUTH",
}
_FROM_SERVER_4 = {CONNACK, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK, PINGRESP}
_FROM_SERVER_4.update(first for first in range(0x30, 0x40) if first & 6 != 6)
_FROM_SERVER_5 = _FROM_SERVER_4 | {DISCONNECT, AUTH}
_ACKS = {PUBACK, PUBREC, PUBREL, PUBCOMP}
_SHORT_HEADER = struct.Struct(">BBH").unpack_from
_LONG_HEADER = struct.Struct(">BBBH").unpack_from
"""First byte, length in one byte or two, and the length of the Topic Name."""
_PUBACKS = re.compile(rb"(?:@\x02..)+", re.DOTALL)
"""PUBACK upon PUBACK, without reason codes: the only packets that come in such numbers that each call counts."""

# Caches are emptied when full: an entry that is still in use comes back with the next message.
_CACHED_TOPICS = 4096
_CACHED_SHAPES = 2048
_NOTED_EACH = 32
_MOST_TO_NOTE = 64 * _NOTED_EACH
"""One shape is noted for so many messages; at first, or after a while without any, for so many."""
_CACHED_BLOCKS = 256
_CACHED_LENGTH = 256

_CONTROL_MAXIMUM = 65536
"""paho reads properties in time quadratic to their length: at this size a third of a second, at ten times it a minute.
A SUBACK for ten thousand Topic Filters has 10 KB."""


def packet_name(first: int) -> str:
    return _NAMES.get(first >> 4, f"packet type {first >> 4}")


class PacketReader:
    """Turns the bytes of one connection into packets, however they are chopped."""

    def __init__(
        self,
        *,
        version: int,
        maximum_packet_size: int,
        topic_alias_maximum: int = 0,
        generation: int = 0,
        source: Acknowledger | None = None,
    ) -> None:
        self.error: ProtocolError | None = None
        """Set when the stream can no longer be trusted; the packets before the fault were returned by ``feed``."""
        self._version5 = version == 5
        self._allowed = _FROM_SERVER_5 if version == 5 else _FROM_SERVER_4
        self._maximum_packet_size = maximum_packet_size
        self._topic_alias_maximum = topic_alias_maximum
        self._generation = generation
        self._source = source
        self.plain = False
        """Whether what ``feed`` returned last is messages of QoS 0 and 1 that have properties at most."""
        self.plain_1 = 0
        """How many of these have QoS 1."""
        self.plain_size = 0
        """The bytes of their payloads."""
        self._expect_connack = True
        self._rest = bytearray()
        self._need = 0
        self._topics: dict[bytes, str] = {}
        self._shapes: dict[bytes, _Shape] = {}
        self._to_note = _MOST_TO_NOTE
        self._blocks: dict[bytes, PropertyBlock | PublishProperties] = {}
        self._aliases: dict[int, str] = {}

    @property
    def partial(self) -> int:
        """Bytes of a packet that has begun and is not complete."""
        return len(self._rest)

    def feed(self, data: bytes | bytearray) -> list[Packet]:
        """The packets that are complete with ``data``; sets ``error`` at the first byte that MQTT does not allow."""
        self.plain = False
        self.plain_1 = self.plain_size = 0
        if self.error is not None:
            return []
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        else:
            data = bytes(data)
        packets: list[Packet] = []
        self.plain = True
        try:
            start = self._split(data, packets)
        except ProtocolError as exc:
            self.error = exc
        else:
            self._rest += data[start:]
        return packets

    def _split(self, data: bytes, packets: list[Packet]) -> int:
        """Append all complete packets; return where the incomplete one begins."""
        start = 0
        end = len(data)
        while start < end:
            first = data[start]
            if (first == 0x30 or first == 0x32) and not self._expect_connack:
                start = self._plain(data, start, packets)
                if start == end:
                    break
                first = data[start]
            if first not in self._allowed or self._expect_connack:
                self._check_first(first, data, start)
            pos = start + 1
            if pos == end:
                self._need = 2
                return start
            length = data[pos]
            pos += 1
            if length > 127:
                length &= 127
                shift = 7
                while True:
                    if pos == end:
                        self._need = pos - start + 1
                        return start
                    byte = data[pos]
                    pos += 1
                    length |= (byte & 127) << shift
                    if byte < 128:
                        break
                    shift += 7
                    if shift > 21:
                        raise ProtocolError("malformed packet: a Remaining Length of more than 4 bytes [MQTT-1.5.5]")
                if not byte:
                    raise ProtocolError("malformed packet: a Remaining Length not in its shortest form [MQTT-1.5.5-1]")
            stop = pos + length
            if stop - start > self._maximum_packet_size:
                raise ProtocolError(
                    f"{packet_name(first)} of {stop - start} bytes is larger than "
                    f"maximum_packet_size={self._maximum_packet_size} [MQTT-3.1.2-24]"
                )
            if stop > end:
                self._check_control_size(first, stop - start)
                self._need = stop - start
                return start
            self.plain = False
            if first & 0xF0 == 0x30:
                packets.append(self._publish(first, data, pos, stop))
            elif first == PUBACK and length == 2:
                stop = self._pubacks(data, start, stop, packets)
            elif first in _ACKS:
                packets.append(self._ack(first, data, pos, stop))
            else:
                self._check_control_size(first, stop - start)
                packets.append(data[start:stop])
            start = stop
        return start

    def _plain(self, data: bytes, start: int, packets: list[Packet]) -> int:
        """Append PUBLISH packets for as long as there is nothing about them, and return where that ends.

        That is QoS 0 or 1 without DUP and RETAIN, a topic that has come before, no properties or such as have come
        before (often it is our own Subscription Identifier alone), a length of one or two bytes: nearly all, so they
        are read without a call for each. Whatever is not quite so is for ``_split``.
        """
        end = len(data)
        known = self._topics.get
        shapes = self._shapes.get
        blocks = self._blocks.get
        append = packets.append
        generation = self._generation
        source = self._source
        before = len(packets)
        zeros = payloads = 0
        new_0, new_1 = PlainQoS0Message.__new__, PlainQoS1Message.__new__
        none: PropertyBlock | PublishProperties = NO_PROPERTIES
        packet_id: int
        properties: int
        while start + 5 < end:
            shape = shapes(data[start : start + 5])
            if shape is not None:
                length, qos, left, unpack = shape
                stop = start + length
                if stop > end:
                    break
                raw, packet_id, properties, payload = unpack(data, start)
            else:
                parts = self._take_apart(data, start)
                if parts is None:
                    break
                stop, qos, left, raw, packet_id, properties, payload = parts
            topic = known(raw)
            if not topic:
                break
            block = none
            if properties:
                known_block = blocks(payload[:properties])
                # A length of two bytes, or one that points beyond the packet: what is there may look like some block.
                if properties > 127 or properties > left or known_block is None or known_block.topic_alias is not None:
                    break
                block = known_block
                payload = payload[properties:]
                left -= properties
            message: Message[Any]
            if qos:
                if not packet_id:
                    break
                message = new_1(PlainQoS1Message)
                message.qos = message._open = 1
                message.packet_id = packet_id
                message._original = message._reader = None
            else:
                zeros += 1
                message = new_0(PlainQoS0Message)
                message.qos = 0
            message.topic = topic
            message.payload = payload
            message.generation = generation
            message._properties = block
            message._source = source
            message.value = None
            append(message)
            payloads += left
            start = stop
        count = len(packets) - before
        self.plain_size += payloads
        self.plain_1 += count - zeros
        self._to_note = min(self._to_note + count, _MOST_TO_NOTE)
        return start

    def _take_apart(self, data: bytes, start: int) -> tuple[int, int, int, bytes, int, int, bytes] | None:
        """Where a PUBLISH ends, its QoS, its payload's size, and its parts; None if there can be something about it.

        Noted, for the next that begins with the same five bytes. But not each: to note one takes as long as to read
        several, and where all differ it is for nothing.
        """
        first: int
        length: int
        size: int
        first, length, size = _SHORT_HEADER(data, start)
        skip = 4
        if length > 127:
            first, low, high, size = _LONG_HEADER(data, start)
            if not 0 < high < 128:
                return None
            length = high << 7 | low & 127
            skip = 5
        qos = first >> 1 & 1
        left = length - 2 - size - 2 * qos - self._version5
        length += skip - 2
        stop = start + length
        if first not in (0x30, 0x32) or left < 0 or length > self._maximum_packet_size or stop > len(data):
            return None
        if self._to_note >= 0:
            self._to_note -= _NOTED_EACH
            if len(self._shapes) >= _CACHED_SHAPES:
                self._shapes.clear()
            parts = f">{skip}x{size}s{'H' if qos else '0s'}{'B' if self._version5 else '0s'}{left}s"
            self._shapes[data[start : start + 5]] = length, qos, left, struct.Struct(parts).unpack_from
        pos = start + skip + size
        raw = data[start + skip : pos]
        packet_id: int = data[pos] << 8 | data[pos + 1] if qos else 0
        properties: int = data[pos + 2 * qos] if self._version5 else 0
        return stop, qos, left, raw, packet_id, properties, data[stop - left : stop]

    def _check_control_size(self, first: int, size: int) -> None:
        if first & 0xF0 != 0x30 and size > _CONTROL_MAXIMUM:
            raise ProtocolError(
                f"{packet_name(first)} of {size} bytes: this client takes PUBLISH only beyond {_CONTROL_MAXIMUM}"
            )

    def _check_first(self, first: int, data: bytes, start: int) -> None:
        if self._expect_connack:
            if first == CONNACK or (first == AUTH and self._version5):
                self._expect_connack = first != CONNACK
                return
            seen = bytes(data[start : start + 12])
            hint = ""
            if seen[:5] == b"HTTP/"[: len(seen)]:
                hint = "; an HTTP server is listening there"
            elif first in (0x15, 0x16):
                hint = "; a TLS server is listening there: use mqtts://"
            raise ProtocolError(f"the first packet must be CONNACK [MQTT-3.2.0-1], but it begins with {seen!r}{hint}")
        raise ProtocolError(f"malformed packet: {packet_name(first)} with first byte 0x{first:02x} from a server")

    def _publish(self, first: int, data: bytes, pos: int, stop: int) -> Message[Any]:
        body = pos + 2
        if body > stop:
            raise ProtocolError("malformed packet: PUBLISH without a Topic Name [MQTT-3.3.2-1]")
        pos = body + (data[pos] << 8 | data[pos + 1])
        if pos > stop:
            raise ProtocolError("malformed packet: PUBLISH whose Topic Name is longer than the packet [MQTT-3.3.2-1]")
        raw = data[body:pos]
        topic = self._topics.get(raw)
        if topic is None:
            topic = self._new_topic(raw)
        qos = first >> 1 & 3
        packet_id = 0
        if qos:
            if pos + 2 > stop:
                raise ProtocolError("malformed packet: PUBLISH without its Packet Identifier [MQTT-2.2.1-2]")
            packet_id = data[pos] << 8 | data[pos + 1]
            if not packet_id:
                raise ProtocolError("protocol error: PUBLISH with Packet Identifier 0 [MQTT-2.2.1-3]")
            pos += 2
        elif first & 8:
            raise ProtocolError("malformed packet: PUBLISH with DUP and QoS 0 [MQTT-3.3.1-2]")
        properties: PropertyBlock | PublishProperties = NO_PROPERTIES
        if self._version5:
            if pos >= stop:
                raise ProtocolError("malformed packet: PUBLISH without a property length [MQTT-2.2.2-1]")
            if data[pos]:
                properties, pos = self._publish_properties(data, pos, stop)
                if properties.topic_alias is not None:
                    topic = self._resolve_alias(topic, properties.topic_alias)
            else:
                pos += 1
        if not topic:
            raise ProtocolError("protocol error: PUBLISH with an empty Topic Name [MQTT-4.7.3-1]")
        retain, dup = first & 1 == 1, first & 8 == 8
        source = self._source
        return Message(topic, data[pos:stop], qos, retain, dup, properties, packet_id, self._generation, source)

    def _new_topic(self, raw: bytes) -> str:
        topic = decode_text(raw, "a Topic Name")
        if "+" in topic or "#" in topic:
            raise ProtocolError(f"malformed packet: a Topic Name with a wildcard [MQTT-3.3.2-2]: {raw[:60]!r}")
        if len(raw) <= _CACHED_LENGTH:
            if len(self._topics) >= _CACHED_TOPICS:
                self._topics.clear()
            self._topics[raw] = topic
        return topic

    def _publish_properties(self, data: bytes, pos: int, stop: int) -> tuple[PropertyBlock | PublishProperties, int]:
        length = data[pos] & 127
        shift = 7
        while data[pos] > 127:
            pos += 1
            if pos >= stop or shift > 21 or not data[pos]:
                raise ProtocolError("malformed packet: the property length of PUBLISH [MQTT-2.2.2.1]")
            length |= (data[pos] & 127) << shift
            shift += 7
        pos += 1
        end = pos + length
        if end > stop:
            raise ProtocolError("malformed packet: the properties of PUBLISH are longer than it [MQTT-2.2.2.1]")
        block = data[pos:end]
        if length > _CACHED_LENGTH:
            return read_publish_properties(block), end
        properties = self._blocks.get(block)
        if properties is None:
            if len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.clear()
            properties = self._blocks[block] = read_publish_properties(block)
        return properties, end

    def _resolve_alias(self, topic: str, alias: int) -> str:
        if alias > self._topic_alias_maximum:
            raise ProtocolError(
                f"protocol error: Topic Alias {alias}, announced were at most {self._topic_alias_maximum} "
                "[MQTT-3.1.2-26]"
            )
        if topic:
            self._aliases[alias] = topic
            return topic
        try:
            return self._aliases[alias]
        except KeyError:
            raise ProtocolError(f"protocol error: Topic Alias {alias} was never set [MQTT-3.3.2-7]") from None

    def _pubacks(self, data: bytes, start: int, stop: int, packets: list[Packet]) -> int:
        """Append a PUBACK that says success, and those that come right behind it; return where the last one ends."""
        if data[stop : stop + 2] != b"@\2":
            packet_ids = [data[start + 2] << 8 | data[start + 3]]
        else:
            run = _PUBACKS.match(data, start)
            assert run is not None
            stop = run.end()
            packet_ids = list(struct.unpack(f">{(stop - start) // 2}H", run[0])[1::2])
        if 0 in packet_ids:
            if packet_ids[0]:
                packets.append(packet_ids[: packet_ids.index(0)])  # what came before the fault is good
            raise ProtocolError("protocol error: PUBACK with Packet Identifier 0 [MQTT-2.2.1-3]")
        packets.append(packet_ids)
        return stop

    def _ack(self, first: int, data: bytes, pos: int, stop: int) -> Ack:
        length = stop - pos
        if length < 2 or (length > 2 and not self._version5):
            raise ProtocolError(f"malformed packet: {packet_name(first)} with {length} bytes after its header")
        packet_id = data[pos] << 8 | data[pos + 1]
        if not packet_id:
            raise ProtocolError(f"protocol error: {packet_name(first)} with Packet Identifier 0 [MQTT-2.2.1-3]")
        code = data[pos + 2] if length > 2 else 0
        return first, packet_id, code, decode_reason_string(data, pos + 3, stop) if length > 3 else None


def encode_publish(
    topic: bytes,
    payload: bytes,
    *,
    qos: int = 0,
    retain: bool = False,
    dup: bool = False,
    packet_id: int = 0,
    properties: bytes | None = None,
) -> bytes:
    """A PUBLISH packet. ``properties`` is a whole property block for MQTT 5 and None for 3.1.1."""
    block = b"" if properties is None else properties
    size = len(topic)
    length = 2 + size + len(payload) + len(block) + (2 if qos else 0)
    first = 0x30 | (8 if dup else 0) | qos << 1 | (1 if retain else 0)
    # Formatting is the quickest way to put bytes together.
    if qos:
        ids = packet_id >> 8, packet_id & 255
        if length < 128:
            return b"%c%c%c%c%b%c%c%b%b" % (first, length, size >> 8, size & 255, topic, *ids, block, payload)
        head = encode_varint(length)
        return b"%c%b%c%c%b%c%c%b%b" % (first, head, size >> 8, size & 255, topic, *ids, block, payload)
    if length < 128:
        return b"%c%c%c%c%b%b%b" % (first, length, size >> 8, size & 255, topic, block, payload)
    return b"%c%b%c%c%b%b%b" % (first, encode_varint(length), size >> 8, size & 255, topic, block, payload)


def encode_ack(first: int, packet_id: int, code: int = 0) -> bytes:
    """PUBACK, PUBREC, PUBREL or PUBCOMP; a reason code other than 0 exists in MQTT 5 only."""
    if code:
        return b"%c\3%c%c%c" % (first, packet_id >> 8, packet_id & 255, code)
    return b"%c\2%c%c" % (first, packet_id >> 8, packet_id & 255)


def encode_pubacks(packet_ids: list[int]) -> bytes:
    """PUBACKs that say success."""
    data = bytearray(b"@\2\0\0") * len(packet_ids)
    ids = struct.pack(f">{len(packet_ids)}H", *packet_ids)
    data[2::4] = ids[::2]
    data[3::4] = ids[1::2]
    return bytes(data)
