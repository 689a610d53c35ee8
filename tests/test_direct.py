"""What goes to and from a socket without Trio's stream, on real sockets."""

from __future__ import annotations

import os
import random
import socket
import ssl
import struct
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, MQTTDriver, State
from trio_mqtt_driver._direct import DirectSocket, quick_ack_of
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._writer import Writer
from trio_mqtt_driver.testing import MemoryBroker

if sys.platform == "win32":
    pytest.skip("sockets are no files there, and nothing is direct", allow_module_level=True)

settled = trio.testing.wait_all_tasks_blocked


@asynccontextmanager
async def pair() -> AsyncGenerator[tuple[trio.SocketStream, socket.socket], None]:
    """Our end, and the peer's, which blocks."""
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = None
    try:
        stream = await trio.open_tcp_stream(*listener.getsockname())
        theirs, _ = listener.accept()
        async with stream:
            yield stream, theirs
    finally:
        listener.close()
        if theirs is not None:
            theirs.close()


async def test_only_a_plain_socket_is_used_directly() -> None:
    async with pair() as (stream, _):
        assert DirectSocket.of(stream) is not None
        assert DirectSocket.of(trio.StapledStream(stream, stream)) is None
    assert DirectSocket.of(trio.testing.memory_stream_pair()[0]) is None


class Fake(trio.socket.SocketType):
    """A socket of a test harness, see ``trio.socket.set_custom_socket_factory``."""

    def __init__(self) -> None:
        pass

    @property
    def type(self) -> socket.SocketKind:
        return socket.SOCK_STREAM

    def setsockopt(self, level: int, optname: int, value: Any = None, optlen: int | None = None) -> None:
        pass

    def fileno(self) -> int:
        raise NotImplementedError


async def test_a_socket_that_is_not_the_system_s_is_not_used_directly() -> None:
    assert DirectSocket.of(trio.SocketStream(Fake())) is None


async def test_what_is_written_arrives_and_what_the_socket_does_not_take_is_left() -> None:
    async with pair() as (stream, theirs):
        direct = DirectSocket(stream)
        assert direct.write(b"hello") == 5
        assert theirs.recv(10) == b"hello"
        first = direct.write(bytes(100_000_000))
        assert 0 < first < 100_000_000
        left = first
        while sent := direct.write(bytes(1000)):
            left += sent
        while left:
            left -= len(theirs.recv(left))
        await stream.wait_send_all_might_not_block()
        assert direct.write(b"more") == 4


async def test_a_closed_socket_is_not_used_by_its_old_number() -> None:
    async with pair() as (stream, _):
        direct = DirectSocket(stream)
        number = stream.socket.fileno()
        await stream.aclose()
        one, other = socket.socketpair()  # one of them has the number
        with one, other:
            assert number in (one.fileno(), other.fileno())
            assert direct.write(b"for somebody else") == 0
            with pytest.raises(trio.ClosedResourceError):
                await direct.read(10)
            watching = other if number == one.fileno() else one
            watching.setblocking(False)
            with pytest.raises(BlockingIOError):
                watching.recv(100)


async def test_writing_to_a_broken_connection_is_left_to_the_stream() -> None:
    async with pair() as (stream, theirs):
        direct = DirectSocket(stream)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        await trio.lowlevel.wait_readable(stream.socket)
        assert direct.write(b"x") == 0
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


async def test_reading_waits_until_there_is_something(nursery: trio.Nursery) -> None:
    got: list[bytes] = []
    read_it = trio.Event()

    async def read() -> None:
        got.append(await direct.read(4))
        read_it.set()

    async with pair() as (stream, theirs):
        direct = DirectSocket(stream)
        nursery.start_soon(read)
        await settled()
        assert got == []
        theirs.sendall(b"abcdef")
        await read_it.wait()
        assert got == [b"abcd"]
        assert await direct.read(4) == b"ef"
        theirs.close()
        assert await direct.read(4) == b""


