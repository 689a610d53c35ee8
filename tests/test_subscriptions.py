"""Subscriptions in use: iterators, unsubscribing from inside, reconnects, and very many of them."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import DriverClosedError, Message, MQTTDriver
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker, Subscribe

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def acknowledged(broker: MemoryBroker) -> int:
    return sum(isinstance(packet, Ack) and packet.kind is Kind.PUBACK for _, packet in broker.received)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"queue_messages": 0}, ValueError, "queue_messages is 0, allowed are whole numbers from 1"),
        ({"queue_messages": -1}, ValueError, "queue_messages is -1, allowed are whole numbers from 1"),
        ({"queue_messages": "many"}, ValueError, "queue_messages is 'many'"),
        ({"qos": 3}, ValueError, "qos is 3, allowed are 0, 1, 2"),
        ({"queue_bytes": 1}, ValueError, "queue_bytes is 1, allowed are whole numbers from 1024"),
        ({"overflow": "explode"}, ValueError, "overflow is 'explode', allowed are 'drop_oldest', 'drop_newest'"),
        ({"acknowledge": "never"}, ValueError, "acknowledge is 'never', allowed are 'processed', 'received'"),
        ({"identifier": 7}, ValueError, "identifier is 7, allowed are whole numbers from 1024"),
        ({"on_dead_letter": "log"}, TypeError, "on_dead_letter must be callable, not str"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
async def test_bad_options_are_refused_at_the_call(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(error, match=words):
            await driver.subscribe("a", print, **options)
        assert not broker.subscriptions(driver.client_id or "")


async def test_a_handler_can_end_its_own_subscription(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:

        async def once(message: Message[bytes]) -> None:
            got.append(message.payload)
            await driver.unsubscribe("a")
            got.append(b"unsubscribed")

        await driver.subscribe("a", once, qos=1)
        for payload in (b"1", b"2", b"3"):
            broker.publish("a", payload, qos=1)
        await settled()
        assert got == [b"1", b"unsubscribed"]
        assert not broker.subscriptions(driver.client_id or "")
        assert driver.status().unacknowledged == 0


async def test_a_handler_can_subscribe_and_publish(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    answers: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:

        async def start(_message: Message[bytes]) -> None:
            await driver.subscribe("answer", lambda message: answers.append(message.payload), qos=1)
            await driver.publish("answer", b"42", qos=2)

        await driver.subscribe("question", start, qos=1)
        await driver.publish("question", b"", qos=1)
        await settled()
        assert answers == [b"42"]


async def test_an_iterator_acknowledges_when_the_next_message_is_asked_for(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        async with driver.subscription("a", qos=1) as messages:
            broker.publish("a", b"1", qos=1)
            broker.publish("a", b"2", qos=1)
            first = await messages.receive()
            await settled()
            assert (first.payload, acknowledged(broker)) == (b"1", 0)
            second = await messages.receive()
            await settled()
            assert (second.payload, acknowledged(broker)) == (b"2", 1)
        await settled()
        assert acknowledged(broker) == 2


async def test_cancelling_an_iterator_loses_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a", qos=1) as messages:
        with trio.move_on_after(1):
            await messages.receive()
        broker.publish("a", b"1", qos=1)
        await settled()
        with trio.CancelScope() as scope:
            scope.cancel()
            await messages.receive()
        assert (await messages.receive()).payload == b"1"


async def test_two_tasks_may_not_iterate_at_once(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    got: list[Message[Any]] = []

    async def receive() -> None:
        got.append(await messages.receive())

    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a") as messages:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await settled()
            with pytest.raises(trio.BusyResourceError, match="another task"):
                await messages.receive()
            broker.publish("a", b"1")
        assert got[0].payload == b"1"


async def test_iteration_ends_when_the_subscription_is_ended(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a") as messages:
        broker.publish("a", b"1")
        async for message in messages:
            assert message.payload == b"1"
            await driver.unsubscribe(messages)
        with pytest.raises(DriverClosedError, match="'a' is ended"):
            await messages.receive()


async def test_iteration_ends_when_the_driver_is_left(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, nursery: trio.Nursery
) -> None:
    got: list[list[bytes]] = []
    finished = trio.Event()

    async def iterate(driver: MQTTDriver) -> None:
        async with driver.subscription("a") as messages:
            got.append([message.payload async for message in messages])
        finished.set()

    async with MQTTDriver(memory_config(broker)) as driver:
        nursery.start_soon(iterate, driver)
        await broker.wait_for_subscription("a")
        broker.publish("a", b"1")
        await settled()
    await finished.wait()
    assert got == [[b"1"]]


async def test_an_iterator_lives_across_reconnects(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: list[tuple[bytes, int]] = []
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a", qos=1) as messages:
        for generation in (1, 2, 3):
            await driver.wait_live()
            # Two: the second one waits in the queue while the link goes.
            broker.publish("a", b"x", qos=1)
            broker.publish("a", b"y", qos=1)
            await settled()
            broker.drop()
            await settled()
            assert driver.generation == generation
        for _ in range(6):
            message = await messages.receive()
            got.append((message.payload, message.generation))
    assert got == [(payload, generation) for generation in (1, 2, 3) for payload in (b"x", b"y")]


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_ten_thousand_subscriptions_are_replayed_in_one_go(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, protocol: str
) -> None:
    count = 10_000
    filters = [f"plant/{number % 100}/sensor/{number}/{'+' if number % 2 else 'value'}" for number in range(count)]
    got: set[str] = set()

    def seen(message: Message[bytes]) -> None:
        got.add(message.topic)

    async with MQTTDriver(memory_config(broker, protocol=protocol, queue_messages=10)) as driver:
        async with trio.open_nursery() as nursery:
            for topic_filter in filters:
                nursery.start_soon(driver.subscribe, topic_filter, seen)
        assert driver.status().subscriptions == count
        broker.forget()
        broker.drop()
        await settled()
        await driver.wait_live()
        assert driver.generation == 2
        assert broker.subscriptions(driver.client_id or "").keys() == set(filters)
        packets = [packet for _, packet in broker.received if isinstance(packet, Subscribe)]
        assert len(packets) == count / driver.config.replay_batch
        assert driver.status().counters["replays"] == count
        broker.publish("plant/99/sensor/9999/value")
        broker.publish("plant/98/sensor/9998/value")
        await settled()
        assert got == {"plant/99/sensor/9999/value", "plant/98/sensor/9998/value"}
