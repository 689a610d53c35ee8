"""The packet reader and the PUBLISH family, against the specification and the independent codec of the test peers.

Whatever the bytes are and however they are chopped, the outcome is packets or one ``ProtocolError``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from tests.packets import (
    CONNACK,
    comparables,
    incoming_properties,
    new_reader,
    packet_ids,
    publish_properties,
    qos,
    read,
    texts,
    topics,
    versions,
    wire_properties,
    wire_publish,
)
from trio_mqtt_driver import ProtocolError
from trio_mqtt_driver._packets import PUBACK, PUBCOMP, PUBREC, PUBREL, encode_ack, encode_publish, packet_name
from trio_mqtt_driver._properties import encode_publish_properties, encode_varint
from trio_mqtt_driver._types import Message, PublishProperties
from trio_mqtt_driver.testing import Ack, Decoder, Kind, Publish, WireError, encode
from trio_mqtt_driver.testing._properties import Properties

ACKS = {PUBACK: Kind.PUBACK, PUBREC: Kind.PUBREC, PUBREL: Kind.PUBREL, PUBCOMP: Kind.PUBCOMP}


def publish_packet(body: bytes, first: int = 0x30) -> bytes:
    return bytes((first,)) + encode_varint(len(body)) + body


# -- examples from the specification --------------------------------------------------------------------------------


def test_a_publish_of_3_1_1_is_read() -> None:
    (message,), error = read(b"\x3d\x09\x00\x03a/b\x00\x0ahi", version=4)
    assert error == ""
    assert isinstance(message, Message)
    assert wire_publish(message) == Publish(topic="a/b", payload=b"hi", qos=2, retain=True, dup=True, packet_id=10)


def test_the_generation_is_written_on_each_message() -> None:
    (message,) = new_reader(generation=7).feed(b"\x30\x04\x00\x01a\x00")
    assert isinstance(message, Message)
    assert message.generation == 7


def test_other_packets_are_handed_on_whole() -> None:
    suback = b"\x90\x04\x00\x01\x00\x00"
    assert read(suback + b"\xd0\x00") == ([suback, b"\xd0\x00"], "")


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"\x40\x02\x00\x01", [1]),
        (b"\x40\x02\x00\x01\x40\x02\xff\xfe\x40\x02\x00\x03", [1, 0xFFFE, 3]),
        (b"\x40\x03\x00\x01\x87", (PUBACK, 1, 0x87, None)),
        (b"\x50\x04\xff\xff\x97\x00", (PUBREC, 65535, 0x97, None)),
        (b"\x70\x09\x00\x01\x92\x05\x1f\x00\x02no", (PUBCOMP, 1, 0x92, "no")),
        (b"\x62\x0a\x00\x01\x00\x06\x26\x00\x01a\x00\x00", (PUBREL, 1, 0, None)),
    ],
)
def test_an_acknowledgement_is_read(data: bytes, expected: object) -> None:
    assert read(data) == ([expected], "")


@pytest.mark.parametrize(
    "value, data",
    [
        (0, b"\x00"),
        (127, b"\x7f"),
        (128, b"\x80\x01"),
        (16383, b"\xff\x7f"),
        (16384, b"\x80\x80\x01"),
        (2097151, b"\xff\xff\x7f"),
        (2097152, b"\x80\x80\x80\x01"),
        (268435455, b"\xff\xff\xff\x7f"),
    ],
)
def test_variable_byte_integers_are_those_of_the_specification(value: int, data: bytes) -> None:
    assert encode_varint(value) == data


# -- what is refused ------------------------------------------------------------------------------------------------


FAULTS_3_1_1 = [
    (b"\x36\x05\x00\x01a\x00\x01", "PUBLISH with first byte 0x36"),  # QoS 3
    (b"\x38\x03\x00\x01a", "DUP and QoS 0"),
    (b"\x32\x05\x00\x01a\x00\x00", "Packet Identifier 0"),
    (b"\x32\x03\x00\x01a", "without its Packet Identifier"),
    (b"\x32\x04\x00\x01a\x00", "without its Packet Identifier"),
    (b"\x30\x00", "without a Topic Name"),
    (b"\x30\x01\x00", "without a Topic Name"),
    (b"\x30\x02\x00\x00", "empty Topic Name"),
    (b"\x30\x03\x00\x02a", "longer than the packet"),
    (b"\x30\x03\x00\x01\x00", "U+0000"),
    (b"\x30\x03\x00\x01\xff", "not UTF-8"),
    (b"\x30\x05\x00\x03\xed\xa0\x80", "not UTF-8"),  # a surrogate
    (b"\x30\x03\x00\x01+", "wildcard"),
    (b"\x30\x05\x00\x03a/#", "wildcard"),
    (b"\x40\x02\x00\x00", "PUBACK with Packet Identifier 0"),
    (b"\x40\x01\x00", "PUBACK with 1 bytes"),
    (b"\x40\x03\x00\x01\x00", "PUBACK with 3 bytes"),
    (b"\x41\x02\x00\x01", "PUBACK with first byte 0x41"),
    (b"\x60\x02\x00\x01", "PUBREL with first byte 0x60"),
    (b"\x92\x03\x00\x01\x00", "SUBACK with first byte 0x92"),
    (b"\x00\x00", "packet type 0"),
    (b"\x10\x00", "CONNECT with first byte 0x10 from a server"),
    (b"\x82\x00", "SUBSCRIBE with first byte 0x82 from a server"),
    (b"\xc0\x00", "PINGREQ with first byte 0xc0 from a server"),
    (b"\xe0\x00", "DISCONNECT with first byte 0xe0 from a server"),
    (b"\xf0\x00", "AUTH with first byte 0xf0"),
    (b"\x30\x80\x80\x80\x80", "Remaining Length of more than 4 bytes"),
    (b"\xd0\x80\x00", "shortest form"),
]


@pytest.mark.parametrize("data, words", FAULTS_3_1_1)
def test_what_3_1_1_does_not_allow_is_a_protocol_error(data: bytes, words: str) -> None:
    packets, error = read(data, version=4)
    assert packets == []
    assert words in error
    with pytest.raises(WireError):
        list(Decoder(server=False, version=4).packets(CONNACK[4] + data))


@pytest.mark.parametrize("data, words", FAULTS_3_1_1)
def test_a_fault_in_the_middle_of_a_flood_is_found_too_and_what_came_before_is_kept(data: bytes, words: str) -> None:
    """Known topics and packets that are alike are read in a quicker way, which must not be one past the rules."""
    good = b"\x30\x04\x00\x01ax\x32\x06\x00\x01a\x00\x07y"
    packets, error = read(good * 2 + data, version=4)
    assert [wire_publish(packet).payload for packet in packets if isinstance(packet, Message)] == [b"x", b"y"] * 2
    assert len(packets) == 4
    assert words in error


@pytest.mark.parametrize(
    "rest",
    [
        b"\x32\x05\x00\x01a\x00\x00",  # an identifier of 0
        b"\x32\x04\x00\x01a\x00",  # half an identifier
        b"\x32\x05\x00\x01a\x00\x07",  # no property length
        b"\x30\x03\x00\x01a",
        b"\x30\x05\x00\x09a\x00x",  # a topic beyond the packet
    ],
)
def test_a_flood_of_mqtt_5_is_read_by_the_rules_too(rest: bytes) -> None:
    good = b"\x30\x05\x00\x01a\x00x\x32\x07\x00\x01a\x00\x07\x00y"
    packets, error = read(good * 2 + rest + good)
    assert len(packets) == 4
    assert error


@pytest.mark.parametrize("first, rest", [(0x30, b""), (0x32, b""), (0x32, b"\0"), (0x32, b"\0\7")])
def test_a_long_topic_that_leaves_no_room_in_its_packet_is_found_in_a_flood_too(first: int, rest: bytes) -> None:
    topic = b"\x00\x96" + b"t" * 150
    good = publish_packet(topic + b"\0x")
    packets, error = read(good * 2 + publish_packet(topic + rest, first) + b"\0\1\0\0" + good)
    assert len(packets) == 2
    assert "malformed packet" in error


@pytest.mark.parametrize(
    "rest, words",
    [
        (b"\x30\x06\x00\x01a\x05\x0b\x07", "longer than it"),  # the payload is the block that is known, but shorter
        (b"\x30\x05\x00\x01a\x03\x0b", "longer than it"),
        (b"\x30\x07\x00\x01a\x03\x0b\x07\x0b", "malformed packet"),  # a known block and half another one
        (b"\x30\x07\x00\x01a\x82\x00\x0b\x07", "property length"),  # its length in two bytes
        (b"\x30\x07\x00\x01a\x03\x23\x00\x09", "Topic Alias 9"),
    ],
)
def test_properties_are_read_by_the_rules_in_a_flood_too(rest: bytes, words: str) -> None:
    good = b"\x30\x07\x00\x01a\x02\x0b\x07x\x32\x09\x00\x01a\x00\x07\x02\x0b\x07y"
    packets, error = read(good * 2 + rest + good)
    messages = [packet for packet in packets if isinstance(packet, Message)]
    assert [(message.payload, message.properties.subscription_identifiers) for message in messages] == [
        (b"x", (7,)),
        (b"y", (7,)),
    ] * 2
    assert len(packets) == 4
    assert words in error


def test_a_property_length_of_two_bytes_is_not_taken_for_one_byte_and_a_block_that_is_known() -> None:
    block = b"\x01\x00\x03\x00\x7d" + b"t" * 125
    good = publish_packet(b"\x00\x01a\x82\x01" + block + b"x")
    packets, error = read(good * 2 + publish_packet(b"\x00\x01a\x82" + block + b"x"))
    assert len(packets) == 2
    assert "property 0x00" in error


def test_payloads_are_counted_without_their_properties() -> None:
    reader = new_reader()
    messages = b"".join(
        publish_packet(b"\0\1a" + packet_id + b"\2\x0b\7" + bytes(size), 0x32 if packet_id else 0x30)
        for size in (3, 200)
        for packet_id in (b"", b"\0\7")
    )
    assert len(reader.feed(messages)) == 4  # topic and properties are new
    assert not reader.plain
    assert len(reader.feed(messages * 2)) == 8
    assert (reader.plain, reader.plain_1, reader.plain_size) == (True, 4, 2 * (3 + 3 + 200 + 200))


def test_a_topic_alias_is_set_and_used_in_a_flood_too() -> None:
    aliases = [aliased("a", 1), aliased("", 1), aliased("b", 1), aliased("", 1), aliased("a", 1), aliased("", 1)]
    packets, error = read(b"".join(aliases * 2), topic_alias_maximum=1)
    topics = [packet.topic for packet in packets if isinstance(packet, Message)]
    assert topics == ["a", "a", "b", "b", "a", "a"] * 2
    assert error == ""


def test_while_a_packet_trickles_in_nothing_is_said_of_those_before() -> None:
    """Who takes the rows would count them again."""
    good = publish_packet(b"\0\1a\0\7\0xyz", 0x32)
    reader = new_reader()
    assert len(reader.feed(good)) == 1  # a topic that is new
    large = publish_packet(b"\0\1a\0\7\0" + bytes(1000), 0x32)
    assert len(reader.feed(good * 3 + large[:10])) == 3
    assert (reader.plain, reader.plain_1, reader.plain_size) == (True, 3, 9)
    assert reader.feed(large[10:500]) == []
    assert (reader.plain, reader.plain_1, reader.plain_size) == (False, 0, 0)
    assert len(reader.feed(large[500:])) == 1
    assert (reader.plain, reader.plain_1, reader.plain_size) == (True, 1, 1000)
    assert reader.feed(good + b"\1")
    assert reader.error is not None
    assert reader.feed(good) == []
    assert (reader.plain, reader.plain_1, reader.plain_size) == (False, 0, 0)


@pytest.mark.parametrize("maximum, payload", [(20, 14), (400, 393)])
def test_a_packet_that_is_too_large_is_refused_in_a_flood_too(maximum: int, payload: int) -> None:
    reader = new_reader(maximum_packet_size=maximum)
    assert len(reader.feed(publish_packet(b"\0\1a\0" + bytes(payload)) * 3)) == 3
    assert not reader.feed(publish_packet(b"\0\1a\0" + bytes(payload + 1)))
    assert f"maximum_packet_size={maximum}" in str(reader.error)


def test_pubacks_before_a_bad_one_count() -> None:
    assert read(b"@\x02\x00\x05" * 3 + b"@\x02\x00\x00" + b"@\x02\x00\x06") == (
        [[5, 5, 5]],
        "protocol error: PUBACK with Packet Identifier 0 [MQTT-2.2.1-3]",
    )


@pytest.mark.parametrize(
    "properties, words",
    [
        (b"", "without a property length"),
        (b"\x01", "longer than it"),
        (b"\x80", "property length"),
        (b"\x80\x00", "property length"),
        (b"\x80\x80\x80\x80\x01", "property length"),
        (b"\x02\x01\x02", "Payload Format Indicator of 2"),
        (b"\x04\x01\x00\x01\x00", "property 0x01 occurs twice"),
        (b"\x06\x23\x00\x01\x23\x00\x01", "property 0x23 occurs twice"),
        (b"\x03\x23\x00\x00", "Topic Alias of 0"),
        (b"\x02\x0b\x00", "Subscription Identifier of 0"),
        (b"\x03\x0b\x80\x00", "shortest form"),
        (b"\x06\x0b\x80\x80\x80\x80\x01", "shortest form"),
        (b"\x03\x02\x00\x00", "longer than its packet"),
        (b"\x04\x03\x00\x05a", "longer than its packet"),
        (b"\x04\x03\x00\x01\x00", "U+0000"),
        (b"\x04\x03\x00\x01\xff", "not UTF-8"),
        (b"\x04\x08\x00\x01#", "Response Topic"),
        (b"\x03\x08\x00\x00", "Response Topic"),
        (b"\x04\x26\x00\x01a", "longer than its packet"),
        (b"\x03\x21\x00\x01", "property 0x21 is not allowed here"),
        (b"\x02\x7f\x00", "property 0x7f is not allowed here"),
    ],
)
def test_properties_that_mqtt_5_does_not_allow_are_a_protocol_error(properties: bytes, words: str) -> None:
    packets, error = read(publish_packet(b"\x00\x01a" + properties))
    assert packets == []
    assert words in error


@pytest.mark.parametrize(
    "body, words",
    [
        (b"\x00\x01\x00\x05", "property length of an acknowledgement"),
        (b"\x00\x01\x00\x00\x00", "property length of an acknowledgement"),
        (b"\x00\x01\x00\x02\x0b\x01", "property 0x0b is not allowed"),
        (b"\x00\x01\x00\x06\x1f\x00\x00\x1f\x00\x00", "property 0x1f occurs twice"),
    ],
)
def test_bad_properties_of_an_acknowledgement_are_a_protocol_error(body: bytes, words: str) -> None:
    packets, error = read(bytes((PUBACK, len(body))) + body)
    assert packets == []
    assert words in error


def test_user_properties_and_subscription_identifiers_may_be_repeated() -> None:
    properties = b"\x26\x00\x01a\x00\x01b\x0b\x05\x26\x00\x01a\x00\x01c\x0b\x06"
    (message,), _ = read(publish_packet(b"\x00\x01a" + bytes((len(properties),)) + properties))
    assert isinstance(message, Message)
    assert message.properties.user_properties == (("a", "b"), ("a", "c"))
    assert message.properties.subscription_identifiers == (5, 6)


def test_a_truncated_packet_cannot_read_into_the_next_one() -> None:
    # The topic would be "a" and four bytes of the PINGRESPs behind it.
    first, rest = b"\x30\x03\x00\x05a", b"\xd0\x00" * 4
    assert read(first + rest, version=4) == ([], read(first, version=4)[1])
    # The same for the properties of an acknowledgement.
    packets, error = read(b"\x40\x04\x00\x01\x00\x02" + b"\x1f\x00" + rest)
    assert packets == []
    assert "acknowledgement" in error


def test_packets_before_the_fault_are_returned_and_those_behind_it_are_not() -> None:
    reader = new_reader()
    assert reader.feed(b"\xd0\x00" + b"\x00\x00" + b"\xd0\x00") == [b"\xd0\x00"]
    assert reader.error is not None
    assert reader.feed(b"\xd0\x00") == []


# -- the first packet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\xd0\x00", "must be CONNACK"),
        (b"\x30\x04\x00\x01a\x00", "must be CONNACK"),
        (b"HTTP/1.1 400 Bad Request\r\n", "an HTTP server is listening there"),
        (b"H", "an HTTP server is listening there"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "a TLS server is listening there: use mqtts://"),
        (b"SSH-2.0-OpenSSH", "b'SSH-2.0-Open'"),
    ],
)
def test_a_stream_that_does_not_begin_with_connack_is_told_what_it_looks_like(data: bytes, words: str) -> None:
    packets, error = read(data, connected=False)
    assert packets == []
    assert words in error


def test_a_peer_that_is_no_broker_is_found_out_by_its_first_byte() -> None:
    reader = new_reader(connected=False)
    reader.feed(b"S")
    assert reader.error is not None


def test_auth_may_come_before_connack_in_mqtt_5_only() -> None:
    auth = b"\xf0\x01\x18"
    assert read(auth + auth + CONNACK[5], connected=False) == ([auth, auth, CONNACK[5]], "")
    assert "must be CONNACK" in read(auth, version=4, connected=False)[1]


# -- topic aliases --------------------------------------------------------------------------------------------------


def aliased(topic: str, alias: int) -> bytes:
    return encode(Publish(topic=topic, payload=b"", properties={"topic_alias": alias}), 5)


def test_a_topic_alias_stands_for_the_topic_until_it_is_set_again() -> None:
    data = aliased("a", 1) + aliased("b", 2) + aliased("", 1) + aliased("", 2) + aliased("c", 1) + aliased("", 1)
    packets, error = read(data, topic_alias_maximum=2)
    assert error == ""
    assert [packet.topic for packet in packets if isinstance(packet, Message)] == ["a", "b", "a", "b", "c", "c"]


def test_topic_aliases_beyond_the_announced_maximum_or_never_set_are_protocol_errors() -> None:
    assert "at most 2" in read(aliased("a", 3), topic_alias_maximum=2)[1]
    assert "was never set" in read(aliased("", 2), topic_alias_maximum=2)[1]
    assert "at most 0" in read(aliased("a", 1))[1]


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_a_packet_that_is_too_large_is_refused_when_its_header_is_there() -> None:
    reader = new_reader(maximum_packet_size=1024)
    assert reader.feed(b"\x30\xfd\x07") == []  # 1021 bytes to come: 1024 in all
    assert reader.error is None
    reader = new_reader(maximum_packet_size=1024)
    assert reader.feed(b"\x30\xfe\x07") == []
    assert reader.error is not None
    assert "PUBLISH of 1025 bytes is larger than maximum_packet_size=1024" in str(reader.error)


def test_a_control_packet_that_paho_would_take_minutes_for_is_refused_when_its_header_is_there() -> None:
    reader = new_reader(maximum_packet_size=10_000_000)
    assert reader.feed(b"\x90" + encode_varint(65_537)) == []
    assert reader.error is not None
    assert "SUBACK of 65541 bytes" in str(reader.error)
    whole = b"\x90" + encode_varint(65_000) + bytes(65_000)
    assert read(whole) == ([whole], "")


def test_a_large_packet_in_small_pieces_is_put_together_once() -> None:
    payload = bytes(range(256)) * 4096
    data = encode(Publish(topic="a", payload=payload), 5)
    reader = new_reader(maximum_packet_size=2_000_000)
    *early, last = (data[start : start + 997] for start in range(0, len(data), 997))
    assert not any(reader.feed(piece) for piece in early)
    assert reader.partial
    (message,) = reader.feed(last)
    assert isinstance(message, Message)
    assert message.payload == payload
    assert not reader.partial


def test_a_long_list_of_user_properties_does_not_take_quadratic_time() -> None:
    """200,000 pairs: a second where the time is linear; with tuples that grow it was minutes."""
    pairs = b"\x26\x00\x00\x00\x00" * 200_000
    (message,), error = read(
        publish_packet(b"\x00\x01a" + encode_varint(len(pairs)) + pairs), maximum_packet_size=2_000_000
    )
    assert error == ""
    assert isinstance(message, Message)
    assert len(message.properties.user_properties) == 200_000


def test_what_the_reader_remembers_is_bounded_whatever_the_broker_sends() -> None:
    reader = new_reader()
    for number in range(10_000):
        properties = {"content_type": f"type {number}"}
        (message,) = reader.feed(encode(Publish(topic=f"topic/{number}", payload=b"", properties=properties), 5))
        assert isinstance(message, Message)
        assert (message.topic, message.properties.content_type) == (f"topic/{number}", f"type {number}")
    for size in range(120):
        for topic in ("a", "bc", *(digits * "x" for digits in range(3, 13))):
            reader.feed(encode(Publish(topic=topic, payload=bytes(min(size, 110))), 5))
    for size in range(120, 5000):
        reader.feed(encode(Publish(topic="a", payload=bytes(size)), 5))
    assert len(reader._shapes) <= 2048
    assert len(reader._topics) <= 4096
    assert len(reader._blocks) <= 256


def test_where_all_packets_differ_few_are_noted_and_one_that_comes_again_is() -> None:
    """To note how one is taken apart takes as long as to read several."""
    reader = new_reader()
    reader.feed(publish_packet(b"\0\1a\0"))
    for size in range(10_000):
        assert reader.feed(publish_packet(b"\0\1a\0" + bytes(size)))
    assert 64 <= len(reader._shapes) <= 64 + 10_000 / 32 + 1
    often = publish_packet(b"\0\1a\0" + bytes(10_000))
    for _ in range(40):
        assert reader.feed(often)
    assert often[:5] in reader._shapes


# -- any bytes in any chunks ----------------------------------------------------------------------------------------


@st.composite
def publishes(draw: st.DrawFn) -> Publish:
    level = draw(qos)
    return Publish(
        topic=draw(topics),
        payload=draw(st.binary(max_size=300)),
        qos=level,
        retain=draw(st.booleans()),
        dup=level > 0 and draw(st.booleans()),
        packet_id=draw(packet_ids) if level else 0,
        properties=wire_properties(draw(incoming_properties)),
    )


acknowledgements = st.builds(Ack, kind=st.sampled_from(list(ACKS.values())), packet_id=packet_ids)
legal_packets = publishes() | acknowledgements


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in pairwise(bounds)]


@st.composite
def nearly_packets(draw: st.DrawFn) -> bytes:
    """A stream of legal packets with some bytes changed, put in or left out."""
    data = bytearray(b"".join(encode(packet, 5) for packet in draw(st.lists(legal_packets, max_size=5))))
    for place, value, how in draw(
        st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255), st.integers(0, 2)), max_size=4)
    ):
        if data:
            start = place % len(data)
            data[start : start + (how > 0)] = bytes((value,)) if how < 2 else b""
    return bytes(data)


@given(
    data=st.binary(max_size=300) | nearly_packets(),
    places=st.lists(st.integers(0, 2000), max_size=8),
    version=versions,
    connected=st.booleans(),
)
@example(data=b"\x30\x80\x80\x80\x80\x01", places=[1, 2, 3, 4], version=5, connected=True)
@example(data=b"\x32\x00", places=[1], version=5, connected=True)
def test_any_bytes_in_any_chunks_are_packets_or_one_protocol_error(
    data: bytes, places: list[int], version: int, connected: bool
) -> None:
    whole = new_reader(version, connected=connected, topic_alias_maximum=3)
    expected = comparables(whole.feed(data))
    for pieces in (cut(data, places), [data[at : at + 1] for at in range(len(data))]):
        reader = new_reader(version, connected=connected, topic_alias_maximum=3)
        got = comparables(packet for piece in pieces for packet in reader.feed(piece))
        assert got == expected
        assert (reader.error is None) == (whole.error is None)
        assert reader.error is None or isinstance(reader.error, ProtocolError)


@given(data=nearly_packets() | st.binary(max_size=60).map(publish_packet))
def test_the_independent_codec_comes_to_the_same_messages(data: bytes) -> None:
    """Up to the first fault of either; the peers also check reason codes, which is the connection's part here."""
    publishes: list[Publish] = []
    refused = False
    decoder = Decoder(server=False, version=5, maximum_packet_size=100_000)
    try:
        publishes.extend(packet for packet in decoder.packets(data) if isinstance(packet, Publish))
    except WireError:
        refused = True
    reader = new_reader(topic_alias_maximum=65535)
    ours = [wire_publish(packet) for packet in reader.feed(data) if isinstance(packet, Message)]
    # An alias alone is resolved by our reader and not by theirs, which leaves such a stream to the tests above.
    if any(not packet.topic for packet in publishes):
        return
    assert ours[: len(publishes)] == publishes
    if not refused:
        assert ours == publishes
        assert reader.error is None or decoder._buffer  # theirs waits for the body before it looks at the flags


