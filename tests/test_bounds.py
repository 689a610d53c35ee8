"""Nothing grows without bound: what is given up, what a stuck handler leaves, what one packet or one window holds."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import (
    DriverConfig,
    Endpoint,
    Message,
    MQTTDriver,
    Overflow,
    PublishTimeoutError,
    ServerLimitError,
    State,
    SubscribeError,
    _replay,
)
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver.testing import Kind, MemoryBroker, Subscribe, Unsubscribe

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def messages_in_memory() -> int:
    gc.collect()
    return sum(isinstance(one, Outgoing) for one in gc.get_objects())


@pytest.mark.long
@pytest.mark.parametrize("waiting", [0, 3])
@pytest.mark.parametrize("qos", [0, 1])
async def test_messages_that_timed_out_while_offline_are_let_go(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, waiting: int, qos: int
) -> None:
    before = messages_in_memory()
    async with MQTTDriver(memory_config(broker, publish_timeout=1, outbox_messages=10)) as driver:
        broker.stop()
        await trio.sleep(100)
        receipts = [driver.publish_nowait("kept", qos=1) for _ in range(waiting)]

        async def give_up() -> None:
            with pytest.raises(PublishTimeoutError):
                await driver.publish("late", bytes(1000), qos=qos)

        for _ in range(50):
            async with trio.open_nursery() as nursery:
                for _ in range(10 - waiting):
                    nursery.start_soon(give_up)
            assert driver.status().queued == waiting
            assert messages_in_memory() - before <= 2 * 10
        broker.start()
        for receipt in receipts:
            await receipt.wait()
        await settled()
    assert [one.topic for one in broker.published if one.topic in ("kept", "late")] == ["kept"] * waiting


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.DROP_NEWEST])
async def test_a_stuck_handler_does_not_gather_the_messages_of_connections_that_are_gone(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow
) -> None:
    """Those of QoS 1 are kept while they hold up the broker's window; one of a dead connection holds up none."""
    release = trio.Event()
    got: list[bytes] = []

    async def stuck(message: Message[bytes]) -> None:
        await release.wait()
        got.append(message.payload)

    bound = 3 + 5
    config = memory_config(broker, protocol="5", receive_maximum=5, queue_messages=3)
    async with MQTTDriver(config) as driver:
        subscription = await driver.subscribe("a", stuck, qos=1, overflow=overflow)
        for _ in range(40):
            for number in range(20):
                broker.publish("a", b"%d" % number, qos=1)
            await trio.sleep(1)
            assert subscription.statistics().queued <= bound
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
        statistics = subscription.statistics()
        assert statistics.received == statistics.dropped + statistics.queued + statistics.delivered
        assert statistics.dropped >= statistics.received - bound - 1
        assert driver.status().counters["dropped"] == statistics.dropped
        release.set()
        broker.publish("a", b"new", qos=1)
        await settled()
        assert got[-1] == b"new"


async def test_a_full_queue_keeps_what_the_present_connection_must_acknowledge(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    release = trio.Event()
    got: list[bytes] = []

    async def slow(message: Message[bytes]) -> None:
        await release.wait()
        got.append(message.payload)

    async with MQTTDriver(memory_config(broker, queue_messages=2)) as driver:
        await driver.subscribe("a", slow, qos=1)
        for generation in (1, 2):
            for number in range(5):
                broker.publish("a", b"%d-%d" % (generation, number), qos=1)
            await settled()
            if generation == 1:
                driver.force_reconnect(even_if_live=True)
                await driver.wait_live()
        release.set()
        await settled()
    assert [payload for payload in got if payload.startswith(b"2")] == [b"2-%d" % number for number in range(5)]


# -- the broker's Maximum Packet Size ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic_filter, options",
    [("a" * 300, {}), ("a", {"user_properties": [("name", "v" * 300)]})],
    ids=["filter", "user-properties"],
)
async def test_a_subscribe_that_the_broker_cannot_take_is_refused_at_the_call(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, topic_filter: str, options: dict[str, Any]
) -> None:
    broker = MemoryBroker(nursery, maximum_packet_size=200)
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        with pytest.raises((SubscribeError, ServerLimitError)), trio.fail_after(5):
            await driver.subscribe(topic_filter, print, **options)
        await trio.sleep(100)
        assert driver.state is State.LIVE
        assert driver.generation == 1
        await driver.subscribe("b", print)
    assert not broker.violations


