"""An answer that does not come ends the link at its time, and not when the timer looks the next time anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config, pings
from tests.stable import QUICK, stable_config
from trio_mqtt_driver import BackoffConfig, Message, MQTTDriver, Overflow, State
from trio_mqtt_driver._connection import Connection
from trio_mqtt_driver._deadlines import CLOCKS_EVERY
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

TIMES = [1.3, 7.9]
"""Shorter and longer than the time after which the timer looks in any case, and no multiples of it."""
assert TIMES[0] < CLOCKS_EVERY < TIMES[1]


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


async def failure(driver: MQTTDriver) -> tuple[float, str]:
    """When the present link or attempt ends, and why."""
    with trio.fail_after(100):
        await driver.wait_state(State.BACKING_OFF)
    event = [event for event in driver.status().history if event.error is not None][-1]
    return event.at, str(event.error)


@pytest.mark.parametrize("seconds", TIMES)
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize(
    "lost, option, words",
    [
        (Kind.CONNACK, "connect_timeout", "TransportError: no CONNACK from mqtt://memory:1883 in"),
        (Kind.PUBACK, "probe_timeout", "was not acknowledged within"),
        (Kind.SUBACK, "subscribe_timeout", "AckTimeoutError: SUBSCRIBE was not answered within"),
    ],
)
async def test_on_the_way_back(
    autojump_clock: MockClock,
    broker: MemoryBroker,
    protocol: str,
    lost: Kind,
    option: str,
    words: str,
    seconds: float,
) -> None:
    config = memory_config(broker, protocol=protocol, backoff=BackoffConfig(min_interval=0), **{option: seconds})
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", print)
        await trio.sleep(30.7)
        broker.faults.drop(lost, times=1)
        broker.drop()
        began = trio.current_time()
        await driver.wait_state(State.CONNECTING)
        at, why = await failure(driver)
        assert at == pytest.approx(began + seconds)
        assert words in why
        assert f"{option}={seconds:g} s" in why
        await driver.wait_live()


@pytest.mark.parametrize("seconds", TIMES)
@pytest.mark.parametrize("lost", [Kind.SUBACK, Kind.UNSUBACK])
async def test_on_a_live_link(autojump_clock: MockClock, broker: MemoryBroker, lost: Kind, seconds: float) -> None:
    async with MQTTDriver(memory_config(broker, subscribe_timeout=seconds)) as driver, trio.open_nursery() as nursery:
        subscription = await driver.subscribe("a", print)
        await trio.sleep(30.7)
        broker.faults.drop(lost, times=1)
        began = trio.current_time()
        nursery.start_soon(driver.subscribe, "b", print)
        nursery.start_soon(driver.unsubscribe, subscription)
        at, why = await failure(driver)
        assert at == pytest.approx(began + seconds)
        assert f"was not answered within subscribe_timeout={seconds:g} s" in why


@pytest.mark.parametrize("seconds", TIMES)
async def test_after_reading_has_paused_it_has_all_its_time(
    autojump_clock: MockClock, broker: MemoryBroker, seconds: float
) -> None:
    go_on = trio.Event()

    async def slow(message: Message[bytes]) -> None:
        await go_on.wait()

    config = memory_config(broker, subscribe_timeout=seconds, keep_alive=0)
    async with MQTTDriver(config) as driver, trio.open_nursery() as nursery:
        await driver.subscribe("a", slow, overflow=Overflow.BLOCK, queue_messages=1)
        for _ in range(3):
            broker.publish("a", b"")
        await settled()
        broker.faults.drop(Kind.SUBACK, times=1)
        nursery.start_soon(driver.subscribe, "b", print)
        await trio.sleep(26.4)  # the timer has just looked, see TIMES
        assert driver.generation == 1
        go_on.set()
        began = trio.current_time()
        at, why = await failure(driver)
        assert at == pytest.approx(began + seconds)
        assert "SUBSCRIBE was not answered" in why


async def test_an_acknowledgement_that_is_late_when_the_link_goes_live_is_asked_for_at_once(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """It was sent when the session was taken up, and the test publish behind it took its time."""
    config = stable_config(broker, "5", ack_timeout=1, keep_alive=0, probe_timeout=60)
    async with MQTTDriver(config) as driver:
        broker.faults.drop(Kind.PUBACK, times=2)
        driver.publish_nowait("out", b"", qos=1)
        await settled()
        test_publish = broker.faults.hold(Kind.PUBACK, first=2, times=1)
        broker.drop()
        await driver.wait_state(State.VALIDATING)
        began = trio.current_time()
        await trio.sleep(3.2)
        assert not pings(broker)
        test_publish.remove()
        await driver.wait_live()
        await settled()
        assert pings(broker) == 1
        assert trio.current_time() == pytest.approx(began + 3.2)


class Busy(trio.abc.Instrument):
    """The process has something else to do for two seconds, as soon as the reader has taken in what is waited for."""

    def __init__(self, clock: MockClock) -> None:
        self.waits: Callable[[], int] | None = None
        self._clock = clock

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.waits is not None and not self.waits() and task.name.endswith("_loop_read"):
            self.waits = None
            self._clock.jump(2)


@pytest.mark.parametrize("held, state", [(Kind.PUBACK, State.VALIDATING), (Kind.SUBACK, State.REPLAYING)])
async def test_an_answer_that_is_there_is_not_late_because_nobody_came_to_take_it(
    autojump_clock: MockClock, broker: MemoryBroker, held: Kind, state: State
) -> None:
    """Whoever waits for it is woken in the same turn as the timer."""
    busy = Busy(autojump_clock)
    trio.lowlevel.add_instrument(busy)
    config = memory_config(broker, subscribe_timeout=5, probe_timeout=5, keep_alive=0, backoff=QUICK)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", print)
        for _ in range(20):  # the order in a turn is random
            with broker.faults.hold(held):
                broker.drop()
                await driver.wait_state(state)
                began = trio.current_time()
                await trio.sleep(4)
                connection = driver._supervisor.connection
                assert connection is not None
                busy.waits = partial(waits, connection)
                assert busy.waits()
            await driver.wait_live()
            assert trio.current_time() == began + 6
        assert driver.status().counters["failures"] == 0
    trio.lowlevel.remove_instrument(busy)


def waits(connection: Connection) -> int:
    """How many answers are not there."""
    return connection.sender.in_flight + connection.requests.unanswered
