"""The probe waits for a driver on Trio's clock, and tells what the driver did instead."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, MQTTDriver, RefusedError, State
from trio_mqtt_driver.testing import DriverProbe, MemoryBroker


@asynccontextmanager
async def probed(broker: MemoryBroker, **options: Any) -> AsyncGenerator[DriverProbe, None]:
    async with MQTTDriver(memory_config(broker, **options)) as driver:
        yield DriverProbe(driver, broker)


async def test_the_way_of_an_outage(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    async with probed(broker) as probe:
        broker.stop()
        assert probe.driver.state is State.LIVE  # It has not noticed yet.
        assert await probe.wait_lost() is State.BACKING_OFF
        assert await probe.wait_state(State.PAUSED, timeout=600) is State.PAUSED
        broker.start()
        assert await probe.wait_live(timeout=90) == 2
        assert probe.driver.state is State.LIVE


async def test_a_state_that_it_only_passes_through(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with probed(broker) as probe:
        nursery.start_soon(reconnect_at_once, probe.driver)
        assert await probe.wait_state(State.VALIDATING, State.PAUSED) is State.VALIDATING
        assert await probe.wait_live() == 2


async def test_a_link_that_is_given_up_without_a_fault(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    async with probed(MemoryBroker(nursery)) as probe:
        probe.driver.pause()
        assert await probe.wait_lost() is State.PAUSED


async def reconnect_at_once(driver: MQTTDriver) -> None:
    await trio.lowlevel.checkpoint()
    driver.force_reconnect(even_if_live=True)


async def test_a_generation(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    async with probed(broker) as probe:
        assert await probe.wait_generation(1) == 1

        async def lose_twice() -> None:
            for _ in range(2):
                await trio.sleep(10)
                broker.drop()

        nursery.start_soon(lose_twice)
        started = trio.current_time()
        assert await probe.wait_generation(3) == 3
        assert trio.current_time() >= started + 20


async def test_a_reconnect_that_is_over_before_it_is_asked_for(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with probed(broker) as probe:
        async with probe.reconnect():
            broker.drop()
            await trio.sleep(60)
            assert probe.driver.state is State.LIVE
        assert probe.driver.generation == 2


async def test_a_reconnect_waits_for_another_link(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with probed(broker) as probe:
        async with probe.reconnect():
            broker.drop()
        assert (probe.driver.generation, probe.driver.state) == (2, State.LIVE)


async def test_the_block_of_a_reconnect_may_fail(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    async with probed(MemoryBroker(nursery)) as probe:
        started = trio.current_time()
        with pytest.raises(ValueError, match="mine"):
            async with probe.reconnect():
                raise ValueError("mine")
        assert trio.current_time() == started


WAITS: dict[str, Callable[[DriverProbe], Awaitable[object]]] = {
    "paused or closed": lambda probe: probe.wait_state(State.PAUSED, State.CLOSED, timeout=7),
    "other than live": lambda probe: probe.wait_lost(timeout=7),
    "live with generation 2": lambda probe: probe.wait_generation(2, timeout=7),
}


@pytest.mark.parametrize("what, wait", WAITS.items(), ids=WAITS)
async def test_in_vain(
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
    what: str,
    wait: Callable[[DriverProbe], Awaitable[object]],
) -> None:
    async with probed(MemoryBroker(nursery)) as probe:
        started = trio.current_time()
        with pytest.raises(AssertionError, match=rf"^the driver was not {what} within 7 s; it is live for 7 s, "):
            await wait(probe)
        assert trio.current_time() == started + 7


async def test_what_a_failure_tells(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    async with probed(broker) as probe:
        await probe.driver.publish("last/words", b"going down", qos=1)
        broker.stop()
        await probe.wait_lost()
        await trio.sleep(1)
        with pytest.raises(AssertionError) as caught:
            await probe.wait_live(timeout=4.5)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("the driver was not live within 4.5 s; it is backing off for ")
    for words in ("generation 1, next attempt in ", " failures in a row, 0 queued, 0 in flight, ", "broker is down"):
        assert words in first
    events = list(itertools.takewhile(lambda line: "the last packets" not in line, rest))
    assert events[0] == "its latest events (seconds before now):"
    assert any("live: " in line for line in events)
    lost = next(line for line in events if "connection lost" in line)
    assert float(lost.split()[0]) == 5.5
    packets = rest[len(events) :]
    assert any("PUBLISH 'last/words' b'going down'" in line for line in packets)


async def test_without_a_broker_there_are_no_packets(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        report = DriverProbe(driver).report()
        assert "it is live for 0 s, generation 1, client ID 'driver_" in report
        assert "packets" not in report


async def test_before_anything_has_happened(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    probe = DriverProbe(MQTTDriver(memory_config(broker)), broker)
    assert "it is new for " in probe.report()
    assert "nothing has happened to it" in probe.report()
    with pytest.raises(AssertionError, match=r"^the driver will not be live: .*not entered yet.*; it is new"):
        await probe.wait_live()


async def test_a_driver_that_will_never_be_live_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, users={"a": "b"})
    caught: list[BaseException] = []
    started = trio.current_time()
    driver = MQTTDriver(memory_config(broker), start="background")

    async def wait() -> None:
        try:
            await DriverProbe(driver, broker).wait_live()
        except AssertionError as exc:
            caught.append(exc)

    async def use() -> None:
        async with driver:
            nursery.start_soon(wait)
            await trio.sleep_forever()

    with pytest.raises(RefusedError):
        await use()
    await trio.testing.wait_all_tasks_blocked()
    assert "the driver will not be live: " in str(caught[0])
    assert isinstance(caught[0].__cause__, RefusedError)
    assert trio.current_time() == started


async def test_the_end_can_be_waited_for(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    reached: list[State] = []
    async with probed(MemoryBroker(nursery)) as probe:

        async def wait() -> None:
            reached.append(await probe.wait_state(State.CLOSED))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
    await trio.testing.wait_all_tasks_blocked()
    assert reached == [State.CLOSED]


async def test_only_the_latest_events_are_shown(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    backoff = BackoffConfig(start=1, maximum=1, min_interval=0, pause_after=1000)
    async with probed(broker, backoff=backoff) as probe:
        broker.stop()
        await trio.sleep(100)
        report = probe.report()
    assert "live: " not in report
    assert report.count("connecting to") < 20
