"""What a test sees of the memory broker: its records, its waits, and what they say when nothing comes."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from tests.testing.peers import join, knock, publish, subscribe
from trio_mqtt_driver.testing import (
    Kind,
    MemoryBroker,
    PropertyValue,
    Publish,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsubscribe,
    Will,
    WireError,
)


async def test_a_broker_that_is_down_refuses_connections(broker: MemoryBroker) -> None:
    broker.down = True
    with pytest.raises(ConnectionRefusedError):
        await broker.connect_stream()
    broker.down = False
    await join(broker, "c")


async def test_connect_stream_checkpoints(broker: MemoryBroker) -> None:
    with trio.testing.assert_checkpoints():
        await broker.connect_stream()


async def test_what_it_saw(broker: MemoryBroker) -> None:
    client = await join(broker, "c", username="me", keep_alive=7)
    await subscribe(client, "a/#", qos=1)
    await publish(client, "x", b"payload")
    assert [entry.kind for _, entry in broker.received] == [Kind.CONNECT, Kind.SUBSCRIBE, Kind.PUBLISH]
    assert [entry.kind for _, entry in broker.sent] == [Kind.CONNACK, Kind.SUBACK, Kind.PUBACK]
    assert [(entry.client_id, entry.username, entry.keep_alive) for entry in broker.connects] == [("c", "me", 7)]
    assert broker.clients == ["c"]
    assert list(broker.sessions) == ["c"]
    assert broker.subscriptions("c")["a/#"].qos == 1
    assert broker.subscriptions("nobody") == {}
    assert "-> c: SUBACK packet_id=1 0x01" in broker.tail()
    broker.forget()
    assert not broker.received
    assert not broker.published
    assert broker.tail() == "no packet was seen"


async def test_records_are_bounded(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, history=10)
    for number in range(30):
        broker.publish(f"t/{number}")
    await broker.wait_for_publish("t/29")
    assert [entry.topic for entry in broker.published] == [f"t/{number}" for number in range(20, 30)]


async def test_waiting_for_what_comes(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    async def client() -> None:
        peer = await join(broker, "c")
        await trio.sleep(1)
        await subscribe(peer, "a/#")
        await trio.sleep(1)
        await peer.send(Publish(topic="x/y", payload=b"1"))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
        assert await broker.wait_for_client() == "c"
        assert trio.current_time() == 0
        assert await broker.wait_for_subscription("a/#") == "c"
        assert trio.current_time() == 1
        assert (await broker.wait_for_publish("x/+")).payload == b"1"
        assert trio.current_time() == 2
        # What has been seen already counts.
        assert (await broker.wait_for_publish("x/+")).payload == b"1"
        nursery.cancel_scope.cancel()


async def test_waiting_in_vain_shows_the_last_packets(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    await join(broker, "c")
    with pytest.raises(AssertionError, match=r"(?s)no PUBLISH for 'x' within 5 s.*<- c: CONNECT.*-> c: CONNACK"):
        await broker.wait_for_publish("x", timeout=5)
    assert trio.current_time() == 5
    with pytest.raises(AssertionError, match="no subscription to 'x' within 30"):
        await broker.wait_for_subscription("x")
    with pytest.raises(AssertionError, match="no connection of nobody within 30"):
        await broker.wait_for_client("nobody")


async def test_waiting_is_a_checkpoint_even_when_it_is_there(broker: MemoryBroker) -> None:
    broker.publish("t")
    with trio.testing.assert_checkpoints():
        await broker.wait_for_publish("t")


async def test_sending_whatever_one_likes(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    broker.send("c", Publish(topic="t", properties={"topic_alias": 1}))
    broker.send("c", b"\x00 nonsense")
    assert (await client.expect(Publish)).properties == {"topic_alias": 1}
    with pytest.raises(WireError, match="packet type 0 is reserved"):
        await client.receive()
    with pytest.raises(LookupError, match="'nobody' is not connected; connected are \\['c'\\]"):
        broker.send("nobody", b"")


async def test_options_are_checked_and_may_change(nursery: trio.Nursery) -> None:
    with pytest.raises(ValueError, match="receive_maximum must be in 1 … 65535, not 0"):
        MemoryBroker(nursery, receive_maximum=0)
    with pytest.raises(ValueError, match="versions must be one or both of 4"):
        MemoryBroker(nursery, versions=(3,))
    broker = MemoryBroker(nursery)
    with pytest.raises(ValueError, match="qos must be 0, 1 or 2, not 3"):
        broker.publish("t", qos=3)
    with pytest.raises(ValueError, match="maximum_qos must be in 0 … 2, not 3"):
        broker.options.maximum_qos = 3
    broker.options.maximum_qos = 1
    _, connack = await knock(broker, "c")
    assert connack.properties["maximum_qos"] == 1


async def test_a_hundred_thousand_messages(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await subscribe(client, "t", qos=1)
    total = 100_000
    for number in range(total):
        broker.publish("t", b"%d" % number)
    for number in range(total):
        packet = await client.expect(Publish)
        if int(packet.payload) != number:
            raise AssertionError((packet, number))
    assert broker.dropped == 0


# ---- what a failed wait says ----

LONG = bytes(range(256)) * 4


async def test_a_failed_wait_shows_packets_that_one_can_read(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, acl=lambda access: access.action == "publish")
    will = Will(topic="status", payload=b"offline", qos=1)
    client = await join(broker, "c", username="me", password=b"secret", keep_alive=90, will=will)
    await trio.sleep(1.5)
    identifier: dict[str, PropertyValue] = {"subscription_identifiers": (7,)}
    requests = (SubscriptionRequest(topic_filter="a/#", qos=1, no_local=True), SubscriptionRequest(topic_filter="b"))
    await client.send(Subscribe(packet_id=1, requests=requests, properties=identifier))
    await client.expect(Suback)
    await publish(client, "a/1", LONG, packet_id=3)
    await client.send(Unsubscribe(packet_id=4, topic_filters=("a/#", "b")), Publish(topic="a/+"))
    with pytest.raises(AssertionError) as caught:
        await broker.wait_for_publish("x", timeout=0.5)
    assert str(caught.value).splitlines() == [
        "no PUBLISH for 'x' within 0.5 s; the last packets (seconds before now, <- from a client, -> to it):",
        "      2.000 <- c: CONNECT client_id='c' keep_alive=90 will=('status' b'offline' qos=1) username='me'",
        "      2.000 -> c: CONNACK 0x00 topic_alias_maximum=100",
        "      0.500 <- c: SUBSCRIBE packet_id=1 'a/#' (qos=1 no_local=True) 'b' subscription_identifiers=(7,)",
        "      0.500 -> c: SUBACK packet_id=1 0x87 0x87",
        f"      0.500 <- c: PUBLISH 'a/1' {LONG[:40]!r}... (1,024 bytes) qos=1 packet_id=3",
        "      0.500 -> c: PUBACK packet_id=3 0x10",
        "      0.500 <- c: UNSUBSCRIBE packet_id=4 'a/#' 'b'",
        "      0.500 -> c: UNSUBACK packet_id=4 0x11 0x11",
        "      0.500 -> c: DISCONNECT 0x90",
        "  MQTT forbids what c did: 'a/+' is not a Topic Name (0x90)",
        "  the ACL denied c to subscribe 'a/#'",
        "  the ACL denied c to subscribe 'b'",
    ]


async def test_a_wait_that_cannot_succeed_says_so_at_once(broker: MemoryBroker) -> None:
    with pytest.raises(ValueError, match="topic_filter: 'a/#/b' is not a Topic Filter"):
        await broker.wait_for_publish("a/#/b")
    with pytest.raises(ValueError, match=r"topic_filter: .* is shared, and matches no Topic Name"):
        await broker.wait_for_publish("$share/g/a")
    with pytest.raises(ValueError, match=r"topic_filter: 'a/b\+' is not a Topic Filter"):
        await broker.wait_for_subscription("a/b+")
    with pytest.raises(ValueError, match="topic: 'a/#' is not a Topic Name"):
        broker.publish("a/#")


def test_history_is_checked() -> None:
    with pytest.raises(ValueError, match="history must be at least 1, not 0"):
        MemoryBroker(Any, history=0)  # type: ignore[arg-type]  # refused before the nursery is looked at
