"""Queues that are too long, by messages or by bytes; the latest of each topic; a flood that meets a slow handler."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Acknowledge, Message, MQTTDriver, Overflow
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker, Publish, encode

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


class Gate:
    """A handler that waits with its first message until ``open()``."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self._event = trio.Event()

    async def handle(self, message: Message[Any]) -> None:
        self.got.append(message.payload)
        await self._event.wait()

    async def open(self) -> None:
        self._event.set()
        await settled()


def pubacks(broker: MemoryBroker) -> int:
    return sum(isinstance(packet, Ack) and packet.kind is Kind.PUBACK for _, packet in broker.received)


# -- the latest of each topic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_latest_keeps_the_newest_message_of_each_topic(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a/+", gate.handle, qos=qos, overflow=Overflow.LATEST, queue_messages=4)
        for number in range(40):
            broker.publish(f"a/{number % 4}", str(number), qos=qos)
            await settled()
        await trio.sleep(2)  # the one that is with the handler is overtaken
        assert driver.status().unacknowledged == (5 if qos else 0)  # what was superseded is acknowledged
        await gate.open()
        assert gate.got == [b"0", b"36", b"37", b"38", b"39"]
        statistics = subscription.statistics()
        assert (statistics.received, statistics.delivered) == (40, 5)
        assert statistics.dropped == statistics.superseded == driver.status().counters["dropped"] == 35
        assert statistics.queued_bytes == 0
        assert driver.status().unacknowledged == 0
        assert driver.status().counters["stale_acknowledgements"] == 0
        assert not broker.violations


