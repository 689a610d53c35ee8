"""Every fault of the proxy, shown happening to bytes that a server echoes."""

from __future__ import annotations

import socket
import struct
from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio

from trio_mqtt_driver.testing import (
    Connect,
    Direction,
    EmbeddedBroker,
    FaultProxy,
    MemoryBroker,
    Publish,
    RawClient,
    encode,
)


class Echo:
    """A server that sends back what comes."""

    def __init__(self) -> None:
        self.port = 0
        self.received = bytearray()
        self.ends: list[str] = []
        """How its connections ended: "eof" or "broken"."""
        self.ended = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                self.received += data
                await stream.send_all(data)
            self.ends.append("eof")
        except trio.BrokenResourceError:
            self.ends.append("broken")
        self.ended.set()


@pytest.fixture
async def echo(nursery: trio.Nursery) -> Echo:
    server = Echo()
    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1")
    )
    server.port = listeners[0].socket.getsockname()[1]
    return server


@pytest.fixture
def proxy(nursery: trio.Nursery, echo: Echo) -> FaultProxy:
    return FaultProxy(nursery, echo.port)


async def call(proxy: FaultProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream(proxy.host, proxy.port)


async def read(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    data = bytearray()
    with trio.fail_after(20):
        while len(data) < count:
            chunk = await stream.receive_some(count - len(data))
            if not chunk:
                break
            data += chunk
    return bytes(data)


async def ask(stream: trio.abc.Stream, data: bytes) -> bytes:
    await stream.send_all(data)
    return await read(stream, len(data))


async def silent(stream: trio.abc.ReceiveStream) -> bool:
    """Whether nothing comes for a while; that a fault lets nothing pass can only be shown by waiting."""
    with trio.move_on_after(0.2) as scope:
        await stream.receive_some(1)
    return scope.cancelled_caught


async def test_everything_passes_unchanged(proxy: FaultProxy, echo: Echo) -> None:
    payload = bytes(range(256)) * 8192
    async with await call(proxy) as one, await call(proxy) as two:
        assert await ask(two, b"two") == b"two"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_all, payload)
            assert await read(one, len(payload)) == payload
        await one.send_eof()
        assert await read(one, 1) == b""
        assert echo.ends == ["eof"]
        assert proxy.accepted == 2
    assert proxy.passed == {Direction.IN: len(payload) + 3, Direction.OUT: len(payload) + 3}


async def test_reset(proxy: FaultProxy, echo: Echo) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        proxy.reset()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
            await stream.receive_some()
        with trio.fail_after(20):
            await echo.ended.wait()
        assert echo.ends == ["broken"]
    async with await call(proxy) as stream:
        assert await ask(stream, b"again") == b"again"


async def test_fin_ends_one_direction(proxy: FaultProxy, echo: Echo) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        proxy.fin()
        assert await read(stream, 1) == b""
        await stream.send_all(b"more")
        await stream.send_eof()
        with trio.fail_after(20):
            await echo.ended.wait()
        assert bytes(echo.received) == b"xmore"
        assert echo.ends == ["eof"]


@pytest.mark.parametrize("direction", [None, Direction.IN, Direction.OUT])
async def test_black_hole(proxy: FaultProxy, echo: Echo, direction: Direction | None) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.blackhole(direction):
            await stream.send_all(b"held")
            assert await silent(stream)
            assert bytes(echo.received) == (b"xheld" if direction is Direction.OUT else b"x")
            with pytest.raises(RuntimeError, match="black hole"), proxy.blackhole():
                pass
            async with await call(proxy) as late:
                await late.send_all(b"late")
                assert await silent(late)
        assert await read(stream, 4) == b"held"
        assert await ask(stream, b"more") == b"more"


async def test_refuse(proxy: FaultProxy) -> None:
    async with await call(proxy) as stream:
        for _ in range(3):
            with proxy.refuse():
                with pytest.raises(OSError, match="connect"):
                    await call(proxy)
                assert await ask(stream, b"open ones stay") == b"open ones stay"
            async with await call(proxy) as other:
                assert await ask(other, b"x") == b"x"


async def test_hang(proxy: FaultProxy) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.hang():
            async with await call(proxy) as late:
                await late.send_all(b"late")
                assert await silent(late)
                assert await ask(stream, b"open ones work") == b"open ones work"
                with pytest.raises(RuntimeError, match="hang already"), proxy.hang():
                    pass
        async with await call(proxy) as late:
            assert await ask(late, b"late") == b"late"


async def test_a_hanging_connection_goes_through_at_the_end(proxy: FaultProxy) -> None:
    with proxy.hang():
        late = await call(proxy)
        await late.send_all(b"late")
    async with late:
        assert await read(late, 4) == b"late"


async def test_delay(proxy: FaultProxy) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        proxy.delay = 0.15
        before = trio.current_time()
        await ask(stream, b"x")
        # A lower bound, which no slow machine can break: there and back.
        assert trio.current_time() - before >= 0.3
        proxy.delay = 0.0
        assert await ask(stream, b"x") == b"x"


async def test_byte_by_byte(nursery: trio.Nursery) -> None:
    """Shown with a server that answers each piece with its length."""
    lengths: list[int] = []

    async def measure(stream: trio.SocketStream) -> None:
        async for data in stream:
            lengths.append(len(data))
            await stream.send_all(b"." * len(data))

    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, measure, 0, host="127.0.0.1"))
    proxy = FaultProxy(nursery, listeners[0].socket.getsockname()[1])
    proxy.byte_by_byte = True
    async with await call(proxy) as stream:
        assert await ask(stream, b"x" * 100) == b"." * 100
    # The kernel may join a few, but never into as large a piece as it was.
    assert len(lengths) > 10


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("direction", list(Direction))
async def test_cut_after(proxy: FaultProxy, echo: Echo, direction: Direction, reset: bool) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"before")
        proxy.cut_after(10, direction, reset=reset)
        for data in (b"0123", b"4567"):
            assert await ask(stream, data) == data
        await stream.send_all(b"89ab")
        if direction is Direction.OUT:
            assert await read(stream, 2) == b"89"
        if reset:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
                await stream.receive_some()
        elif direction is Direction.OUT:
            assert await read(stream, 1) == b""
        with trio.fail_after(20):
            await echo.ended.wait()
        if direction is Direction.IN:
            assert bytes(echo.received) == b"before0123456789"
    async with await call(proxy) as stream:
        assert await ask(stream, b"the next connection works") == b"the next connection works"


