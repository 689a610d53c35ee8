"""What the specification lays down, asked of the memory broker and of mosquitto in the same words.

Four things are asked of the memory broker alone, elsewhere, since mosquitto 2.0.11 does them differently: it sends
retained messages to shared subscriptions, sends one message more than the Receive Maximum after an acknowledgement,
takes a session over without a word, and forgets a delayed will at a clean start.
"""

from __future__ import annotations

import pytest

from tests.testing.both_brokers import Peers, over, publish, silent
from tests.testing.peers import subscribe
from trio_mqtt_driver.testing import (
    Ack,
    Disconnect,
    Kind,
    Pingreq,
    Pingresp,
    PropertyValue,
    Publish,
    Unsuback,
    Unsubscribe,
    Will,
)

VERSIONS = pytest.mark.parametrize("version", [4, 5])
# ---- messages ----


@VERSIONS
@pytest.mark.parametrize("sent", [0, 1, 2])
@pytest.mark.parametrize("granted", [0, 1, 2])
async def test_the_lower_qos_of_sender_and_subscription(peers: Peers, version: int, sent: int, granted: int) -> None:
    sender, receiver = await peers.join("s", version), await peers.join("r", version)
    assert (await subscribe(receiver, "t/+", qos=granted)).reason_codes == (granted,)
    await sender.send(Publish(topic="t/1", payload=b"hello", qos=sent, packet_id=9 if sent else 0))
    if sent:
        ack = await sender.expect(Ack)
        assert (ack.kind, ack.packet_id) == (Kind.PUBACK if sent == 1 else Kind.PUBREC, 9)
    if sent == 2:
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
    assert await silent(receiver)


@VERSIONS
async def test_a_qos_2_message_that_comes_twice_is_delivered_once(peers: Peers, version: int) -> None:
    client = await peers.join("c", version)
    await subscribe(client, "t")
    await client.send(Publish(topic="t", qos=2, packet_id=1), Publish(topic="t", qos=2, packet_id=1, dup=True))
    await client.send(Ack(kind=Kind.PUBREL, packet_id=1), Ack(kind=Kind.PUBREL, packet_id=1), Pingreq())
    got = [await client.receive() for _ in range(6)]
    assert [entry.kind for entry in got if isinstance(entry, Ack)] == [*[Kind.PUBREC] * 2, *[Kind.PUBCOMP] * 2]
    assert sum(isinstance(entry, Publish) for entry in got) == 1


@VERSIONS
async def test_order_is_kept(peers: Peers, version: int) -> None:
    sender, receiver = await peers.join("s", version), await peers.join("r", version)
    await subscribe(receiver, "t", qos=1)
    await sender.send(*(Publish(topic="t", payload=b"%d" % n, qos=1, packet_id=n) for n in range(1, 19)))
    for number in range(1, 19):
        packet = await receiver.expect(Publish)
        assert int(packet.payload) == number
        await receiver.send(Ack(kind=Kind.PUBACK, packet_id=packet.packet_id))


async def test_properties_travel(peers: Peers) -> None:
    properties: dict[str, PropertyValue] = {
        "payload_format": 1,
        "content_type": "text/plain",
        "response_topic": "answers",
        "correlation_data": b"\x00\x01",
        "user_properties": (("b", "1"), ("a", "2"), ("b", "3")),
    }
    client, old = await peers.join("c"), await peers.join("old", 4)
    await subscribe(client, "t")
    await subscribe(old, "t")
    expiring = {**properties, "message_expiry": 1000}
    await client.send(Publish(topic="t", payload=b"x", properties={**expiring, "topic_alias": 3}))
    got = await client.expect(Publish)
    left = got.properties["message_expiry"]
    assert isinstance(left, int)
    assert 990 < left <= 1000
    assert got.properties == {**expiring, "message_expiry": left}
    assert (await old.expect(Publish)).payload == b"x"


