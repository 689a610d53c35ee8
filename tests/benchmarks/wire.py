"""As much of MQTT's bytes as the servers and the bare loop need; written to be fast, not to be complete."""

from __future__ import annotations

from collections.abc import Iterator

from .job import CONTENT_TYPE, DONE, USER_PROPERTIES, Job

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 9, 10, 12, 14
PINGRESP = b"\xd0\x00"
ID_CYCLE = 1000
"""Ready-made QoS 1 packets have the identifiers 1 to 1,000 in turn; a window is never larger."""


def length_bytes(value: int) -> bytes:
    """A Variable Byte Integer [MQTT-1.5.5]."""
    out = bytearray()
    while True:
        value, digit = value >> 7, value & 0x7F
        out.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(out)


def string(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(2, "big") + raw


def packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + length_bytes(len(body)) + body


def connect(client_id: str, version: str) -> bytes:
    level, properties = (b"\x05", b"\x00") if version == "5" else (b"\x04", b"")
    return packet(CONNECT << 4, string("MQTT") + level + b"\x02\x00\x00" + properties + string(client_id))


def connack(version: str) -> bytes:
    return b"\x20\x03\x00\x00\x00" if version == "5" else b"\x20\x02\x00\x00"


def subscribe(filters: list[str], qos: int, version: str, packet_id: int = 1) -> bytes:
    body = b"".join(string(topic_filter) + bytes((qos,)) for topic_filter in filters)
    return packet(0x82, packet_id.to_bytes(2, "big") + (b"\x00" if version == "5" else b"") + body)


def publish_properties(job: Job) -> bytes:
    """The property block of a PUBLISH; nothing at all with 3.1.1."""
    if job.version != "5":
        return b""
    if not job.properties:
        return b"\x00"
    block = b"\x03" + string(CONTENT_TYPE)
    block += b"".join(b"\x26" + string(name) + string(value) for name, value in USER_PROPERTIES)
    return length_bytes(len(block)) + block


def publish(job: Job, topic: str, content: bytes, qos: int, packet_id: int = 0) -> bytes:
    identifier = packet_id.to_bytes(2, "big") if qos else b""
    return packet(0x30 | qos << 1, string(topic) + identifier + publish_properties(job) + content)


def ready_made(job: Job) -> tuple[bytes, list[int]]:
    """A block of packets, repeated as often as it takes for topics and identifiers to come out even, and where each
    begins; twice over, so that any stretch of it can be cut out in one piece."""
    topics = job.topic_names()
    size = max(ID_CYCLE if job.payload <= 1024 else 1, len(topics))
    assert size % len(topics) == 0, "topics must come out even"
    assert not job.qos or size % ID_CYCLE == 0, "identifiers must come out even"
    made = [
        publish(job, topics[number % len(topics)], job.content, job.qos, number % ID_CYCLE + 1)
        for number in range(size)
    ]
    starts = [0]
    for one in made + made:
        starts.append(starts[-1] + len(one))
    return b"".join(made) * 2, starts


def done(job: Job, qos: int, packet_id: int = 0) -> bytes:
    return publish(job, DONE, b"", qos, packet_id)


def remaining_length(data: bytes | bytearray | memoryview, position: int) -> tuple[int, int] | None:
    """The Remaining Length of the packet at ``position`` and where its body begins; None if that is not there yet."""
    value = shift = 0
    for at in range(position + 1, min(position + 5, len(data))):
        digit = data[at]
        value |= (digit & 0x7F) << shift
        if digit < 0x80:
            return value, at + 1
        shift += 7
    return None


def split(data: bytearray) -> Iterator[tuple[int, bytes]]:
    """Take whole packets off the front of ``data``: first byte and body."""
    while data:
        found = remaining_length(data, 0)
        if found is None or len(data) < found[0] + found[1]:
            return
        length, start = found
        first, body = data[0], bytes(data[start : start + length])
        del data[: start + length]
        yield first, body


_FIXED = {0x01: 1, 0x02: 4, 0x11: 4, 0x17: 1, 0x19: 1, 0x21: 2, 0x22: 2, 0x24: 1, 0x25: 1, 0x27: 4}


def receive_maximum(connect_body: bytes) -> tuple[str, int]:
    """MQTT version and Receive Maximum of a CONNECT; 65,535 if it names none [MQTT-3.1.2.11.3]."""
    name_length = int.from_bytes(connect_body[:2], "big")
    if connect_body[2 + name_length] != 5:
        return "3.1.1", 65535
    found = remaining_length(connect_body, 5 + name_length)
    assert found is not None, "a CONNECT that ends before its properties"
    length, position = found
    end = position + length
    while position < end:
        identifier = connect_body[position]
        if identifier == 0x21:
            return "5", int.from_bytes(connect_body[position + 1 : position + 3], "big")
        position += 1
        if identifier in _FIXED:
            position += _FIXED[identifier]
        else:
            for _ in range(2 if identifier == 0x26 else 1):
                position += 2 + int.from_bytes(connect_body[position : position + 2], "big")
    return "5", 65535


def count_filters(first: int, body: bytes, version: str) -> int:
    """Of a SUBSCRIBE, or of an UNSUBSCRIBE, whose filters have no options behind them."""
    position = 2
    if version == "5":
        found = remaining_length(body, 1)
        assert found is not None, "a packet that ends before its properties"
        position = found[0] + found[1]
    count = 0
    options = 1 if first >> 4 == SUBSCRIBE else 0
    while position < len(body):
        position += 2 + int.from_bytes(body[position : position + 2], "big") + options
        count += 1
    return count


def suback(body: bytes, version: str, count: int, qos: int) -> bytes:
    return packet(SUBACK << 4, body[:2] + (b"\x00" if version == "5" else b"") + bytes((qos,)) * count)


def unsuback(body: bytes, version: str, count: int) -> bytes:
    return packet(0xB0, body[:2] + (b"\x00" + bytes(count) if version == "5" else b""))
