"""The timing of a fault proxy, on streams in memory and a clock that jumps: exact to the microsecond."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from trio_mqtt_driver.testing import PipeStream, open_pipe
from trio_mqtt_driver.testing._lane import MOST_BYTES, Lane
from trio_mqtt_driver.testing._shaping import Fault, Shaping

Arrival = tuple[float, bytes]
EOF = b""


class Sink(trio.abc.HalfCloseableStream):
    """Notes each piece, and when it came."""

    def __init__(self) -> None:
        self.start = trio.current_time()
        self.arrivals: list[Arrival] = []
        self.broken = False
        self.clogged = trio.Event()
        self.clogged.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        await self.clogged.wait()
        if self.broken:
            raise trio.BrokenResourceError
        self.arrivals.append((round(trio.current_time() - self.start, 6), bytes(data)))

    async def send_eof(self) -> None:
        await self.send_all(EOF)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise AssertionError(f"a lane reads from its source only, not {max_bytes} bytes from its sink")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    @property
    def received(self) -> bytes:
        return b"".join(data for _, data in self.arrivals)


class Line:
    """A lane with both its ends; what it tells its connection is noted."""

    def __init__(self, nursery: trio.Nursery, shaping: Shaping) -> None:
        self.near, source = open_pipe(capacity=10 * MOST_BYTES)
        self.source: PipeStream = source
        self.sink = Sink()
        self.told: list[str] = []
        self.lane = Lane(source, self.sink, shaping, self)
        nursery.start_soon(self.lane.run)

    def source_was_reset(self, lane: Lane) -> None:
        assert lane is self.lane
        self.told.append("source was reset")

    def sink_broke(self, lane: Lane) -> None:
        assert lane is self.lane
        self.told.append("sink broke")

    def cut(self, *, reset: bool) -> None:
        self.told.append("cut by reset" if reset else "cut by EOF")

    async def until_ended(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert self.lane.ended


@pytest.fixture
def shaping() -> Shaping:
    return Shaping(random.Random(7))


@pytest.fixture
def line(nursery: trio.Nursery, shaping: Shaping) -> Line:
    return Line(nursery, shaping)


@contextmanager
def all_of(shaping: Shaping, *faults: Fault) -> Generator[None, None, None]:
    if not faults:
        yield
        return
    with shaping.during(faults[0]), all_of(shaping, *faults[1:]):
        yield


async def test_without_faults_all_passes_at_once(autojump_clock: object, line: Line) -> None:
    await line.near.send_all(b"one")
    await trio.sleep(1)
    await line.near.send_all(b"two")
    line.near.close()
    await line.until_ended()
    assert line.sink.arrivals == [(0, b"one"), (1, b"two"), (1, EOF)]
    assert (line.lane.passed, line.lane.held) == (6, 0)


async def test_pieces_that_are_late_are_under_way_together_and_eof_is_late_too(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    with shaping.during(Fault(delay=10)):
        await line.near.send_all(b"one")
        await trio.sleep(1)
        await line.near.send_all(b"two")
        await trio.sleep(1)
        line.near.close()
        await trio.testing.wait_all_tasks_blocked()
        assert line.lane.held == 6
        await trio.sleep(10.5)
    assert line.sink.arrivals == [(10, b"one"), (11, b"two"), (12, EOF)]


async def test_jitter_is_drawn_from_the_random_source_and_keeps_order(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    expected = random.Random(7)
    due: list[float] = []
    with shaping.during(Fault(delay=1, jitter=2)):
        for number in range(10):
            await line.near.send_all(b"%d" % number)
            await trio.testing.wait_all_tasks_blocked()
            due.append(max(number * 0.5 + 1 + expected.uniform(0, 2), *due[-1:], 0))
            await trio.sleep(0.5)
        await trio.sleep(3)
    assert line.sink.received == b"0123456789"
    assert [at for at, _ in line.sink.arrivals] == pytest.approx(due)
    # Some have caught up with those before them: without that, order would prove nothing.
    assert len(set(due)) < len(due)


async def test_one_byte_per_second(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    with shaping.during(Fault(bandwidth=1)):
        await line.near.send_all(b"abc")
        line.near.close()
        await trio.sleep(4)
    assert line.sink.arrivals == [(1, b"a"), (2, b"b"), (3, b"c"), (3, EOF)]


async def test_a_bandwidth_is_kept_and_does_not_add_up_while_nothing_comes(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    with shaping.during(Fault(bandwidth=1000)):
        for start in (0, 100):
            await trio.sleep(start)
            await line.near.send_all(bytes(1000))
            await trio.sleep(0.52)
            assert len(line.sink.received) % 1000 == 500
            await trio.sleep(0.5)
            assert len(line.sink.received) % 1000 == 0
            assert line.lane.held == 0


async def test_connections_share_the_bandwidth(
    autojump_clock: object, nursery: trio.Nursery, shaping: Shaping
) -> None:
    lines = [Line(nursery, shaping) for _ in range(2)]
    with shaping.during(Fault(bandwidth=100)):
        for line in lines:
            await line.near.send_all(bytes(100))
        await trio.sleep(1.01)
        assert [len(line.sink.received) for line in lines] == [50, 50]
        await trio.sleep(1)
        assert [len(line.sink.received) for line in lines] == [100, 100]


async def test_every_byte_on_its_own(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    with shaping.during(Fault(trickle=True)):
        await line.near.send_all(b"abc")
        await trio.testing.wait_all_tasks_blocked()
    assert line.sink.arrivals == [(0, b"a"), (0, b"b"), (0, b"c")]


async def test_a_black_hole_holds_data_and_eof_until_its_end(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    with shaping.during(Fault(hole=True)):
        await line.near.send_all(b"held")
        line.near.close()
        await trio.sleep(3600)
        assert line.sink.arrivals == []
        assert line.lane.held == 4
    await line.until_ended()
    assert line.sink.arrivals == [(3600, b"held"), (3600, EOF)]


async def test_what_is_held_back_is_bounded_in_bytes(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    payload = random.Random(1).randbytes(4 * MOST_BYTES)
    with shaping.during(Fault(hole=True)):
        await line.near.send_all(payload)
        await trio.testing.wait_all_tasks_blocked()
        assert line.lane.held == MOST_BYTES
    await trio.testing.wait_all_tasks_blocked()
    assert line.sink.received == payload


async def test_what_is_held_back_is_bounded_in_pieces(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    with shaping.during(Fault(hole=True)):
        for _ in range(6000):
            await line.near.send_all(b"x")
            await trio.testing.wait_all_tasks_blocked()
        assert line.lane.held == 4096
    await trio.testing.wait_all_tasks_blocked()
    assert len(line.sink.received) == 6000


async def test_the_end_of_a_fault_is_felt_at_once(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    with shaping.during(Fault(delay=1000)):
        await line.near.send_all(b"late")
        await trio.sleep(1)
    await trio.testing.wait_all_tasks_blocked()
    with shaping.during(Fault(bandwidth=1)):
        await line.near.send_all(b"slow" * 1000)
        await trio.sleep(2.5)
    await trio.testing.wait_all_tasks_blocked()
    assert line.sink.arrivals == [(1, b"late"), (2, b"s"), (3, b"l"), (3.5, b"ow" + b"slow" * 999)]


async def test_faults_of_one_kind_are_combined(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    with all_of(shaping, Fault(delay=1), Fault(delay=2), Fault(bandwidth=10), Fault(bandwidth=1)):
        await line.near.send_all(b"ab")
        await trio.sleep(6)
    assert line.sink.arrivals == [(4, b"a"), (5, b"b")]
    with shaping.during(Fault(hole=True)):
        with shaping.during(Fault(hole=True)):
            await line.near.send_all(b"c")
        await trio.sleep(1)
        assert line.sink.received == b"ab"
    await trio.testing.wait_all_tasks_blocked()
    assert line.sink.received == b"abc"


async def test_faults_of_all_kinds_are_combined(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    shaping.corrupt(1, 0x20)
    with all_of(shaping, Fault(delay=5), Fault(bandwidth=2), Fault(trickle=True)):
        await line.near.send_all(b"abc")
        await trio.sleep(5.7)
        with shaping.during(Fault(hole=True)):
            await trio.sleep(10)
        await trio.sleep(1)
    assert line.sink.arrivals == [(5.5, b"a"), (15.7, b"B"), (16.2, b"c")]


async def test_the_byte_that_is_asked_for_is_changed(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    shaping.corrupt(5, 0x01)
    shaping.corrupt(0, 0xFF)
    shaping.corrupt(3, 0x80)
    for data in (b"\0\0", b"\0\0\0", b"\0\0"):
        await line.near.send_all(data)
        await trio.testing.wait_all_tasks_blocked()
    assert line.sink.received == b"\xff\0\0\x80\0\x01\0"
    assert shaping.clear


@pytest.mark.parametrize("reset", [True, False])
async def test_a_cut_comes_after_its_byte(autojump_clock: object, line: Line, shaping: Shaping, reset: bool) -> None:
    shaping.cut_after(9, reset=True)
    shaping.cut_after(5, reset=reset)
    shaping.corrupt(7, 0x20)
    for data in (b"abc", b"defg"):
        await line.near.send_all(data)
        await trio.testing.wait_all_tasks_blocked()
        if data == b"abc":
            assert line.told == []
    assert line.told == ["cut by reset" if reset else "cut by EOF"]
    assert line.sink.received == b"abcde"
    # The other marks count on: "fg" did not pass.
    await line.near.send_all(b"hijk")
    await trio.testing.wait_all_tasks_blocked()
    assert line.told[1:] == ["cut by reset"]
    assert line.sink.received == b"abcdehiJk"
    assert shaping.clear


async def test_a_reset_keeps_its_place_behind_the_data(autojump_clock: object, line: Line, shaping: Shaping) -> None:
    with shaping.during(Fault(delay=5)):
        await line.near.send_all(b"last words")
        line.near.reset()
        await trio.sleep(4)
        assert line.told == []
        await trio.sleep(2)
    assert line.sink.arrivals == [(5, b"last words")]
    assert line.told == ["source was reset"]
    assert line.lane.ended


async def test_a_reset_that_the_other_lane_found_keeps_its_place_too(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    with shaping.during(Fault(hole=True)):
        await line.near.send_all(b"last words")
        await trio.testing.wait_all_tasks_blocked()
        assert line.lane.detoured
        line.lane.append_reset()
        await trio.testing.wait_all_tasks_blocked()
        assert line.told == []
    await line.until_ended()
    assert line.sink.received == b"last words"
    assert line.told == ["source was reset"]


@pytest.mark.parametrize("at_eof", [False, True])
async def test_a_sink_that_breaks_ends_the_lane(autojump_clock: object, line: Line, at_eof: bool) -> None:
    line.sink.broken = True
    if at_eof:
        line.near.close()
    else:
        await line.near.send_all(b"lost")
    await line.until_ended()
    assert line.told == ["sink broke"]
    assert (line.lane.passed, line.lane.held) == (0, 0)


async def test_a_lane_that_discards_reads_until_eof_and_sends_nothing(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    with shaping.during(Fault(hole=True)):
        await line.near.send_all(b"held")
        await trio.testing.wait_all_tasks_blocked()
        line.lane.discard()
        assert line.lane.held == 0
        await line.near.send_all(bytes(3 * MOST_BYTES))
        await trio.testing.wait_all_tasks_blocked()
    assert not line.lane.ended
    line.near.close()
    await line.until_ended()
    assert line.sink.arrivals == []


async def test_a_sink_that_breaks_while_a_lane_begins_to_discard_is_no_news(
    autojump_clock: object, line: Line
) -> None:
    line.sink.clogged = trio.Event()
    await line.near.send_all(b"under way")
    await trio.testing.wait_all_tasks_blocked()
    assert line.lane.held == 9
    line.lane.discard()
    line.sink.broken = True
    line.sink.clogged.set()
    await line.near.send_all(b"more")
    line.near.close()
    await line.until_ended()
    assert line.told == []


async def test_a_stream_that_is_closed_under_the_lane_is_the_closers_affair(
    autojump_clock: object, line: Line, shaping: Shaping
) -> None:
    with shaping.during(Fault(hole=True)):
        await trio.testing.wait_all_tasks_blocked()
        line.source.close()
        await trio.testing.wait_all_tasks_blocked()
    assert line.lane.ended
    assert line.told == []