async def test_topic_aliases_from_the_client(peers: Peers) -> None:
    client = await peers.join("c")
    await subscribe(client, "#")
    for topic, payload in (("a", b"1"), ("", b"2"), ("b", b"3"), ("", b"4")):
        await client.send(Publish(topic=topic, payload=payload, properties={"topic_alias": 1}))
    got = [await client.expect(Publish) for _ in range(4)]
    assert [(entry.topic, entry.payload) for entry in got] == [("a", b"1"), ("a", b"2"), ("b", b"3"), ("b", b"4")]


async def test_the_clients_receive_maximum(peers: Peers) -> None:
    client = await peers.join("c", properties={"receive_maximum": 2})
    sender = await peers.join("s")
    await subscribe(client, "t", qos=2)
    for number in range(1, 5):
        await publish(sender, "t", b"%d" % number)
    got = [await client.expect(Publish) for _ in range(2)]
    assert await silent(client)
    await client.send(Ack(kind=Kind.PUBACK, packet_id=got[0].packet_id))
    assert (await client.expect(Publish)).payload == b"3"


async def test_the_clients_maximum_packet_size(peers: Peers) -> None:
    client = await peers.join("c", properties={"maximum_packet_size": 100})
    sender = await peers.join("s")
    await subscribe(client, "t", qos=1)
    await publish(sender, "t", bytes(100))
    await publish(sender, "t", b"small", packet_id=2)
    assert (await client.expect(Publish)).payload == b"small"
    assert await silent(client)


# ---- subscriptions ----


async def test_reason_codes_come_in_order(peers: Peers) -> None:
    client = await peers.join("c")
    await client.send(Unsubscribe(packet_id=1, topic_filters=("never", "$share/g/never")))
    assert (await client.expect(Unsuback)).reason_codes == (0x11, 0x11)
    await subscribe(client, "a", "$share/g/a", packet_id=2)
    await client.send(Unsubscribe(packet_id=3, topic_filters=("never", "a", "$share/g/a")))
    assert (await client.expect(Unsuback)).reason_codes == (0x11, 0, 0)
    await publish(client, "a", packet_id=4)
    assert await silent(client)


async def test_a_new_subscription_replaces_the_old(peers: Peers) -> None:
    client = await peers.join("c")
    await subscribe(client, "t", qos=1, packet_id=1, properties={"subscription_identifiers": (1,)})
    await subscribe(client, "t", qos=0, packet_id=2, properties={"subscription_identifiers": (2,)})
    await client.send(Publish(topic="t"))
    got = await client.expect(Publish)
    assert (got.qos, got.properties) == (0, {"subscription_identifiers": (2,)})
    await subscribe(client, "t", packet_id=3)
    await client.send(Publish(topic="t"))
    assert (await client.expect(Publish)).properties == {}
    assert await silent(client)


async def test_no_local(peers: Peers) -> None:
    client, other = await peers.join("c"), await peers.join("o")
    await subscribe(client, "t", no_local=True)
    await publish(client, "t", b"mine")
    await publish(other, "t", b"theirs")
    assert (await client.expect(Publish)).payload == b"theirs"
    assert await silent(client)


@VERSIONS
async def test_wildcards_do_not_match_dollar_topics(peers: Peers, version: int) -> None:
    client, watcher = await peers.join("c", version), await peers.join("w", version)
    await subscribe(client, "#", "+/x")
    await subscribe(watcher, "$own/#")
    await watcher.send(Publish(topic="$own/x"))
    assert (await watcher.expect(Publish)).topic == "$own/x"
    assert await silent(client)


async def test_a_shared_group_gets_each_message_once(peers: Peers) -> None:
    members = [await peers.join(name) for name in "ab"]
    plain, sender = await peers.join("plain"), await peers.join("s")
    for member in members:
        await subscribe(member, "$share/g/t/#", qos=1)
    await subscribe(plain, "t/#")
    for number in range(1, 7):
        await publish(sender, f"t/{number}", packet_id=number)
    seen: list[str] = []
    for member in members:
        await member.send(Pingreq())
        packet = await member.receive()
        while isinstance(packet, Publish):
            seen.append(packet.topic)
            packet = await member.receive()
    assert sorted(seen) == [f"t/{number}" for number in range(1, 7)]
    assert [(await plain.expect(Publish)).topic for _ in range(6)] == [f"t/{number}" for number in range(1, 7)]


