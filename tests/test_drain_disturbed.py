"""Leaving a driver when things go wrong: the link is lost meanwhile, or there is none; the body did not just end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.drains import KINDS, Maker, Worker, answered, left_behind, sent
from trio_mqtt_driver import (
    BackoffConfig,
    DriverClosedError,
    Message,
    MessageLostError,
    MQTTDriver,
    Receipt,
    RefusedError,
    State,
)
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

Act = Callable[[MQTTDriver, MemoryBroker], object]


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=KINDS)
def make_config(request: pytest.FixtureRequest, broker: MemoryBroker) -> Maker:
    return Maker(broker, *request.param)


# -- the link is lost meanwhile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_link_that_is_back_in_time_brings_what_was_published(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery, qos: int
) -> None:
    async def outage() -> None:
        await trio.sleep(1)
        broker.stop()
        hold.remove()
        await trio.sleep(20)
        broker.start()

    async with MQTTDriver(make_config(ack_timeout=math.inf)) as driver:
        hold = broker.faults.hold(Kind.PUBACK if qos == 1 else Kind.PUBREC)
        receipts = [driver.publish_nowait("out", str(number), qos=qos) for number in range(3)]
        nursery.start_soon(outage)
    assert 21 < trio.current_time() < 100
    for receipt in receipts:
        assert (await receipt.wait()).attempts == 2
    assert sent(broker, "out")[-3:] == [b"0", b"1", b"2"]
    assert (driver.undelivered, left_behind(driver)) == ((), [])
    assert not broker.violations


async def test_handlers_go_on_when_the_link_is_lost_and_publish_when_it_is_back(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    """What they have belongs to the old connection; what the new one brings is not taken."""
    worker = Worker(2)

    async def forward(message: Message[bytes]) -> None:
        await worker(message)
        await driver.publish("out", message.payload, qos=1)

    async def outage() -> None:
        await trio.sleep(1)
        broker.stop()
        await trio.sleep(10)
        broker.start()

    broker.publish("in", b"retained", retain=True, qos=1)
    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", forward, qos=1)
        broker.publish("in", b"x", qos=1)
        await settled()
        nursery.start_soon(outage)
    assert driver.generation == 2
    assert worker.done == [b"retained", b"x"]
    assert sent(broker, "out") == [b"retained", b"x"]
    assert driver.status().counters["stale_acknowledgements"] == 2
    assert left_behind(driver) == []
    assert answered(broker) == 0


async def test_a_link_that_is_not_back_in_time_is_not_waited_for_any_longer(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    async def outage() -> None:
        await trio.sleep(1)
        broker.stop()

    async with MQTTDriver(make_config(drain_timeout=30, ack_timeout=math.inf)) as driver:
        broker.faults.hold(Kind.PUBACK)
        receipt = driver.publish_nowait("out", b"x", qos=1)
        nursery.start_soon(outage)
    assert trio.current_time() == 30
    with pytest.raises(MessageLostError):
        await receipt.wait()
    (one,) = driver.undelivered
    assert (one.topic, one.payload, one.attempts) == ("out", b"x", 1)
    assert left_behind(driver) == ["1 published and not acknowledged, 0 received and not processed"]


async def test_reconnecting_on_purpose_while_the_driver_is_left(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async def handler(message: Message[bytes]) -> None:
        await trio.sleep(1)
        driver.force_reconnect(even_if_live=True)
        await driver.publish("out", qos=1)

    async with MQTTDriver(make_config()) as driver:
        await driver.subscribe("in", handler, qos=1)
        broker.publish("in", b"x", qos=1)
        await settled()
    assert driver.generation == 2
    assert sent(broker, "out") == [b""]
    assert left_behind(driver) == []
    assert not broker.violations


async def test_a_pause_while_the_driver_is_left_is_bounded_by_the_drain_timeout(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    async def handler(message: Message[bytes]) -> None:
        await trio.sleep(1)
        driver.pause()
        await trio.sleep(1)
        driver.publish_nowait("out", qos=1)

    async with MQTTDriver(make_config(drain_timeout=10)) as driver:
        await driver.subscribe("in", handler, qos=1)
        broker.publish("in", b"x", qos=1)
        await settled()
    assert trio.current_time() == 10
    assert left_behind(driver) == ["1 published and not acknowledged, 0 received and not processed"]


# -- there is none ----------------------------------------------------------------------------------------------------


def pause(driver: MQTTDriver, broker: MemoryBroker) -> None:
    driver.pause()


def go_down(driver: MQTTDriver, broker: MemoryBroker) -> None:
    broker.stop()


def fall_silent(driver: MQTTDriver, broker: MemoryBroker) -> None:
    """New connections are made and never answered."""
    broker.faults.drop(Kind.CONNECT)
    broker.drop()


@pytest.mark.parametrize(
    "act, states",
    [
        (pause, {State.PAUSED}),
        (go_down, {State.BACKING_OFF, State.PAUSED}),
        (fall_silent, {State.CONNECTING}),
    ],
)
async def test_without_a_link_nobody_is_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, act: Act, states: set[State]
) -> None:
    worker = Worker(100)
    # An attempt that hangs is given up at once, too.
    config = make_config(backoff=BackoffConfig(min_interval=0, start=0.01, maximum=1), connect_timeout=1000)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", worker, qos=1)
        for _ in range(2):
            broker.publish("in", b"x", qos=1)
        await settled()
        act(driver, broker)
        await trio.sleep(10.5)
        assert driver.state in states
        driver.publish_nowait("out", qos=1)
        left_at = trio.current_time()
    assert trio.current_time() == left_at
    assert [one.attempts for one in driver.undelivered] == [0]
    assert left_behind(driver) == ["1 published and not acknowledged, 2 received and not processed"]
    assert worker.done == []


@pytest.mark.parametrize("kind", [Kind.CONNACK, Kind.PUBACK, Kind.SUBACK])
async def test_a_link_that_is_coming_up_is_not_waited_for(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery, kind: Kind
) -> None:
    async def subscribe() -> None:
        with pytest.raises(DriverClosedError):
            await driver.subscribe("in", print)

    hold = broker.faults.hold(kind)
    config = make_config(connect_timeout=50, disconnect_timeout=50)
    async with MQTTDriver(config, start="background") as driver:
        nursery.start_soon(subscribe)
        driver.publish_nowait("out", qos=1)
        await broker.wait_for(lambda: hold.held, "held packet")
        await settled()
        assert driver.state in (State.CONNECTING, State.VALIDATING, State.REPLAYING)
    assert trio.current_time() == 0
    assert [(one.topic, one.attempts) for one in driver.undelivered] == [("out", 0)]
    assert left_behind(driver) == ["1 published and not acknowledged, 0 received and not processed"]


# -- how the body ended -----------------------------------------------------------------------------------------------


class Job:
    """In the body: something to finish, out and in. At the end it must be done."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.receipt: Receipt | None = None
        self._broker = broker
        self._worker = Worker(3)

    async def begin(self, driver: MQTTDriver) -> None:
        await driver.subscribe("in", self._worker, qos=1)
        self._broker.publish("in", b"x", qos=1)
        await settled()
        assert self._worker.begun
        with self._broker.faults.hold(Kind.PUBACK):  # They are sent when the body has ended.
            self.receipt = driver.publish_nowait("out", qos=1)
            await settled()

    def check(self, driver: MQTTDriver) -> None:
        assert self.receipt is not None
        assert self.receipt.done
        assert (driver.undelivered, left_behind(driver)) == ((), [])
        assert self._worker.done == [b"x"]
        assert answered(self._broker) == 1
        assert trio.current_time() == 3


