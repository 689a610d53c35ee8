"""``drain()`` and ``undelivered``: what was published and is not acknowledged, in the body and at the end."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.drains import KINDS, Maker, left_behind, sent
from trio_mqtt_driver import (
    DriverClosedError,
    Event,
    Message,
    MessageLostError,
    MQTTDriver,
    PublishProperties,
    PublishTimeoutError,
    State,
    Undelivered,
)
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=KINDS)
def make_config(request: pytest.FixtureRequest, broker: MemoryBroker) -> Maker:
    return Maker(broker, *request.param)


# -- drain() ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_drain_waits_for_what_was_published_and_the_driver_goes_on(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, qos: int
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload), qos=1)
        with trio.testing.assert_checkpoints():
            assert await driver.drain() == ()
        receipts = [driver.publish_nowait("out", str(number), qos=qos) for number in range(3)]
        assert await driver.drain() == ()
        assert all(receipt.done for receipt in receipts)
        assert trio.current_time() == 0
        broker.publish("in", b"x", qos=1)
        await driver.publish("out", b"3", qos=qos)
        await settled()
        assert got == [b"x"]
    assert sent(broker, "out") == [b"0", b"1", b"2", b"3"]


async def test_drain_returns_after_drain_timeout_what_is_not_acknowledged(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async with MQTTDriver(make_config(drain_timeout=8, ack_timeout=math.inf)) as driver:
        hold = broker.faults.hold(Kind.PUBACK, first=2)
        driver.publish_nowait("out", b"0", qos=1)
        driver.publish_nowait("out", b"1", qos=1)
        (one,) = await driver.drain()
        assert trio.current_time() == 8
        assert one == Undelivered(
            topic="out", payload=b"1", qos=1, retain=False, properties=PublishProperties(), attempts=1
        )
        assert driver.undelivered == (one,)
        hold.remove()
        assert await driver.drain() == ()
    assert trio.current_time() == 8


async def test_drain_waits_an_outage_out(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    async def restart() -> None:
        await trio.sleep(20)
        broker.start()

    async with MQTTDriver(make_config()) as driver:
        broker.stop()
        await driver.wait_state(State.BACKING_OFF)
        driver.publish_nowait("out", b"0")
        driver.publish_nowait("out", b"1", qos=1)
        nursery.start_soon(restart)
        assert await driver.drain() == ()
        assert trio.current_time() > 20
        assert driver.generation == 2
    assert sent(broker, "out") == [b"0", b"1"]


async def test_drain_does_not_wait_for_what_is_published_after_it_was_called(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    async def chatter() -> None:
        for _ in range(10):
            driver.publish_nowait("chatter", qos=1)
            hold.release()
            await trio.sleep(1)

    async with MQTTDriver(make_config(ack_timeout=math.inf)) as driver:
        hold = broker.faults.hold(Kind.PUBACK)
        nursery.start_soon(chatter)
        await trio.sleep(2.5)
        assert await driver.drain() == ()
        assert trio.current_time() == 3
        assert len(driver.undelivered) == 1
        hold.remove()
        await trio.sleep(10)


async def test_drain_does_not_wait_for_what_was_given_up(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    """``publish()`` said so. On the wire or not, it is not waited for."""
    async with MQTTDriver(make_config(publish_timeout=3, ack_timeout=math.inf)) as driver:
        broker.faults.hold(Kind.PUBACK, times=1)
        with pytest.raises(PublishTimeoutError):
            await driver.publish("out", qos=1)
        assert (await driver.drain(), driver.undelivered) == ((), ())
    assert trio.current_time() == 3


async def test_drain_can_be_cancelled_and_called_by_several(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    left: list[tuple[Undelivered, ...]] = []

    async def drain() -> None:
        left.append(await driver.drain())

    async with MQTTDriver(make_config(ack_timeout=math.inf)) as driver:
        hold = broker.faults.hold(Kind.PUBACK)
        receipt = driver.publish_nowait("out", qos=1)
        with trio.move_on_after(1) as scope:
            await driver.drain()
        assert scope.cancelled_caught
        assert not receipt.done
        nursery.start_soon(drain)
        nursery.start_soon(drain)
        await settled()
        assert left == []
        hold.remove()
        await settled()
        assert left == [(), ()]
        with trio.CancelScope() as scope:
            scope.cancel()
            await driver.drain()
        assert scope.cancelled_caught
    assert trio.current_time() == 1


async def test_drain_needs_a_driver_that_is_entered(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    driver = MQTTDriver(make_config())
    with pytest.raises(DriverClosedError, match="not entered"):
        await driver.drain()
    async with driver:
        pass
    with pytest.raises(DriverClosedError, match="was left"):
        await driver.drain()


async def test_drain_ends_with_the_driver(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    left: list[tuple[Undelivered, ...]] = []

    async def drain() -> None:
        left.append(await driver.drain())

    async with MQTTDriver(make_config(drain_timeout=5, ack_timeout=math.inf)) as driver:
        broker.faults.hold(Kind.PUBACK)
        driver.publish_nowait("out", qos=1)
        await driver.drain()
        nursery.start_soon(drain)
        driver.pause()
        await settled()
        driver.publish_nowait("late", qos=1)
    await settled()
    assert trio.current_time() == 5
    assert [one.topic for one in left[0]] == ["out"]
    assert [one.topic for one in driver.undelivered] == ["out", "late"]


async def test_a_handler_may_drain_also_while_the_driver_is_left(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async def handler(message: Message[bytes]) -> None:
        await trio.sleep(1)
        driver.publish_nowait("out", qos=2)
        assert await driver.drain() == ()
        done.append(message.payload)

    done: list[bytes] = []
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", handler, qos=1)
        broker.publish("in", b"x", qos=1)
        await settled()
    assert done == [b"x"]
    assert trio.current_time() == 1


# -- undelivered ------------------------------------------------------------------------------------------------------


async def test_undelivered_tells_everything_in_order_with_its_properties(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    """What is on the wire comes first: it was published first."""
    properties = PublishProperties(
        content_type="text/plain",
        response_topic="answers",
        correlation_data=b"7",
        message_expiry=60,
        user_properties=(("a", "b"), ("a", "c")),
    )
    async with MQTTDriver(make_config(in_flight=2, ack_timeout=math.inf)) as driver:
        broker.faults.hold(Kind.PUBACK)
        broker.faults.hold(Kind.PUBREC)
        driver.publish_nowait("out", b"0", qos=1)
        driver.publish_nowait("out", b"1", qos=2)
        driver.publish_nowait("out", b"2", qos=1, retain=True)
        driver.publish_nowait(
            "out",
            b"3",
            qos=1,
            content_type="text/plain",
            response_topic="answers",
            correlation_data=b"7",
            message_expiry=60,
            user_properties=[("a", "b"), ("a", "c")],
        )
        await settled()
        expected = [(b"0", 1, 1), (b"1", 2, 1), (b"2", 1, 0), (b"3", 1, 0)]
        assert [(one.payload, one.qos, one.attempts) for one in driver.undelivered] == expected
        broker.stop()
        await driver.wait_state(State.BACKING_OFF)
        driver.publish_nowait("out", b"4")
        expected.append((b"4", 0, 0))
        during = driver.undelivered
        assert [(one.payload, one.qos, one.attempts) for one in during] == expected
        assert [one.retain for one in during] == [False, False, True, False, False]
        assert [one.properties for one in during] == [PublishProperties()] * 3 + [properties, PublishProperties()]
    assert driver.undelivered == during
    assert left_behind(driver) == ["5 published and not acknowledged, 0 received and not processed"]


async def test_attempts_count_the_connections_that_carried_it(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async with MQTTDriver(make_config(ack_timeout=math.inf, probe="ping")) as driver:
        broker.faults.hold(Kind.PUBACK)
        receipt = driver.publish_nowait("out", b"0", qos=1)
        for connections in (1, 2, 3):
            await driver.wait_live()
            await settled()
            assert [one.attempts for one in driver.undelivered] == [connections]
            broker.drop()
            await driver.wait_state(State.BACKING_OFF)
        broker.stop()
    assert [one.attempts for one in driver.undelivered] == [3]
    with pytest.raises(MessageLostError):
        await receipt.wait()


async def test_what_is_left_behind_is_an_event_before_the_driver_closes(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    events: list[Event] = []
    driver = MQTTDriver(make_config(drain_timeout=5))
    stream = driver.events()

    async def listen() -> None:
        async for event in stream:
            events.append(event)  # noqa: PERF401  # the rest of an endless loop would be lost with an exception

    nursery.start_soon(listen)
    async with driver:
        broker.faults.hold(Kind.PUBACK)
        driver.publish_nowait("out", qos=1)
    await settled()
    kinds = [event.kind for event in events]
    assert kinds[kinds.index("left behind") :] == ["left behind", "closing", "closed"]
    assert [event.at for event in events if event.kind == "left behind"] == [5]


async def test_publishes_that_wait_for_room_are_told_and_are_not_among_the_undelivered(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    """They were never accepted."""
    outcomes: list[type[Exception]] = []

    async def publish() -> None:
        try:
            await driver.publish("out", qos=1)
        except (DriverClosedError, MessageLostError) as exc:
            outcomes.append(type(exc))

    async with MQTTDriver(make_config(outbox_messages=2, drain_timeout=5, ack_timeout=math.inf)) as driver:
        broker.faults.hold(Kind.PUBACK)
        for _ in range(4):
            nursery.start_soon(publish)
        await settled()
    await settled()
    assert sorted(one.__name__ for one in outcomes) == ["DriverClosedError"] * 2 + ["MessageLostError"] * 2
    assert len(driver.undelivered) == 2
