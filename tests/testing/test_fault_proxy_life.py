"""What passes a fault proxy unharmed, and what it reports."""

from __future__ import annotations

import random
import socket
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from tests.testing.proxies import IN, LINGER_0, OUT, ask, broken, call, closed, reachable, read, serve
from trio_mqtt_driver.testing import (
    ConnectionEnd,
    Direction,
    FaultProxy,
)


@pytest.fixture
async def proxy(nursery: trio.Nursery) -> FaultProxy:
    return FaultProxy(nursery, await serve(nursery), rng=random.Random(3))


# -- what passes --


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
async def test_ten_megabytes_in_random_pieces_are_the_same_behind_it(
    proxy: FaultProxy, seed: int, shaped: bool
) -> None:
    rng = random.Random(seed)
    payload = rng.randbytes(10_000_000)

    async def send(stream: trio.SocketStream) -> None:
        position = 0
        while position < len(payload):
            size = int(10 ** rng.uniform(0, 6))
            await stream.send_all(payload[position : position + size])
            position += size
        await stream.send_eof()

    async with AsyncExitStack() as stack:
        if shaped:
            stack.enter_context(proxy.delay(0.001, jitter=0.001))
        stream = await stack.enter_async_context(await call(proxy))
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(send, stream)
        # In pieces of other sizes, so that both sides are slower than the other one at times.
        received = bytearray()
        while chunk := await stream.receive_some(int(10 ** rng.uniform(0, 6))):
            received += chunk
        assert received == payload
    assert proxy.passed == {IN: len(payload), OUT: len(payload)}


async def test_faults_that_come_and_go_lose_nothing(proxy: FaultProxy) -> None:
    """While more waits than the sockets can take: what the fast way could not send, the slow one has to."""
    rng = random.Random(5)
    payload = rng.randbytes(20_000_000)
    received = bytearray()

    async def send(stream: trio.SocketStream) -> None:
        await stream.send_all(payload)
        await stream.send_eof()

    async def receive(stream: trio.SocketStream) -> None:
        while chunk := await stream.receive_some(rng.randrange(1, 200_000)):
            received.extend(chunk)

    async def disturb() -> None:
        while True:
            fault = rng.randrange(3)
            with (
                proxy.blackhole() if fault == 0 else proxy.delay(0.001) if fault == 1 else proxy.bandwidth(50_000_000)
            ):
                await trio.sleep(0.002)
            await trio.sleep(0.002)
            assert min(proxy.held.values()) >= 0

    async with await call(proxy) as stream, trio.open_nursery() as troubles:
        troubles.start_soon(disturb)
        async with trio.open_nursery() as transfer:
            transfer.start_soon(send, stream)
            transfer.start_soon(receive, stream)
        troubles.cancel_scope.cancel()
    assert received == payload


async def test_two_hundred_connections_at_once(proxy: FaultProxy) -> None:
    answers: set[bytes] = set()

    async def one(number: int) -> None:
        async with await call(proxy) as stream:
            for _ in range(3):
                answers.add(await ask(stream, b"%4d" % number))
            everybody.append(number)
            if len(everybody) == 200:
                all_there.set()
            await all_there.wait()

    everybody: list[int] = []
    all_there = trio.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, number)
            await all_there.wait()
            assert proxy.open == 200
    await closed(proxy)
    assert answers == {b"%4d" % number for number in range(200)}
    # A bounded ring of reports, and a sum that forgets nothing.
    assert len(proxy.connections) == 100
    assert (proxy.accepted, proxy.passed) == (200, {IN: 2400, OUT: 2400})


# -- what it reports --


async def test_a_connection_is_reported_from_its_begin_to_its_end(proxy: FaultProxy) -> None:
    before = trio.current_time()
    async with await call(proxy) as stream:
        await ask(stream, b"1234")
        (report,) = proxy.connections
        assert (report.number, report.closed, report.end) == (1, None, None)
        assert before <= report.opened <= trio.current_time()
        assert (report.passed, report.held) == ({IN: 4, OUT: 4}, {IN: 0, OUT: 0})
    await closed(proxy)
    (report,) = proxy.connections
    assert report.end is ConnectionEnd.EOF
    assert report.closed is not None
    assert report.opened <= report.closed <= trio.current_time()
    assert proxy.url == f"mqtt://127.0.0.1:{proxy.port}"


