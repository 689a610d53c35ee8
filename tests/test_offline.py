"""What becomes of a publish while the link is down: wait, queue, latest, fail; and how what waited goes out."""

from __future__ import annotations

import math
import random

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import (
    MessageDroppedError,
    MessageExpiredError,
    MQTTDriver,
    NotConnectedError,
    OfflinePolicy,
    OutboxFullError,
    PublishTimeoutError,
    Receipt,
    SupersededError,
)
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def arrived(broker: MemoryBroker, topic: str = "t") -> list[bytes]:
    return [message.payload for message in broker.published if message.topic == topic]


async def cut(broker: MemoryBroker) -> None:
    await settled()  # what is in the write buffer leaves
    broker.stop()
    await settled()


# -- queue ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_queue_waits_for_the_acknowledgement_on_a_live_link_and_returns_at_once_without_one(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int
) -> None:
    async with MQTTDriver(memory_config(broker), rng=random.Random(1)) as driver:
        live = await driver.publish("t", b"live", qos=qos, offline="queue")
        assert (live.queued, live.generation, live.attempts) == (False, 1, 1)
        await cut(broker)
        begin = trio.current_time()
        down = await driver.publish("t", b"down", qos=qos, offline=OfflinePolicy.QUEUE)
        assert (down.queued, down.generation, down.attempts, down.latency) == (True, 1, 0, 0)
        assert trio.current_time() == begin
        assert driver.status().queued == 1
        broker.start()
        await driver.wait_live()
        assert await driver.drain() == ()
    assert arrived(broker) == [b"live", b"down"]


async def test_a_queued_publish_that_is_under_way_returns_when_the_link_is_lost_and_is_delivered_later(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, trio.open_nursery() as nursery:
        with broker.faults.drop(Kind.PUBLISH, direction=Direction.IN):
            returned: list[tuple[bool, int]] = []

            async def publish() -> None:
                result = await driver.publish("t", b"x", qos=1, offline="queue")
                returned.append((result.queued, result.attempts))

            nursery.start_soon(publish)
            await settled()
            assert returned == []
            broker.drop()
            await settled()
            assert returned == [(True, 1)]
        await driver.drain()
    assert arrived(broker) == [b"x"]


async def test_the_config_has_the_default_and_the_call_wins(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, offline="fail")) as driver:
        await cut(broker)
        with pytest.raises(NotConnectedError, match="publish to 't': the link is down"):
            await driver.publish("t", b"1", qos=1)
        with pytest.raises(NotConnectedError):
            driver.publish_nowait("t", b"1", qos=1)
        assert (await driver.publish("t", b"2", qos=1, offline="queue")).queued
        with pytest.raises(ValueError, match=r"offline is 'never', allowed are 'wait', 'queue', 'latest', 'fail'"):
            await driver.publish("t", b"3", offline="never")  # type: ignore[arg-type]  # that is the point
        driver.apply_settings(driver.config.evolve(offline="queue"))
        assert (await driver.publish("t", b"3", qos=1)).queued
        broker.start()
        await driver.wait_live()
    assert arrived(broker) == [b"2", b"3"]


async def test_a_background_start_queues_before_the_first_link(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, offline="queue"), start="background") as driver:
        assert (await driver.publish("t", b"early", qos=1)).queued
        await driver.wait_live()
    assert arrived(broker) == [b"early"]


# -- fail -------------------------------------------------------------------------------------------------------------


async def test_fail_does_not_wait_out_an_outage_that_begins_later(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, trio.open_nursery() as nursery:
        broker.faults.drop(Kind.PUBLISH, direction=Direction.IN, times=2)
        errors: list[Exception] = []

        async def publish() -> None:
            with pytest.raises(NotConnectedError, match=r"lost before the acknowledgement.*last error") as caught:
                await driver.publish("t", b"fail", qos=1, offline="fail")
            errors.append(caught.value)

        nursery.start_soon(publish)
        await settled()
        receipt = driver.publish_nowait("t", b"too", qos=1, offline="fail")
        broker.drop()
        await settled()
        assert len(errors) == 1
        with pytest.raises(NotConnectedError):
            await receipt.wait()
        await driver.wait_live()
        assert driver.undelivered == ()
        assert driver.status().queued == 0
    assert arrived(broker) == []


async def test_fail_looks_again_when_there_is_room(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, outbox_messages=1)) as driver, trio.open_nursery() as nursery:
        broker.faults.drop(Kind.PUBLISH, direction=Direction.IN, times=1)
        first = driver.publish_nowait("t", b"first", qos=1, offline="fail")

        async def publish() -> None:
            with pytest.raises(NotConnectedError, match="the link is down"):
                await driver.publish("t", b"second", qos=1, offline="fail")

        nursery.start_soon(publish)
        await settled()
        await cut(broker)
        with pytest.raises(NotConnectedError):
            await first.wait()
        broker.start()
    assert arrived(broker) == []