async def test_latest_drops_the_oldest_of_qos_0_if_there_are_too_many_topics(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a/+", gate.handle, qos=1, overflow=Overflow.LATEST, queue_messages=3)
        broker.publish("a/first", "first", qos=0)
        await settled()
        for number in range(6):
            broker.publish(f"a/{number}", str(number), qos=number % 2)
        await settled()
        await gate.open()
        assert gate.got == [b"first", b"1", b"3", b"5"]
        assert (subscription.statistics().dropped, subscription.statistics().superseded) == (3, 0)


async def test_latest_leaves_a_queue_alone_that_is_short_enough(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", gate.handle, overflow=Overflow.LATEST, queue_messages=4)
        for number in range(5):
            broker.publish("a", str(number))
            await settled()
        await gate.open()
        assert gate.got == [b"0", b"1", b"2", b"3", b"4"]


# -- by bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overflow, kept",
    [(Overflow.DROP_OLDEST, [7, 8, 9]), (Overflow.DROP_NEWEST, [1, 2, 3]), (Overflow.LATEST, [9])],
)
async def test_a_queue_is_bounded_by_bytes_too(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow, kept: list[int]
) -> None:
    gate = Gate()
    payloads = [b"%d" % number + bytes(999) for number in range(10)]
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", gate.handle, overflow=overflow, queue_bytes=3000)
        for payload in payloads:
            broker.publish("a", payload)
            await settled()
            assert subscription.statistics().queued_bytes <= 3000
        await gate.open()
        assert [payload[:1] for payload in gate.got[-len(kept) :]] == [b"%d" % number for number in kept]
        assert subscription.statistics().queued_bytes == 0


@pytest.mark.parametrize("overflow", list(Overflow))
async def test_one_message_is_let_in_whatever_its_size(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", gate.handle, overflow=overflow, queue_bytes=1024)
        broker.publish("a", b"first")
        await settled()
        broker.publish("a", bytes(100_000))
        await settled()
        assert subscription.statistics().queued_bytes == 100_000
        await gate.open()
        assert [len(payload) for payload in gate.got] == [5, 100_000]
        assert subscription.statistics().dropped == 0


async def test_block_by_bytes_pauses_reading_and_loses_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    other: list[bytes] = []
    async with MQTTDriver(memory_config(broker, keep_alive=10)) as driver:
        await driver.subscribe("a", gate.handle, overflow=Overflow.BLOCK, queue_bytes=1024)
        await driver.subscribe("b", lambda message: other.append(message.payload))
        for _ in range(3):
            broker.publish("a", bytes(2000))
            await settled()
        broker.publish("b", b"1")
        await trio.sleep(100)
        assert not other
        assert driver.generation == 1
        await gate.open()
        assert other == [b"1"]
        assert len(gate.got) == 3


async def test_block_goes_on_reading_as_soon_as_there_is_room(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    turns, most_turns = trio.open_memory_channel[None](0)

    async def handle(_message: Message[bytes]) -> None:
        await most_turns.receive()

    async with MQTTDriver(memory_config(broker, subscription_identifiers=False)) as driver:
        subscription = await driver.subscribe("a", handle, overflow=Overflow.BLOCK, queue_messages=3)
        for number in range(8):
            broker.publish("a", str(number))
            await settled()
        assert (subscription.statistics().received, subscription.statistics().queued) == (4, 3)
        await turns.send(None)
        await settled()
        assert subscription.statistics().received == 8
        for _ in range(7):
            await turns.send(None)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("acknowledge", [Acknowledge.PROCESSED, Acknowledge.MANUAL])
async def test_unacknowledged_bytes_pause_reading_until_they_are_fewer(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, protocol: str, acknowledge: Acknowledge
) -> None:
    kept: list[Message[bytes]] = []
    release = trio.Event()

    async def handle(message: Message[bytes]) -> None:
        kept.append(message)
        if acknowledge is Acknowledge.PROCESSED:
            await release.wait()

    async with MQTTDriver(memory_config(broker, protocol=protocol, receive_bytes=3000, keep_alive=10)) as driver:
        await driver.subscribe("a", handle, qos=1, acknowledge=acknowledge)
        for _ in range(10):
            broker.publish("a", bytes(1000), qos=1)
            await settled()
        await trio.sleep(100)
        assert driver.status().unacknowledged == 4
        assert driver.generation == 1
        release.set()
        while len(kept) < 10 or pubacks(broker) < 10:
            for message in kept:
                message.ack()
            await settled()
        assert driver.status().unacknowledged == 0
        assert driver.generation == 1


async def test_a_large_message_behind_others_does_not_pause_reading_for_ever(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    """It takes several reads, in each of which nothing is complete."""
    got: list[int] = []
    config = memory_config(broker, subscription_identifiers=False, receive_bytes=100_000)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", lambda message: got.append(len(message.payload)), qos=2)
        for _ in range(2):
            for size in (10_000, 10_000, 10_000):
                broker.publish("a", bytes(size), qos=1)
            broker.publish("a", bytes(1_000_000), qos=2)
            await settled()
        assert got == [10_000, 10_000, 10_000, 1_000_000] * 2
        assert driver.status().unacknowledged == 0


async def test_what_is_queued_when_a_subscription_ends_was_not_delivered(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", gate.handle, qos=1)
        for number in range(3):
            broker.publish("a", str(number), qos=1)
        await settled()
        await driver.unsubscribe(subscription)
        statistics = subscription.statistics()
        assert (statistics.received, statistics.delivered, statistics.dropped, statistics.queued) == (3, 1, 0, 0)
        await gate.open()
        assert gate.got == [b"0"]


# -- a flood ----------------------------------------------------------------------------------------------------------

FLOOD = 100_000
READ = 65536


def messages_in_memory() -> int:
    gc.collect()
    return sum(type(one) is Message for one in gc.get_objects())


@pytest.mark.parametrize("overflow", list(Overflow))
@pytest.mark.parametrize("queue_messages, queue_bytes", [(500, None), (None, 500 * 100)], ids=["messages", "bytes"])
async def test_a_flood_into_a_stuck_handler_takes_no_more_memory_than_the_bounds_allow(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
    overflow: Overflow,
    queue_messages: int | None,
    queue_bytes: int | None,
) -> None:
    gate = Gate()
    packets = b"".join(encode(Publish(topic=f"a/{number}", payload=bytes(100)), 5) for number in range(1000))
    one_read = READ // (len(packets) // 1000) + 1
    async with MQTTDriver(memory_config(broker, protocol="5", keep_alive=10, drain_timeout=0.1)) as driver:
        subscription = await driver.subscribe(
            "a/+", gate.handle, overflow=overflow, queue_messages=queue_messages, queue_bytes=queue_bytes
        )
        before = messages_in_memory()
        for _ in range(FLOOD // 1000):
            broker.send(driver.client_id or "", packets)
        await settled()
        assert messages_in_memory() - before <= 500 + one_read + 1
        assert subscription.statistics().queued <= 500 + (one_read if overflow is Overflow.BLOCK else 0)
        pings = sum(packet.kind is Kind.PINGREQ for _, packet in broker.received)
        await trio.sleep(100)
        assert sum(packet.kind is Kind.PINGREQ for _, packet in broker.received) >= pings + 9
        assert driver.generation == 1
        await gate.open()
        statistics = subscription.statistics()
        assert statistics.received == FLOOD == statistics.delivered + statistics.dropped
        assert (statistics.dropped == 0) is (overflow is Overflow.BLOCK)
        assert (await driver.publish("out", qos=1)).generation == 1


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_quick_handler_empties_a_blocking_queue_that_has_filled_up_in_one_read(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    received: list[int] = []

    def handle(message: Message[bytes]) -> None:
        received.append(int(message.payload))

    async with MQTTDriver(memory_config(broker, receive_maximum=1000)) as driver:
        subscription = await driver.subscribe("a", handle, qos=qos, overflow=Overflow.BLOCK, queue_messages=10)
        for number in range(500):
            broker.publish("a", b"%d" % number, qos=qos)
        await settled()
        assert received == list(range(500))
        assert subscription.statistics().dropped == 0
        assert driver.status().unacknowledged == 0


async def test_a_message_of_a_dead_connection_that_somebody_keeps_does_not_keep_the_others(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    kept: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, drain_timeout=0.1)) as driver:
        await driver.subscribe("kept", kept.append, qos=1, acknowledge=Acknowledge.MANUAL)
        await driver.subscribe("stuck", gate.handle, qos=1, queue_messages=1)
        before = messages_in_memory()
        for _ in range(10):
            broker.publish("kept", qos=1)
            for _ in range(50):
                broker.publish("stuck", qos=1)
            await settled()
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
        assert len(kept) == 10
        assert messages_in_memory() - before <= 10 + 2 * 52