class Forgetful(dict[bytes, str]):
    """In place of the topics that have come before: then each packet is looked at by itself."""

    def get(self, *_: object) -> None:  # type: ignore[override]  # no default is asked for
        return None


FEW_TOPICS = ["a", "b/c", "d" * 120]
PROPERTIES: list[dict[str, Any]] = [
    {"content_type": "x"},
    {"subscription_identifiers": (7,)},
    {"content_type": "y" * 100, "subscription_identifiers": (1, 300)},
]
LONG_OR_ALIAS: list[dict[str, Any]] = [{"content_type": "z" * 130}, {"topic_alias": 3}]
shapes = st.tuples(
    st.sampled_from(FEW_TOPICS),
    st.sampled_from([3, 5, 117, 118, 119, 120, 121, 122, 123, 400, 16_200, 16_400]),
    st.sampled_from([0, 0, 1, 300, 65535]),
    st.sampled_from([{}, {}, *PROPERTIES, *LONG_OR_ALIAS]),
)


@given(
    shapes=st.lists(shapes, max_size=12),
    fault=st.none() | st.tuples(st.integers(0, 300), st.integers(0, 255)),
    places=st.lists(st.integers(0, 40_000), max_size=3),
    version=versions,
)
def test_packets_that_are_alike_are_read_by_the_rules(
    shapes: list[tuple[str, int, int, dict[str, Any]]], fault: tuple[int, int] | None, places: list[int], version: int
) -> None:
    """They are taken apart in a quicker way, once their topics, properties and first bytes have come before."""
    packets = [
        Publish(
            topic=topic,
            payload=bytes(size),
            qos=int(packet_id > 0),
            packet_id=packet_id,
            properties=properties if version == 5 else {},
        )
        for topic, size, packet_id, properties in shapes
    ]
    reader = new_reader(version, topic_alias_maximum=65535)
    known = [Publish(topic=topic) for topic in FEW_TOPICS]
    if version == 5:
        known += [Publish(topic="a", properties=properties) for properties in PROPERTIES]
    assert len(reader.feed(b"".join(encode(packet, version) for packet in known))) == len(known)
    data = bytearray(b"".join(encode(packet, version) for packet in packets * 2))
    if fault is None:
        assert [wire_publish(one) for one in reader.feed(data) if isinstance(one, Message)] == packets * 2
        largest = max((len(encode(packet, version)) for packet in packets), default=0)
        assert reader.plain == (
            largest < 16_384 + 3 and not any(packet.properties in LONG_OR_ALIAS for packet in packets)
        )
        if reader.plain:
            assert reader.plain_1 == 2 * sum(packet.qos for packet in packets)
            assert reader.plain_size == 2 * sum(len(packet.payload) for packet in packets)
    elif data:
        data[fault[0] % len(data)] = fault[1]
    slow = new_reader(version, topic_alias_maximum=65535)
    slow._topics = Forgetful()
    expected = comparables(slow.feed(data))
    got = comparables(packet for piece in cut(bytes(data), places) for packet in reader.feed(piece))
    assert got == expected
    assert (reader.error is None) == (slow.error is None)