# -- latest -----------------------------------------------------------------------------------------------------------


async def test_latest_keeps_the_newest_of_each_topic_while_the_link_is_down(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, offline="latest")) as driver:
        await cut(broker)
        receipts = [
            driver.publish_nowait(topic, f"{topic}{n}", qos=1, retain=True) for n in range(3) for topic in "ab"
        ]
        driver.publish_nowait("a", b"other", qos=1, offline="wait")
        assert (driver.status().queued, driver.status().counters["superseded"]) == (3, 4)
        for receipt in receipts[:4]:
            with pytest.raises(SupersededError, match=r"a newer message to '[ab]' took its place"):
                await receipt.wait()
        broker.start()
        await driver.wait_live()
        await driver.drain()
        driver.publish_nowait("a", b"live", qos=1)
        driver.publish_nowait("a", b"live too", qos=1)
    assert arrived(broker, "a") == [b"a2", b"other", b"live", b"live too"]
    assert arrived(broker, "b") == [b"b2"]
    assert broker.retained["b"].payload == b"b2"


async def test_what_a_dead_connection_hands_back_gives_way_to_the_latest(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, offline="latest")) as driver:
        with broker.faults.drop(Kind.PUBLISH, direction=Direction.IN):
            older = driver.publish_nowait("t", b"older", qos=1)
            await settled()
            await cut(broker)
        newer = driver.publish_nowait("t", b"newer", qos=1)
        broker.start()
        with pytest.raises(SupersededError):
            await older.wait()
        await newer.wait()
    assert arrived(broker) == [b"newer"]


async def test_a_publish_whose_message_is_superseded_returns_as_if_it_were_queued(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    config = memory_config(broker, in_flight=1, offline="latest")
    async with MQTTDriver(config) as driver, trio.open_nursery() as nursery:
        with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN):
            driver.publish_nowait("other", b"x", qos=1)
            queued: list[bool] = []

            async def publish() -> None:
                queued.append((await driver.publish("t", b"older", qos=1)).queued)

            nursery.start_soon(publish)
            await settled()
            newer = driver.publish_nowait("t", b"newer", qos=1)
            await settled()
            assert queued == [True]
        await newer.wait()
    assert arrived(broker) == [b"newer"]


async def test_the_latest_takes_the_place_of_the_older_in_a_full_outbox(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, outbox_messages=1, offline="latest")) as driver:
        await cut(broker)
        driver.publish_nowait("t", b"1", qos=1)
        driver.publish_nowait("t", b"2", qos=1)
        assert (await driver.publish("t", b"3", qos=1)).queued
        with pytest.raises(OutboxFullError):
            driver.publish_nowait("u", b"1", qos=1)
        broker.start()
        await driver.wait_live()
    assert arrived(broker) == [b"3"]


# -- time to live -----------------------------------------------------------------------------------------------------


def expiries(broker: MemoryBroker) -> list[object]:
    return [message.properties.get("message_expiry") for message in broker.published if message.topic == "t"]


async def test_message_expiry_is_counted_down_while_a_message_waits(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker), rng=random.Random(1)) as driver:
        await driver.publish("t", b"at once", qos=1, message_expiry=100)
        await cut(broker)
        receipts = [driver.publish_nowait("t", str(expiry), qos=1, message_expiry=expiry) for expiry in (100, 31, 29)]
        forever = driver.publish_nowait("t", b"for ever", qos=1)
        begin = trio.current_time()
        with pytest.raises(MessageExpiredError, match="'t' was not acknowledged within message_expiry=29 s"):
            await receipts[2].wait()
        assert trio.current_time() == pytest.approx(begin + 29)
        await trio.sleep_until(begin + 30)
        broker.start()
        driver.force_reconnect()
        await forever.wait()
        assert trio.current_time() == pytest.approx(begin + 30)
        assert driver.status().counters["expired"] == 1
    assert arrived(broker) == [b"at once", b"100", b"31", b"for ever"]
    assert expiries(broker) == [100, 70, 1, None]


