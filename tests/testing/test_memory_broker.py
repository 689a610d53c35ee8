"""The memory broker routes messages as MQTT says: QoS, retained messages, overlapping and shared subscriptions."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.testing.peers import join, knock, nothing, publish, subscribe
from trio_mqtt_driver.testing import (
    Ack,
    Connect,
    Disconnect,
    Kind,
    MemoryBroker,
    Packet,
    Pingreq,
    Pingresp,
    PropertyValue,
    Publish,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
)


async def test_ping(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await client.send(Pingreq())
    assert await client.expect(Pingresp) == Pingresp()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("sent", [0, 1, 2])
@pytest.mark.parametrize("granted", [0, 1, 2])
async def test_every_qos_both_ways(broker: MemoryBroker, version: int, sent: int, granted: int) -> None:
    sender, receiver = await join(broker, "s", version), await join(broker, "r", version)
    assert (await subscribe(receiver, "t/+", qos=granted)).reason_codes == (granted,)
    await sender.send(Publish(topic="t/1", payload=b"hello", qos=sent, packet_id=9 if sent else 0))
    if sent == 1:
        assert await sender.expect(Ack) == Ack(kind=Kind.PUBACK, packet_id=9)
    elif sent == 2:
        assert await sender.expect(Ack) == Ack(kind=Kind.PUBREC, packet_id=9)
        await sender.send(Ack(kind=Kind.PUBREL, packet_id=9))
        assert await sender.expect(Ack) == Ack(kind=Kind.PUBCOMP, packet_id=9)
    got = await receiver.expect(Publish)
    qos = min(sent, granted)
    assert (got.topic, got.payload, got.qos, got.dup, got.retain) == ("t/1", b"hello", qos, False, False)
    if qos == 2:
        await receiver.send(Ack(kind=Kind.PUBREC, packet_id=got.packet_id))
        assert await receiver.expect(Ack) == Ack(kind=Kind.PUBREL, packet_id=got.packet_id)
        await receiver.send(Ack(kind=Kind.PUBCOMP, packet_id=got.packet_id))
    elif qos == 1:
        await receiver.send(Ack(kind=Kind.PUBACK, packet_id=got.packet_id))
    await trio.testing.wait_all_tasks_blocked()
    assert broker.sessions["r"].in_flight == 0
    assert [entry.payload for entry in broker.published] == [b"hello"]


async def test_a_qos_2_message_that_comes_twice_counts_once(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    packet = Publish(topic="t", qos=2, packet_id=1)
    await client.send(packet, Publish(topic="t", qos=2, packet_id=1, dup=True), Ack(kind=Kind.PUBREL, packet_id=1))
    kinds = [(await client.expect(Ack)).kind for _ in range(3)]
    assert kinds == [Kind.PUBREC, Kind.PUBREC, Kind.PUBCOMP]
    assert len(broker.published) == 1


async def test_pubrel_for_an_unknown_identifier(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await client.send(Ack(kind=Kind.PUBREL, packet_id=5), Ack(kind=Kind.PUBREC, packet_id=6))
    assert await client.expect(Ack) == Ack(kind=Kind.PUBCOMP, packet_id=5, reason_code=0x92)
    assert await client.expect(Ack) == Ack(kind=Kind.PUBREL, packet_id=6, reason_code=0x92)


async def test_a_refusing_pubrec_ends_the_exchange(broker: MemoryBroker) -> None:
    client = await join(broker, "c", properties={"receive_maximum": 1})
    await subscribe(client, "t", qos=2)
    broker.publish("t", b"1", qos=2)
    broker.publish("t", b"2", qos=2)
    first = await client.expect(Publish)
    await client.send(Ack(kind=Kind.PUBREC, packet_id=first.packet_id, reason_code=0x80))
    assert (await client.expect(Publish)).payload == b"2"


async def test_puback_tells_when_nobody_listens(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    assert (await publish(client, "t", b"")).reason_code == 0x10
    await subscribe(client, "t")
    await client.send(Publish(topic="t", qos=1, packet_id=2))
    await client.expect(Publish)
    assert (await client.expect(Ack)).reason_code == 0


async def test_unsubscribe(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await subscribe(client, "a", "$share/g/b")
    await client.send(Unsubscribe(packet_id=2, topic_filters=("a", "$share/g/b", "never")))
    assert (await client.expect(Unsuback)).reason_codes == (0, 0, 0x11)
    assert broker.subscriptions("c") == {}
    assert broker.publish("a") == broker.publish("b") == 0
    assert await nothing(client)


TOPICS = [
    ("sport/tennis/player1/#", "sport/tennis/player1", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
    ("sport/#", "sport", True),
    ("#", "a/b", True),
    ("sport/tennis/+", "sport/tennis/player1", True),
    ("sport/tennis/+", "sport/tennis/player1/ranking", False),
    ("sport/+", "sport", False),
    ("sport/+", "sport/", True),
    ("+/+", "/finance", True),
    ("/+", "/finance", True),
    ("+", "/finance", False),
    ("#", "$SYS/x", False),
    ("+/monitor/Clients", "$SYS/monitor/Clients", False),
    ("$SYS/#", "$SYS/x", True),
    ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ("a", "A", False),
]


@pytest.mark.parametrize("topic_filter,topic,wanted", TOPICS)
async def test_topic_matching(broker: MemoryBroker, topic_filter: str, topic: str, wanted: bool) -> None:
    """The examples of the specification [MQTT-4.7]."""
    client = await join(broker, "c")
    await subscribe(client, topic_filter)
    assert broker.publish(topic) == wanted


# ---- retained messages ----


async def test_retained_messages(broker: MemoryBroker) -> None:
    broker.publish("a/1", b"old", retain=True)
    broker.publish("a/1", b"new", retain=True)
    broker.publish("a/2", b"gone", retain=True)
    broker.publish("a/2", b"", retain=True)
    client = await join(broker, "c")
    await subscribe(client, "a/+", "a/1")
    got = [await client.expect(Publish) for _ in range(2)]
    assert [(entry.topic, entry.payload, entry.retain) for entry in got] == [("a/1", b"new", True)] * 2
    broker.publish("a/1", b"live", retain=True)
    live = await client.expect(Publish)
    assert (live.payload, live.retain) == (b"live", False)
    assert set(broker.retained) == {"a/1"}


@pytest.mark.parametrize("handling,times", [(0, 2), (1, 1), (2, 0)])
async def test_retain_handling(broker: MemoryBroker, handling: int, times: int) -> None:
    broker.publish("t", b"x", retain=True)
    client = await join(broker, "c")
    got = 0
    for packet_id in (1, 2):
        await subscribe(client, "t", packet_id=packet_id, retain_handling=handling)
        if not await nothing(client):
            got += 1
    assert got == times


async def test_retain_as_published(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await subscribe(client, "kept", retain_as_published=True)
    broker.publish("kept", b"x", retain=True)
    broker.publish("kept", b"y")
    assert [(await client.expect(Publish)).retain for _ in range(2)] == [True, False]


async def test_a_shared_subscription_gets_no_retained_messages(broker: MemoryBroker) -> None:
    broker.publish("t", b"x", retain=True)
    client = await join(broker, "c")
    await subscribe(client, "$share/g/t")
    assert await nothing(client)


# ---- who gets what ----


async def test_one_copy_for_overlapping_subscriptions(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await subscribe(client, "a/#", qos=1, packet_id=1, properties={"subscription_identifiers": (11,)})
    await subscribe(client, "a/b", qos=0, packet_id=2, properties={"subscription_identifiers": (22,)})
    broker.publish("a/b", b"x", qos=2)
    got = await client.expect(Publish)
    assert got.qos == 1
    assert set(got.properties["subscription_identifiers"]) == {11, 22}  # type: ignore[arg-type]  # a tuple
    assert await nothing(client)


async def test_a_copy_for_each_overlapping_subscription(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, overlapping="copies")
    client = await join(broker, "c")
    await subscribe(client, "a/#", qos=1, packet_id=1, properties={"subscription_identifiers": (11,)})
    await subscribe(client, "a/b", qos=0, packet_id=2, properties={"subscription_identifiers": (22,)})
    broker.publish("a/b", b"x", qos=1)
    got = [await client.expect(Publish) for _ in range(2)]
    assert {(entry.qos, entry.properties["subscription_identifiers"]) for entry in got} == {(1, (11,)), (0, (22,))}
    assert await nothing(client)


async def test_no_local(broker: MemoryBroker) -> None:
    client, other = await join(broker, "c"), await join(broker, "o")
    await subscribe(client, "t", no_local=True)
    await client.send(Publish(topic="t", payload=b"mine"))
    await other.send(Publish(topic="t", payload=b"theirs"))
    assert (await client.expect(Publish)).payload == b"theirs"


async def test_a_shared_group_takes_turns_and_skips_the_absent(broker: MemoryBroker) -> None:
    members = [await join(broker, name) for name in "abc"]
    for member in members:
        await subscribe(member, "$share/g/t/#", qos=1)
    plain = await join(broker, "plain")
    await subscribe(plain, "t/#")
    for number in range(6):
        assert broker.publish(f"t/{number}") == 2
    seen = [(await member.expect(Publish)).topic for member in members for _ in range(2)]
    assert sorted(seen) == [f"t/{number}" for number in range(6)]
    for _ in range(6):
        await plain.expect(Publish)
    broker.drop("a")
    for _ in range(4):
        broker.publish("t/x")
    for member in members[1:]:
        assert [(await member.expect(Publish)).topic for _ in range(2)] == ["t/x", "t/x"]


async def test_properties_travel_and_expiry_counts_down(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    properties: dict[str, PropertyValue] = {
        "payload_format": 1,
        "message_expiry": 100,
        "content_type": "text/plain",
        "response_topic": "answers",
        "correlation_data": b"\x00\x01",
        "user_properties": (("a", "1"), ("a", "2")),
    }
    sender, receiver = await join(broker, "s"), await join(broker, "r")
    await sender.send(Publish(topic="t", payload=b"x", retain=True, properties={**properties, "topic_alias": 3}))
    await broker.wait_for_publish("t")
    await trio.sleep(40)
    await subscribe(receiver, "t")
    assert (await receiver.expect(Publish)).properties == {**properties, "message_expiry": 60}
    await trio.sleep(60)
    await subscribe(receiver, "t", packet_id=2)
    assert await nothing(receiver)
    assert broker.retained == {}


async def test_topic_aliases_from_the_client(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    alias = {"topic_alias": 7}
    await client.send(
        Publish(topic="a", payload=b"1", properties=alias),
        Publish(topic="", payload=b"2", properties=alias),
        Publish(topic="b", payload=b"3", properties=alias),
        Publish(topic="", payload=b"4", properties=alias),
    )
    await broker.wait_for(lambda: len(broker.published) == 4, "four messages")
    assert [(entry.topic, entry.payload) for entry in broker.published] == [
        ("a", b"1"),
        ("a", b"2"),
        ("b", b"3"),
        ("b", b"4"),
    ]


async def test_topic_aliases_to_the_client(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, use_topic_aliases=True)
    client = await join(broker, "c", properties={"topic_alias_maximum": 2})
    plain = await join(broker, "plain")
    old = await join(broker, "old", version=4)
    for receiver in (client, plain, old):
        await subscribe(receiver, "#", qos=1)
    for topic in ("a", "a", "b", "c", "c", "b"):
        broker.publish(topic, qos=1)
    got = [await client.expect(Publish) for _ in range(6)]
    assert [(entry.topic, entry.properties.get("topic_alias")) for entry in got] == [
        ("a", 1),
        ("", 1),
        ("b", 2),
        ("c", None),
        ("c", None),
        ("", 2),
    ]
    for receiver in (plain, old):
        packets = [await receiver.expect(Publish) for _ in range(6)]
        assert [(entry.topic, entry.properties) for entry in packets] == [(topic, {}) for topic in "aabccb"]


async def test_the_broker_uses_no_alias_that_was_not_told(nursery: trio.Nursery) -> None:
    """An alias that would make the packet too large, or whose packet a fault has swallowed, is not in force."""
    broker = MemoryBroker(nursery, use_topic_aliases=True)
    limits: dict[str, PropertyValue] = {"topic_alias_maximum": 2, "maximum_packet_size": 50}
    client = await join(broker, "c", properties=limits)
    await subscribe(client, "#")
    broker.publish("t", bytes(44))
    with broker.faults.drop(Kind.PUBLISH):
        broker.publish("t", b"lost")
    broker.publish("t", b"told")
    broker.send("c", Publish(topic="own", properties={"topic_alias": 2}))
    broker.publish("t", b"used")
    got = [await client.expect(Publish) for _ in range(4)]
    assert [(entry.topic, entry.properties.get("topic_alias")) for entry in got] == [
        ("t", None),
        ("t", 1),
        ("own", 2),
        ("", 1),
    ]


# ---- flow control and limits ----


async def test_the_clients_receive_maximum_is_honoured(broker: MemoryBroker) -> None:
    client = await join(broker, "c", properties={"receive_maximum": 2})
    await subscribe(client, "t", qos=2)
    for number in range(5):
        broker.publish("t", b"%d" % number, qos=1 + number % 2)
    got = [await client.expect(Publish) for _ in range(2)]
    assert await nothing(client)
    assert (broker.sessions["c"].in_flight, broker.sessions["c"].queued) == (2, 3)
    await client.send(Ack(kind=Kind.PUBACK, packet_id=got[0].packet_id))
    assert (await client.expect(Publish)).payload == b"2"
    await client.send(Ack(kind=Kind.PUBREC, packet_id=got[1].packet_id))
    await client.expect(Ack)
    assert await nothing(client)
    await client.send(Ack(kind=Kind.PUBCOMP, packet_id=got[1].packet_id))
    assert (await client.expect(Publish)).payload == b"3"


async def test_a_message_too_large_for_the_client_is_dropped(broker: MemoryBroker) -> None:
    client = await join(broker, "c", properties={"maximum_packet_size": 100})
    await subscribe(client, "t", qos=1)
    broker.publish("t", b"x" * 100, qos=1)
    broker.publish("t", b"x" * 100)
    broker.publish("t", b"small", qos=1)
    assert (await client.expect(Publish)).payload == b"small"
    assert broker.dropped == 2


async def test_full_queue_and_full_buffer_drop_and_count(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, queue_limit=3, buffer_bytes=1000)
    client = await join(broker, "c", clean_start=False, properties={"session_expiry": 100})
    await subscribe(client, "t", qos=1)
    for _ in range(300):
        broker.publish("t", b"x" * 100)
    assert 280 < broker.dropped < 295
    broker.drop("c")
    await trio.testing.wait_all_tasks_blocked()
    before = broker.dropped
    for _ in range(5):
        broker.publish("t", b"y", qos=1)
    assert broker.sessions["c"].queued == 3
    assert broker.dropped == before + 2


async def test_limits_are_announced(nursery: trio.Nursery) -> None:
    limits = {
        "receive_maximum": 5,
        "maximum_qos": 1,
        "maximum_packet_size": 1000,
        "topic_alias_maximum": 3,
        "server_keep_alive": 77,
    }
    off = {
        "retain_available": False,
        "wildcard_available": False,
        "identifiers_available": False,
        "shared_available": False,
    }
    broker = MemoryBroker(nursery, **limits, **off, response_information="reply/")  # type: ignore[arg-type]  # as named
    _, connack = await knock(broker, "", properties={"request_response_information": 1})
    assert connack.properties == {
        **limits,
        **dict.fromkeys(off, 0),
        "response_information": "reply/",
        "assigned_client_id": "assigned-1",
    }
    _, connack = await knock(broker, "c", version=4)
    assert connack.properties == {}


VIOLATIONS: list[tuple[Packet, int]] = [
    (Publish(topic="t", qos=2, packet_id=1), 0x9B),
    (Publish(topic="t", retain=True), 0x9A),
    (Publish(topic="t", payload=b"x" * 1000), 0x95),
    (Publish(topic="t", properties={"topic_alias": 4}), 0x94),
    (Publish(topic="", properties={"topic_alias": 1}), 0x82),
    (Publish(topic="a/+"), 0x90),
    (Disconnect(properties={"session_expiry": 5}), 0x82),
    (Connect(client_id="c"), 0x82),
]


@pytest.mark.parametrize("packet,code", VIOLATIONS)
async def test_violations_end_the_connection(nursery: trio.Nursery, packet: Packet, code: int) -> None:
    broker = MemoryBroker(
        nursery, maximum_qos=1, retain_available=False, maximum_packet_size=500, topic_alias_maximum=3
    )
    client = await join(broker, "c")
    await client.send(packet)
    assert (await client.expect(Disconnect)).reason_code == code
    assert await client.receive() is None
    assert [entry[0] for entry in broker.violations] == ["c"]
    assert f"0x{code:02x}" in broker.violations[0][1]


async def test_a_violation_in_311_just_ends_the_connection(broker: MemoryBroker) -> None:
    client = await join(broker, "c", version=4)
    await client.send(Publish(topic="a/#"))
    assert await client.receive() is None
    assert len(broker.violations) == 1


async def test_more_in_flight_than_the_brokers_receive_maximum(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, receive_maximum=2)
    client = await join(broker, "c")
    broker.faults.hold(Kind.PUBACK)
    await client.send(*(Publish(topic="t", qos=1, packet_id=number) for number in (1, 2, 3)))
    assert (await client.expect(Disconnect)).reason_code == 0x93


@pytest.mark.parametrize(
    "packet",
    [
        Publish(topic="t", qos=1, packet_id=1),
        Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="a"),)),
        Unsubscribe(packet_id=1, topic_filters=("a",)),
    ],
)
async def test_a_packet_identifier_in_use(broker: MemoryBroker, packet: Packet) -> None:
    client = await join(broker, "c")
    broker.faults.hold(Kind.PUBACK)
    await client.send(Publish(topic="t", qos=1, packet_id=1), packet)
    assert (await client.expect(Disconnect)).reason_code == 0x82
    assert "Packet Identifier 1 is still in use" in broker.violations[0][1]


async def test_subscriptions_that_the_broker_does_not_offer(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(
        nursery, maximum_qos=1, wildcard_available=False, shared_available=False, identifiers_available=False
    )
    client = await join(broker, "c")
    assert (await subscribe(client, "a/+", "$share/g/a", "a", qos=2)).reason_codes == (0xA2, 0x9E, 1)
    identified = await subscribe(client, "b", packet_id=2, properties={"subscription_identifiers": (1,)})
    assert identified.reason_codes == (0xA1,)
    old = await join(broker, "old", version=4)
    assert (await subscribe(old, "a/+")).reason_codes == (0x80,)
