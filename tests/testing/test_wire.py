"""The test kit's own codec: what it writes it can read, what MQTT forbids it refuses, and nothing else happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver.testing import (
    Ack,
    Auth,
    Connack,
    Connect,
    Decoder,
    Disconnect,
    Kind,
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
    WireError,
    encode,
)

# ---- every packet, from bytes written by hand out of the specification ----

HAND_WRITTEN: list[tuple[str, int, Packet]] = [
    (
        "10 10 0004 4d515454 04 02 003c 0004 74657374",
        4,
        Connect(client_id="test", version=4, clean_start=True, keep_alive=60),
    ),
    (
        "10 22 0004 4d515454 04 ee 000a 0001 63 0003 612f62 0002 6869 0004 75736572 0004 70617373",
        4,
        Connect(
            client_id="c",
            version=4,
            clean_start=True,
            keep_alive=10,
            will=Will(topic="a/b", payload=b"hi", qos=1, retain=True),
            username="user",
            password=b"pass",
        ),
    ),
    (
        "10 13 0004 4d515454 05 02 0000 05 11 0000000a 0001 63",
        5,
        Connect(client_id="c", version=5, clean_start=True, properties={"session_expiry": 10}),
    ),
    ("20 02 00 05", 4, Connack(reason_code=5)),
    ("20 06 01 00 03 21 000a", 5, Connack(session_present=True, properties={"receive_maximum": 10})),
    ("30 05 0003 612f62", 4, Publish(topic="a/b")),
    ("3b 08 0001 61 0007 6869 21", 4, Publish(topic="a", payload=b"hi!", qos=1, retain=True, dup=True, packet_id=7)),
    (
        "34 09 0001 61 0007 02 01 01 78",
        5,
        Publish(topic="a", payload=b"x", qos=2, packet_id=7, properties={"payload_format": 1}),
    ),
    ("40 02 0007", 4, Ack(kind=Kind.PUBACK, packet_id=7)),
    ("40 03 0007 10", 5, Ack(kind=Kind.PUBACK, packet_id=7, reason_code=0x10)),
    ("50 02 0007", 5, Ack(kind=Kind.PUBREC, packet_id=7)),
    ("62 02 0007", 5, Ack(kind=Kind.PUBREL, packet_id=7)),
    ("70 03 0007 92", 5, Ack(kind=Kind.PUBCOMP, packet_id=7, reason_code=0x92)),
    (
        "82 08 0001 0003 612f23 01",
        4,
        Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="a/#", qos=1),)),
    ),
    (
        "82 09 0001 02 0b 05 0001 2b 2e",
        5,
        Subscribe(
            packet_id=1,
            requests=(
                SubscriptionRequest(
                    topic_filter="+", qos=2, no_local=True, retain_as_published=True, retain_handling=2
                ),
            ),
            properties={"subscription_identifiers": (5,)},
        ),
    ),
    ("90 04 0001 02 80", 4, Suback(packet_id=1, reason_codes=(2, 0x80))),
    ("90 04 0001 00 87", 5, Suback(packet_id=1, reason_codes=(0x87,))),
    ("a2 05 0001 0001 61", 4, Unsubscribe(packet_id=1, topic_filters=("a",))),
    ("b0 02 0001", 4, Unsuback(packet_id=1)),
    ("b0 04 0001 00 11", 5, Unsuback(packet_id=1, reason_codes=(0x11,))),
    ("c0 00", 4, Pingreq()),
    ("d0 00", 4, Pingresp()),
    ("e0 00", 4, Disconnect()),
    ("e0 01 8e", 5, Disconnect(reason_code=0x8E)),
    (
        "f0 09 18 07 15 0001 6d 16 0000",
        5,
        Auth(reason_code=0x18, properties={"authentication_method": "m", "authentication_data": b""}),
    ),
]
FROM_CLIENT = {Kind.CONNECT, Kind.SUBSCRIBE, Kind.UNSUBSCRIBE, Kind.PINGREQ}


def decoder_for(packet: Packet, version: int) -> Decoder:
    server = packet.kind in FROM_CLIENT or (packet.kind is Kind.DISCONNECT and version == 4)
    return Decoder(server=server, version=0 if packet.kind is Kind.CONNECT else version)


@pytest.mark.parametrize("text,version,packet", HAND_WRITTEN)
def test_agrees_with_the_specification(text: str, version: int, packet: Packet) -> None:
    data = bytes.fromhex(text)
    assert encode(packet, version) == data
    assert list(decoder_for(packet, version).packets(data)) == [packet]


# ---- round trips ----

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
topics = text.filter(lambda topic: topic and "+" not in topic and "#" not in topic)
filters = st.one_of(topics, st.builds("{}/#".format, topics), st.just("+"), st.just("#"), st.just("$share/g/a/+"))
filters = filters.filter(lambda entry: entry == "$share/g/a/+" or not entry.startswith("$share/"))
ids = st.integers(1, 65535)
u32 = st.integers(0, 2**32 - 1)
users = st.lists(st.tuples(text, text), min_size=1, max_size=3).map(tuple)
publish_properties = st.fixed_dictionaries(
    {},
    optional={
        "payload_format": st.integers(0, 1),
        "message_expiry": u32,
        "content_type": text,
        "response_topic": topics,
        "correlation_data": st.binary(max_size=300),
        "user_properties": users,
        "topic_alias": ids,
    },
)
connect_properties = st.fixed_dictionaries(
    {},
    optional={
        "session_expiry": u32,
        "receive_maximum": ids,
        "maximum_packet_size": st.integers(1, 2**32 - 1),
        "topic_alias_maximum": st.integers(0, 65535),
        "request_problem_information": st.integers(0, 1),
        "user_properties": users,
    },
)


def with_version(strategy: Any, properties: Any) -> Any:
    """(packet, version) pairs: properties only with version 5."""

    def five(values: Any) -> Any:
        return st.tuples(strategy(values), st.just(5))

    return st.one_of(st.tuples(strategy({}), st.just(4)), properties.flatmap(five))


def publishes(properties: Mapping[str, Any]) -> st.SearchStrategy[Publish]:
    def fix(packet: dict[str, Any]) -> Publish:
        if not packet["qos"]:
            packet |= {"packet_id": 0, "dup": False}
        return Publish(**packet, properties=properties)

    return st.fixed_dictionaries(
        {
            "topic": topics,
            "payload": st.binary(max_size=300),
            "qos": st.integers(0, 2),
            "retain": st.booleans(),
            "dup": st.booleans(),
            "packet_id": ids,
        }
    ).map(fix)


def wills(version: int) -> st.SearchStrategy[Will]:
    properties = publish_properties.map(lambda p: {k: v for k, v in p.items() if k != "topic_alias"})
    return st.builds(
        Will,
        topic=topics,
        payload=st.binary(max_size=50),
        qos=st.integers(0, 2),
        retain=st.booleans(),
        properties=properties if version == 5 else st.just({}),
    )


def connects(version: int) -> st.SearchStrategy[Connect]:
    return st.builds(
        Connect,
        client_id=text,
        version=st.just(version),
        clean_start=st.booleans(),
        keep_alive=st.integers(0, 65535),
        will=st.none() | wills(version),
        username=text,
        password=st.none() | st.binary(max_size=50),
        properties=connect_properties if version == 5 else st.just({}),
    )


requests = st.builds(
    SubscriptionRequest,
    topic_filter=filters,
    qos=st.integers(0, 2),
    retain_as_published=st.booleans(),
    retain_handling=st.integers(0, 2),
)
client_packets_5: st.SearchStrategy[Packet] = st.one_of(
    publish_properties.flatmap(publishes),
    st.builds(
        Ack, kind=st.sampled_from([Kind.PUBACK, Kind.PUBREC]), packet_id=ids, reason_code=st.sampled_from([0, 0x87])
    ),
    st.builds(Subscribe, packet_id=ids, requests=st.lists(requests, min_size=1, max_size=5).map(tuple)),
    st.builds(Unsubscribe, packet_id=ids, topic_filters=st.lists(filters, min_size=1, max_size=5).map(tuple)),
    st.just(Pingreq()),
    st.builds(Disconnect, reason_code=st.sampled_from([0, 4, 0x97])),
)


@given(with_version(publishes, publish_properties))
def test_publish_round_trip(case: tuple[Publish, int]) -> None:
    packet, version = case
    assert list(Decoder(server=False, version=version).packets(encode(packet, version))) == [packet]


@given(st.sampled_from([4, 5]).flatmap(connects))
def test_connect_round_trip(packet: Connect) -> None:
    decoder = Decoder(server=True)
    assert list(decoder.packets(encode(packet, packet.version))) == [packet]
    assert decoder.version == packet.version


@given(st.lists(client_packets_5, max_size=8), st.lists(st.integers(1, 40), min_size=1))
def test_chunking_does_not_matter(packets: list[Packet], sizes: list[int]) -> None:
    data = encode(Connect(client_id="c"), 5) + b"".join(encode(packet, 5) for packet in packets)
    decoder = Decoder(server=True)
    got: list[Packet] = []
    position = index = 0
    while position < len(data):
        size = sizes[index % len(sizes)]
        got += decoder.packets(data[position : position + size])
        position, index = position + size, index + 1
    assert got[1:] == packets


# ---- what is refused ----

CONNECT_5 = "100d 0004 4d515454 05 02 0000 00 0000"
MALFORMED = [
    ("reserved type", "", "00 00", 0x81),
    ("not CONNECT first", "", "c0 00", 0x82),
    ("second CONNECT", CONNECT_5, CONNECT_5, 0x82),
    ("from the wrong side", CONNECT_5, "d0 00", 0x82),
    ("protocol name", "", "10 0c 0004 4d515455 04 02 0000 0000", 0x84),
    ("protocol version 3", "", "10 0c 0004 4d515454 03 02 0000 0000", 0x84),
    ("reserved flag in CONNECT", "", "10 0c 0004 4d515454 04 03 0000 0000", 0x81),
    ("will QoS without will", "", "10 0c 0004 4d515454 04 0a 0000 0000", 0x81),
    ("password without user in 3.1.1", "", "10 0d 0004 4d515454 04 42 0000 0000 0000"[:-1] + "0", 0x81),
    ("bytes after CONNECT", "", "10 0d 0004 4d515454 04 02 0000 0000 00", 0x81),
    ("flags of PINGREQ", CONNECT_5, "c1 00", 0x81),
    ("flags of SUBSCRIBE", CONNECT_5, "80 07 0001 00 0001 61 00", 0x81),
    ("QoS 3", CONNECT_5, "36 06 0001 61 0001 00", 0x81),
    ("DUP with QoS 0", CONNECT_5, "38 04 0001 61 00", 0x81),
    ("packet identifier 0", CONNECT_5, "32 06 0001 61 0000 00", 0x82),
    ("topic with a wildcard", CONNECT_5, "30 04 0001 2b 00", 0x90),
    ("topic with U+0000", CONNECT_5, "30 04 0001 00 00", 0x81),
    ("topic that is not UTF-8", CONNECT_5, "30 04 0001 ff 00", 0x81),
    ("topic that is longer than the packet", CONNECT_5, "30 03 0009 61", 0x81),
    ("empty topic without an alias", CONNECT_5, "30 03 0000 00", 0x82),
    ("unknown property", CONNECT_5, "30 06 0001 61 02 7f 00", 0x81),
    ("property of another packet", CONNECT_5, "30 07 0001 61 03 21 0001", 0x82),
    ("property twice", CONNECT_5, "30 08 0001 61 04 01 00 01 00", 0x82),
    ("property with an illegal value", CONNECT_5, "30 06 0001 61 02 01 02", 0x82),
    ("response topic with a wildcard", CONNECT_5, "30 08 0001 61 04 08 0001 2b", 0x82),
    ("properties longer than the packet", CONNECT_5, "30 04 0001 61 09", 0x81),
    ("subscription identifier from a client", CONNECT_5, "30 06 0001 61 02 0b 01", 0x82),
    ("SUBSCRIBE without a filter", CONNECT_5, "82 03 0001 00", 0x82),
    ("SUBSCRIBE with QoS 3", CONNECT_5, "82 07 0001 00 0001 61 03", 0x82),
    ("SUBSCRIBE with reserved options", CONNECT_5, "82 07 0001 00 0001 61 c0", 0x82),
    ("no local on a shared subscription", CONNECT_5, "82 10 0001 00 000a 2473686172652f672f61 04", 0x82),
    ("filter with # in the middle", CONNECT_5, "82 09 0001 00 0003 232f61 00", 0x8F),
    ("filter with + beside other characters", CONNECT_5, "82 08 0001 00 0002 612b 00", 0x8F),
    ("shared filter without a filter", CONNECT_5, "82 0e 0001 00 0008 2473686172652f67 00", 0x8F),
    ("reason code of another packet", CONNECT_5, "40 03 0001 8e", 0x82),
    ("AUTH without a method", CONNECT_5, "f0 01 18", 0x82),
    ("remaining length of five bytes", CONNECT_5, "30 8080808001", 0x81),
    ("remaining length not in its shortest form", CONNECT_5, "c0 8000", 0x81),
]


@pytest.mark.parametrize("before,data,code", [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_refuses(before: str, data: str, code: int) -> None:
    decoder = Decoder(server=True)
    assert len(list(decoder.packets(bytes.fromhex(before)))) == bool(before)
    with pytest.raises(WireError) as caught:
        list(decoder.packets(bytes.fromhex(data)))
    assert caught.value.reason_code == code


def test_refuses_a_large_packet_before_it_has_arrived() -> None:
    decoder = Decoder(server=False, version=5, maximum_packet_size=100)
    with pytest.raises(WireError, match="101 bytes; the maximum is 100") as caught:
        list(decoder.packets(b"\x30\x63"))
    assert caught.value.reason_code == 0x95
    assert list(Decoder(server=False, version=5, maximum_packet_size=100).packets(b"\x30\x62")) == []


def test_an_http_request_is_refused_at_its_first_byte() -> None:
    with pytest.raises(WireError):
        list(Decoder(server=True).packets(b"G"))


@given(st.binary(max_size=200), st.sampled_from([4, 5]), st.booleans())
def test_any_bytes_are_packets_or_a_wire_error(data: bytes, version: int, server: bool) -> None:
    decoder = Decoder(server=server, version=version)
    packets: list[Packet] = []
    code = 0
    try:
        packets.extend(decoder.packets(data))
    except WireError as error:
        code = error.reason_code
    assert code == 0 or code >= 0x80
    assert len(packets) <= len(data) // 2
