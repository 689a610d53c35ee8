"""Leaving a driver whose link is live: handlers finish, publishes are acknowledged, in ``drain_timeout``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.drains import KINDS, Maker, Worker, answered, left_behind, sent
from tests.peers import memory_config
from trio_mqtt_driver import Acknowledge, Availability, Message, MQTTDriver, Overflow, PayloadError, State
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=KINDS)
def make_config(request: pytest.FixtureRequest, broker: MemoryBroker) -> Maker:
    return Maker(broker, *request.param)


# -- what has come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_handlers_finish_what_is_here_and_it_is_acknowledged(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, qos: int
) -> None:
    first, second = Worker(2), Worker(3)
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("first", first, qos=qos)
        await driver.subscribe("second", second, qos=qos)
        for payload in (b"1", b"2", b"3"):
            broker.publish("first", payload, qos=qos)
        broker.publish("second", b"4", qos=qos)
        await settled()
        assert (first.begun, first.done) == ([b"1"], [])
    assert first.done == [b"1", b"2", b"3"]
    assert second.done == [b"4"]
    assert trio.current_time() == 3 * 2
    assert answered(broker) == (4 if qos else 0)
    assert left_behind(driver) == []
    assert driver.status().counters["dropped"] == 0
    assert not broker.violations


async def test_what_comes_when_the_driver_is_being_left_is_dropped_and_not_acknowledged(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    worker = Worker(5)

    async def send() -> None:
        await trio.sleep(1)
        for _ in range(3):
            broker.publish("in", b"too late", qos=1)

    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", worker, qos=1)
        broker.publish("in", b"in time", qos=1)
        await settled()
        nursery.start_soon(send)
    assert worker.begun == worker.done == [b"in time"]
    assert trio.current_time() == 5
    assert answered(broker) == 1
    assert driver.status().counters["dropped"] == 3
    assert left_behind(driver) == []


async def test_a_topic_that_is_never_quiet_does_not_hold_up_the_end(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    worker = Worker(0.5)

    async def chatter() -> None:
        for number in range(1_000_000):
            broker.publish("in", str(number), qos=1)
            await trio.sleep(0.1)

    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", worker, qos=1)
        nursery.start_soon(chatter)
        await trio.sleep(0.95)
        here = driver.status().counters["messages_in"]
        assert here == 10
    assert len(worker.done) == answered(broker) == here
    assert trio.current_time() == 10 * 0.5
    assert driver.status().counters["dropped"] > 30
    nursery.cancel_scope.cancel()


async def test_a_handler_that_only_blocks_the_scheduler_is_waited_for_whenever_the_driver_is_left(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    """More messages than a handler takes in one turn: what it got is acknowledged, what it did not get is dropped."""
    cases: set[bool] = set()
    for turns in range(14):
        handled: list[bytes] = []

        def handler(message: Message[bytes], log: list[bytes] = handled) -> None:
            log.append(message.payload)

        broker.forget()
        async with MQTTDriver(make_config()) as driver:
            await driver.subscribe("in", handler, qos=1)
            for _ in range(2000):
                broker.publish("in", b"x", qos=1)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            cases.add(0 < len(handled) < 2000)
        counters = driver.status().counters
        assert len(handled) == answered(broker)
        assert len(handled) + counters["dropped"] == counters["messages_in"]
        assert left_behind(driver) == []
    assert cases == {False, True}


async def test_a_handler_that_hangs_is_cancelled_after_the_drain_timeout(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    worker, other = Worker(math.inf), Worker(1)
    async with MQTTDriver(make_config(drain_timeout=7)) as driver:
        await driver.subscribe("in", worker, qos=1)
        await driver.subscribe("other", other, qos=1)
        for topic in ("in", "in", "other"):
            broker.publish(topic, b"x", qos=1)
        await settled()
    assert trio.current_time() == 7
    assert (worker.begun, worker.done, other.done) == ([b"x"], [], [b"x"])
    assert answered(broker) == 1
    assert left_behind(driver) == ["0 published and not acknowledged, 2 received and not processed"]
    assert [record.levelname for record in caplog.records if "left behind" in record.message] == ["WARNING"]
    assert driver.undelivered == ()


async def test_a_dead_letter_handler_is_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    worker, undertaker = Worker(1), Worker(4)
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", worker, dict, qos=1, on_dead_letter=undertaker)
        broker.publish("in", b"no JSON", qos=1)
        broker.publish("in", b"{}", qos=1)
        await settled()
        assert undertaker.begun
    assert (undertaker.done, worker.done) == ([b"no JSON"], [b"{}"])
    assert trio.current_time() == 5
    assert answered(broker) == 2


@pytest.mark.parametrize("hangs_in", ["handler", "dead letter"])
async def test_a_message_is_counted_as_left_behind_while_either_handler_has_it(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, hangs_in: str
) -> None:
    async def hang(message: Message[Any], error: PayloadError | None = None) -> None:
        await trio.sleep_forever()

    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", hang, dict, qos=1, on_dead_letter=hang)
        broker.publish("in", b"{}" if hangs_in == "handler" else b"no JSON", qos=1)
        await settled()
    assert trio.current_time() == 100
    assert left_behind(driver) == ["0 published and not acknowledged, 1 received and not processed"]


async def test_a_handler_whose_subscription_was_ended_is_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    worker = Worker(5)
    async with MQTTDriver(make_config()) as driver:
        subscription = await driver.subscribe("in", worker, qos=1)
        for payload in (b"running", b"queued"):
            broker.publish("in", payload, qos=1)
        await settled()
        await driver.unsubscribe(subscription)
    assert worker.begun == worker.done == [b"running"]
    assert trio.current_time() == 5
    assert answered(broker) == 2
    assert left_behind(driver) == []


async def test_a_handler_that_hangs_and_whose_subscription_was_ended_is_counted(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", Worker(math.inf), qos=1)
        broker.publish("in", b"x", qos=1)
        await settled()
        await driver.unsubscribe("in")
    assert trio.current_time() == 100
    assert left_behind(driver) == ["0 published and not acknowledged, 1 received and not processed"]


async def test_a_handler_that_ends_its_own_subscription_while_it_is_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async def last(message: Message[bytes]) -> None:
        await trio.sleep(1)
        await driver.unsubscribe("in")
        await trio.sleep(1)

    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", last, qos=1)
        for _ in range(3):
            broker.publish("in", b"x", qos=1)
        await settled()
    assert trio.current_time() == 2
    assert answered(broker) == 3
    assert left_behind(driver) == []


async def test_a_handler_that_fails_while_it_is_waited_for_ends_the_driver_with_its_exception(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    """And keeps nobody else from finishing."""
    worker = Worker(3)

    async def fail(message: Message[bytes]) -> None:
        await trio.sleep(1)
        raise ValueError(message.payload)

    driver = MQTTDriver(make_config(on_handler_error="raise"))
    with pytest.raises(ValueError, match="first"):  # noqa: PT012  # the end is under test
        async with driver:
            await driver.subscribe("in", worker, qos=1)
            await driver.subscribe("bad", fail, qos=1)
            for topic, payload in (("in", b"x"), ("bad", b"first"), ("bad", b"second")):
                broker.publish(topic, payload, qos=1)
            await settled()
    assert worker.done == [b"x"]
    assert trio.current_time() == 3
    assert answered(broker) == 1
    assert left_behind(driver) == ["0 published and not acknowledged, 2 received and not processed"]


async def test_an_iterator_outside_the_block_gets_nothing_more_and_is_not_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    got: list[bytes] = []
    ended = trio.Event()
    driver = MQTTDriver(make_config())

    async def iterate() -> None:
        async with driver.subscription("in", qos=1) as messages:
            async for message in messages:
                got.append(message.payload)
                await trio.sleep(10)
        ended.set()

    worker = Worker(2)
    async with driver:
        nursery.start_soon(iterate)
        await driver.subscribe("work", worker, qos=1)
        await settled()
        broker.publish("work", b"x", qos=1)
        for payload in (b"1", b"2"):
            broker.publish("in", payload, qos=1)
        await settled()
    assert worker.done == [b"x"]
    assert trio.current_time() == 2
    assert left_behind(driver) == ["0 published and not acknowledged, 2 received and not processed"]
    await ended.wait()
    assert got == [b"1"]


async def test_an_iterator_in_the_block_is_done_with_its_messages_when_its_own_block_ends(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async with MQTTDriver(make_config()) as driver, driver.subscription("in", qos=1) as messages:
        for _ in range(3):
            broker.publish("in", b"x", qos=1)
        await messages.receive()
    assert trio.current_time() == 0
    await settled()
    assert left_behind(driver) == []


# -- what was published -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [1, 2])
async def test_what_was_published_is_acknowledged_before_the_driver_ends(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery, qos: int
) -> None:
    kind = Kind.PUBACK if qos == 1 else Kind.PUBREC

    async def release() -> None:
        await trio.sleep(3)
        hold.remove()

    async with MQTTDriver(make_config(ack_timeout=math.inf, in_flight=2)) as driver:
        hold = broker.faults.hold(kind)
        receipts = [driver.publish_nowait("out", str(number), qos=qos) for number in range(5)]
        nursery.start_soon(release)
    assert trio.current_time() == 3
    assert sent(broker, "out") == [b"0", b"1", b"2", b"3", b"4"]
    for receipt in receipts:
        assert (await receipt.wait()).attempts == 1
    assert (driver.undelivered, left_behind(driver)) == ((), [])


async def test_handlers_may_publish_while_they_are_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async def forward(message: Message[bytes]) -> None:
        await trio.sleep(1)
        await driver.publish("out", b"waited for", qos=1)
        driver.publish_nowait("out", b"not waited for", qos=2)

    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", forward, qos=1)
        for _ in range(2):
            broker.publish("in", b"x", qos=1)
        await settled()
    assert sent(broker, "out") == [b"waited for", b"not waited for"] * 2
    assert trio.current_time() == 2
    assert (driver.undelivered, left_behind(driver)) == ((), [])


async def test_a_task_that_goes_on_publishing_does_not_hold_up_the_end(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    """Something is always unacknowledged: what counts is what was there when the handlers were done."""

    async def chatter() -> None:
        while driver.state is State.LIVE:
            driver.publish_nowait("chatter", qos=1)
            hold.release()
            await trio.sleep(1)

    async with MQTTDriver(make_config(ack_timeout=math.inf)) as driver:
        hold = broker.faults.hold(Kind.PUBACK)
        nursery.start_soon(chatter)
        await trio.sleep(0.5)
        receipt = driver.publish_nowait("last", qos=1)
    assert trio.current_time() == 1
    assert (await receipt.wait()).attempts == 1
    assert [one.topic for one in driver.undelivered] == ["chatter"]


async def test_a_handler_that_hangs_does_not_keep_what_was_published_from_being_acknowledged(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    """Its queue is full, so reading pauses, and behind its messages lie our acknowledgements."""
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", Worker(math.inf), qos=1, queue_messages=1, overflow=Overflow.BLOCK)
        for _ in range(6):
            broker.publish("in", b"x", qos=1)
        await settled()
        receipt = driver.publish_nowait("out", qos=1)
        await trio.sleep(1)
        assert not receipt.done
    assert trio.current_time() == 1 + 100
    assert receipt.done
    assert driver.undelivered == ()


async def test_what_is_dropped_does_not_stop_the_reader(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    """A 3.1.1 broker may send more than our Receive Maximum, of which it does not know."""

    async def forward(message: Message[bytes]) -> None:
        await trio.sleep(1)
        for _ in range(10):
            broker.publish("in", b"late", qos=1)
        await settled()
        await driver.publish("out", qos=1)

    async with MQTTDriver(make_config(receive_maximum=3)) as driver:
        await driver.subscribe("in", forward, qos=1)
        broker.publish("in", b"x", qos=1)
        await settled()
    assert trio.current_time() == 1
    assert left_behind(driver) == []


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_reader_that_is_paused_does_not_hold_up_the_end(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: str
) -> None:
    """The acknowledgement of what was published lies behind messages that nobody acknowledges."""
    config = memory_config(
        broker, protocol=protocol, receive_maximum=5 if protocol == "3.1.1" else 100, receive_bytes=1024
    )
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", lambda _: None, qos=1, acknowledge=Acknowledge.MANUAL)
        for _ in range(10):
            broker.publish("in", bytes(200), qos=1)
        await trio.sleep(1)
        receipt = driver.publish_nowait("out", qos=1)
    assert trio.current_time() == 1
    assert receipt.done
    assert driver.undelivered == ()


# -- without an end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("availability", [None, Availability(topic="presence")])
async def test_a_dead_broker_is_waited_for_as_long_as_both_timeouts_say(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, availability: Availability | None
) -> None:
    config = make_config(
        drain_timeout=4, disconnect_timeout=3, ack_timeout=math.inf, keep_alive=0, availability=availability
    )
    async with MQTTDriver(config) as driver:
        await settled()
        broker.silence()
        driver.publish_nowait("out", qos=1)
    assert trio.current_time() == 4 + 3
    assert [one.topic for one in driver.undelivered] == ["out"]
    assert left_behind(driver) == ["1 published and not acknowledged, 0 received and not processed"]


async def test_nothing_to_drain_takes_no_time_and_is_not_mentioned(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", Worker(1))
    assert trio.current_time() == 0
    assert (left_behind(driver), driver.undelivered) == ([], ())


async def test_what_was_queued_when_the_driver_ended_is_counted(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async def hang(_message: Message[bytes]) -> None:
        await trio.sleep_forever()

    async with MQTTDriver(make_config(drain_timeout=1)) as driver:
        subscription = await driver.subscribe("in", hang, qos=1)
        for number in range(4):
            broker.publish("in", str(number), qos=1)
        await settled()
    assert driver.status().counters["dropped"] == subscription.statistics().dropped == 3
