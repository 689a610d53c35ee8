"""The memory broker, tested over a socket by a client that somebody else wrote: paho-mqtt, in a thread of its own."""

from __future__ import annotations

import importlib
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from trio_mqtt_driver.testing import MemoryBroker

# Not by `import`: paho 1.6 has no annotations and 2.x has some, so neither checker can be content with both.
paho: Any = importlib.import_module("paho.mqtt.client")
packet_types: Any = importlib.import_module("paho.mqtt.packettypes").PacketTypes
new_properties: Any = importlib.import_module("paho.mqtt.properties").Properties
new_options: Any = importlib.import_module("paho.mqtt.subscribeoptions").SubscribeOptions

VERSIONS = pytest.mark.parametrize("version", [paho.MQTTv311, paho.MQTTv5])


def new_client(client_id: str, version: int, **options: Any) -> Any:
    """A client of paho 1.6 or 2.x; they differ in how it is made."""
    api = getattr(paho, "CallbackAPIVersion", None)
    first = () if api is None else (api.VERSION2,)
    return paho.Client(*first, client_id=client_id, protocol=version, **options)


class PahoPeer:
    """A paho client whose callbacks can be awaited, in order."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._send, self._receive = trio.open_memory_channel[tuple[str, Any]](math.inf)
        token = trio.lowlevel.current_trio_token()

        def hear(what: str, which: Any) -> Callable[..., None]:
            def callback(*args: Any) -> None:
                try:
                    token.run_sync_soon(self._send.send_nowait, (what, args[which]))
                except trio.RunFinishedError:
                    return  # The test is over.

            return callback

        client.on_connect = hear("connect", slice(2, 4))
        client.on_subscribe = hear("subscribe", 3)
        client.on_publish = hear("publish", 2)
        client.on_message = hear("message", 2)
        client.on_disconnect = hear("disconnect", 1)

    async def next(self) -> tuple[str, Any]:
        with trio.fail_after(20):
            return await self._receive.receive()

    async def expect(self, what: str) -> Any:
        """The value of the next event, which must be this one."""
        happened, value = await self.next()
        assert happened == what, value
        return value


@asynccontextmanager
async def connected(port: int, client: Any, **options: Any) -> AsyncGenerator[PahoPeer, None]:
    peer = PahoPeer(client)
    await trio.to_thread.run_sync(lambda: client.connect("127.0.0.1", port, 60, **options))
    client.loop_start()
    try:
        yield peer
    finally:
        with trio.move_on_after(20, shield=True):
            client.disconnect()
            await trio.to_thread.run_sync(client.loop_stop)


@VERSIONS
async def test_messages_of_every_qos(broker: MemoryBroker, version: int) -> None:
    port = await broker.listen()
    async with connected(port, new_client("c", version)) as peer:
        await peer.expect("connect")
        peer.client.subscribe("t/#", 2)
        assert [int(getattr(code, "value", code)) for code in await peer.expect("subscribe")] == [2]
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
            _, reason = await peer.expect("connect")
            assert (int(getattr(reason, "value", reason)) == 0) is right
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
            flags, _ = await peer.expect("connect")
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