# ---- retained messages ----


@VERSIONS
async def test_retained_messages(peers: Peers, version: int) -> None:
    sender, live = await peers.join("s", version), await peers.join("live", version)
    await subscribe(live, "#", qos=1)
    for number, (topic, payload) in enumerate([("a", b"old"), ("a", b"new"), ("b", b"x"), ("b", b"")], 1):
        await publish(sender, topic, payload, packet_id=number, retain=True)
        got = await live.expect(Publish)
        assert (got.topic, got.payload, got.retain) == (topic, payload, False)
    late = await peers.join("late", version)
    await subscribe(late, "+", qos=0)
    got = await late.expect(Publish)
    assert (got.topic, got.payload, got.retain, got.qos) == ("a", b"new", True, 0)
    assert await silent(late)


@pytest.mark.parametrize("handling,times", [(0, 2), (1, 1), (2, 0)])
async def test_retain_handling(peers: Peers, handling: int, times: int) -> None:
    client = await peers.join("c")
    await publish(client, "t", retain=True)
    got = 0
    for packet_id in (2, 3):
        await subscribe(client, "t", packet_id=packet_id, retain_handling=handling)
        await client.send(Pingreq())
        if isinstance(await client.receive(), Publish):
            got += 1
            await client.expect(Pingresp)
    assert got == times


async def test_retain_as_published(peers: Peers) -> None:
    client = await peers.join("c")
    await subscribe(client, "t", retain_as_published=True, properties={"subscription_identifiers": (9,)})
    await client.send(Publish(topic="t", payload=b"1", retain=True), Publish(topic="t", payload=b"2"))
    got = [await client.expect(Publish) for _ in range(2)]
    assert [(entry.payload, entry.retain) for entry in got] == [(b"1", True), (b"2", False)]
    assert got[0].properties == {"subscription_identifiers": (9,)}


# ---- sessions ----


@VERSIONS
async def test_a_session_outlives_its_connection(peers: Peers, version: int) -> None:
    client, present = await peers.resume(version)
    assert not present
    await subscribe(client, "t", qos=1)
    await client.send(Disconnect())
    assert await over(client) is None
    sender = await peers.join("s", version)
    await publish(sender, "t", b"1")
    await publish(sender, "t", b"2", packet_id=2)
    client, present = await peers.resume(version)
    assert present
    assert [(await client.expect(Publish)).payload for _ in range(2)] == [b"1", b"2"]
    assert await silent(client)
    # A clean start forgets it, and is not kept itself.
    client, connack = await peers.knock("c", version, clean_start=True)
    assert not connack.session_present
    await publish(sender, "t", b"3", packet_id=3)
    assert await silent(client)
    await client.send(Disconnect())
    await over(client)
    _, present = await peers.resume(version)
    assert not present


async def test_disconnect_may_end_the_session(peers: Peers) -> None:
    client, _ = await peers.resume()
    await client.send(Disconnect(properties={"session_expiry": 0}))
    await over(client)
    _, present = await peers.resume()
    assert not present


@VERSIONS
async def test_what_was_in_flight_comes_again(peers: Peers, version: int) -> None:
    client, _ = await peers.resume(version)
    sender = await peers.join("s", version)
    await subscribe(client, "t", qos=2)
    await publish(sender, "t", b"1")
    await sender.send(Publish(topic="t", payload=b"2", qos=2, packet_id=2))
    await sender.expect(Ack)
    await sender.send(Ack(kind=Kind.PUBREL, packet_id=2))
    await sender.expect(Ack)
    first, second = [await client.expect(Publish) for _ in range(2)]
    await client.send(Ack(kind=Kind.PUBREC, packet_id=second.packet_id))
    assert await client.expect(Ack) == Ack(kind=Kind.PUBREL, packet_id=second.packet_id)
    client, present = await peers.resume(version)
    assert present
    again = [await client.receive() for _ in range(2)]
    assert Ack(kind=Kind.PUBREL, packet_id=second.packet_id) in again
    packets = [entry for entry in again if isinstance(entry, Publish)]
    assert [(entry.payload, entry.dup, entry.packet_id) for entry in packets] == [(b"1", True, first.packet_id)]


