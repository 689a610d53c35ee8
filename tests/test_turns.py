"""How long another task waits during a flood, counted in messages between two of its turns; nothing is timed.

The scheduler runs every task that is ready once per round, in an order of its own each time. So a task that does
nothing but checkpoint has a turn in each round, and each of the driver's tasks has at most two between two of these.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

FLOOD = 20_000
PAYLOAD = bytes(64)
READ = 65536
"""Bytes that one read of the driver takes at most."""
BATCH = READ // len(PAYLOAD)
"""More messages than one read can bring."""


class Bystander:
    """Looks in each of its turns how far ``progress`` has gone since the last."""

    def __init__(self, progress: Callable[[], int]) -> None:
        self._progress = progress
        self.longest_wait = 0

    async def run(self) -> None:
        seen = self._progress()
        while True:
            await trio.lowlevel.checkpoint()
            now = self._progress()
            self.longest_wait = max(self.longest_wait, now - seen)
            seen = now


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("iterate", [False, True])
async def test_a_flood_lets_another_task_run_between_any_two_batches(
    iterate: bool, qos: int, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    processed = 0
    all_processed = trio.Event()

    def handle(message: Message[bytes]) -> None:
        nonlocal processed
        processed += 1
        if processed == FLOOD:
            all_processed.set()

    async def consume(driver: MQTTDriver) -> None:
        async with driver.subscription("t", qos=qos) as messages:
            subscribed.set()
            async for message in messages:
                handle(message)

    async with MQTTDriver(memory_config(broker, receive_maximum=65535)) as driver:
        subscribed = trio.Event()
        if iterate:
            nursery.start_soon(consume, driver)
            await subscribed.wait()
        else:
            await driver.subscribe("t", handle, qos=qos)
        read = Bystander(lambda: driver.status().counters["messages_in"])
        done = Bystander(lambda: processed)
        for _ in range(FLOOD):
            broker.publish("t", PAYLOAD, qos=qos)
        nursery.start_soon(read.run)
        nursery.start_soon(done.run)
        await all_processed.wait()
        assert 0 < read.longest_wait <= 2 * BATCH
        assert 0 < done.longest_wait <= 2 * BATCH
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("iterate", [False, True])
async def test_a_backlog_lets_another_task_run_while_it_is_worked_off(
    iterate: bool, qos: int, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Nothing comes from the network meanwhile, so nothing but the consumer's own turns is left to end its run."""
    broker = MemoryBroker(nursery)
    processed = 0
    released, all_processed, subscribed = trio.Event(), trio.Event(), trio.Event()

    async def handle(message: Message[bytes]) -> None:
        nonlocal processed
        if not processed:
            await released.wait()
        processed += 1
        if processed == FLOOD:
            all_processed.set()

    async def consume(driver: MQTTDriver) -> None:
        async with driver.subscription("t", qos=qos) as messages:
            subscribed.set()
            async for message in messages:
                await handle(message)

    config = memory_config(broker, receive_maximum=65535, queue_messages=FLOOD)
    async with MQTTDriver(config) as driver:
        if iterate:
            nursery.start_soon(consume, driver)
            await subscribed.wait()
        else:
            await driver.subscribe("t", handle, qos=qos)
        for _ in range(FLOOD):
            broker.publish("t", PAYLOAD, qos=qos)
        await trio.testing.wait_all_tasks_blocked()
        bystander = Bystander(lambda: processed)
        nursery.start_soon(bystander.run)
        released.set()
        await all_processed.wait()
        assert 0 < bystander.longest_wait <= 2 * BATCH
        nursery.cancel_scope.cancel()
