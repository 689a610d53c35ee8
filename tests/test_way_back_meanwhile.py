"""The driver looks for the way back, and meanwhile its link is lost, replaced, given up or left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.several import Several, at, leave_a, place
from trio_mqtt_driver import FailoverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Direction, Disconnect, Kind, MemoryBroker, Rule

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def several(nursery: trio.Nursery) -> Several:
    return Several(nursery)


HELD = {
    "opening": None,
    "CONNECT": (Kind.CONNACK, Direction.OUT),
    "test publish": (Kind.PUBACK, Direction.OUT),
    "DISCONNECT": (Kind.DISCONNECT, Direction.IN),
}


def hold(several: Several, held: str) -> Rule | None:
    """Make the tests of the primary hang there."""
    found = HELD[held]
    if found is None:
        several.swallowed.add("a")
        return None
    kind, direction = found
    return several["a"].faults.hold(kind, direction=direction)


def lose(several: Several, driver: MQTTDriver) -> None:
    several["b"].drop()


def lose_half_open(several: Several, driver: MQTTDriver) -> None:
    several["b"].silence()


def reconnect(several: Several, driver: MQTTDriver) -> None:
    driver.force_reconnect("asked for", even_if_live=True)


def pause(several: Several, driver: MQTTDriver) -> None:
    driver.pause("asked for")


def other_settings(several: Several, driver: MQTTDriver) -> None:
    driver.apply_settings(driver.config.evolve(endpoint=at("b"), fallbacks=()))


Happening = Callable[[Several, MQTTDriver], None]
HAPPENINGS: list[Happening] = [lose, lose_half_open, reconnect, pause, other_settings]


@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("held", HELD)
async def test_a_test_ends_with_the_link_that_it_is_made_beside(
    several: Several, held: str, happens: Happening, autojump_clock: MockClock
) -> None:
    config = several.config(keep_alive=4, connect_timeout=60, probe_timeout=60, disconnect_timeout=60)
    async with MQTTDriver(config) as driver:
        await leave_a(several, driver)
        rule = hold(several, held)
        await trio.sleep(30.001)
        assert several.order == "a"
        assert several.open == (["b", "a"] if rule else ["b"])
        several["b"].faults.hold(Kind.CONNACK)  # keep the driver away from there
        several.swallowed.add("a")
        happens(several, driver)
        await trio.sleep(20 if happens is lose_half_open else 0)
        await settled()
        assert "a" not in several.open
        assert driver.state is not State.LIVE
        if rule:
            rule.remove()
    await settled()
    several.check()


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_driver_that_is_left_ends_its_test(
    several: Several, held: str, cancelled: bool, autojump_clock: MockClock
) -> None:
    driver = MQTTDriver(several.config(connect_timeout=60, probe_timeout=60))
    with trio.CancelScope() as scope:
        async with driver:
            await leave_a(several, driver)
            hold(several, held)
            await trio.sleep(30.001)
            assert several.order == "a"
            if cancelled:
                scope.cancel()
                await trio.sleep(1)
    assert driver.state is State.CLOSED
    several.check()


@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda one: one.__name__)
async def test_at_each_moment_of_the_return(several: Several, happens: Happening, autojump_clock: MockClock) -> None:
    """At each turn of the scheduler, from the end of the last test on, until the driver has given its link up."""
    failover = FailoverConfig(fail_after=1, check_every=1, return_after=0.5)
    seen: set[State] = set()
    async with MQTTDriver(several.config(failover=failover)) as driver:
        original = driver.config
        for turns in range(40):
            await leave_a(several, driver)
            await several["a"].wait_for(lambda: disconnects(several["a"]) == 2)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            seen.add(driver.state)
            happens(several, driver)
            if happens is pause:
                await trio.sleep(5)
                assert driver.state is State.PAUSED, turns
                driver.resume()
            driver.apply_settings(original)
            await trio.sleep(20)
            assert (driver.state, place(driver), several.open) == (State.LIVE, "a", ["a"]), turns
    assert seen >= {State.LIVE, State.BACKING_OFF, State.CONNECTING}
    several.check()


@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda one: one.__name__)
async def test_just_when_the_last_test_has_passed(
    several: Several, happens: Happening, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config(failover=FailoverConfig(check_every=1, return_after=0.5))) as driver:
        await leave_a(several, driver)
        await trio.sleep(1.5)
        assert driver.status().endpoints[0].tests_passed == 1

        def do(name: str) -> None:
            several.on_closed = lambda _: None
            assert name == "a"
            happens(several, driver)

        several.on_closed = do
        await trio.sleep(0.6)
        if happens is pause:
            assert driver.state is State.PAUSED
            driver.resume()
        await trio.sleep(60)
        assert driver.state is State.LIVE
        assert place(driver) == ("b" if happens is other_settings else "a")
    several.check()


def disconnects(broker: MemoryBroker) -> int:
    return sum(1 for _, packet in broker.received if isinstance(packet, Disconnect))


async def test_tests_leave_nothing_behind(several: Several, autojump_clock: MockClock) -> None:
    def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    async with MQTTDriver(several.config()) as driver:
        await leave_a(several, driver)
        several["a"].stop()
        await trio.sleep(100)
        before = tasks()
        several["a"].faults.hold(Kind.PUBACK)
        for _ in range(50):
            several["a"].start()
            await trio.sleep(45)
            several["a"].stop()
            await trio.sleep(45)
        assert tasks() == before
        assert several.open == ["b"]
    several.check()
