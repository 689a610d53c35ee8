"""Every public async method, disturbed at each of its checkpoints in turn: cancelled, cut off, left, reconnected."""

from __future__ import annotations

from itertools import product

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from tests.sweep import DISTURBANCES, LINKS, Case, public_async_methods, run
from tests.sweep_cases import CASES
from tests.test_cancellation_of_a_life import COVERED
from trio_mqtt_driver import MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


def test_each_public_async_method_has_a_case() -> None:
    """Whoever adds a method adds a case to ``sweep_cases``."""
    covered = {method for case in CASES for method in case.methods}
    assert covered | COVERED == public_async_methods()


@pytest.mark.long
@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("case", CASES, ids=repr)
async def test_each_checkpoint(autojump_clock: MockClock, case: Case, disturbance: str) -> None:
    """By one caller, and by two at once, of whom the first is disturbed."""
    for link, callers in product(LINKS, (1, 2)):
        step = 0
        fired = True
        while fired:
            step += 1
            outcome = await run(case, link, disturbance, step, callers=callers)
            fired = outcome.fired
            if disturbance == "cancel":
                assert outcome.completed >= callers - 1 or case.raises
            if not fired or disturbance in ("cut", "reconnect"):
                assert outcome.completed == callers or case.raises
        assert step > 1 or case.raises


INTRICATE = ("ping", "publish_qos_2", "receive", "subscribe_what_is_subscribed", "unsubscribe_and_subscribe", "view")


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("case", [case for case in CASES if repr(case) in INTRICATE], ids=repr)
async def test_between_any_two_steps(autojump_clock: MockClock, case: Case, disturbance: str) -> None:
    """Of any task of driver and broker: while a packet is half-way."""
    step = 0
    fired = True
    while fired:
        step += 1
        fired = (await run(case, "up", disturbance, step, callers=2, any_task=True)).fired
    assert step > 5


async def test_publish_that_is_cancelled_before_acceptance_has_no_effect(
    autojump_clock: MockClock, nursery: trio.Nursery
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
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        broker.stop()
        with trio.move_on_after(1) as scope:
            await driver.publish("out", b"x", qos=1)
        assert scope.cancelled_caught
        broker.start()
        await broker.wait_for_publish("out", timeout=300)
