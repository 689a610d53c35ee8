"""The memory broker, tested over a socket by paho-mqtt: what only MQTT 5 has."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.testing.paho_peer import (
    TELLS_SHORT_DISCONNECT,
    connected,
    new_client,
    paho,
    some_properties,
    told_at_the_end,
)
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker


def client_5(client_id: str = "c", **options: Any) -> Any:
    return new_client(client_id, paho.MQTTv5, **options)


def publishes(broker: MemoryBroker) -> int:
    return sum(packet.kind is Kind.PUBLISH for _, packet in broker.sent)


@pytest.mark.parametrize("handling,times", [(0, 2), (1, 1), (2, 0)])
async def test_retain_handling(broker: MemoryBroker, handling: int, times: int) -> None:
    broker.publish("t", b"kept", retain=True)
    port = await broker.listen()
    async with connected(port, client_5()) as peer:
        await peer.expect("connect")
        for _ in range(2):
            assert await peer.subscribe("t", qos=1, retainHandling=handling) == [1]
        broker.publish("t", b"end")
        got = [(await peer.until("message")).payload for _ in range(times + 1)]
        assert got == [*[b"kept"] * times, b"end"]


async def test_retain_as_published_no_local_and_identifiers(broker: MemoryBroker) -> None:
    port = await broker.listen()
    async with connected(port, client_5()) as peer, connected(port, client_5("other")) as other:
        await peer.expect("connect")
        await other.expect("connect")
        identified = some_properties("SUBSCRIBE", SubscriptionIdentifier=300)
        await peer.subscribe("kept", retainAsPublished=True, noLocal=True, properties=identified)
        await peer.subscribe("plain", noLocal=True)
        for client in (peer.client, other.client):
            for topic in ("kept", "plain"):
                client.publish(topic, b"mine" if client is peer.client else b"theirs", 1, retain=True)
        got = await peer.messages(2)
        assert [(entry.topic, entry.payload, bool(entry.retain)) for entry in got] == [
            ("kept", b"theirs", True),
            ("plain", b"theirs", False),
        ]
        assert got[0].properties.SubscriptionIdentifier == [300]
        assert not hasattr(got[1].properties, "SubscriptionIdentifier")


async def test_the_clients_receive_maximum(broker: MemoryBroker) -> None:
    port = await broker.listen()
    async with connected(port, client_5(), properties=some_properties("CONNECT", ReceiveMaximum=2)) as peer:
        await peer.expect("connect")
        await peer.subscribe("t", qos=2)
        with broker.faults.hold(Kind.PUBACK, direction=Direction.IN) as rule:
            for number in range(5):
                broker.publish("t", b"%d" % number, qos=1)
            await broker.wait_for(lambda: rule.held == 2, "two acknowledgements")
            assert publishes(broker) == 2
            rule.release()
            await broker.wait_for(lambda: rule.held == 2, "two more")
            assert publishes(broker) == 4
        assert [int(entry.payload) for entry in await peer.messages(5)] == list(range(5))


async def test_the_brokers_receive_maximum(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, receive_maximum=2)
    port = await broker.listen()
    client = client_5(reconnect_on_failure=False)
    client.max_inflight_messages_set(3)
    async with connected(port, client) as peer:
        await peer.expect("connect")
        with broker.faults.hold(Kind.PUBACK):
            for _ in range(3):
                client.publish("t", b"", 1)
            values = await peer.until("disconnect")
    assert told_at_the_end(values) == (0x93 if TELLS_SHORT_DISCONNECT else None)
    assert "more than 2 PUBLISHes in flight" in broker.violations[0][1]


async def test_topic_aliases_both_ways(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, use_topic_aliases=True)
    port = await broker.listen()
    connect = some_properties("CONNECT", TopicAliasMaximum=1)
    async with connected(port, client_5(), properties=connect) as peer:
        await peer.expect("connect")
        await peer.subscribe("#")
        alias = some_properties("PUBLISH", TopicAlias=7)
        for topic, payload in (("a/b", b"1"), ("", b"2")):
            peer.client.publish(topic, payload, 0, properties=alias)
        peer.client.publish("other", b"3", 0)
        # paho does not resolve aliases: it shows what came.
        got = [(entry.topic, entry.payload, alias_of(entry)) for entry in await peer.messages(3)]
        assert got == [("a/b", b"1", 1), ("", b"2", 1), ("other", b"3", None)]
    assert [entry.topic for entry in broker.published] == ["a/b", "a/b", "other"]


def alias_of(message: Any) -> int | None:
    return getattr(message.properties, "TopicAlias", None)


@pytest.mark.parametrize("expiry,present", [(3600, True), (0, False)])
async def test_a_session_and_its_expiry(broker: MemoryBroker, expiry: int, present: bool) -> None:
    port = await broker.listen()
    for again in (False, True):
        connect = some_properties("CONNECT", SessionExpiryInterval=expiry)
        async with connected(port, client_5(), clean_start=False, properties=connect) as peer:
            flags = (await peer.expect("connect"))[0]
            found = flags["session present"] if hasattr(flags, "get") else flags.session_present
            assert bool(found) is (again and present)
            if not again:
                await peer.subscribe("t", qos=2)
            elif present:
                # Paho hands over a message of QoS 2 when its PUBREL has come.
                assert [int(entry.payload) for entry in await peer.messages(3)] == [1, 3, 2]
        await broker.wait_for(lambda: not broker.clients, "disconnect")
        for number, qos in enumerate((0, 1, 2, 1)):
            broker.publish("t", b"%d" % number, qos=qos)
    assert not broker.violations


@pytest.mark.parametrize("back", [False, True])
async def test_a_will_delay(broker: MemoryBroker, back: bool) -> None:
    """The clock of a socket test is real, so the delay is ended by the end of the session, or by coming back."""
    port = await broker.listen()
    client = client_5(reconnect_on_failure=False)
    delay = some_properties("WILLMESSAGE", WillDelayInterval=3600, ContentType="text")
    client.will_set("status", b"gone", 1, properties=delay)
    connect = some_properties("CONNECT", SessionExpiryInterval=7200)
    async with connected(port, client, properties=connect) as peer:
        await peer.expect("connect")
        broker.drop("c")
        await peer.until("disconnect")
    assert not broker.published
    async with connected(port, client_5(), clean_start=not back, properties=connect) as peer:
        await peer.expect("connect")
        assert len(broker.published) == (not back)
    if not back:
        assert broker.published[0].properties == {"content_type": "text"}


async def test_limits_are_told(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(
        nursery, receive_maximum=5, maximum_qos=1, retain_available=False, server_keep_alive=77, topic_alias_maximum=3
    )
    port = await broker.listen()
    client = client_5("")
    async with connected(port, client) as peer:
        told = (await peer.expect("connect"))[-1]
        names = ("ReceiveMaximum", "MaximumQoS", "RetainAvailable", "ServerKeepAlive", "TopicAliasMaximum")
        assert [getattr(told, name) for name in names] == [5, 1, 0, 77, 3]
        assert told.AssignedClientIdentifier == "assigned-1"
        assert broker.clients == ["assigned-1"]
        assert await peer.subscribe("t", qos=2) == [1]
        broker.publish("t", b"x", qos=2)
        assert (await peer.until("message")).qos == 1


async def test_a_message_expires_and_the_rest_is_told(broker: MemoryBroker) -> None:
    port = await broker.listen()
    async with connected(port, client_5()) as peer:
        await peer.expect("connect")
        peer.client.publish(
            "t", b"x", 1, retain=True, properties=some_properties("PUBLISH", MessageExpiryInterval=900)
        )
        peer.client.publish("u", b"x", 1, retain=True, properties=some_properties("PUBLISH", MessageExpiryInterval=0))
        await peer.expect("publish")
        await peer.expect("publish")
        await peer.subscribe("#")
        got = await peer.until("message")
        assert (got.topic, 800 < got.properties.MessageExpiryInterval <= 900) == ("t", True)
    assert list(broker.retained) == ["t"]
