"""SUBSCRIBE and SUBACK, held against paho's codec and the fake broker's."""

from __future__ import annotations

from typing import Any

import paho.mqtt.client as mqtt
import pytest
from hypothesis import given, strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from trio_mqtt_driver import ProtocolError, ReasonCode, RetainHandling
from trio_mqtt_driver._properties import encode_varint
from trio_mqtt_driver._subscribing import SubAck, decode_suback, encode_subscribe, needs_5, pack_filter
from trio_mqtt_driver.testing import Decoder, Suback, Subscribe, SubscriptionRequest, encode

topic_filters = st.sampled_from(["a", "a/#", "+/b", "$share/g/c", "ä/ü", "x" * 200, "y" * 65_535])
requests = st.lists(
    st.builds(
        SubscriptionRequest,
        topic_filter=topic_filters,
        qos=st.integers(0, 2),
        no_local=st.booleans(),
        retain_as_published=st.booleans(),
        retain_handling=st.sampled_from(RetainHandling),
    ).filter(lambda one: not (one.no_local and one.topic_filter.startswith("$share/"))),
    min_size=1,
    max_size=5,
)
CODES = (0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)


def pack(one: SubscriptionRequest) -> bytes:
    return pack_filter(
        one.topic_filter,
        one.qos,
        no_local=one.no_local,
        retain_as_published=one.retain_as_published,
        retain_handling=RetainHandling(one.retain_handling),
    )


class Pipe:
    def __init__(self) -> None:
        self.sent = bytearray()

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def fileno(self) -> int:
        return -1

    def pending(self) -> int:
        return 0

    def close(self) -> None: ...


def by_paho(wanted: list[SubscriptionRequest], identifier: int | None, users: list[tuple[str, str]]) -> bytes:
    arguments: dict[str, Any] = {"client_id": "x", "protocol": mqtt.MQTTv5}
    paho: Any = mqtt
    if hasattr(paho, "CallbackAPIVersion"):
        arguments["callback_api_version"] = paho.CallbackAPIVersion.VERSION2
    client: Any = paho.Client(**arguments)
    pipe = client._sock = Pipe()
    properties: Any = Properties(PacketTypes.SUBSCRIBE)  # type: ignore[no-untyped-call]  # paho has no annotations there
    if identifier is not None:
        properties.SubscriptionIdentifier = identifier
    for pair in users:
        properties.UserProperty = pair
    make: Any = SubscribeOptions
    client._send_subscribe(
        False,
        [
            (
                one.topic_filter.encode(),
                make(one.qos, one.no_local, one.retain_as_published, one.retain_handling),
            )
            for one in wanted
        ],
        properties,
    )
    client.loop_write()
    client._sock = None
    return bytes(pipe.sent)


@given(
    wanted=requests,
    identifier=st.none() | st.sampled_from([1, 127, 128, 268_435_455]),
    users=st.lists(st.tuples(st.text("ab", max_size=3), st.text("cd", max_size=3)), max_size=2),
)
def test_paho_would_send_the_same_bytes(
    wanted: list[SubscriptionRequest], identifier: int | None, users: list[tuple[str, str]]
) -> None:
    ours = encode_subscribe(
        1, [pack(one) for one in wanted], version5=True, identifier=identifier, user_properties=users
    )
    assert ours == by_paho(wanted, identifier, users)


@given(wanted=requests, packet_id=st.integers(1, 65535), version=st.sampled_from([4, 5]))
def test_a_broker_reads_what_was_asked_for(wanted: list[SubscriptionRequest], packet_id: int, version: int) -> None:
    data = encode_subscribe(packet_id, [pack(one) for one in wanted], version5=version == 5)
    (packet,) = Decoder(server=True, version=version).packets(data)
    assert isinstance(packet, Subscribe)
    assert packet.packet_id == packet_id
    expected = [
        one if version == 5 else SubscriptionRequest(topic_filter=one.topic_filter, qos=one.qos) for one in wanted
    ]
    assert list(packet.requests) == expected


@pytest.mark.parametrize(
    "options, needs",
    [
        ({"qos": 2}, False),
        ({"qos": 0, "no_local": True}, True),
        ({"qos": 0, "retain_as_published": True}, True),
        ({"qos": 0, "retain_handling": RetainHandling.SEND_IF_NEW}, True),
    ],
)
def test_what_3_1_1_cannot_say_is_known(options: dict[str, Any], needs: bool) -> None:
    assert needs_5(pack_filter("a", **options)) == needs


@given(
    codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=300),
    packet_id=st.integers(1, 65535),
    properties=st.sampled_from([{}, {"reason_string": "r" * 200}, {"user_properties": (("a", "b"), ("a", "b"))}]),
)
def test_a_suback_is_read(codes: list[int], packet_id: int, properties: dict[str, Any]) -> None:
    data = encode(Suback(packet_id=packet_id, reason_codes=tuple(codes), properties=properties), 5)
    body = data[1 + len(encode_varint(len(data) - 2 if len(data) < 130 else len(data) - 3)) :]
    assert decode_suback(body, version5=True) == SubAck(packet_id, tuple(ReasonCode(code) for code in codes))


@pytest.mark.parametrize(
    "body, version5, words",
    [
        (b"\0\1", True, "SUBACK of 2 bytes"),
        (b"\0\1\0", True, "SUBACK of 3 bytes"),
        (b"\0\1", False, "SUBACK of 2 bytes"),
        (b"\0\1\0\3", True, "SUBACK with reason code 0x03"),
        (b"\0\1\0\x81", True, "SUBACK with reason code 0x81"),
        (b"\0\1\x83", False, "SUBACK with reason code 0x83"),
        (b"\0\1\x80\x80\x80\x80\1\0", True, "the property length of SUBACK"),
        (b"\0\1\x80", True, "the property length of SUBACK"),
        (b"\0\1\5\x1f\0\1a", True, "the properties of SUBACK are longer than it"),
        (b"\0\1\3\x01\0\0\0", True, "property 0x01 is not allowed here"),
        (b"\0\1\4\x1f\0\5a\0", True, "malformed packet"),
    ],
)
def test_what_is_no_suback_is_a_protocol_error(body: bytes, version5: bool, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode_suback(body, version5=version5)
