"""Raw clients for these tests: joined to a memory broker, and the exchanges that every test needs."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from trio_mqtt_driver.testing import (
    Ack,
    Connack,
    Connect,
    Kind,
    MemoryBroker,
    Packet,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
)


async def join(broker: MemoryBroker, client_id: str, version: int = 5, **options: Any) -> RawClient:
    """A client that is connected; ``options`` are fields of CONNECT."""
    client, connack = await knock(broker, client_id, version, **options)
    assert connack.reason_code == 0
    return client


async def knock(broker: MemoryBroker, client_id: str, version: int = 5, **options: Any) -> tuple[RawClient, Connack]:
    """A client and the answer to its CONNECT."""
    client = RawClient(await broker.connect_stream(), version)
    return client, await client.connect(Connect(client_id=client_id, version=version, **options))


async def subscribe(client: RawClient, *filters: str, packet_id: int = 1, **options: Any) -> Suback:
    """SUBSCRIBE and its SUBACK; ``options`` are fields of each request, ``properties`` those of the packet."""
    properties = options.pop("properties", {})
    requests = tuple(SubscriptionRequest(topic_filter=entry, **options) for entry in filters)
    await client.send(Subscribe(packet_id=packet_id, requests=requests, properties=properties))
    return await client.expect(Suback)


async def publish(client: RawClient, topic: str, payload: bytes, packet_id: int = 1) -> Ack:
    """PUBLISH with QoS 1 and its PUBACK."""
    await client.send(Publish(topic=topic, payload=payload, qos=1, packet_id=packet_id))
    ack = await client.expect(Ack)
    assert (ack.kind, ack.packet_id) == (Kind.PUBACK, packet_id)
    return ack


async def nothing(client: RawClient) -> bool:
    """Whether nothing comes, and nothing will, while all tasks are idle."""
    got: list[Packet | None] = []

    async def listen() -> None:
        got.append(await client.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return not got
