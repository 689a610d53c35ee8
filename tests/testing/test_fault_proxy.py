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
    RawClient,
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


async def test_fin_towards_the_broker(nursery: trio.Nursery) -> None:
    """The broker gets EOF and goes on sending; what the client still sends is lost."""
    received = bytearray()
    may_answer = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")
        async for data in stream:
            received.extend(data)
        await may_answer.wait()
        await stream.send_all(b"still here")

    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
    proxy = FaultProxy(nursery, listeners[0].socket.getsockname()[1])
    async with await call(proxy) as stream:
        assert await read(stream, 5) == b"hello"
        with proxy.blackhole(Direction.IN):
            await stream.send_all(b"held back")
            assert await silent(stream)
            proxy.fin(Direction.IN)
        await stream.send_all(b"lost")
        may_answer.set()
        assert await read(stream, 100) == b"still here"
    assert received == b""


@pytest.mark.parametrize("direction", [None, Direction.IN, Direction.OUT])
async def test_black_hole(proxy: FaultProxy, echo: Echo, direction: Direction | None) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.blackhole(direction):
            await stream.send_all(b"held")
            assert await silent(stream)
            assert bytes(echo.received) == (b"xheld" if direction is Direction.OUT else b"x")
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
        async with await call(proxy) as late:
            assert await ask(late, b"late") == b"late"


async def test_a_hanging_connection_goes_through_at_the_end(proxy: FaultProxy) -> None:
    with proxy.hang():
        late = await call(proxy)
        await late.send_all(b"late")
    async with late:
        assert await read(late, 4) == b"late"


async def test_delay(proxy: FaultProxy) -> None:
    """Its exact timing is shown in test_lanes.py; here a lower bound, which no slow machine can break."""
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.delay(0.15, jitter=0.01):
            before = trio.current_time()
            await ask(stream, b"x")
            assert trio.current_time() - before >= 0.3
        assert await ask(stream, b"x") == b"x"


async def test_delay_in_one_direction(proxy: FaultProxy, echo: Echo) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.delay(600, direction=Direction.OUT):
            await stream.send_all(b"late")
            assert await silent(stream)
            assert bytes(echo.received) == b"xlate"
            assert proxy.held == {Direction.IN: 0, Direction.OUT: 4}
        assert await read(stream, 4) == b"late"


async def test_bandwidth(proxy: FaultProxy) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.bandwidth(1000, direction=Direction.IN):
            before = trio.current_time()
            assert await ask(stream, bytes(200)) == bytes(200)
            assert trio.current_time() - before >= 0.2
        with proxy.bandwidth(1):
            await stream.send_all(b"slow")
            assert await silent(stream)
        assert await read(stream, 4) == b"slow"


@pytest.mark.parametrize("direction", list(Direction))
async def test_corrupt(proxy: FaultProxy, echo: Echo, direction: Direction) -> None:
    async with await call(proxy) as stream:
        assert await ask(stream, b"abcd") == b"abcd"
        proxy.corrupt(2, direction, mask=0x20)
        assert await ask(stream, b"abcd") == b"abCd"
        assert bytes(echo.received) == (b"abcdabcd" if direction is Direction.OUT else b"abcdabCd")
        assert await ask(stream, b"abcd") == b"abcd"


async def test_byte_by_byte(nursery: trio.Nursery) -> None:
    """Shown with a server that answers each piece with its length."""
    lengths: list[int] = []

    async def measure(stream: trio.SocketStream) -> None:
        async for data in stream:
            lengths.append(len(data))
            await stream.send_all(b"." * len(data))

    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, measure, 0, host="127.0.0.1"))
    proxy = FaultProxy(nursery, listeners[0].socket.getsockname()[1])
    async with await call(proxy) as stream:
        with proxy.byte_by_byte():
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