async def test_reading_is_a_cancel_point_and_takes_nothing_then() -> None:
    async with pair() as (stream, theirs):
        direct = DirectSocket(stream)
        theirs.sendall(b"x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await direct.read(4)
        assert scope.cancelled_caught
        assert await direct.read(4) == b"x"


async def test_reading_from_a_connection_that_was_reset_raises_what_the_stream_raises() -> None:
    async with pair() as (stream, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        with pytest.raises(trio.BrokenResourceError, match="socket connection broken") as caught:
            await DirectSocket(stream).read(4)
        assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_a_socket_that_is_closed_meanwhile_ends_the_read(nursery: trio.Nursery) -> None:
    ended = trio.Event()

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await direct.read(4)
        ended.set()

    async with pair() as (stream, _):
        direct = DirectSocket(stream)
        nursery.start_soon(read)
        await settled()
        await stream.aclose()
        await ended.wait()


async def test_a_false_alarm_is_waited_out(nursery: trio.Nursery) -> None:
    """The scheduler was told that there is something, and then somebody else has taken it."""
    got: list[bytes] = []
    read_it = trio.Event()

    class Thief(trio.abc.Instrument):
        taken = b""

        def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002
            if not self.taken:
                self.taken = other.recv(10)

    async def read() -> None:
        got.append(await direct.read(4))
        read_it.set()

    async with pair() as (stream, theirs):
        direct = DirectSocket(stream)
        other = socket.socket(fileno=os.dup(stream.socket.fileno()))
        with other:
            nursery.start_soon(read)
            await settled()
            thief = Thief()
            theirs.sendall(b"first")
            trio.lowlevel.add_instrument(thief)
            await settled()
            trio.lowlevel.remove_instrument(thief)
            assert thief.taken == b"first"
            assert got == []
            theirs.sendall(b"next")
            await read_it.wait()
            assert got == [b"next"]


# -- the writer ------------------------------------------------------------------------------------------------------


class Bench:
    """A writer on one end of a connection."""

    def __init__(self, stream: trio.SocketStream, theirs: socket.socket) -> None:
        theirs.settimeout(5)
        self._stream = stream
        self.theirs = theirs
        self.counters = Counters()
        self.flushes: list[tuple[int, bool]] = []
        self.more: list[bytes] = []
        self.on_flushed: Callable[[], object] = lambda: None
        self.writer = Writer(stream, self.counters, self._flushed)

    def _flushed(self) -> None:
        self.flushes.append((self.writer.waiting, trio.lowlevel.currently_ki_protected()))
        self.on_flushed()
        if self.more:
            self.publish(self.more.pop(0))

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await self.writer.run(lambda: None)

    def publish(self, packet: bytes) -> None:
        """As the express lane does."""
        writer = self.writer
        writer.buffer.append(packet)
        writer.written += len(packet)
        if writer.idle:
            writer.hurry()

    def shrink(self) -> None:
        """Have the system take little at a time."""
        self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def arrived(self) -> bytes:
        self.theirs.setblocking(False)
        try:
            return self.theirs.recv(1 << 20)
        except BlockingIOError:
            return b""
        finally:
            self.theirs.settimeout(5)


@asynccontextmanager
async def benches(nursery: trio.Nursery) -> AsyncGenerator[Bench, None]:
    async with pair() as (stream, theirs):
        bench = Bench(stream, theirs)
        bench.writer.go_live()
        await nursery.start(bench.run)
        await settled()
        yield bench
        nursery.cancel_scope.cancel()


async def test_the_first_publish_on_a_quiet_link_is_written_at_once(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with benches(nursery) as bench:
        bench.publish(b"one")
        assert bench.theirs.recv(10) == b"one"
        assert bench.flushes == [(0, True)]
        assert (bench.writer.flushed, bench.counters.bytes_out) == (3, 3)


async def test_before_the_link_is_live_all_are_and_a_row_of_them_in_one_piece(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with pair() as (stream, theirs):
        bench = Bench(stream, theirs)
        await nursery.start(bench.run)
        await settled()
        for packet in (b"CONNECT", b"PUBLISH"):
            bench.writer.write(packet)
            assert bench.arrived() == packet
        held = bench.writer.hold()
        for packet in (b"SUBSCRIBE", b"SUBSCRIBE again"):
            bench.writer.write(packet)
            assert bench.arrived() == b""
        assert held
        bench.writer.let_go()
        assert bench.arrived() == b"SUBSCRIBESUBSCRIBE again"
        assert len(bench.flushes) == 3
        bench.writer.go_live()
        bench.writer.write(b"PINGREQ")
        assert bench.arrived() == b""
        await settled()
        assert bench.arrived() == b"PINGREQ"
        nursery.cancel_scope.cancel()


async def test_what_follows_within_a_millisecond_is_the_task_s(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    async with benches(nursery) as bench:
        bench.publish(b"one")
        bench.publish(b"two")
        bench.publish(b"three")
        assert bench.arrived() == b"one"
        await settled()
        assert bench.arrived() == b"twothree"
        assert [waiting for waiting, _ in bench.flushes] == [0, 0]
        mock_clock.jump(0.0009)
        bench.publish(b"four")
        assert bench.arrived() == b""
        await settled()
        assert bench.arrived() == b"four"
        mock_clock.jump(0.0011)
        bench.publish(b"five")
        assert bench.arrived() == b"five"


async def test_any_packet_makes_the_link_busy(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    async with benches(nursery) as bench:
        bench.writer.answer(b"PUBACK")
        bench.publish(b"one")
        assert bench.arrived() == b""
        await settled()
        assert bench.arrived() == b"PUBACKone"
        mock_clock.jump(0.0011)
        bench.writer.write(b"PINGREQ")
        assert bench.arrived() == b"PINGREQ"
        bench.publish(b"two")
        assert bench.arrived() == b""
        await settled()
        assert bench.arrived() == b"two"


async def test_what_is_written_before_the_task_begins_is_written_at_once_too(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with pair() as (stream, theirs):
        bench = Bench(stream, theirs)
        bench.writer.write(b"CONNECT")
        assert bench.arrived() == b"CONNECT"
        bench.writer.write(b"more")
        await nursery.start(bench.run)
        await settled()
        assert bench.arrived() == b"more"
        assert bench.writer.idle
        nursery.cancel_scope.cancel()


async def test_what_a_read_brings_about_is_written_in_one_piece(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    async with benches(nursery) as bench:
        writer = bench.writer
        assert writer.hold()
        writer.answer(b"PUBREL")
        bench.publish(b"one")
        writer.write(b"SUBSCRIBE")
        assert bench.arrived() == b""
        assert not writer.hold()  # it is held already
        writer.let_go()
        assert bench.arrived() == b"PUBRELoneSUBSCRIBE"
        assert bench.flushes == [(0, True)]
        assert (writer.answers, writer.idle) == (0, True)
        assert writer.hold()  # and again, however soon
        bench.publish(b"two")
        bench.more = [b"three"]  # the room that this makes is used at once
        writer.let_go()
        assert bench.arrived() == b"two"
        await settled()
        assert bench.arrived() == b"three"
        assert writer.hold()
        writer.let_go()  # with nothing
        assert (bench.arrived(), writer.idle) == (b"", True)


async def test_a_writer_at_work_is_not_held(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    async with benches(nursery) as bench:
        bench.writer.answer(b"PUBREL")
        assert not bench.writer.hold()
        bench.publish(b"one")
        await settled()
        assert bench.arrived() == b"PUBRELone"


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 1 << 20])
async def test_what_is_too_much_for_one_piece_is_the_task_s(
    size: int, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with benches(nursery) as bench:
        bench.shrink()
        writer = bench.writer
        packet = random.Random(1).randbytes(size)
        assert writer.hold()
        writer.answer(packet)
        writer.let_go()
        assert not writer.idle
        assert writer.answers == size
        arrived = bytearray()
        while len(arrived) < size:
            arrived += await trio.to_thread.run_sync(bench.theirs.recv, 1 << 20)
        assert arrived == packet
        await settled()
        assert (writer.answers, writer.waiting, writer.idle) == (0, 0, True)


async def test_acknowledgements_wait_until_others_have_had_a_turn(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Whoever a message was for is not to wait for its PUBACK. The scheduler's order is random, so many times."""
    async with pair() as (stream, theirs):
        bench = Bench(stream, theirs)
        noted: list[bytes] = []

        def collect() -> None:
            for packet in noted:
                bench.writer.answer(packet)
            noted.clear()

        nursery.start_soon(bench.writer.run, collect)
        for _ in range(30):
            await settled()
            noted.append(b"PUBACK")
            bench.writer.rouse()
            await trio.lowlevel.checkpoint()
            assert bench.arrived() == b""
            await settled()
            assert bench.arrived() == b"PUBACK"
        nursery.cancel_scope.cancel()


async def test_what_the_socket_does_not_take_goes_before_what_comes_later(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    large = random.Random(1).randbytes(60_000)
    async with benches(nursery) as bench:
        bench.shrink()
        bench.publish(large)
        assert 0 < bench.writer.flushed < len(large)
        assert not bench.writer.idle
        mock_clock.jump(1)
        bench.publish(b"the end")
        received = bytearray()
        with trio.fail_after(60):
            while not received.endswith(b"the end"):
                received += bench.arrived()
                await trio.lowlevel.checkpoint()
        assert received == large + b"the end"
        await settled()
        assert bench.writer.waiting == 0
        assert bench.counters.bytes_out == len(received)


async def test_what_is_large_is_left_to_the_task(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    """What the socket does not take of it would be copied, and to hand over much takes a while."""
    async with benches(nursery) as bench:
        bench.publish(bytes(65_537))
        assert bench.arrived() == b""
        assert not bench.writer.idle
        await settled()
        assert bench.writer.waiting == 0


@pytest.mark.parametrize("seconds", [0, 0.002], ids=["quick", "slow"])
async def test_a_flush_that_has_more_sent_does_not_nest(
    mock_clock: MockClock, nursery: trio.Nursery, seconds: float
) -> None:
    async with benches(nursery) as bench:
        bench.on_flushed = lambda: mock_clock.jump(seconds)  # each write takes so long
        bench.more = [b"%04d" % number for number in range(2000)]  # more than Python lets calls nest
        bench.publish(b"one")
        assert bench.arrived() == b"one"
        received = bytearray()
        while bench.more or bench.writer.waiting:
            await trio.lowlevel.checkpoint()
            received += bench.arrived()
        received += bench.arrived()
        assert received == b"".join(b"%04d" % number for number in range(2000))


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_pace_bytes_leave_in_their_order(
    seed: int, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    rng = random.Random(seed)
    expected, received = bytearray(), bytearray()
    async with benches(nursery) as bench:
        for _ in range(300):
            packet = rng.randbytes(rng.choice([1, 80, 5000, 300_000]))
            expected += packet
            rng.choice([bench.publish, bench.publish, bench.writer.write, bench.writer.answer])(packet)
            if rng.random() < 0.5:
                mock_clock.jump(rng.choice([0.0005, 0.01]))
            for _ in range(rng.randrange(4)):
                await trio.lowlevel.checkpoint()
                received += bench.arrived()
        with trio.fail_after(60):
            while len(received) < len(expected):
                received += bench.arrived()
                await trio.lowlevel.checkpoint()
        assert received == expected
        await settled()
        assert (bench.writer.waiting, bench.writer.answers) == (0, 0)


# -- a driver --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [1, 2])  # the express lane, and the way of all others
async def test_an_acknowledgement_is_due_for_what_was_written_at_once(
    mock_clock: MockClock, nursery: trio.Nursery, qos: int
) -> None:
    broker = MemoryBroker(nursery)
    config = memory_config(
        broker,
        open_stream=None,
        endpoint=Endpoint(host="127.0.0.1", port=await broker.listen()),
        ack_timeout=20,
        keep_alive=1000,
    )
    async with MQTTDriver(config) as driver:
        await driver.wait_live()
        mock_clock.jump(500)  # long ago something else was acknowledged
        broker.silence()
        before = driver.status().counters["bytes_out"]
        receipt = driver.publish_nowait("a", b"x", qos=qos)
        assert driver.status().counters["bytes_out"] > before  # no task has run
        waited = 0
        while not driver.status().counters["losses"]:
            await settled()
            mock_clock.jump(1)
            waited += 1
            assert waited < 100
        # Overdue, then asked by PINGREQ, which is not answered either.
        assert 20 < waited <= 20 + config.ping_timeout + 2
        await receipt.wait()  # on the next connection
        nursery.cancel_scope.cancel()


# -- acknowledgements of TCP -----------------------------------------------------------------------------------------


def unacknowledged(sock: socket.socket) -> int:
    """Segments that the other end's system has not acknowledged yet (``tcpi_unacked``)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, 24)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_QUICKACK is Linux's")
async def test_what_was_read_is_acknowledged_at_once_even_if_something_was_sent_before() -> None:
    async with pair() as (stream, theirs):
        acknowledge = quick_ack_of(stream)
        assert acknowledge is not None
        held_up = 0
        for _ in range(50):
            theirs.send(b"question")
            await stream.receive_some(100)
            await stream.send_all(b"answer")  # from here on the system would wait, for there may be another one
            theirs.recv(100)
            theirs.send(b"more")
            await stream.receive_some(100)
            held_up += unacknowledged(theirs) > 0
            acknowledge()
            assert unacknowledged(theirs) == 0
        assert held_up  # else this shows nothing


async def test_only_tcp_is_told_to_acknowledge(tmp_path: Path) -> None:
    ours, _ = trio.testing.memory_stream_pair()
    assert quick_ack_of(ours) is None
    assert quick_ack_of(trio.StapledStream(ours, ours)) is None
    assert quick_ack_of(trio.SocketStream(Fake())) is None
    async with pair() as (stream, _):
        over_tls = trio.SSLStream(stream, ssl.create_default_context(), server_hostname="localhost")
        acknowledge = quick_ack_of(over_tls)
        assert (acknowledge is None) == (sys.platform != "linux")
        await stream.aclose()
        if acknowledge is not None:
            acknowledge()  # a closed socket is the read's to find
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        async with await trio.open_unix_socket(tmp_path / "socket") as unix:
            assert quick_ack_of(unix) is None


async def test_a_driver_has_each_read_acknowledged(
    monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    told = 0

    def counting(_stream: trio.abc.Stream) -> Callable[[], None]:
        def acknowledge() -> None:
            nonlocal told
            told += 1

        return acknowledge

    monkeypatch.setattr("trio_mqtt_driver._connection.quick_ack_of", counting)
    broker = MemoryBroker(nursery)
    config = memory_config(broker, open_stream=None, endpoint=Endpoint(host="127.0.0.1", port=await broker.listen()))
    async with MQTTDriver(config) as driver:
        got: list[bytes] = []
        await driver.subscribe("a", lambda message: got.append(message.payload))
        for number in range(5):
            before = told
            broker.publish("a", b"%d" % number)
            while len(got) <= number:  # noqa: ASYNC110  # turns are waited for
                await trio.lowlevel.checkpoint()
            assert told == before + 1
        nursery.cancel_scope.cancel()


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch) -> Generator[list[bytes], None, None]:
    """What is written in the block without the writer's task."""
    written: list[bytes] = []
    write = DirectSocket.write

    def noting(self: DirectSocket, data: bytes) -> int:
        written.append(data)
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(DirectSocket, "write", noting)
        yield written


async def test_what_left_meanwhile_leaves_in_one_piece_too(
    monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    config = memory_config(broker, open_stream=None, endpoint=Endpoint(host="127.0.0.1", port=await broker.listen()))
    async with MQTTDriver(config.evolve(replay_batch=1, stable_id=True)) as driver:
        subscriptions = [await driver.subscribe(f"in/{number}", print) for number in range(30)]
        driver.pause("so that they leave")
        await driver.wait_state(State.PAUSED)
        async with trio.open_nursery() as unsubscribing:
            for one in subscriptions:
                unsubscribing.start_soon(driver.unsubscribe, one)
            await settled()
            with noted(monkeypatch) as written:
                driver.resume()
                await driver.wait_live()
        assert [data[0] >> 4 for data in written] == [1, 3, 10]  # CONNECT, PUBLISH, UNSUBSCRIBE
        assert written[-1].count(b"in/") == 30
        assert not broker.subscriptions("driver")
        nursery.cancel_scope.cancel()


async def test_the_way_to_a_live_link_takes_three_writes_and_no_turn_of_the_writer(
    monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    config = memory_config(broker, open_stream=None, endpoint=Endpoint(host="127.0.0.1", port=await broker.listen()))
    async with MQTTDriver(config.evolve(replay_batch=10)) as driver:
        async with trio.open_nursery() as subscribing:
            for number in range(100):
                subscribing.start_soon(driver.subscribe, f"in/{number}", print)
        mock_clock.jump(1)  # so that the link is quiet
        with noted(monkeypatch) as written:
            driver.force_reconnect("to see the way", even_if_live=True)
            await driver.wait_live()
        assert [data[0] >> 4 for data in written] == [14, 1, 3, 8]  # DISCONNECT, CONNECT, PUBLISH, SUBSCRIBE
        assert sum(data.count(b"in/") for data in written[-1:]) == 100
        assert len(broker.subscriptions(str(driver.client_id))) == 100
        # On the live link what follows is the writer's, who sends many with one call.
        with noted(monkeypatch) as written:
            for _ in range(5):
                driver.publish_nowait("a")
        assert len(written) <= 1
        nursery.cancel_scope.cancel()
