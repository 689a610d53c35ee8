"""Nobody is starved: floods in both directions, fast and slow consumers side by side."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, OutboxFullError, Overflow
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
    """``publish()`` lets others run now and then even when it need not block."""
    broker = MemoryBroker(nursery)
    received: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("in", received.append)
        broker.publish("in", b"x")
        for _ in range(2000):
            await driver.publish("out", b"y")
        assert received


async def test_a_publish_that_need_not_block_gives_a_turn_every_256th_time_and_is_a_cancel_point_each_time(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with MQTTDriver(memory_config(broker)) as driver, trio.open_nursery() as others:
        others.start_soon(count)
        await trio.lowlevel.checkpoint()
        before = turns
        for _ in range(2560):
            await driver.publish("out", b"y")
        assert 9 <= turns - before <= 11
        with trio.CancelScope() as scope:
            await driver.publish("out", b"y")
            scope.cancel()
            await driver.publish("out", b"y")
        assert scope.cancelled_caught
        others.cancel_scope.cancel()


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("outbox_messages", [10, 10_000])
async def test_a_hundred_publishers_share_the_window(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, outbox_messages: int, qos: int
) -> None:
    """Whether they wait for room in the outbox, or in it for room in the window: each has its turn."""
    broker = MemoryBroker(nursery)
    counts = [0] * 100
    enough = trio.Event()

    async def publish(driver: MQTTDriver, number: int) -> None:
        while True:
            await driver.publish(f"out/{number}", b"x", qos=qos)
            counts[number] += 1
            if sum(counts) == 2000:
                enough.set()

    config = memory_config(broker, in_flight=7, outbox_messages=outbox_messages)
    async with MQTTDriver(config) as driver, trio.open_nursery() as publishers:
        for number in range(100):
            publishers.start_soon(publish, driver, number)
        await enough.wait()
        publishers.cancel_scope.cancel()
    assert max(counts) - min(counts) <= 2


async def test_a_publisher_of_qos_0_that_never_waits_holds_up_nobody(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Messages come in, go out and are acknowledged while it sends as fast as it can."""
    broker = MemoryBroker(nursery)
    received: list[bytes] = []
    acknowledged = 0
    sent = 0

    async def publish_properly(driver: MQTTDriver) -> None:
        nonlocal acknowledged
        while True:
            await driver.publish("proper", b"x", qos=1)
            acknowledged += 1

    async with MQTTDriver(memory_config(broker)) as driver, trio.open_nursery() as publishers:
        await driver.subscribe("in", lambda message: received.append(message.payload), qos=1)
        publishers.start_soon(publish_properly, driver)
        for number in range(200):
            broker.publish("in", b"%d" % number, qos=1)
        while len(received) < 200 or acknowledged < 200:
            await driver.publish("greedy", b"y")
            sent += 1
            assert sent < 400_000
        publishers.cancel_scope.cancel()


async def test_publish_nowait_in_a_loop_comes_to_the_bounds_and_what_it_handed_over_arrives(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It cannot yield, so it must be refused before it has filled the memory; whoever then lets others run goes on."""
    broker = MemoryBroker(nursery, history=50_000)
    received: list[Message[bytes]] = []
    bounds = 100 + 1024 // 100  # messages in the outbox, and bytes in the write buffer
    sent = 0
    async with MQTTDriver(memory_config(broker, outbox_messages=100, write_buffer=1024)) as driver:
        await driver.subscribe("in", received.append)
        broker.publish("in", b"x")
        while sent < 2000:
            before = sent
            with suppress(OutboxFullError):
                while sent <= before + bounds:
                    driver.publish_nowait("out", bytes(100), qos=sent % 2)
                    sent += 1
            assert sent <= before + bounds
            await trio.lowlevel.checkpoint()
        assert received
        await driver.drain()
        assert sum(one.topic == "out" for one in broker.published) == sent