async def test_each_message_expires_in_its_own_time(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        await cut(broker)
        begin = trio.current_time()
        order = random.Random(3).sample(range(1, 51), 50)
        ended: list[float] = []

        async def wait(receipt: Receipt) -> None:
            with pytest.raises(MessageExpiredError):
                await receipt.wait()
            ended.append(trio.current_time() - begin)

        async with trio.open_nursery() as nursery:
            for expiry in order:
                nursery.start_soon(wait, driver.publish_nowait("t", b"x", qos=1, message_expiry=expiry))
        assert ended == pytest.approx(list(range(1, 51)))
        assert driver.status().queued == 0


async def test_what_has_expired_on_the_wire_is_not_sent_again(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, ack_timeout=30)) as driver:
        with broker.faults.drop(Kind.PUBLISH, direction=Direction.IN):
            receipt = driver.publish_nowait("t", b"x", qos=1, message_expiry=10)
            await trio.sleep(11)
            assert not receipt.done  # it may have arrived, and its acknowledgement may still come
            broker.drop()
            with pytest.raises(MessageExpiredError):
                await receipt.wait()
    assert arrived(broker) == []


async def test_expiry_ends_the_wait_for_room(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, outbox_messages=1)) as driver:
        await cut(broker)
        driver.publish_nowait("t", b"x", qos=1)
        with trio.fail_after(6), pytest.raises(MessageExpiredError):
            await driver.publish("t", b"y", qos=1, message_expiry=5)
        broker.start()
        await driver.wait_live()
        await driver.publish("t", b"z", qos=1)
    assert arrived(broker) == [b"x", b"z"]


