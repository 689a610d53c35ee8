"""The memory broker, tested over a socket by a client that somebody else wrote: what both protocol versions have."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.testing.paho_peer import (
    TELLS_SHORT_DISCONNECT,
    code_of,
    connected,
    new_client,
    new_options,
    new_properties,
    packet_types,
    paho,
    told_at_the_end,
)
from trio_mqtt_driver.testing import MemoryBroker

VERSIONS = pytest.mark.parametrize("version", [paho.MQTTv311, paho.MQTTv5])
BAD_CREDENTIALS = (4, 0x86)
"""In 3.1.1 and 5; paho 2.x tells both as that of version 5."""


@VERSIONS
async def test_messages_of_every_qos(broker: MemoryBroker, version: int) -> None:
    port = await broker.listen()
    async with connected(port, new_client("c", version)) as peer:
        await peer.expect("connect")
        peer.client.subscribe("t/#", 2)
        assert [code_of(code) for code in await peer.expect("subscribe")] == [2]
        for qos in (0, 1, 2):
            peer.client.publish(f"t/{qos}", b"%d" % qos, qos)
        events: list[Any] = []
        while len(events) < 3:
            happened, value = await peer.next()
            if happened == "message":
                events.append(value)
        assert [(entry.topic, entry.payload, entry.qos) for entry in events] == [
            (f"t/{qos}", b"%d" % qos, qos) for qos in (0, 1, 2)
        ]
        await broker.wait_for(lambda: broker.sessions["c"].in_flight == 0, "acknowledgement of all")
    assert not broker.violations
    await broker.wait_for(lambda: not broker.clients, "clean end")


@VERSIONS
async def test_a_large_retained_message(broker: MemoryBroker, version: int) -> None:
    port = await broker.listen()
    payload = bytes(range(256)) * 4096
    broker.publish("big", payload, qos=1, retain=True)
    async with connected(port, new_client("c", version)) as peer:
        await peer.expect("connect")
        peer.client.subscribe("big", 1)
        await peer.expect("subscribe")
        message = await peer.expect("message")
        assert (message.payload == payload, message.retain) == (True, True)


@VERSIONS
async def test_credentials(nursery: trio.Nursery, version: int) -> None:
    broker = MemoryBroker(nursery, users={"me": "secret"})
    port = await broker.listen()
    for password, right in (("wrong", False), ("secret", True)):
        client = new_client("c", version)
        client.username_pw_set("me", password)
        async with connected(port, client) as peer:
            reason = (await peer.expect("connect"))[1]
            assert code_of(reason) in ((0,) if right else BAD_CREDENTIALS)
    assert not broker.violations


@VERSIONS
async def test_a_will(broker: MemoryBroker, version: int) -> None:
    port = await broker.listen()
    client = new_client("c", version)
    client.will_set("status", b"offline", 1, retain=True)
    async with connected(port, client) as peer:
        await peer.expect("connect")
        broker.drop("c", reset=True)
        await peer.expect("disconnect")
    assert (await broker.wait_for_publish("status")).payload == b"offline"
    assert broker.retained["status"].qos == 1


async def test_a_session_in_311(broker: MemoryBroker) -> None:
    port = await broker.listen()
    for present in (False, True):
        client = new_client("c", paho.MQTTv311, clean_session=False)
        async with connected(port, client) as peer:
            flags = (await peer.expect("connect"))[0]
            # A dict in 1.6, an object in 2.x.
            assert bool(flags["session present"] if hasattr(flags, "get") else flags.session_present) is present
            if present:
                assert (await peer.expect("message")).payload == b"meanwhile"
            else:
                client.subscribe("t", 1)
                await peer.expect("subscribe")
        await broker.wait_for(lambda: not broker.clients, "disconnect")
        broker.publish("t", b"meanwhile", qos=1)


async def test_version_5_properties(broker: MemoryBroker) -> None:
    port = await broker.listen()
    connect = new_properties(packet_types.CONNECT)
    connect.SessionExpiryInterval = 60
    connect.ReceiveMaximum = 1
    client = new_client("c", paho.MQTTv5)
    async with connected(port, client, properties=connect) as peer:
        await peer.expect("connect")
        subscribe = new_properties(packet_types.SUBSCRIBE)
        subscribe.SubscriptionIdentifier = 42
        client.subscribe("t", options=new_options(qos=1, retainAsPublished=True), properties=subscribe)
        await peer.expect("subscribe")
        properties = new_properties(packet_types.PUBLISH)
        properties.ResponseTopic = "answers"
        properties.CorrelationData = b"\x01\x02"
        properties.UserProperty = [("a", "1"), ("b", "2")]
        properties.ContentType = "text/plain"
        properties.MessageExpiryInterval = 30
        client.publish("t", b"x", 0, retain=True, properties=properties)
        await peer.expect("publish")
        got = await peer.expect("message")
        assert got.properties.SubscriptionIdentifier == [42]
        assert got.properties.ResponseTopic == "answers"
        assert got.properties.CorrelationData == b"\x01\x02"
        assert got.properties.UserProperty == [("a", "1"), ("b", "2")]
        assert got.properties.ContentType == "text/plain"
        assert got.retain
    assert broker.sessions["c"].expiry == 60
    assert not broker.violations


async def test_a_broker_that_is_down_resets_socket_connections(broker: MemoryBroker) -> None:
    port = await broker.listen()
    broker.down = True
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


@VERSIONS
async def test_retained_messages_come_and_go(broker: MemoryBroker, version: int) -> None:
    port = await broker.listen()
    async with connected(port, new_client("c", version)) as peer:
        await peer.expect("connect")
        for topic, payload in (("a", b"old"), ("a", b"new"), ("b", b"x"), ("b", b"")):
            peer.client.publish(topic, payload, 2, retain=True)
            await peer.expect("publish")
        peer.client.subscribe("#", 1)
        message = await peer.until("message")
        assert (message.topic, message.payload, message.retain, message.qos) == ("a", b"new", True, 1)
        peer.client.publish("a", b"live", 0, retain=True)
        message = await peer.until("message")
        assert (message.payload, message.retain) == (b"live", False)
    assert list(broker.retained) == ["a"]


@VERSIONS
async def test_a_shared_group(broker: MemoryBroker, version: int) -> None:
    port = await broker.listen()
    async with connected(port, new_client("a", version)) as one, connected(port, new_client("b", version)) as two:
        for peer in (one, two):
            await peer.expect("connect")
            peer.client.subscribe("$share/group/t/+", 2)
            await peer.expect("subscribe")
        for number in range(6):
            broker.publish(f"t/{number}", qos=number % 3)
        topics = [entry.topic for peer in (one, two) for entry in await peer.messages(3)]
        assert sorted(topics) == [f"t/{number}" for number in range(6)]


@VERSIONS
async def test_takeover_and_server_disconnect(nursery: trio.Nursery, version: int) -> None:
    broker = MemoryBroker(nursery, server_reference="other:1883")
    port = await broker.listen()
    async with connected(port, new_client("c", version, reconnect_on_failure=False)) as first:
        await first.expect("connect")
        async with connected(port, new_client("c", version, reconnect_on_failure=False)) as second:
            await second.expect("connect")
            told = told_at_the_end(await first.expect("disconnect"))
            assert told == (0x8E if version == paho.MQTTv5 and TELLS_SHORT_DISCONNECT else None)
            broker.disconnect("c", reason_code=0x9C)
            told = told_at_the_end(await second.expect("disconnect"))
            assert told == (0x9C if version == paho.MQTTv5 else None)
    assert not broker.violations


@pytest.mark.parametrize("version,denied", [(paho.MQTTv311, 0x80), (paho.MQTTv5, 0x87)])
async def test_an_acl(nursery: trio.Nursery, version: int, denied: int) -> None:
    broker = MemoryBroker(nursery, users={"me": "secret"}, acl=lambda access: access.topic.startswith("me/"))
    port = await broker.listen()
    client = new_client("c", version)
    client.username_pw_set("me", "secret")
    client.will_set("status", b"gone", 1, retain=True)
    async with connected(port, client) as peer:
        await peer.expect("connect")
        client.subscribe([("me/#", 1), ("#", 2)])
        assert [code_of(code) for code in await peer.expect("subscribe")] == [1, denied]
        for qos in (0, 1, 2):
            client.publish("you", b"", qos)
            await peer.expect("publish")
        client.publish("me/x", b"mine", 2)
        assert (await peer.until("message")).payload == b"mine"
        broker.drop("c")
        await peer.until("disconnect")
    assert [entry.topic for entry in broker.published] == ["me/x"]
    assert [entry.topic for entry in broker.denied] == ["#", "you", "you", "you", "status"]
    assert not broker.violations