async def test_a_filter_that_the_next_broker_cannot_take_is_refused_alone(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    long = "a" * 300
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        await driver.subscribe(long, print)
        await driver.subscribe("b", print)
        broker.options.maximum_packet_size = 200
        broker.drop()
        await trio.sleep(100)
        assert driver.generation == 2
        assert [topic_filter for topic_filter, _ in driver.status().degraded] == [long]
        assert set(broker.subscriptions(driver.client_id or "")) == {"b"}
    assert not broker.violations


async def test_a_filter_that_the_next_broker_cannot_take_can_be_unsubscribed(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        subscription = await driver.subscribe("a" * 300, print)
        broker.options.maximum_packet_size = 200
        broker.drop()
        await trio.sleep(100)
        with trio.fail_after(5):
            await driver.unsubscribe(subscription)
        await trio.sleep(100)
        assert driver.generation == 2
    assert not broker.violations


async def test_many_unsubscribes_at_once_keep_within_the_broker_s_packet_size(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, maximum_packet_size=200)
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        subscriptions = [await driver.subscribe(f"{number:040}", print) for number in range(50)]
        async with trio.open_nursery() as unsubscribing:
            for subscription in subscriptions:
                unsubscribing.start_soon(driver.unsubscribe, subscription)
        assert driver.generation == 1
        assert not broker.subscriptions(driver.client_id or "")
    assert not broker.violations
    packets = [packet for _, packet in broker.received if isinstance(packet, Unsubscribe)]
    assert len(packets) < 50  # and yet several filters go in one


# -- packet identifiers -----------------------------------------------------------------------------------------------


def test_the_window_may_not_take_all_packet_identifiers() -> None:
    """SUBSCRIBE and UNSUBSCRIBE need some, too."""
    with pytest.raises(ValueError, match="in_flight is 65535, allowed are whole numbers from 1 to "):
        DriverConfig(endpoint=Endpoint(host="memory", port=1883), in_flight=65535)


@pytest.fixture
def wave(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many packets may wait for their answers: fewer than usual, so that a test with few filters shows it."""
    monkeypatch.setattr(_replay, "_WAVE", 100)
    return 100


@pytest.mark.long
async def test_the_packets_of_a_replay_wait_for_answers_a_bounded_number_at_a_time(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, wave: int
) -> None:
    """Each takes a packet identifier until it is answered."""
    many = 3000
    async with MQTTDriver(memory_config(broker, replay_batch=1)) as driver:
        async with trio.open_nursery() as subscribing:
            for number in range(many):
                subscribing.start_soon(driver.subscribe, f"t/{number}", print)
        broker.forget()
        with broker.faults.hold(Kind.SUBACK) as hold:
            broker.drop()
            await trio.sleep(2)
            assert hold.held == wave
        await driver.wait_live()
        sent = [packet for _, packet in broker.received if isinstance(packet, Subscribe)]
        assert len(sent) == many
        assert all(len(packet.requests) == 1 for packet in sent)
        assert driver.generation == 2
        assert driver.status().subscriptions == many
    assert not broker.violations


async def test_the_packets_of_many_unsubscribes_wait_for_answers_a_bounded_number_at_a_time(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, wave: int
) -> None:
    many = 1000
    async with MQTTDriver(memory_config(broker, replay_batch=1)) as driver:
        subscriptions = [await driver.subscribe(f"t/{number}", print) for number in range(many)]
        async with trio.open_nursery() as unsubscribing:
            with broker.faults.hold(Kind.UNSUBACK) as hold:
                for subscription in subscriptions:
                    unsubscribing.start_soon(driver.unsubscribe, subscription)
                await settled()
                assert 0 < hold.held <= wave
        assert not broker.subscriptions(driver.client_id or "")
        assert driver.generation == 1
    assert not broker.violations
