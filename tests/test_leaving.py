"""Leaving a driver: what a ``finally:`` can still do, how long it may take, and that the broker is told goodbye."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.goodbye import check_goodbye, config_for, count_tasks
from trio_mqtt_driver import (
    DriverClosedError,
    DriverConfig,
    Endpoint,
    Message,
    MessageLostError,
    MQTTDriver,
    RefusedError,
    State,
)
from trio_mqtt_driver.testing import Disconnect, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.mark.parametrize("how", ["normal", "error", "cancelled", "handler"])
async def test_a_finally_in_the_body_can_still_publish(
    broker: MemoryBroker, how: str, autojump_clock: MockClock
) -> None:
    def handler(message: Message[bytes]) -> None:
        raise ValueError(message)

    try:
        with trio.move_on_after(1):
            async with MQTTDriver(config_for(broker, on_handler_error="raise")) as driver:
                await driver.subscribe("in", handler)
                try:
                    if how == "error":
                        raise ValueError
                    if how == "handler":
                        broker.publish("in")
                    if how != "normal":
                        await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await driver.publish("last", b"words", qos=2)
    except ValueError:
        assert how in ("error", "handler")
    assert "last" in [message.topic for message in broker.published]
    check_goodbye(broker)


async def test_a_finally_that_publishes_after_a_refusal_for_good_is_told_and_does_not_hang(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    told = False
    with pytest.raises(RefusedError):  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker)) as driver:
            subscription = await driver.subscribe("old", print)
            broker.stop()
            await settled()
            receipt = driver.publish_nowait("queued", qos=1)
            broker.start()
            broker.faults.refuse_connect(0x87)
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True), trio.fail_after(5):
                    with pytest.raises(MessageLostError):
                        await receipt.wait()
                    with pytest.raises(DriverClosedError, match="stopped for good"):
                        await driver.publish("last", qos=1)
                    with pytest.raises(DriverClosedError, match="stopped for good"):
                        driver.publish_nowait("last")
                    with pytest.raises(DriverClosedError):
                        await driver.subscribe("in", print)
                    with pytest.raises(DriverClosedError):
                        await driver.unsubscribe(subscription)
                    with pytest.raises(RefusedError):
                        await driver.wait_live()
                    told = True
    assert told


async def test_a_driver_cannot_be_entered_twice(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    driver = MQTTDriver(config_for(broker))
    async with driver:
        with pytest.raises(RuntimeError, match="entered once only"):
            await driver.__aenter__()
    with pytest.raises(RuntimeError, match="entered once only"):
        await driver.__aenter__()
    assert len(broker.connects) == 1


async def test_leaving_twice_does_nothing(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    driver = MQTTDriver(config_for(broker))
    async with driver:
        pass
    assert not await driver.__aexit__(None, None, None)
    check_goodbye(broker)


@pytest.mark.parametrize("how", ["normal", "error", "cancelled"])
async def test_a_dead_broker_does_not_hold_up_the_end(
    broker: MemoryBroker, how: str, autojump_clock: MockClock
) -> None:
    config = config_for(broker, disconnect_timeout=3, drain_timeout=4, ack_timeout=math.inf)
    with trio.move_on_after(1000 if how != "cancelled" else 1) as scope:
        await trio.lowlevel.checkpoint()
        try:
            async with MQTTDriver(config) as driver:
                broker.silence()
                driver.publish_nowait("a", qos=1)
                await trio.sleep(1)
                if how == "error":
                    raise ValueError
        except ValueError:
            assert how == "error"
    assert scope.cancelled_caught is (how == "cancelled")
    assert trio.current_time() == 1 + 4 + 3


@pytest.mark.parametrize("how", ["normal", "error", "cancelled"])
async def test_a_half_open_socket_is_left_like_any_other_link(
    nursery: trio.Nursery, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Over a real one, which is closed without a turn of the scheduler: the loops end in a group of ``Cancelled``."""
    broker = MemoryBroker(nursery)
    endpoint = Endpoint(host="127.0.0.1", port=await broker.listen())
    config = DriverConfig(endpoint=endpoint, client_id="dut", drain_timeout=0.1, disconnect_timeout=0.1)
    with trio.CancelScope() as scope:
        try:
            async with MQTTDriver(config) as driver:
                broker.silence(deaf=True)
                driver.publish_nowait("a", qos=1)
                if how == "error":
                    raise ValueError
                if how == "cancelled":
                    scope.cancel()
                await trio.lowlevel.checkpoint()
        except ValueError:
            assert how == "error"
    assert scope.cancelled_caught is (how == "cancelled")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [Kind.PUBACK, Kind.SUBACK])
