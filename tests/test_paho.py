"""``ControlPackets``: the control packets that paho writes and reads for us, against the codec of the test peers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from hypothesis import given, strategies as st

from tests.packets import new_reader, texts, topics, versions
from trio_mqtt_driver import DriverConfig, Endpoint, ProtocolError, ReasonCode, RetainHandling, Will
from trio_mqtt_driver._inflight import PacketIds
from trio_mqtt_driver._paho import (
    AuthPacket,
    ConnAck,
    ControlPackets,
    ServerDisconnect,
    _connect_properties,
    _server_limits,
)
from trio_mqtt_driver._properties import encode_varint
from trio_mqtt_driver._subscribing import SubAck, pack_filter
from trio_mqtt_driver._types import PayloadFormat, ServerLimits
from trio_mqtt_driver.testing import (
    Auth,
    Connack,
    Connect,
    Decoder,
    Disconnect,
    Packet,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
    Will as WireWill,
    encode,
)

ENDPOINT = Endpoint(host="memory", port=1883)
both_versions = pytest.mark.parametrize("version", [4, 5])


async def _no_loop() -> None:
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def control_packets(
    version: int, client_id: str = "me", *, clean_start: bool = True
) -> AsyncGenerator[ControlPackets, None]:
    async with trio.open_nursery() as nursery:
        yield ControlPackets(
            nursery,
            client_id=client_id,
            version=version,
            clean_start=clean_start,
            next_packet_id=PacketIds().allocate,
            loops=(_no_loop, _no_loop, _no_loop),
        )


@asynccontextmanager
async def connected(version: int) -> AsyncGenerator[ControlPackets, None]:
    async with control_packets(version) as control:
        control.connect_packet(DriverConfig(endpoint=ENDPOINT), None)
        assert control.feed(encode(Connack(), version)) == ConnAck(False, ReasonCode.SUCCESS)
        yield control


def decoded(*packets: bytes, version: int = 0) -> list[Packet]:
    """What a broker reads; ``version`` is needed where no CONNECT tells it."""
    decoder = Decoder(server=True)
    decoder.version = version
    return [packet for data in packets for packet in decoder.packets(data)]


async def connect_packet(config: DriverConfig, version: int, client_id: str = "me", auth: Any = None) -> Packet:
    async with control_packets(version, client_id) as control:
        (packet,) = decoded(control.connect_packet(config, auth))
    return packet


# -- CONNECT --------------------------------------------------------------------------------------------------------


@both_versions
async def test_connect_starts_clean_and_tells_what_is_configured(version: int) -> None:
    config = DriverConfig(endpoint=ENDPOINT, keep_alive=17)
    assert await connect_packet(config, version, "Größe") == Connect(
        client_id="Größe",
        version=version,
        clean_start=True,
        keep_alive=17,
        properties={}
        if version == 4
        else {"receive_maximum": 1000, "maximum_packet_size": 64 * 1024 * 1024, "topic_alias_maximum": 32},
    )


@both_versions
@pytest.mark.parametrize("password", [None, "pässword", b"\x00\xff", ""])
async def test_credentials_are_in_connect(version: int, password: str | bytes | None) -> None:
    config = DriverConfig(endpoint=ENDPOINT, username="üser", password=password)
    packet = await connect_packet(config, version)
    assert isinstance(packet, Connect)
    assert packet.username == "üser"
    assert packet.password == (password.encode() if isinstance(password, str) else password)


@both_versions
@pytest.mark.parametrize("payload", [b"", b"gone\x00", b"x" * 65535])
async def test_the_will_is_in_connect(version: int, payload: bytes) -> None:
    will = Will(topic="status/ä", payload=payload, qos=2, retain=True)
    packet = await connect_packet(DriverConfig(endpoint=ENDPOINT, will=will), version)
    assert isinstance(packet, Connect)
    assert packet.will == WireWill(topic="status/ä", payload=payload, qos=2, retain=True)


async def test_every_property_of_a_will_is_in_connect() -> None:
    will = Will(
        topic="status",
        payload="gone",
        delay=30,
        payload_format=PayloadFormat.UTF8,
        message_expiry=0,
        content_type="text/plain",
        response_topic="answer",
        correlation_data=b"\x00\x01",
        user_properties=[("a", "1"), ("a", "2")],
    )
    packet = await connect_packet(DriverConfig(endpoint=ENDPOINT, will=will), 5)
    assert isinstance(packet, Connect)
    assert packet.will is not None
    assert packet.will.properties == {
        "will_delay": 30,
        "payload_format": 1,
        "message_expiry": 0,
        "content_type": "text/plain",
        "response_topic": "answer",
        "correlation_data": b"\x00\x01",
        "user_properties": (("a", "1"), ("a", "2")),
    }


async def test_every_property_of_connect_is_in_connect() -> None:
    config = DriverConfig(
        endpoint=ENDPOINT,
        receive_maximum=5,
        maximum_packet_size=2048,
        topic_alias_maximum=0,
        request_response_information=True,
        request_problem_information=False,
        connect_user_properties=[("a", "1"), ("b", "2")],
    )
    packet = await connect_packet(config, 5, auth=("SCRAM", b""))
    assert isinstance(packet, Connect)
    assert packet.properties == {
        "receive_maximum": 5,
        "maximum_packet_size": 2048,
        "request_response_information": 1,
        "request_problem_information": 0,
        "authentication_method": "SCRAM",
        "authentication_data": b"",
        "user_properties": (("a", "1"), ("b", "2")),
    }


async def test_connect_says_what_is_configured_now() -> None:
    """Blocks of properties are remembered: of several configs each gets its own, again and again."""
    usual = {"receive_maximum": 1000, "maximum_packet_size": 64 * 1024 * 1024, "topic_alias_maximum": 32}
    said: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"receive_maximum": 5}, {"receive_maximum": 5}),
        ({"maximum_packet_size": 5000}, {"maximum_packet_size": 5000}),
        ({"topic_alias_maximum": 5}, {"topic_alias_maximum": 5}),
        ({"stable_id": True, "session_expiry": 5}, {"session_expiry": 5}),
        ({"stable_id": True, "session_expiry": 6}, {"session_expiry": 6}),
        ({"request_response_information": True}, {"request_response_information": 1}),
        ({"request_problem_information": False}, {"request_problem_information": 0}),
        ({"connect_user_properties": [("a", "1")]}, {"user_properties": (("a", "1"),)}),
        ({"connect_user_properties": [("a", "2")]}, {"user_properties": (("a", "2"),)}),
    ]
    for options, properties in said * 2:
        packet = await connect_packet(DriverConfig(endpoint=ENDPOINT, **options), 5)
        assert isinstance(packet, Connect)
        assert packet.properties == {**usual, **properties}


# -- what else goes out ---------------------------------------------------------------------------------------------


async def test_subscribe_has_every_option() -> None:
    filters = [
        pack_filter("a/#", 1),
        pack_filter("+/b", 2, no_local=True, retain_as_published=True, retain_handling=RetainHandling.SEND_IF_NEW),
        pack_filter("$share/g/c", 0, retain_handling=RetainHandling.DO_NOT_SEND),
    ]
    async with connected(5) as control:
        packet_id, data = control.subscribe_packet(filters, 268_435_455, [("a", "1"), ("a", "2")])
    assert decoded(data, version=5) == [
        Subscribe(
            packet_id=packet_id,
            requests=(
                SubscriptionRequest(topic_filter="a/#", qos=1),
                SubscriptionRequest(
                    topic_filter="+/b", qos=2, no_local=True, retain_as_published=True, retain_handling=1
                ),
                SubscriptionRequest(topic_filter="$share/g/c", qos=0, retain_handling=2),
            ),
            properties={"subscription_identifiers": (268_435_455,), "user_properties": (("a", "1"), ("a", "2"))},
        )
    ]


async def test_subscribe_of_3_1_1_has_filters_and_qos_only() -> None:
    async with connected(4) as control:
        packet_id, data = control.subscribe_packet([pack_filter("a", 1, no_local=True)], 5, [("a", "1")])
    assert decoded(data, version=4) == [
        Subscribe(packet_id=packet_id, requests=(SubscriptionRequest(topic_filter="a", qos=1),))
    ]


@both_versions
async def test_packet_identifiers_are_ours(version: int) -> None:
    async with connected(version) as control:
        first, _ = control.subscribe_packet([pack_filter("a", 0)], None, ())
        second, data = control.unsubscribe_packet(["a", "b/#"])
    assert (first, second) == (1, 2)
    assert decoded(data, version=version) == [Unsubscribe(packet_id=2, topic_filters=("a", "b/#"))]


@both_versions
async def test_disconnect_is_one_packet_without_a_reason(version: int) -> None:
    async with connected(version) as control:
        assert decoded(control.disconnect_packet(end_session=False), version=version) == [Disconnect()]


@pytest.mark.parametrize("data", [None, b"", b"proof" * 100])
async def test_auth_continues_the_exchange(data: bytes | None) -> None:
    async with control_packets(5) as control:
        packet = control.auth_packet("SCRAM", data)
    properties: dict[str, Any] = {"authentication_method": "SCRAM"}
    if data is not None:
        properties["authentication_data"] = data
    assert decoded(packet, version=5) == [Auth(reason_code=0x18, properties=properties)]


# -- CONNACK --------------------------------------------------------------------------------------------------------


def fed(control: ControlPackets, data: bytes) -> object:
    control.connect_packet(DriverConfig(endpoint=ENDPOINT), None)
    return control.feed(data)


async def test_every_limit_in_connack_is_read() -> None:
    properties: dict[str, Any] = {
        "session_expiry": 60,
        "receive_maximum": 10,
        "maximum_qos": 1,
        "retain_available": 0,
        "maximum_packet_size": 1000,
        "assigned_client_id": "given",
        "topic_alias_maximum": 4,
        "reason_string": "welcome",
        "user_properties": (("a", "b"), ("a", "c")),
        "wildcard_available": 0,
        "identifiers_available": 0,
        "shared_available": 0,
        "server_keep_alive": 0,
        "response_information": "answers/",
        "server_reference": "other",
        "authentication_method": "SCRAM",
        "authentication_data": b"proof",
    }
    async with control_packets(5) as control:
        event = fed(control, encode(Connack(session_present=True, properties=properties), 5))
    assert event == ConnAck(
        True,
        ReasonCode.SUCCESS,
        ServerLimits(
            receive_maximum=10,
            maximum_qos=1,
            retain_available=False,
            maximum_packet_size=1000,
            topic_alias_maximum=4,
            wildcard_available=False,
            identifiers_available=False,
            shared_available=False,
            server_keep_alive=0,
            assigned_client_id="given",
            server_reference="other",
            reason_string="welcome",
            response_information="answers/",
            session_expiry=60,
        ),
        b"proof",
    )


async def test_what_connack_says_is_not_taken_for_what_another_said() -> None:
    async with control_packets(5) as control:
        for maximum in (10, 20, 10, 20):
            event = fed(control, encode(Connack(properties={"receive_maximum": maximum}), 5))
            assert event == ConnAck(False, ReasonCode.SUCCESS, ServerLimits(receive_maximum=maximum))


async def test_secrets_are_not_remembered() -> None:
    remembered = [_connect_properties, _server_limits]
    for each in remembered:
        each.cache_clear()
    for secret in (b"one", b"two", b"one"):
        config = DriverConfig(endpoint=ENDPOINT, connect_user_properties=[("token", secret.decode())])
        await connect_packet(config, 5)
        packet = await connect_packet(DriverConfig(endpoint=ENDPOINT, receive_maximum=77), 5, auth=("SCRAM", secret))
        assert isinstance(packet, Connect)
        assert packet.properties["authentication_data"] == secret
        properties: dict[str, Any] = {"authentication_method": "SCRAM", "authentication_data": secret}
        async with control_packets(5) as control:
            event = fed(control, encode(Connack(properties=properties), 5))
        assert isinstance(event, ConnAck)
        assert event.authentication_data == secret
        # The identifier of Authentication Data in two bytes, which MQTT does not allow.
        with pytest.raises(ProtocolError, match="Authentication Data"):
            control.feed(b"\x20\x0a\0\0\x07\x96\0\0\x03" + secret)
    assert [each.cache_info().currsize for each in remembered] == [1, 0]  # `fed` connects without any


@pytest.mark.parametrize("size", [268_435_455, 268_435_456, 0xFFFFFFFF])
async def test_a_maximum_packet_size_beyond_the_largest_packet_is_no_limit(size: int) -> None:
    async with control_packets(5) as control:
        event = fed(control, encode(Connack(properties={"maximum_packet_size": size}), 5))
    assert isinstance(event, ConnAck)
    assert event.limits.maximum_packet_size == 268_435_455


@pytest.mark.parametrize(
    "code, reason",
    [
        (1, ReasonCode.UNSUPPORTED_PROTOCOL_VERSION),
        (2, ReasonCode.CLIENT_IDENTIFIER_NOT_VALID),
        (3, ReasonCode.SERVER_UNAVAILABLE),
        (4, ReasonCode.BAD_USER_NAME_OR_PASSWORD),
        (5, ReasonCode.NOT_AUTHORIZED),
    ],
)
async def test_return_codes_of_3_1_1_are_told_in_the_words_of_mqtt_5(code: int, reason: ReasonCode) -> None:
    async with control_packets(4) as control:
        assert fed(control, bytes((0x20, 2, 0, code))) == ConnAck(False, reason)
        assert control.take_output() == b""  # paho has not begun anew


async def test_a_broker_of_3_1_1_may_refuse_version_5_in_its_own_form() -> None:
    async with control_packets(5) as control:
        event = fed(control, b"\x20\x02\x00\x01")
    assert event == ConnAck(False, ReasonCode.UNSUPPORTED_PROTOCOL_VERSION)


async def test_a_refusal_has_its_reason() -> None:
    packet = Connack(reason_code=0x87, properties={"reason_string": "no"})
    async with control_packets(5) as control:
        event = fed(control, encode(packet, 5))
    assert event == ConnAck(False, ReasonCode.NOT_AUTHORIZED, ServerLimits(reason_string="no"))


# -- SUBACK and UNSUBACK --------------------------------------------------------------------------------------------


async def test_suback_and_unsuback_of_mqtt_5_are_read() -> None:
    codes = (0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)
    properties = {"reason_string": "why"}
    async with connected(5) as control:
        assert control.feed(encode(Suback(packet_id=3, reason_codes=codes, properties=properties), 5)) == SubAck(
            3, tuple(ReasonCode(code) for code in codes)
        )
        for answers in ((0,), (0x11, 0x87)):
            assert control.feed(encode(Unsuback(packet_id=9, reason_codes=answers), 5)) == SubAck(
                9, tuple(ReasonCode(code) for code in answers), unsubscribe=True
            )


async def test_suback_and_unsuback_of_3_1_1_are_read() -> None:
    async with connected(4) as control:
        assert control.feed(encode(Suback(packet_id=65535, reason_codes=(0, 1, 2, 0x80)), 4)) == SubAck(
            65535, (ReasonCode.SUCCESS, ReasonCode.GRANTED_QOS_1, ReasonCode.GRANTED_QOS_2, ReasonCode(0x80))
        )
        assert control.feed(encode(Unsuback(packet_id=1), 4)) == SubAck(1, (), unsubscribe=True)


async def test_a_suback_of_ten_thousand_codes_is_read() -> None:
    async with connected(5) as control:
        event = control.feed(encode(Suback(packet_id=1, reason_codes=(1,) * 10_000), 5))
    assert event == SubAck(1, (ReasonCode.GRANTED_QOS_1,) * 10_000)


# -- DISCONNECT and AUTH --------------------------------------------------------------------------------------------


async def test_disconnect_is_read() -> None:
    properties = {"reason_string": "moved", "server_reference": "other:1883"}
    async with connected(5) as control:
        assert control.feed(b"\xe0\x00") == ServerDisconnect(ReasonCode.SUCCESS, None, None)
        assert control.feed(b"\xe0\x01\x8b") == ServerDisconnect(ReasonCode.SERVER_SHUTTING_DOWN, None, None)
        assert control.feed(encode(Disconnect(reason_code=0x9D, properties=properties), 5)) == ServerDisconnect(
            ReasonCode.SERVER_MOVED, "moved", "other:1883"
        )


async def test_auth_is_read() -> None:
    packet = Auth(reason_code=0x18, properties={"authentication_method": "SCRAM", "authentication_data": b"\x00"})
    async with control_packets(5) as control:
        assert fed(control, encode(packet, 5)) == AuthPacket(ReasonCode.CONTINUE_AUTHENTICATION, "SCRAM", b"\x00")


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        b"\x20\x00",
        b"\x20\x02\x00\x00",  # no property length
        b"\x20\x02\x00\x05",
        b"\x20\x03\x02\x00\x00",  # flags
        b"\x20\x03\x00\x05\x00",  # no such reason code
        b"\x20\x03\x00\x00\x01",  # properties beyond the packet
        b"\x20\x04\x00\x00\x00\x00",  # bytes behind the properties
        b"\x20\x06\x00\x00\x03\x21\x00\x00",  # Receive Maximum 0
        b"\x20\x08\x00\x00\x05\x27\x00\x00\x00\x00",  # Maximum Packet Size 0
        b"\x20\x09\x00\x00\x06\x21\x00\x01\x21\x00\x02",  # a property twice
        b"\x20\x06\x00\x00\x03\x23\x00\x01",  # a property of PUBLISH
        b"\x20\x08\x00\x00\x05\x1f\x00\x02\xff\xfe",  # no UTF-8
        b"\x20\x07\x00\x00\x04\x1f\x00\x01\x00",  # U+0000
        b"\x90\x00",
        b"\x90\x02\x00\x01",
        b"\x90\x04\x00\x01\x0a\x00",
        b"\x90\x04\x00\x01\x00\x55",  # no such reason code
        b"\xb0\x02\x00\x01",
        b"\xb0\x04\x00\x01\x00\x55",
        b"\xe0\x01\x05",
        b"\xe0\x03\x8d\x05\x1f",
        b"\xe0\x03\x8d\x00\x00",
        b"\xf0\x01\x55",
        b"\xf0\x02\x18\x05",
        b"\xd0\x00",  # nothing that paho is asked about
    ],
    ids=bytes.hex,
)
async def test_what_mqtt_5_does_not_allow_is_a_protocol_error(packet: bytes) -> None:
    async with control_packets(5) as control:
        control.connect_packet(DriverConfig(endpoint=ENDPOINT), None)
        with pytest.raises(ProtocolError, match=r"malformed packet|protocol error"):
            control.feed(packet)


@pytest.mark.parametrize(
    "packet",
    [
        b"\x20\x00",
        b"\x20\x03\x00\x00\x00",
        b"\x20\x02\x00\x06",
        b"\x20\x02\x02\x00",
        b"\x90\x00",
        b"\x90\x03\x00\x01\x05",
    ],
    ids=bytes.hex,
)
async def test_what_3_1_1_does_not_allow_is_a_protocol_error(packet: bytes) -> None:
    async with control_packets(4) as control:
        control.connect_packet(DriverConfig(endpoint=ENDPOINT), None)
        with pytest.raises(ProtocolError, match=r"malformed packet|protocol error"):
            control.feed(packet)


def in_trio(check: Callable[[ControlPackets], None], version: int) -> None:
    async def main() -> None:
        async with connected(version) as control:
            check(control)

    trio.run(main)


@st.composite
def bodies_with_properties(draw: st.DrawFn) -> bytes:
    """The beginning of a body, properties that are nearly right, and what may follow them."""
    values = draw(st.lists(st.tuples(st.integers(0, 0x2B), st.binary(max_size=6)), max_size=4))
    properties = b"".join(bytes((identifier,)) + value for identifier, value in values)
    head, tail = draw(st.binary(min_size=1, max_size=2)), draw(st.binary(max_size=3))
    return head + encode_varint(len(properties)) + properties + tail


@given(
    first=st.sampled_from([0x20, 0x90, 0xB0, 0xE0, 0xF0]),
    body=st.binary(max_size=80) | bodies_with_properties(),
    version=versions,
)
def test_any_bytes_in_a_control_packet_are_an_event_or_a_protocol_error(first: int, body: bytes, version: int) -> None:
    packet = bytes((first,)) + encode_varint(len(body)) + body
    packets = new_reader(version).feed(packet)

    def check(control: ControlPackets) -> None:
        for whole in packets:
            assert whole == packet
            try:
                event = control.feed(packet)
            except ProtocolError:
                return
            assert isinstance(event, ConnAck | SubAck | ServerDisconnect | AuthPacket)

    in_trio(check, version)


@given(
    username=st.none() | texts,
    password=st.none() | texts | st.binary(max_size=50),
    topic=topics,
    payload=st.binary(max_size=100),
    pairs=st.lists(st.tuples(texts, texts), max_size=3),
    keep_alive=st.integers(0, 65535),
    version=versions,
)
def test_any_credentials_and_will_arrive(
    username: str | None,
    password: str | bytes | None,
    topic: str,
    payload: bytes,
    pairs: list[tuple[str, str]],
    keep_alive: int,
    version: int,
) -> None:
    config = DriverConfig(
        endpoint=ENDPOINT,
        username=username,
        password=None if username is None else password,
        will=Will(topic=topic, payload=payload, user_properties=pairs),
        keep_alive=keep_alive,
    )
    packet = trio.run(connect_packet, config, version)
    assert isinstance(packet, Connect)
    assert packet.will == WireWill(
        topic=topic, payload=payload, properties={"user_properties": tuple(pairs)} if version == 5 and pairs else {}
    )
    raw = config.password.encode() if isinstance(config.password, str) else config.password
    assert (packet.username, packet.password, packet.keep_alive) == (username, raw, keep_alive)