async def test_how_connections_end(nursery: trio.Nursery) -> None:
    async def abort_at_the_second(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(await stream.receive_some())
            await stream.receive_some()
        except trio.BrokenResourceError:
            return
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        stream.socket.close()

    proxy = FaultProxy(nursery, await serve(nursery, abort_at_the_second))

    async def begin() -> trio.SocketStream:
        stream = await call(proxy)
        await ask(stream, b"x")
        return stream

    stream = await begin()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    stream.socket.close()
    await closed(proxy)
    async with await begin() as stream:
        await stream.send_all(b"y")
        assert await broken(stream)
    await closed(proxy)
    async with await begin() as stream:
        proxy.reset()
        assert await broken(stream)
    await closed(proxy)
    async with await begin() as stream:
        proxy.cut_after(1, Direction.IN)
        await stream.send_all(b"y")
        assert await broken(stream)
    await closed(proxy)
    # Nobody listens on port 1.
    refused = FaultProxy(nursery, 1)
    async with await call(refused) as stream:
        assert await broken(stream)
    assert [report.end for report in (*proxy.connections, *refused.connections)] == [
        ConnectionEnd.RESET_BY_CLIENT,
        ConnectionEnd.RESET_BY_BROKER,
        ConnectionEnd.RESET_BY_PROXY,
        ConnectionEnd.CUT,
        ConnectionEnd.REFUSED,
    ]


async def test_a_reset_does_not_cross_a_black_hole(proxy: FaultProxy) -> None:
    stream = await call(proxy)
    await ask(stream, b"x")
    with proxy.blackhole(Direction.IN):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        stream.socket.close()
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert proxy.open == 1
    await closed(proxy)
    assert proxy.connections[0].end is ConnectionEnd.RESET_BY_CLIENT


async def test_nor_if_it_is_the_other_direction_that_finds_it(nursery: trio.Nursery) -> None:
    """The broker goes on sending to a client that is gone: it must not hear of that through the black hole."""
    speak = trio.Event()
    heard: list[str] = []

    async def talk(stream: trio.SocketStream) -> None:
        await speak.wait()
        try:
            for _ in range(5):
                await stream.send_all(b"hello")
                await trio.testing.wait_all_tasks_blocked(0.01)
            heard.append("all sent")
            await stream.receive_some()
        except trio.BrokenResourceError:
            heard.append("reset")

    proxy = FaultProxy(nursery, await serve(nursery, talk))
    stream = await call(proxy)
    with proxy.blackhole(IN):
        await stream.send_all(b"last words")
        await trio.testing.wait_all_tasks_blocked(0.01)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        stream.socket.close()
        speak.set()
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert (heard, proxy.open) == (["all sent"], 1)
    await closed(proxy)
    assert proxy.connections[0].end is ConnectionEnd.RESET_BY_CLIENT


async def test_a_reset_at_any_moment(proxy: FaultProxy) -> None:
    """Also between the proxy's tasks: before a lane had its first turn, its sockets may be closed."""
    for turns in range(60):
        async with await call(proxy) as stream:
            try:
                await stream.send_all(b"x")
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                proxy.reset()
                # If the proxy has not accepted it yet, the answer comes.
                with trio.fail_after(20):
                    await stream.receive_some()
            except trio.BrokenResourceError:
                pass
    await closed(proxy)
    assert ConnectionEnd.RESET_BY_PROXY in {report.end for report in proxy.connections}


async def test_a_hanging_connection_can_be_reset(proxy: FaultProxy) -> None:
    with proxy.hang():
        async with await call(proxy) as stream:
            with trio.fail_after(20):
                while not proxy.open:
                    await trio.testing.wait_all_tasks_blocked(0.001)
            proxy.fin()  # It has not reached the broker: left alone.
            proxy.reset()
            assert await broken(stream)
    await closed(proxy)
    assert proxy.connections[0].end is ConnectionEnd.RESET_BY_PROXY


@pytest.mark.parametrize("how", ["reset", "fin", "black hole"])
async def test_a_fault_while_the_client_does_not_read(nursery: trio.Nursery, how: str) -> None:
    """The proxy waits for the client's socket to take more."""
    refused: list[bool] = []
    count = 50_000_000

    async def pour(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(bytes(count))
        except trio.BrokenResourceError:
            refused.append(True)

    proxy = FaultProxy(nursery, await serve(nursery, pour))
    async with await call(proxy) as stream:
        assert await read(stream, 1) == b"\0"
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 0 < proxy.held[OUT] < 100_000
        if how == "black hole":
            with proxy.blackhole():
                passed = proxy.passed[OUT]
                # What is in the kernel's buffers comes, and no more.
                while await receive_within(stream, 0.1):
                    pass
                assert proxy.passed[OUT] == passed
            return
        if how == "fin":
            proxy.fin(Direction.OUT)
            data = b"x"
            with trio.fail_after(20):
                while data:
                    data = await stream.receive_some()
        else:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    await closed(proxy)
    assert refused == ([True] if how == "reset" else [])
    end = ConnectionEnd.RESET_BY_CLIENT if how == "reset" else ConnectionEnd.EOF
    assert proxy.connections[0].end is end


async def receive_within(stream: trio.SocketStream, seconds: float) -> bytes:
    """What comes within this time, if anything does."""
    with trio.move_on_after(seconds):
        return bytes(await stream.receive_some())
    return b""


async def test_refusals_may_be_nested(proxy: FaultProxy) -> None:
    with proxy.refuse():
        with proxy.refuse():
            assert not reachable(proxy)
        assert not reachable(proxy)
    assert reachable(proxy)