@given(packets=st.lists(legal_packets, max_size=5), version=versions)
def test_a_valid_stream_that_trickles_in_byte_by_byte_is_read(packets: list[Publish | Ack], version: int) -> None:
    data = b"".join(encode(packet, version) for packet in packets)
    reader = new_reader(version)
    count = sum(len(reader.feed(data[at : at + 1])) for at in range(len(data)))
    assert reader.error is None
    assert count == len(packets)
    assert not reader.partial


# -- encoding -------------------------------------------------------------------------------------------------------


@given(
    topic=topics,
    payload=st.binary(max_size=300),
    qos=qos,
    retain=st.booleans(),
    dup=st.booleans(),
    packet_id=packet_ids,
    properties=publish_properties,
    version=versions,
)
def test_what_we_publish_a_broker_reads(
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,
    dup: bool,
    packet_id: int,
    properties: PublishProperties,
    version: int,
) -> None:
    dup = dup and qos > 0
    data = encode_publish(
        topic.encode(),
        payload,
        qos=qos,
        retain=retain,
        dup=dup,
        packet_id=packet_id,
        properties=encode_publish_properties(properties) if version == 5 else None,
    )
    (packet,) = Decoder(server=False, version=version).packets(data)
    assert packet == Publish(
        topic=topic,
        payload=payload,
        qos=qos,
        retain=retain,
        dup=dup,
        packet_id=packet_id if qos else 0,
        properties=wire_properties(properties) if version == 5 else {},
    )


@given(first=st.sampled_from(list(ACKS)), packet_id=packet_ids, failed=st.booleans())
def test_what_we_acknowledge_a_broker_reads(first: int, packet_id: int, failed: bool) -> None:
    code = 0 if not failed else 0x92 if first in (PUBREL, PUBCOMP) else 0x97
    (packet,) = Decoder(server=False, version=5).packets(encode_ack(first, packet_id, code))
    assert packet == Ack(kind=ACKS[first], packet_id=packet_id, reason_code=code)


@given(texts, texts)
def test_the_reason_string_of_an_acknowledgement_is_read(reason: str, name: str) -> None:
    properties: Properties = {"reason_string": reason, "user_properties": ((name, "x"),)}
    data = encode(Ack(kind=Kind.PUBACK, packet_id=1, reason_code=0x80, properties=properties), 5)
    assert read(data) == ([(PUBACK, 1, 0x80, reason)], "")


def test_packets_have_names() -> None:
    assert packet_name(0x3D) == "PUBLISH"
    assert packet_name(0x00) == "packet type 0"