@pytest.mark.parametrize("how", ["leave", "reconnect"])
async def test_a_link_that_is_given_up_before_it_is_live_says_goodbye_too(
    broker: MemoryBroker, kind: Kind, how: str, autojump_clock: MockClock
) -> None:
    """The broker has armed the will since CONNACK."""
    with broker.faults.hold(kind, times=1) as hold:
        async with MQTTDriver(config_for(broker), start="background") as driver, trio.open_nursery() as nursery:
            nursery.start_soon(driver.subscribe, "in", print)
            await broker.wait_for(lambda: hold.held, "held packet")
            await settled()
            assert driver.state in (State.VALIDATING, State.REPLAYING)
            if how == "reconnect":
                driver.force_reconnect(even_if_live=True)
                await driver.wait_live()
            nursery.cancel_scope.cancel()
    assert len([1 for _, packet in broker.received if isinstance(packet, Disconnect)]) == len(broker.connects)
    check_goodbye(broker)


async def test_leaving_while_the_link_is_replaced_says_goodbye_on_the_old_one(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        driver.force_reconnect(even_if_live=True)
    check_goodbye(broker)


async def test_a_second_ctrl_c_while_the_driver_is_left_ends_it(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """It hits the task that waits for the broker: nothing may hang, and it is still Ctrl-C."""
    before = count_tasks()
    task = trio.lowlevel.current_task()

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    async def press() -> None:
        await trio.sleep(1)
        task._attempt_abort(interrupt)  # as Trio does to a main task that is blocked

    async with trio.open_nursery() as nursery:
        with pytest.raises(KeyboardInterrupt) as caught:  # noqa: PT012  # the end is under test
            async with MQTTDriver(config_for(broker, disconnect_timeout=100)):
                broker.silence()
                nursery.start_soon(press)
    assert caught.value.__cause__ is not None
    assert trio.current_time() == 1
    await settled()
    assert count_tasks() == before


PROGRAM = """
import trio
from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver, Will
from trio_mqtt_driver.testing import MemoryBroker

async def main():
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        config = DriverConfig(
            endpoint=Endpoint(host="memory", port=1883),
            open_stream=lambda endpoint: broker.connect_stream(),
            will=Will(topic="will"),
        )
        try:
            async with MQTTDriver(config) as driver:
                try:
                    print("live", flush=True)
                    await trio.sleep_forever()
                finally:
                    with trio.move_on_after(5, shield=True):
                        await driver.publish("last", qos=1)
        except BaseException as exc:
            print(type(exc).__name__, [one.topic for one in broker.published][1:], broker.clients, flush=True)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


async def test_a_real_ctrl_c_is_a_keyboard_interrupt_after_a_clean_end_in_real_time() -> None:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said, errors = b"", b""
    async with process.stdout, process.stderr:
        try:
            with trio.fail_after(30):
                while not said.endswith(b"live\n"):
                    said += await process.stdout.receive_some()
                process.send_signal(signal.SIGINT)
                async for part in process.stdout:
                    said += part
                async for part in process.stderr:
                    errors += part
                await process.wait()
        finally:
            process.kill()
    assert said == b"live\nKeyboardInterrupt ['last'] []\n"
    assert (process.returncode, errors) == (0, b"")


async def test_a_subscribe_of_a_task_outside_the_body_ends_with_the_driver(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """Whenever it comes: before, while and after the driver is left."""
    outcomes: list[str] = []

    async def subscribe(driver: MQTTDriver, turns: int) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        try:
            await driver.subscribe("in", print)
            outcomes.append("granted")
        except DriverClosedError:
            outcomes.append("closed")

    for turns in range(60):
        driver = MQTTDriver(config_for(broker))
        async with trio.open_nursery() as nursery:
            with trio.fail_after(60):
                async with driver:
                    nursery.start_soon(subscribe, driver, turns)
        assert len(outcomes) == turns + 1, turns
    assert "closed" in outcomes
    assert not broker.violations
