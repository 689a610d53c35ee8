"""Every public async method, cancelled at each of its checkpoints in turn, and with the link cut at each of them.

Afterwards the driver must work, the broker must know exactly the subscriptions that somebody holds, and nothing may be
left behind.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import ConnectionLostError, MQTTDriver, NotConnectedError, State
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

Operation = Callable[[MQTTDriver], Awaitable[object]]


class AtStep(trio.abc.Instrument):
    """Does something just before a task takes its n-th step, that is, right after its n-th checkpoint."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._task = trio.lowlevel.current_task()
        self._left = step
        self._action = action
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task and not self.fired:
            self._left -= 1
            if not self._left:
                self.fired = True
                self._action()


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def publish_0(driver: MQTTDriver) -> None:
    await driver.publish("out/0", b"x")


async def publish_1(driver: MQTTDriver) -> None:
    await driver.publish("out/1", b"x", qos=1)


async def publish_2(driver: MQTTDriver) -> None:
    await driver.publish("out/2", b"x", qos=2)


async def subscribe(driver: MQTTDriver) -> None:
    await driver.subscribe("kept/#", print, qos=1)


async def use_subscription(driver: MQTTDriver) -> None:
    async with driver.subscription("held/#", qos=1) as messages:
        await driver.publish("held/x", b"x", qos=1)
        await messages.receive()


async def unsubscribe(driver: MQTTDriver) -> None:
    await driver.unsubscribe("before/#")


async def ping(driver: MQTTDriver) -> None:
    await driver.ping()


async def wait_live(driver: MQTTDriver) -> None:
    driver.force_reconnect("test", even_if_live=True)
    await driver.wait_live()


OPERATIONS: list[Operation] = [
    publish_0,
    publish_1,
    publish_2,
    subscribe,
    use_subscription,
    unsubscribe,
    ping,
    wait_live,
]


@asynccontextmanager
async def running_driver(broker: MemoryBroker) -> AsyncGenerator[MQTTDriver, None]:
    before = tasks()
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("before/#", print, qos=1)
        yield driver
    assert driver.state is State.CLOSED
    await settled()
    assert tasks() == before


async def check(driver: MQTTDriver, broker: MemoryBroker) -> None:
    """The driver works, and the broker knows what it should."""
    await driver.wait_live()
    async with driver.subscription("check/#", qos=2) as messages:
        with trio.fail_after(60):
            await driver.publish("check/x", b"still here", qos=2)
            assert (await messages.receive()).payload == b"still here"
    await settled()
    assert driver.client_id is not None
    wanted = {one.topic_filter for one in driver._registry}
    assert set(broker.subscriptions(driver.client_id)) == wanted
    status = driver.status()
    assert (status.queued, status.in_flight, status.degraded) == (0, 0, ())
    assert not broker.violations


async def run_until(
    nursery: trio.Nursery, operation: Operation, step: int, *, cut: bool
) -> tuple[bool, MemoryBroker, bool]:
    """Disturb ``operation`` at ``step``; returns whether the step came, the broker, whether it completed."""
    broker = MemoryBroker(nursery)
    completed = False
    async with running_driver(broker) as driver:
        scope = trio.CancelScope()
        instrument = AtStep(step, broker.drop if cut else scope.cancel)
        with scope:
            trio.lowlevel.add_instrument(instrument)
            try:
                await operation(driver)
                completed = True
            except (ConnectionLostError, NotConnectedError):
                assert operation is ping
            finally:
                trio.lowlevel.remove_instrument(instrument)
        await settled()
        await check(driver, broker)
        held = {one.topic_filter for one in driver._registry}
        if operation is subscribe:
            assert ("kept/#" in held) == completed
        assert "held/#" not in held
        if completed and operation is unsubscribe:
            assert "before/#" not in held
    return instrument.fired, broker, completed


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_cancelled_at_each_checkpoint(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, operation: Operation
) -> None:
    step = 0
    fired = True
    while fired:
        step += 1
        fired, _, completed = await run_until(nursery, operation, step, cut=False)
        assert completed or fired
    assert step > 1


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_cut_off_at_each_checkpoint(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, operation: Operation
) -> None:
    step = 0
    fired = True
    while fired:
        step += 1
        fired, broker, completed = await run_until(nursery, operation, step, cut=True)
        assert completed or operation is ping
        if operation is publish_1:
            assert any(one.topic == "out/1" for one in broker.published)
    assert step > 1


async def test_publish_that_is_cancelled_before_acceptance_has_no_effect(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        with trio.CancelScope() as scope:
            scope.cancel()
            await driver.publish("out", b"x", qos=1)
        assert scope.cancelled_caught
        await settled()
        assert not any(one.topic == "out" for one in broker.published)


async def test_publish_that_is_cancelled_while_it_waits_is_delivered(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        broker.stop()
        with trio.move_on_after(1) as scope:
            await driver.publish("out", b"x", qos=1)
        assert scope.cancelled_caught
        broker.start()
        await broker.wait_for_publish("out", timeout=300)


async def test_entering_cancelled_at_each_checkpoint(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    await settled()
    before = tasks()
    fired = True
    step = 0
    while fired:
        step += 1
        inside = False
        driver = MQTTDriver(memory_config(broker))
        scope = trio.CancelScope()
        instrument = AtStep(step, scope.cancel)
        with scope:
            trio.lowlevel.add_instrument(instrument)
            try:
                await driver.__aenter__()
            finally:
                trio.lowlevel.remove_instrument(instrument)
            inside = True
            await driver.__aexit__(None, None, None)
        fired = instrument.fired
        assert inside or scope.cancelled_caught
        assert driver.state is State.CLOSED
        await settled()
        assert tasks() == before
        assert not broker.clients
    assert step > 2