async def test_cut_after_nothing() -> None:
    async with trio.open_nursery() as nursery:
        proxy = FaultProxy(nursery, 1)
        with pytest.raises(ValueError, match="count must be at least 1, not 0"):
            proxy.cut_after(0)
        nursery.cancel_scope.cancel()


async def test_a_target_that_refuses(nursery: trio.Nursery) -> None:
    # Nobody listens on port 1.
    proxy = FaultProxy(nursery, 1)
    async with await call(proxy) as stream:
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
            await stream.receive_some()
    assert (proxy.accepted, proxy.open) == (1, 0)


async def test_a_client_that_resets(proxy: FaultProxy, echo: Echo) -> None:
    stream = await call(proxy)
    await ask(stream, b"x")
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
    with trio.fail_after(20):
        await echo.ended.wait()
    assert echo.ends == ["broken"]


async def test_mqtt_through_the_proxy(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    proxy = FaultProxy(nursery, await broker.listen())
    proxy.byte_by_byte = True
    async with await call(proxy) as stream:
        assert (await RawClient(stream).connect(Connect(client_id="c"))).reason_code == 0
        proxy.reset()
        await broker.wait_for(lambda: not broker.clients, "lost connection")


@pytest.mark.broker
async def test_a_real_broker_behind_the_proxy(nursery: trio.Nursery) -> None:
    async with EmbeddedBroker() as broker:
        proxy = FaultProxy(nursery, broker.port)
        async with await call(proxy) as stream:
            client = RawClient(stream, version=4)
            assert (await client.connect(Connect(client_id="c", version=4))).reason_code == 0
            await broker.kill()
            with trio.fail_after(20):
                try:
                    last = await client.receive()
                except trio.BrokenResourceError:
                    last = None
            assert last is None


async def test_nothing_is_left_open(nursery: trio.Nursery, echo: Echo) -> None:
    """Cancelled at once, before any of its tasks ran, and later: the listener is closed."""
    for rounds in (0, 1):
        async with trio.open_nursery() as own:
            proxy = FaultProxy(own, echo.port)
            async with AsyncExitStack() as stack:
                for _ in range(rounds):
                    await ask(await stack.enter_async_context(await call(proxy)), b"x")
            own.cancel_scope.cancel()
        with pytest.raises(OSError, match="connect"):
            await call(proxy)


async def test_a_client_gets_messages_at_half_the_direct_rate_or_more(nursery: trio.Nursery) -> None:
    """All run in this thread, so the ratio is steady where times are not; the best of three counts."""
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
