"""What the tests of the fault proxy share: a server behind it, and clients before it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import trio
import trio.testing

from trio_mqtt_driver.testing import Direction, FaultProxy

IN, OUT = Direction
# A socket that is closed with it sends a reset.
LINGER_0 = struct.pack("ii", 1, 0)


async def echo(stream: trio.SocketStream) -> None:
    try:
        async for data in stream:
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def serve(nursery: trio.Nursery, handler: Callable[[trio.SocketStream], Any] = echo) -> int:
    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def call(proxy: FaultProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream(proxy.host, proxy.port)


async def ask(stream: trio.SocketStream, data: bytes) -> bytes:
    await stream.send_all(data)
    return await read(stream, len(data))


async def read(stream: trio.SocketStream, count: int) -> bytes:
    data = bytearray()
    with trio.fail_after(20):
        while len(data) < count and (chunk := await stream.receive_some(count - len(data))):
            data += chunk
    return bytes(data)


async def broken(stream: trio.SocketStream) -> bool:
    with trio.fail_after(20):
        try:
            await stream.receive_some()
        except trio.BrokenResourceError:
            return True
        return False


async def closed(proxy: FaultProxy) -> None:
    """Until the proxy has noticed the end of all its connections."""
    with trio.fail_after(20):
        while proxy.open:
            await trio.testing.wait_all_tasks_blocked(0.001)


def reachable(proxy: FaultProxy) -> bool:
    """Whether somebody listens: the kernel says so at once, no clock needs to move."""
    with socket.socket() as probe:
        return probe.connect_ex((proxy.host, proxy.port)) == 0
