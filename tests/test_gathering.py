"""When a read waits so that it brings more: peers in plain numbers, and a driver on a stream that keeps time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver
from trio_mqtt_driver._gathering import Gathering
from trio_mqtt_driver.testing import MemoryBroker, Publish, encode

COST = 30e-6
"""Seconds that the reader needs for one read."""


@attrs.define
class Outcome:
    reads: int = 0
    messages: int = 0
    waits: int = 0
    waited_at: list[float] = attrs.field(factory=list[float])


Peer = Callable[[float], int]
"""How many messages there are for a read at this time."""


def steady(rate: float) -> Peer:
    """One that sends whatever we do."""
    sent = 0

    def peer(now: float) -> int:
        nonlocal sent
        fresh = int(now * rate) - sent
        sent += fresh
        return fresh

    return peer


def waiting(window: int, turnaround: float) -> Peer:
    """One that sends so many messages when it has seen what became of the last ones."""
    seen = 0.0

    def peer(now: float) -> int:
        nonlocal seen
        if now - seen < turnaround:
            return 0
        seen = now
        return window

    return peer


def read_for(seconds: float, peer: Peer, delay: float = 0.001, late: float = 0.0) -> Outcome:
    """``late`` is by how much the timers are."""
    gathering, outcome, now = Gathering(delay), Outcome(), 0.0
    while now < seconds:
        now += COST
        messages = peer(now)
        while not messages:
            now += 1e-6
            messages = peer(now)
        outcome.reads += 1
        outcome.messages += messages
        wait = gathering.wait_after(now, messages, emptied=True)
        assert wait in (0.0, delay)
        if wait:
            outcome.waits += 1
            outcome.waited_at.append(now)
            now += wait + late
    return outcome


@pytest.mark.parametrize("rate", [20_000, 80_000, 500_000])
def test_a_busy_link_of_a_peer_that_goes_on_is_read_far_more_seldom(rate: float) -> None:
    without, gathered = read_for(1.0, steady(rate), delay=0.0), read_for(1.0, steady(rate))
    assert without.waits == 0
    assert gathered.reads < without.reads / 3
    assert gathered.messages > 0.99 * without.messages


@pytest.mark.parametrize("rate", [10, 1000, 7000])
def test_a_link_that_is_read_less_than_eight_times_in_a_millisecond_is_left_alone(rate: float) -> None:
    assert read_for(1.0, steady(rate)).waits == 0


@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_peer_that_waits_for_us_is_hardly_slowed_down(window: int) -> None:
    without, gathered = [read_for(2.0, waiting(window, 50e-6), delay) for delay in (0.0, 0.001)]
    assert gathered.waits
    assert gathered.messages > 0.97 * without.messages


def test_what_is_of_no_use_is_tried_more_and_more_seldom() -> None:
    times = read_for(10.0, waiting(1, 50e-6)).waited_at
    trials = [one for one, before in zip(times, [-1.0, *times], strict=False) if one - before > 0.005]
    gaps = [after - before for before, after in itertools.pairwise(trials)]
    assert gaps[0] < 0.1
    for gap, before in zip(gaps[1:6], gaps, strict=False):
        assert 1.5 * before < gap < 2.5 * before
    assert max(gaps) < 3  # it is never given up: the peer may be another one tomorrow


def test_a_peer_that_goes_on_after_all_is_forgiven() -> None:
    slow, fast = waiting(1, 50e-6), steady(80_000)

    def peer(now: float) -> int:
        return (fast if 4.0 <= now < 8.0 else slow)(now)

    times = read_for(10.0, peer).waited_at
    assert sum(4.0 <= one < 8.0 for one in times) > 300
    trials = [one for one, before in zip(times, [-1.0, *times], strict=False) if one - before > 0.005]
    gaps = [after - before for before, after in itertools.pairwise([8.0, *(one for one in trials if one > 8.0)])]
    assert gaps[1] < 0.1  # as at the beginning


def test_waiting_ends_with_the_flood() -> None:
    gathering, now = Gathering(0.001), 0.0
    peer = steady(80_000)
    while not gathering.wait_after(now := now + COST, peer(now), emptied=True):
        pass
    for _ in range(16):  # from here on a message every 2 ms
        now += 0.002
        gathering.wait_after(now, 1, emptied=True)
    for _ in range(100):
        now += 0.002
        assert gathering.wait_after(now, 1, emptied=True) == 0.0


def test_floods_with_pauses_between_them_are_each_read_more_seldom() -> None:
    gathering, now = Gathering(0.001), 0.0
    for _ in range(20):
        peer, begin, reads, messages = steady(80_000), now, 0, 0
        while now < begin + 0.2:
            fresh = peer(now - begin) or 1
            reads += 1
            messages += fresh
            now += COST + gathering.wait_after(now, fresh, emptied=True)
        assert reads < 0.2 / COST / 2
        now += 5.0  # nothing more for a while, perhaps just when it waits


@pytest.mark.parametrize("late", [0.005, 0.015])
def test_where_timers_are_coarse_waiting_is_given_up(late: float) -> None:
    """A peer that waits for us would be held up so long each time."""
    without = read_for(2.0, waiting(1, 50e-6), delay=0.0)
    gathered = read_for(2.0, waiting(1, 50e-6), late=late)
    assert gathered.waits
    assert gathered.messages > 0.9 * without.messages


def test_reads_that_did_not_empty_the_socket_count_too() -> None:
    """What has gathered may be more than one read takes."""
    gathering, now, waits = Gathering(0.001), 0.0, 0
    peer = steady(200_000)
    for _ in range(5000):
        now += COST
        fresh = peer(now)
        while fresh > 100:
            assert gathering.wait_after(now, 100, emptied=False) == 0.0
            fresh -= 100
            now += COST
        wait = gathering.wait_after(now, fresh, emptied=True)
        waits += wait > 0
        now += wait
    assert waits > 900


def test_nothing_waits_on_a_clock_that_stands_still() -> None:
    gathering = Gathering(0.001)
    assert {gathering.wait_after(7.0, 5, emptied=True) for _ in range(10_000)} == {0.0}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_peer_does_it_is_not_slowed_down_much(seed: int) -> None:
    rng = random.Random(seed)
    changes = [(rng.choice([steady, waiting]), rng.random()) for _ in range(20)]

    def some(now: float) -> int:
        kind, number = changes[int(now * 10) % len(changes)]
        if kind is waiting:
            return rng.randrange(1, 20)
        return int(rng.random() < number)

    without, gathered = read_for(2.0, some, delay=0.0), read_for(2.0, some)
    assert gathered.messages > 0.8 * without.messages


# -- a driver --------------------------------------------------------------------------------------------------------


class Timed(trio.abc.Stream):
    """A stream on which, once ``rate`` is set, so many messages a second come by the clock, and a read takes time."""

    def __init__(self, inner: Any, clock: MockClock) -> None:
        self._inner = inner
        self._clock = clock
        self.rate = 0.0
        self._since = 0.0
        self.sent = 0
        self.last = 0
        self.reads = 0

    def flood(self, rate: float, last: int) -> None:
        self.rate, self.last = rate, last
        self._since = trio.current_time()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self.sent >= self.last:
            return bytes(await self._inner.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        self._clock.jump(COST)
        self.reads += 1
        upto = min(self.last, max(self.sent + 1, int((trio.current_time() - self._since) * self.rate)))
        packets = [encode(Publish(topic="a", payload=b"%d" % number), 5) for number in range(self.sent, upto)]
        self.sent = upto
        return b"".join(packets)

    async def send_all(self, data: Any) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def close(self) -> None:
        self._inner.close()


class Direct:
    """In place of ``DirectSocket``: only of such streams it is known that a read brings all that is there."""

    def __init__(self, stream: Timed) -> None:
        self._stream = stream

    async def read(self, size: int) -> bytes:
        return await self._stream.receive_some(size)

    def write(self, _data: bytes) -> int:
        return 0

    def close(self) -> None:
        self._stream.close()


async def reads_of_a_flood(
    nursery: trio.Nursery, clock: MockClock, *, ask: bool = False, **options: Any
) -> tuple[int, float]:
    """How many reads there are, and how late the latest message is; with ``ask`` somebody waits for a PUBACK."""
    broker = MemoryBroker(nursery)
    streams: list[Timed] = []
    got: list[bytes] = []
    late = 0.0

    async def connect(_endpoint: object) -> trio.abc.Stream:
        streams.append(Timed(await broker.connect_stream(), clock))
        return streams[-1]

    def handler(message: Message[bytes]) -> None:
        nonlocal late
        got.append(message.payload)
        late = max(late, trio.current_time() - begin - len(got) / 80_000)

    async with MQTTDriver(memory_config(broker, open_stream=connect, **options)) as driver:
        await driver.subscribe("a", handler)
        (stream,) = streams
        begin = trio.current_time()
        stream.flood(80_000, 10_000)
        receipt = driver.publish_nowait("b", b"", qos=1) if ask else None
        broker.publish("a", b"begin")  # to end the read that waits already
        while len(got) < 10_001:  # noqa: ASYNC110  # the clock shall jump meanwhile
            await trio.sleep(0.001)
        assert got == [b"begin", *(b"%d" % number for number in range(10_000))]
        if receipt is not None:  # the answer is behind the flood, so the reader may not have come to it
            with trio.fail_after(1):
                await receipt.wait()
    return stream.reads, late


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(stream: trio.abc.Stream) -> Direct | None:
        return Direct(stream) if isinstance(stream, Timed) else None

    monkeypatch.setattr("trio_mqtt_driver._connection.DirectSocket.of", of)


@pytest.mark.usefixtures("direct")
async def test_a_driver_waits_on_a_busy_link_and_may_be_told_not_to(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    reads, late = await reads_of_a_flood(nursery, autojump_clock)
    assert late < 0.003
    without, prompt = await reads_of_a_flood(nursery, autojump_clock, read_delay=0)
    assert prompt < 0.001
    assert reads < without / 3


@pytest.mark.usefixtures("direct")
async def test_a_driver_that_waits_for_an_answer_does_not_let_it_wait(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    _, late = await reads_of_a_flood(nursery, autojump_clock, ask=True)
    assert late < 0.001


async def test_a_driver_does_not_wait_where_a_read_may_leave_something(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    _, late = await reads_of_a_flood(nursery, autojump_clock)
    assert late < 0.001
