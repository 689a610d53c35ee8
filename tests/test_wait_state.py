"""Waiting for a state: the present one, one that passes at once, one that cannot come any more."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import DriverClosedError, DriverConfig, MQTTDriver, RefusedError, State
from trio_mqtt_driver.testing import MemoryBroker


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def config(broker: MemoryBroker) -> DriverConfig:
    return memory_config(broker)


async def test_the_present_state_returns_at_once(config: DriverConfig) -> None:
    async with MQTTDriver(config) as driver:
        with trio.testing.assert_checkpoints():
            assert await driver.wait_state(State.PAUSED, State.LIVE) is State.LIVE


async def test_states_that_only_pass_are_seen(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: trio.testing.MockClock
) -> None:
    seen: list[State] = []

    async def watch(driver: MQTTDriver, state: State) -> None:
        seen.append(await driver.wait_state(state))

    async with MQTTDriver(config) as driver, trio.open_nursery() as nursery:
        for state in (State.BACKING_OFF, State.CONNECTING, State.VALIDATING, State.REPLAYING):
            nursery.start_soon(watch, driver, state)
        await trio.testing.wait_all_tasks_blocked()
        broker.drop()
        assert await driver.wait_state(State.CONNECTING, State.BACKING_OFF) is State.BACKING_OFF
        await driver.wait_live()
    assert set(seen) == {State.BACKING_OFF, State.CONNECTING, State.VALIDATING, State.REPLAYING}


async def test_wait_live_does_not_return_with_a_link_that_was_lost_again(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: trio.testing.MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        driver.force_reconnect(even_if_live=True)
        remove = driver.register_connection_callback(lambda up: up and driver.force_reconnect(even_if_live=True))
        driver.register_connection_callback(lambda _up: remove())
        await driver.wait_live()
        assert driver.state is State.LIVE
        assert driver.generation == 3


@pytest.mark.parametrize("state", [State.LIVE, State.PAUSED])
async def test_a_state_that_will_not_come_any_more(config: DriverConfig, state: State) -> None:
    async def wait() -> None:
        with pytest.raises(DriverClosedError, match=rf"the driver was left, it will not be {state.value}"):
            await driver.wait_state(state)

    async with trio.open_nursery() as nursery, MQTTDriver(config) as driver:
        if state is State.LIVE:
            driver.force_reconnect(even_if_live=True)
        nursery.start_soon(wait)
        await trio.lowlevel.checkpoint()
    with pytest.raises(DriverClosedError, match="was left"):
        await driver.wait_state(state)


async def test_the_end_can_be_waited_for(config: DriverConfig) -> None:
    seen: list[State] = []

    async def watch(driver: MQTTDriver) -> None:
        seen.append(await driver.wait_state(State.CLOSED))

    async with trio.open_nursery() as nursery, MQTTDriver(config) as driver:
        nursery.start_soon(watch, driver)  # noqa: ASYNC111  # it is to see the driver's end
        await trio.testing.wait_all_tasks_blocked()
    assert seen == [State.CLOSED]


async def test_a_terminal_refusal_is_raised(broker: MemoryBroker, config: DriverConfig) -> None:
    async def run() -> None:
        async with MQTTDriver(config, start="background") as driver:
            with trio.CancelScope(shield=True), pytest.raises(RefusedError):
                await driver.wait_state(State.PAUSED)
            await trio.sleep_forever()

    broker.faults.refuse_connect(0x87)
    with pytest.raises(RefusedError):
        await run()


async def test_what_is_not_a_state(config: DriverConfig) -> None:
    async with MQTTDriver(config) as driver:
        with pytest.raises(TypeError, match="at least one State"):
            await driver.wait_state()
        with pytest.raises(TypeError, match="not 'live'"):
            await driver.wait_state("live")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # what untyped callers do


async def test_closed_is_there_at_once_when_the_driver_was_left(config: DriverConfig) -> None:
    async with MQTTDriver(config) as driver:
        pass
    assert await driver.wait_state(State.LIVE, State.CLOSED) is State.CLOSED
    with pytest.raises(DriverClosedError):
        await driver.wait_state(State.LIVE)


async def test_cancelled_waits_leave_nothing_behind(config: DriverConfig) -> None:
    async with MQTTDriver(config) as driver:
        with trio.move_on_after(0.01):
            await driver.wait_state(State.PAUSED)
        assert not driver._supervisor._states._waiters