@VERSIONS
async def test_qos_2_across_a_reconnect(peers: Peers, version: int) -> None:
    client, _ = await peers.resume(version)
    watcher = await peers.join("w", version)
    await subscribe(watcher, "t")
    await client.send(Publish(topic="t", qos=2, packet_id=3))
    assert (await client.expect(Ack)).kind is Kind.PUBREC
    client, _ = await peers.resume(version)
    await client.send(Publish(topic="t", qos=2, packet_id=3, dup=True))
    assert (await client.expect(Ack)).kind is Kind.PUBREC
    await client.send(Ack(kind=Kind.PUBREL, packet_id=3))
    assert await client.expect(Ack) == Ack(kind=Kind.PUBCOMP, packet_id=3)
    await watcher.expect(Publish)
    assert await silent(watcher)


@VERSIONS
async def test_takeover(peers: Peers, version: int) -> None:
    old, watcher = (
        await peers.join("c", version, will=Will(topic="w", payload=b"gone")),
        await peers.join("w", version),
    )
    await subscribe(watcher, "w")
    new = await peers.join("c", version)
    await over(old)
    assert (await watcher.expect(Publish)).payload == b"gone"
    assert await silent(new)


async def test_a_client_without_an_identifier(peers: Peers) -> None:
    client, connack = await peers.knock("")
    assert connack.properties["assigned_client_id"]
    assert await silent(client)
    _, connack = await peers.knock("", 4)
    assert connack.reason_code == 0
    client, connack = await peers.knock("", 4, clean_start=False)
    assert connack.reason_code == 2
    assert await over(client) is None


# ---- wills ----


@VERSIONS
async def test_a_will(peers: Peers, version: int) -> None:
    watcher = await peers.join("w", version)
    await subscribe(watcher, "status/#", qos=2)
    properties: dict[str, PropertyValue] = {
        "content_type": "text",
        "user_properties": (("a", "b"),),
        "response_topic": "r",
    }
    for name, farewell, seen in [("lost", None, True), ("left", Disconnect(), False)]:
        will = Will(topic=f"status/{name}", payload=b"x", qos=1, retain=True, properties=properties)
        client = await peers.join("c", version, will=will)
        if farewell is not None:
            await client.send(farewell)
            await over(client)
        await client.stream.aclose()
        if seen:
            got = await watcher.expect(Publish)
            assert (got.payload, got.qos, got.retain) == (b"x", 1, False)
            assert got.properties == (properties if version == 5 else {})
            await watcher.send(Ack(kind=Kind.PUBACK, packet_id=got.packet_id))
    assert await silent(watcher)
    await subscribe(watcher, "status/+", packet_id=2)
    got = await watcher.expect(Publish)
    assert (got.topic, got.retain) == ("status/lost", True)
    assert await silent(watcher)


async def test_a_will_with_disconnect(peers: Peers) -> None:
    watcher = await peers.join("w")
    await subscribe(watcher, "status")
    client = await peers.join("c", will=Will(topic="status", payload=b"x"))
    await client.send(Disconnect(reason_code=4))
    assert (await watcher.expect(Publish)).payload == b"x"


async def test_coming_back_in_time_cancels_a_delayed_will(peers: Peers) -> None:
    watcher = await peers.join("w")
    await subscribe(watcher, "status")
    client, _ = await peers.resume(will=Will(topic="status", payload=b"x", properties={"will_delay": 900}))
    await client.stream.aclose()
    _, present = await peers.resume()
    assert present
    assert await silent(watcher)
