"""A handler that takes its time lets others run as often as a quick one: turns end by time, too."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

COST = 0.0003
MOST = 0.001


@pytest.mark.parametrize("iterate", [False, True])
async def test_a_slow_synchronous_handler_lets_another_task_run_each_millisecond(
    iterate: bool, mock_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """The clock goes on in the handler only, so what another task waits is what handlers took together."""
    broker = MemoryBroker(nursery)
    left = 1000
    ended = trio.Event()
    longest = 0.0

    def handle(message: Message[bytes]) -> None:
        nonlocal left
        mock_clock.jump(COST)
        left -= 1
        if not left:
            ended.set()

    async def bystander() -> None:
        nonlocal longest
        while True:
            before = trio.current_time()
            await trio.lowlevel.checkpoint()
            longest = max(longest, trio.current_time() - before)

    async def consume(driver: MQTTDriver) -> None:
        async with driver.subscription("t") as messages:
            subscribed.set()
            async for message in messages:
                handle(message)

    async with MQTTDriver(memory_config(broker, keep_alive=0)) as driver:
        subscribed = trio.Event()
        if iterate:
            nursery.start_soon(consume, driver)
            await subscribed.wait()
        else:
            await driver.subscribe("t", handle)
        for _ in range(left):
            broker.publish("t", bytes(64))
        nursery.start_soon(bystander)
        await ended.wait()
        # Two turns of the consumer may lie between two of the bystander's, and a handler cannot be interrupted.
        assert longest <= 2 * (MOST + COST)
        nursery.cancel_scope.cancel()
