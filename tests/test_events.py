"""The stream of events: everything from the call on, in order, to each consumer at its own pace, until the end."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import DriverClosedError, DriverConfig, Event, EventStream, MQTTDriver, RefusedError, State
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

ATTEMPT = ["connecting", "validating", "replaying", "live"]
END = ["closing", "closed"]


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def config(broker: MemoryBroker) -> DriverConfig:
    return memory_config(broker)


async def consume(events: EventStream, into: list[Event]) -> None:
    """Until the iteration ends."""
    with trio.fail_after(3600):  # it must end
        async for event in events:
            into.append(event)  # noqa: PERF401  # looked at while it goes on


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


async def taken(events: EventStream, count: int) -> list[str]:
    """The kinds of the next events, which must be there already."""
    found: list[str] = []
    for _ in range(count):
        with trio.fail_after(0.001):
            event = await events.receive()
        found.append(event.kind)
    return found


async def reason(events: EventStream) -> str:
    """Why ``force_reconnect()`` was called, of the next event."""
    found = re.search(r"\((.*)\)", (await events.receive()).text)
    assert found is not None
    return found[1]


# -- what is seen -----------------------------------------------------------------------------------------------------


async def test_from_before_the_start_to_the_end(config: DriverConfig, autojump_clock: MockClock) -> None:
    seen: list[Event] = []
    driver = MQTTDriver(config)
    with driver.events() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume, events, seen)  # noqa: ASYNC111  # it is to see the driver's end
            async with driver:
                await settled()
                assert kinds(seen) == ATTEMPT
        assert kinds(seen) == [*ATTEMPT, *END]
        assert tuple(seen) == driver.status().history
        assert events.missed == 0


async def test_only_what_happens_from_the_call_on(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            driver.force_reconnect("because")
            event = await events.receive()
            assert (event.kind, event.generation) == ("force reconnect", 1)
            assert "because" in event.text


async def test_an_outage_from_beginning_to_end(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    seen: list[Event] = []
    came: list[float] = []

    async def watch(events: EventStream) -> None:
        async for event in events:
            seen.append(event)
            came.append(trio.current_time())

    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, events)
                await trio.sleep(100)
                lost_at = trio.current_time()
                broker.stop()
                await trio.sleep(3)
                back_at = trio.current_time()
                broker.start()
                await driver.wait_live()
                await settled()
                nursery.cancel_scope.cancel()
    assert kinds(seen[:3]) == ["backing off", "connecting", "backing off"]
    assert kinds(seen[-4:]) == ATTEMPT
    assert seen[0].at == lost_at
    assert str(seen[0].error).startswith("ConnectionLostError")
    assert "Connection refused" in str(seen[2].error)
    assert [event.generation for event in seen] == [1] * (len(seen) - 1) + [2]
    assert seen[-1].at >= back_at
    assert came == [event.at for event in seen]  # nobody waited for anything


async def test_a_terminal_refusal_is_the_last_but_one(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    seen: list[Event] = []
    broker.faults.refuse_connect(0x87)
    driver = MQTTDriver(config, start="background")
    late: list[str] = []

    async def run() -> None:
        async with driver:
            try:
                await trio.sleep_forever()
            finally:
                # The body still unwinds, but nothing will happen any more.
                try:
                    driver.events()
                except DriverClosedError as exc:
                    late.append(str(exc))

    events = driver.events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume, events, seen)
        with pytest.raises(RefusedError):
            await run()
    assert kinds(seen) == ["connecting", *END]
    assert str(seen[1].error).startswith("RefusedError")
    assert late == ["the driver has closed: there will be no more events"]


async def test_a_driver_that_never_got_to_connect_ends_it_too(config: DriverConfig, autojump_clock: MockClock) -> None:
    driver = MQTTDriver(config)
    events = driver.events()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with driver:
            raise AssertionError("it was cancelled")
    seen: list[Event] = []
    await consume(events, seen)
    assert kinds(seen)[-2:] == END


# -- buffers ----------------------------------------------------------------------------------------------------------


async def test_each_consumer_has_its_own_buffer(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events(buffer=2) as short, driver.events(buffer=5) as long, driver.events() as keen:
            for number in range(5):
                driver.force_reconnect(str(number))
                assert await reason(keen) == str(number)
            assert (short.missed, long.missed, keen.missed) == (3, 0, 0)
            assert [await reason(short) for _ in range(2)] == ["3", "4"]
            assert [await reason(long) for _ in range(5)] == ["0", "1", "2", "3", "4"]


async def test_of_a_full_buffer_the_oldest_is_dropped(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events(buffer=1) as events:
            for why in ("first", "second", "third"):
                driver.force_reconnect(why)
            assert repr(events) == "<EventStream 1 waiting, 2 missed>"
            assert await reason(events) == "third"
            driver.force_reconnect("fourth")
            assert await reason(events) == "fourth"
            assert events.missed == 2


async def test_a_consumer_that_never_reads_holds_nobody_up(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events(buffer=3) as events:
            for _ in range(50):
                broker.drop()
                await settled()
                await driver.wait_live()
            assert driver.generation == 51
            assert await taken(events, 3) == ATTEMPT[1:]
            assert events.missed == 50 * 5 - 3


@pytest.mark.parametrize("buffer", [0, -1, 1_000_001, 1.5, True, None, "many"])
def test_a_bad_buffer(buffer: Any) -> None:
    with pytest.raises(ValueError, match=rf"buffer is {buffer!r}, allowed are whole numbers from 1 to 1000000"):
        MQTTDriver("mqtt://localhost").events(buffer)


# -- waiting ----------------------------------------------------------------------------------------------------------


async def test_every_receive_is_a_checkpoint(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            driver.force_reconnect("one")
            with trio.testing.assert_checkpoints():
                await events.receive()


async def test_cancelled_before_the_first_checkpoint(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            driver.force_reconnect("one")
            with trio.CancelScope() as scope:
                scope.cancel()
                await events.receive()
            assert scope.cancelled_caught
            assert await reason(events) == "one"


@pytest.mark.parametrize("event_first", [True, False])
async def test_cancelled_while_waiting_when_an_event_comes(
    config: DriverConfig, autojump_clock: MockClock, event_first: bool
) -> None:
    got: list[Event] = []

    async def wait(events: EventStream, scope: trio.CancelScope) -> None:
        with scope:
            got.append(await events.receive())

    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                nursery.start_soon(wait, events, scope)
                await settled()
                if event_first:
                    driver.force_reconnect("one")
                    scope.cancel()
                else:
                    scope.cancel()
                    driver.force_reconnect("one")
                await settled()
                assert scope.cancelled_caught is not event_first
                if not event_first:
                    got.append(await events.receive())
                assert ["one" in event.text for event in got] == [True]
                with trio.move_on_after(60) as idle:
                    await events.receive()
                assert idle.cancelled_caught


async def test_a_second_task_is_told_that_it_is_busy(config: DriverConfig, autojump_clock: MockClock) -> None:
    seen: list[Event] = []
    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(consume, events, seen)
                await settled()
                with pytest.raises(trio.BusyResourceError, match="another task is receiving"), trio.fail_after(1):
                    await events.receive()
                driver.force_reconnect("one")
                await settled()
                assert kinds(seen) == ["force reconnect"]  # the first one is as before
                events.close()


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_closing_wakes_who_waits(config: DriverConfig, autojump_clock: MockClock) -> None:
    seen: list[Event] = []
    async with MQTTDriver(config) as driver:
        events = driver.events()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume, events, seen)
            await settled()
            events.close()
            events.close()
        assert seen == []
        driver.force_reconnect("nobody hears it")
        with pytest.raises(DriverClosedError, match="no more events"):
            await events.receive()
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_closing_lets_go_of_what_is_buffered(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        with driver.events() as events:
            driver.force_reconnect("one")
        with pytest.raises(DriverClosedError):
            await events.receive()
        events.close()


async def test_a_stream_that_is_closed_or_dropped_is_forgotten(
    config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        with pytest.raises(KeyError), driver.events() as closed:
            raise KeyError
        assert not driver._history._listeners
        dropped = driver.events()
        assert list(driver._history._listeners) == [dropped]
        del dropped
        gc.collect()
        assert not driver._history._listeners
        with closed:
            driver.force_reconnect("nobody hears it")


async def test_what_is_buffered_is_handed_out_after_the_driver_was_left(
    config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        events = driver.events()
    assert driver.state is State.CLOSED
    assert await taken(events, 2) == END
    with pytest.raises(DriverClosedError, match="no more events"):
        await events.receive()
    with pytest.raises(DriverClosedError, match="the driver has closed"):
        driver.events()