@pytest.mark.parametrize("value", [-1, 2**32, 1.5, True])
async def test_an_expiry_that_mqtt_cannot_carry_is_refused(
    autojump_clock: MockClock, broker: MemoryBroker, value: int
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(ValueError, match=r"message_expiry is .* from 0 to 4294967295"):
            await driver.publish("t", b"x", message_expiry=value)


# -- a full outbox ----------------------------------------------------------------------------------------------------


async def test_a_full_outbox_makes_publish_wait_fail_or_drop(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    config = memory_config(broker, outbox_messages=2, outbox_full="fail")
    async with MQTTDriver(config) as driver:
        await cut(broker)
        driver.publish_nowait("t", b"1", qos=1)
        driver.publish_nowait("t", b"2", qos=1)
        with pytest.raises(OutboxFullError, match="outbox_messages=2"):
            await driver.publish("t", b"3", qos=1)
        assert driver.status().counters["outbox_refused"] == 1
        broker.start()
        await driver.wait_live()
    assert arrived(broker) == [b"1", b"2"]


async def test_dropping_the_oldest_tells_their_receipts_and_counts(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    config = memory_config(broker, outbox_messages=3, outbox_full="drop_oldest")
    async with MQTTDriver(config) as driver:
        await cut(broker)
        important = driver.publish_nowait("t", b"important", qos=1, priority=1)
        receipts = [driver.publish_nowait("t", str(number), qos=1) for number in range(5)]
        for receipt in receipts[:3]:
            with pytest.raises(MessageDroppedError, match="'t' was dropped for newer messages"):
                await receipt.wait()
        assert (await driver.publish("t", b"5", qos=1, offline="queue")).queued
        with pytest.raises(OutboxFullError):
            driver.publish_nowait("t", b"unimportant", qos=1, priority=-1)
        assert not important.done
        counters = driver.status().counters
        assert (counters["outbox_dropped"], counters["outbox_refused"]) == (4, 1)
        broker.start()
        await driver.wait_live()
        await driver.drain()
    assert arrived(broker) == [b"important", b"4", b"5"]


async def test_what_is_on_the_wire_is_not_dropped(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    config = memory_config(broker, outbox_messages=1, outbox_full="drop_oldest")
    async with MQTTDriver(config) as driver, trio.open_nursery() as nursery:
        with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN) as held:
            sent = driver.publish_nowait("t", b"sent", qos=1)
            with pytest.raises(OutboxFullError):
                driver.publish_nowait("t", b"no room", qos=1)
            nursery.start_soon(driver.publish, "t", b"waits")  # QoS 0 does not need the outbox
            await settled()
            held.release()
            await sent.wait()
    assert arrived(broker) == [b"sent", b"waits"]


# -- priority and pace ------------------------------------------------------------------------------------------------


async def test_a_higher_priority_goes_first_and_each_has_an_order_of_its_own(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        await cut(broker)
        for number, priority in enumerate((0, 5, -10, 0, 10, 5)):
            driver.publish_nowait("t", str(number), qos=1, priority=priority)
        assert [message.payload for message in driver.undelivered] == [b"4", b"1", b"5", b"0", b"3", b"2"]
        broker.start()
        await driver.wait_live()
    assert arrived(broker) == [b"4", b"1", b"5", b"0", b"3", b"2"]


@pytest.mark.parametrize("value", [11, -11, 1.5, "high", True])
async def test_a_priority_out_of_its_range_is_refused(
    autojump_clock: MockClock, broker: MemoryBroker, value: int
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(ValueError, match=r"priority is .*, allowed are whole numbers from -10 to 10"):
            driver.publish_nowait("t", b"x", priority=value)


@pytest.mark.parametrize("qos", [0, 1])
async def test_refill_rate_paces_what_has_waited_and_nothing_else(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int
) -> None:
    async with MQTTDriver(memory_config(broker, refill_rate=10)) as driver:
        await cut(broker)
        receipts = [driver.publish_nowait("t", str(number), qos=qos) for number in range(51)]
        broker.start()
        await driver.wait_live()
        begin = trio.current_time()
        await trio.sleep(2.05)
        assert len(arrived(broker)) in (21, 22)
        for receipt in receipts:
            await receipt.wait()
        assert trio.current_time() - begin == pytest.approx(5, abs=0.2)
        begin = trio.current_time()
        for number in range(51):
            await driver.publish("u", str(number), qos=1)
        assert trio.current_time() == begin
    assert arrived(broker) == [b"%d" % number for number in range(51)]


async def test_without_a_rate_the_window_sets_the_pace(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, in_flight=7)) as driver:
        assert driver.config.refill_rate == math.inf
        await cut(broker)
        receipts = [driver.publish_nowait("t", str(number), qos=1) for number in range(50)]
        most = 0
        with broker.faults.hold(Kind.PUBACK) as held:
            broker.start()
            await broker.wait_for_client()
            held.release()
        while not receipts[-1].done:
            most = max(most, driver.status().in_flight)
            await trio.lowlevel.checkpoint()
        assert 1 <= most <= 7
    assert len(arrived(broker)) == 50


# -- the wait and the delivery ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["wait", "queue", "latest"])
async def test_cancelling_the_wait_does_not_cancel_the_delivery(
    autojump_clock: MockClock, broker: MemoryBroker, policy: OfflinePolicy
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN) as held:
            with trio.move_on_after(1) as scope:
                await driver.publish("t", b"x", qos=1, offline=policy)
            assert scope.cancelled_caught
            held.release()
        assert await driver.drain() == ()
    assert arrived(broker) == [b"x"]


async def test_a_publish_that_is_overdue_in_the_outbox_is_given_up(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, publish_timeout=5)) as driver:
        await cut(broker)
        with pytest.raises(PublishTimeoutError, match=r"generation 1, no connection, 1 queued, 0 in flight"):
            await driver.publish("t", b"x", qos=1)
        assert (await driver.publish("t", b"y", qos=1, offline="queue")).queued
        assert driver.status().counters["overdue"] == 1
        broker.start()
        await driver.wait_live()
    assert arrived(broker) == [b"y"]


async def test_a_refusal_that_nobody_waits_for_is_counted_and_the_first_of_a_connection_is_logged(
    autojump_clock: MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with MQTTDriver(memory_config(broker, offline="queue")) as driver:
        await cut(broker)
        for number in range(3):
            assert (await driver.publish("secret", b"%d" % number, qos=1)).queued
        broker.faults.refuse_publish("secret")
        broker.start()
        await driver.wait_live()
        assert await driver.drain() == ()
        assert driver.status().counters["refused"] == 3
    assert caplog.text.count("the broker refused 'secret': not authorized (0x87)") == 1


async def test_a_message_that_the_broker_rules_out_later_is_counted_too(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    broker = MemoryBroker(nursery, maximum_qos=1)
    async with MQTTDriver(memory_config(broker, offline="queue"), start="background") as driver:
        assert (await driver.publish("t", b"x", qos=2)).queued
        await driver.wait_live()
        await driver.drain()
        assert driver.status().counters["refused"] == 1
    assert "Maximum QoS is 1" in caplog.text
