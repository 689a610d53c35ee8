"""Nobody is starved: floods in both directions, fast and slow consumers side by side."""

from __future__ import annotations

import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, Overflow
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


async def test_a_flood_into_a_fast_handler_loses_nothing(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """One read brings more than a short queue holds, before the handler has had a turn."""
    broker = MemoryBroker(nursery)
    count = 0

    def handle(message: Message[bytes]) -> None:
        nonlocal count
        count += 1

    async with MQTTDriver(memory_config(broker, queue_messages=10)) as driver:
        subscription = await driver.subscribe("t", handle)
        for _ in range(20_000):
            broker.publish("t", b"x")
        await settled()
        assert count == 20_000
        assert subscription.statistics().dropped == 0


async def test_a_flood_into_a_fast_iterator_loses_nothing(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with (
        MQTTDriver(memory_config(broker)) as driver,
        driver.subscription("t", queue_messages=10) as messages,
    ):
        for number in range(20_000):
            broker.publish("t", b"%d" % number)
        for number in range(20_000):
            message = await messages.receive()
            assert message.payload == b"%d" % number
        assert messages.statistics().dropped == 0


async def test_a_flood_into_a_sleeping_handler_is_bounded_and_hurts_nobody_else(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    slow: list[bytes] = []
    fast: list[bytes] = []

    async def sleep(message: Message[bytes]) -> None:
        slow.append(message.payload)
        await trio.sleep(1000)

    async with MQTTDriver(memory_config(broker)) as driver:
        oldest = await driver.subscribe("t", sleep, queue_messages=10)
        newest = await driver.subscribe("t", sleep, queue_messages=10, overflow=Overflow.DROP_NEWEST)
        await driver.subscribe("t", lambda message: fast.append(message.payload))
        start = trio.current_time()
        for number in range(20_000):
            broker.publish("t", b"%d" % number)
        await settled()
        assert trio.current_time() == start
        assert len(fast) == 20_000
        for subscription in (oldest, newest):
            assert subscription.statistics().queued == 10
            assert subscription.statistics().dropped == 20_000 - 11
        assert driver.status().counters["dropped"] == 2 * (20_000 - 11)
        await trio.sleep(1500)
        assert sorted(slow) == [b"0", b"0", b"1", b"19990"]


async def test_a_publisher_that_never_waits_does_not_starve_the_reader(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """``publish()`` is a checkpoint even when it need not block."""
    broker = MemoryBroker(nursery)
    received: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("in", received.append)
        broker.publish("in", b"x")
        for _ in range(100):
            await driver.publish("out", b"y")
        assert received
