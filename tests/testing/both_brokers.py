"""Clients of a broker over TCP, be it the memory broker or mosquitto, and how tests of both tell that it is done."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import trio

from trio_mqtt_driver.testing import (
    Ack,
    Connack,
    Connect,
    Disconnect,
    Kind,
    Pingreq,
    Pingresp,
    PropertyValue,
    Publish,
    RawClient,
)

KEPT: dict[str, PropertyValue] = {"session_expiry": 1000}


class Peers:
    """Makes clients of one broker, over TCP; ends their connections with the test."""

    def __init__(self, port: int, stack: AsyncExitStack) -> None:
        self.port = port
        self._stack = stack

    async def knock(self, client_id: str, version: int = 5, **options: Any) -> tuple[RawClient, Connack]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        client = RawClient(await self._stack.enter_async_context(stream), version)
        return client, await client.connect(Connect(client_id=client_id, version=version, **options))

    async def join(self, client_id: str, version: int = 5, **options: Any) -> RawClient:
        client, connack = await self.knock(client_id, version, **options)
        assert connack.reason_code == 0
        return client

    async def resume(self, version: int = 5, **options: Any) -> tuple[RawClient, bool]:
        """Client "c" with a session that is kept, and whether there was one."""
        properties = {**KEPT, **options.pop("properties", {})} if version == 5 else {}
        client, connack = await self.knock("c", version, clean_start=False, properties=properties, **options)
        assert connack.reason_code == 0
        return client, connack.session_present


async def silent(client: RawClient) -> bool:
    """Whether nothing came before the answer to a ping: both brokers serve a client in the order of events."""
    await client.send(Pingreq())
    return await client.receive() == Pingresp()


async def publish(client: RawClient, topic: str, payload: bytes = b"x", packet_id: int = 1, **fields: Any) -> None:
    """With QoS 1, so that the broker has taken the message when this returns."""
    await client.send(Publish(topic=topic, payload=payload, qos=1, packet_id=packet_id, **fields))
    ack = await client.expect(Ack)
    assert (ack.kind, ack.packet_id) == (Kind.PUBACK, packet_id)


async def over(client: RawClient) -> Disconnect | None:
    """The connection has ended, or ends now; what DISCONNECT said about it, if there was one."""
    said: Disconnect | None = None
    try:
        packet = await client.receive()
        if isinstance(packet, Disconnect):
            said, packet = packet, await client.receive()
    except trio.BrokenResourceError:
        return said
    assert packet is None
    return said