async def test_after_a_cancellation(autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker) -> None:
    job = Job(broker)
    driver = MQTTDriver(make_config())
    with trio.CancelScope() as scope:
        async with driver:
            await job.begin(driver)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    job.check(driver)


async def test_after_a_cancellation_while_it_is_being_left(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    job = Job(broker)
    driver = MQTTDriver(make_config())
    with trio.move_on_after(1) as scope:
        async with driver:
            await job.begin(driver)
    assert not scope.cancelled_caught  # there was nothing left to cancel
    job.check(driver)


async def test_after_an_exception(autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker) -> None:
    job = Job(broker)
    driver = MQTTDriver(make_config())
    with pytest.raises(ValueError, match="of the body"):  # noqa: PT012  # the end is under test
        async with driver:
            await job.begin(driver)
            raise ValueError("of the body")
    job.check(driver)


async def test_after_ctrl_c_in_the_body(autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker) -> None:
    job = Job(broker)
    driver = MQTTDriver(make_config())
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the end is under test
        async with driver:
            await job.begin(driver)
            raise KeyboardInterrupt
    job.check(driver)


async def test_a_second_ctrl_c_ends_the_wait(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker, nursery: trio.Nursery
) -> None:
    task = trio.lowlevel.current_task()

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    async def press() -> None:
        await trio.sleep(1)
        task._attempt_abort(interrupt)  # as Trio does to a main task that is blocked

    driver = MQTTDriver(make_config())
    job = Job(broker)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the end is under test
        async with driver:
            await job.begin(driver)
            broker.faults.hold(Kind.PUBACK)
            driver.publish_nowait("lost", qos=1)
            nursery.start_soon(press)
    assert trio.current_time() == 1
    assert [one.topic for one in driver.undelivered] == ["lost"]
    await settled()
    assert not broker.clients


@pytest.mark.parametrize("how", ["cancelled", "returns"])
async def test_a_refusal_for_good_leaves_everything_behind(
    autojump_clock: MockClock,
    broker: MemoryBroker,
    make_config: Maker,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    worker = Worker(100)
    driver = MQTTDriver(make_config())
    receipts: list[Receipt] = []
    with pytest.raises(RefusedError):  # noqa: PT012  # the end is under test
        async with driver:
            await driver.subscribe("in", worker, qos=1)
            broker.publish("in", b"x", qos=1)
            await settled()
            broker.faults.hold(Kind.PUBACK)
            receipts += [driver.publish_nowait("out", str(number), qos=1) for number in range(2)]
            await settled()
            broker.faults.refuse_connect(0x87)
            broker.drop()
            await driver.wait_state(State.BACKING_OFF)
            if how == "cancelled":
                await trio.sleep_forever()
            with trio.CancelScope(shield=True), pytest.raises(RefusedError):
                await driver.wait_live()
    assert trio.current_time() < 10
    assert [(one.payload, one.attempts) for one in driver.undelivered] == [(b"0", 1), (b"1", 1)]
    for receipt in receipts:
        with pytest.raises(MessageLostError):
            await receipt.wait()
    assert worker.done == []
    assert left_behind(driver) == ["2 published and not acknowledged, 1 received and not processed"]
    assert "left behind: 2 published" in caplog.text


async def test_a_handlers_exception_that_ends_the_driver_is_not_drained(
    autojump_clock: MockClock, broker: MemoryBroker, make_config: Maker
) -> None:
    def fail(message: Message[bytes]) -> None:
        raise ValueError("of the handler")

    worker = Worker(3)
    driver = MQTTDriver(make_config(on_handler_error="raise"))
    with pytest.raises(ValueError, match="of the handler"):  # noqa: PT012  # the end is under test
        async with driver:
            await driver.subscribe("in", worker, qos=1)
            await driver.subscribe("bad", fail, qos=1)
            broker.publish("in", b"x", qos=1)
            await settled()
            broker.publish("bad", qos=1)
            await trio.sleep_forever()
    assert trio.current_time() == 0
    assert worker.done == []
    assert left_behind(driver) == ["0 published and not acknowledged, 2 received and not processed"]
