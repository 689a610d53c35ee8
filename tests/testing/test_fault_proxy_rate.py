"""A proxy that does nothing passes at least half of what goes directly.

All run in this thread, so the ratio is steady where times are not; the best of a few counts.
"""

from __future__ import annotations

from functools import partial

import trio

from trio_mqtt_driver.testing import FaultProxy, Publish, RawClient, encode

BULK = 32 * 1024 * 1024


async def test_bytes_in_bulk(nursery: trio.Nursery) -> None:
    data = bytes(65536)

    async def pour(stream: trio.SocketStream) -> None:
        for _ in range(BULK // len(data)):
            await stream.send_all(data)

    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, pour, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    proxy = FaultProxy(nursery, port)

    async def seconds(target: int) -> float:
        async with await trio.open_tcp_stream("127.0.0.1", target) as stream:
            before, count = trio.current_time(), 0
            async for chunk in stream:
                count += len(chunk)
            assert count == BULK
            return trio.current_time() - before

    ratios = [await seconds(port) / await seconds(proxy.port) for _ in range(7)]
    assert max(ratios) >= 0.5, ratios


async def test_messages(nursery: trio.Nursery) -> None:
    count, batch = 20_000, 500
    data = encode(Publish(topic="sensors/kitchen/temperature", payload=bytes(64)), 5) * batch

    async def pour(stream: trio.SocketStream) -> None:
        for _ in range(count // batch):
            await stream.send_all(data)

    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, pour, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    proxy = FaultProxy(nursery, port)

    async def seconds(target: int) -> float:
        async with await trio.open_tcp_stream("127.0.0.1", target) as stream:
            client = RawClient(stream)
            before = trio.current_time()
            for _ in range(count):
                await client.expect(Publish)
            return trio.current_time() - before

    ratios = [await seconds(port) / await seconds(proxy.port) for _ in range(3)]
    assert max(ratios) >= 0.5, ratios
