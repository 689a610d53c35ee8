"""A machine that was suspended: the wall clock went on, Trio's did not. A link that answers stays all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config, pings
from trio_mqtt_driver import DriverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


class Machine:
    """Its wall clock, which goes on while it is suspended."""

    def __init__(self) -> None:
        self._slept = 0.0

    def wall_clock(self) -> float:
        return 1_700_000_000 + self._slept + trio.current_time()

    def suspend(self, seconds: float) -> None:
        self._slept += seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def config_for(broker: MemoryBroker, machine: Machine, **options: Any) -> DriverConfig:
    return memory_config(broker, wall_clock=machine.wall_clock, **options)


def clock_events(driver: MQTTDriver) -> list[str]:
    return [event.text for event in driver.status().history if event.kind == "clock"]


async def check_named_and_healed(
    driver: MQTTDriver, broker: MemoryBroker, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    """The suspension is in status, history and log; the way back is that of every loss."""
    error = "SuspendedError: the machine was suspended for about 600 s: "
    status = driver.status()
    assert str(status.last_error).startswith(error)
    assert words in str(status.last_error)
    assert [event.kind for event in status.history if event.error is not None] == [State.BACKING_OFF.value]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warnings if error in line]) == 1
    with trio.fail_after(60):
        await driver.wait_live()
        await broker.wait_for_subscription("in")
        assert (await driver.publish("out", qos=1)).generation == 2
    await trio.sleep(100)
    assert driver.generation == 2
    assert not clock_events(driver)


async def test_a_link_that_outlived_the_suspension_stays_and_the_jump_is_told(
    broker: MemoryBroker, machine: Machine, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO)
    async with MQTTDriver(config_for(broker, machine)) as driver:
        await trio.sleep(100)
        broker.forget()
        machine.suspend(600)
        await trio.sleep(5.1)
        assert pings(broker) == 1
        assert driver.state is State.LIVE
        assert [text.split(":")[0] for text in clock_events(driver)] == ["the wall clock jumped ahead by 600 s"]
        assert caplog.text.count("jumped ahead by 600 s") == 1
        await trio.sleep(100)
        broker.drop()
        await settled()
        assert str(driver.status().last_error) == "ConnectionLostError: the broker closed the connection"


async def test_a_link_that_does_not_answer_after_the_suspension_is_replaced(
    broker: MemoryBroker, machine: Machine, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, machine)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        machine.suspend(600)
        broker.silence()
        await trio.sleep(10.1)
        await check_named_and_healed(driver, broker, caplog, "no answer to PINGREQ within 5 s")


def eof(broker: MemoryBroker, dialer: Dialer) -> None:
    broker.drop()


def reset(broker: MemoryBroker, dialer: Dialer) -> None:
    broker.drop(reset=True)


def disconnect(broker: MemoryBroker, dialer: Dialer) -> None:
    broker.disconnect(reason_code=0x8D)


@pytest.mark.parametrize(
    "seen, words",
    [
        (eof, "the broker closed the connection"),
        (reset, "reset by peer"),
        (disconnect, "keep alive timeout (0x8d)"),
    ],
)
@pytest.mark.parametrize("later", [0, 3])
async def test_what_ends_the_link_after_the_suspension_is_named_after_it(
    broker: MemoryBroker,
    dialer: Dialer,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    seen: Callable[[MemoryBroker, Dialer], None],
    words: str,
    later: float,
    autojump_clock: MockClock,
) -> None:
    """However soon it is seen: before the clocks were looked at, or while the answer is waited for."""
    async with MQTTDriver(config_for(broker, machine)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(103)
        machine.suspend(600)
        with broker.faults.drop(Kind.PINGRESP):
            await trio.sleep(later)
            seen(broker, dialer)
            await settled()
        await check_named_and_healed(driver, broker, caplog, words)


async def test_a_write_that_fails_after_the_suspension_is_named_after_it(
    broker: MemoryBroker,
    dialer: Dialer,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    async with MQTTDriver(config_for(broker, machine, open_stream=dialer)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        machine.suspend(600)
        dialer.streams[0].broken = trio.BrokenResourceError("the network is down")
        await trio.sleep(6)
        await check_named_and_healed(driver, broker, caplog, "the network is down")


async def test_a_publish_of_a_suspended_machine_arrives_on_the_next_link(
    broker: MemoryBroker, machine: Machine, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, machine)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        broker.silence()
        receipt = driver.publish_nowait("out", b"precious", qos=1)
        await trio.sleep(3)  # so that the clocks are next compared when the acknowledgement is late
        machine.suspend(600)
        assert (await receipt.wait()).generation == 2
        await check_named_and_healed(driver, broker, caplog, "no acknowledgement within ack_timeout=5 s")


@pytest.mark.parametrize(
    "seen, name",
    [
        (lambda broker: broker.disconnect(reason_code=0x8E), "ServerDisconnectedError"),
        (lambda broker: broker.send(broker.clients[0], b"\xc0\x00"), "ProtocolError"),
    ],
)
async def test_a_reason_of_its_own_is_not_hidden_by_the_suspension(
    broker: MemoryBroker,
    machine: Machine,
    seen: Callable[[MemoryBroker], None],
    name: str,
    autojump_clock: MockClock,
) -> None:
    async with MQTTDriver(config_for(broker, machine)) as driver:
        await trio.sleep(100)
        machine.suspend(600)
        seen(broker)
        await settled()
        assert str(driver.status().last_error).startswith(f"{name}: ")


async def test_a_clock_that_is_set_back_says_nothing(
    broker: MemoryBroker, machine: Machine, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, machine)) as driver:
        await trio.sleep(100)
        broker.forget()
        machine.suspend(-86_400)
        await trio.sleep(10)
        assert pings(broker) == 0
        broker.drop()
        await settled()
        assert "SuspendedError" not in str(driver.status().last_error)


@pytest.mark.parametrize("keep_alive, unnoticed", [(30, 45), (0, 60)])
async def test_a_nap_is_no_suspension(
    broker: MemoryBroker, machine: Machine, keep_alive: int, unnoticed: float, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, machine, keep_alive=keep_alive)) as driver:
        await trio.sleep(100)
        machine.suspend(unnoticed - 1)
        await trio.sleep(10)
        assert not clock_events(driver)
        machine.suspend(unnoticed + 1)
        await trio.sleep(10)
        assert len(clock_events(driver)) == 1
        assert driver.generation == 1


async def test_suspended_in_the_middle_of_an_attempt(
    broker: MemoryBroker, machine: Machine, autojump_clock: MockClock
) -> None:
    """It is no sign of a broker that does not know MQTT 5, and the next attempt comes as after any other failure."""
    with broker.faults.hold(Kind.CONNACK, times=1) as hold:
        async with MQTTDriver(config_for(broker, machine), start="background") as driver:
            await broker.wait_for(lambda: hold.held, "CONNECT")
            machine.suspend(600)
            broker.drop()
            await settled()
            status = driver.status()
            assert status.state is State.BACKING_OFF
            assert str(status.last_error).startswith("SuspendedError: the machine was suspended for about 600 s: ")
            with trio.fail_after(10):
                await driver.wait_live()
            assert driver.status().protocol == "5"


async def test_a_link_that_went_live_after_a_suspension_in_the_middle_stays(
    broker: MemoryBroker, machine: Machine, autojump_clock: MockClock
) -> None:
    with broker.faults.hold(Kind.CONNACK, times=1) as hold:
        async with MQTTDriver(config_for(broker, machine), start="background") as driver:
            await broker.wait_for(lambda: hold.held, "CONNECT")
            machine.suspend(600)
            await trio.sleep(6)
            hold.release()
            await driver.wait_live()
            await trio.sleep(100)
            assert driver.generation == 1
            assert len(clock_events(driver)) == 1


async def test_a_suspension_during_the_back_off_needs_nothing(
    broker: MemoryBroker, dialer: Dialer, machine: Machine, autojump_clock: MockClock
) -> None:
    """Its waits are short and go on with Trio's clock: the next attempt is as far away as before."""
    async with MQTTDriver(config_for(broker, machine, open_stream=dialer)) as driver:
        await trio.sleep(100)
        broker.stop()
        await trio.sleep(300)
        planned = driver.status().next_attempt_in
        assert planned is not None
        due = trio.current_time() + planned
        machine.suspend(8 * 3600)
        broker.start()
        with trio.fail_after(31):
            await driver.wait_live()
        assert dialer.attempts[-1] == pytest.approx(due)
        assert "SuspendedError" not in str(driver.status().last_error)
