"""Which exception leaves ``async with MQTTDriver(...)``: always one, never a group, and the broker is told goodbye."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import (
    DriverClosedError,
    DriverConfig,
    DriverInternalError,
    Message,
    MessageLostError,
    MQTTDriver,
    RefusedError,
    State,
    Will,
)
from trio_mqtt_driver.testing import Disconnect, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **{"will": Will(topic="will", payload="lost"), **options})


def check_goodbye(broker: MemoryBroker) -> None:
    """The last packet of the last connection was DISCONNECT, so that no will was published."""
    assert isinstance(broker.received[-1][1], Disconnect)
    assert "will" not in [message.topic for message in broker.published]
    assert not broker.clients
    assert not broker.violations


def internal_tasks() -> int:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    todo, count = [root], 0
    while todo:
        task = todo.pop()
        count += 1
        todo.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return count


# -- the cases --------------------------------------------------------------------------------------------------------


async def test_a_normal_end_raises_nothing_and_leaves_no_task(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    before = internal_tasks()
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda _: None)
        assert internal_tasks() > before
    assert driver.state is State.CLOSED
    await settled()
    assert internal_tasks() == before
    check_goodbye(broker)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, StopAsyncIteration, GeneratorExit])
async def test_what_the_body_raises_leaves_as_itself(
    broker: MemoryBroker, kind: type[BaseException], autojump_clock: MockClock
) -> None:
    error = kind("mine")
    error.__cause__ = cause = KeyError("cause")
    error.__context__ = context = IndexError("context")
    caught: BaseException | None = None
    try:
        async with MQTTDriver(config_for(broker)):
            raise error
    except BaseException as exc:  # noqa: BLE001  # SystemExit and the like are what this is about
        caught = exc
    assert caught is error
    assert error.__cause__ is cause
    assert error.__context__ is context
    check_goodbye(broker)


async def test_an_exception_group_of_the_body_stays_what_it_is(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    with pytest.RaisesGroup(ValueError, pytest.RaisesExc(KeyError)):  # the body is under test
        async with MQTTDriver(config_for(broker)), trio.open_nursery() as nursery:

            async def fail(error: Exception) -> None:
                await trio.lowlevel.checkpoint()
                raise error

            nursery.start_soon(fail, ValueError())
            nursery.start_soon(fail, KeyError())
    check_goodbye(broker)


async def test_a_cancellation_from_outside_is_a_cancellation(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    with trio.move_on_after(10) as scope:
        async with MQTTDriver(config_for(broker)):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == 10
    check_goodbye(broker)


async def test_the_cancelled_that_leaves_is_the_one_that_the_body_got(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    seen: list[BaseException] = []
    with trio.CancelScope() as scope:
        try:
            async with MQTTDriver(config_for(broker)):
                scope.cancel()
                try:
                    await trio.sleep_forever()
                except trio.Cancelled as exc:
                    seen.append(exc)
                    raise
        except trio.Cancelled as exc:
            seen.append(exc)
            raise
    assert seen[0] is seen[1]


async def test_a_cancellation_while_connecting_leaves_nothing(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    before = internal_tasks()
    with broker.faults.hold(Kind.CONNACK), trio.move_on_after(3) as scope:
        async with MQTTDriver(config_for(broker)):
            raise AssertionError("entered")
    assert scope.cancelled_caught
    assert trio.current_time() == 3
    await settled()
    assert internal_tasks() == before
    assert not broker.clients


async def test_a_refusal_at_the_start_leaves_as_one_error(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    broker.faults.refuse_connect(0x87)
    with pytest.raises(RefusedError) as caught:
        async with MQTTDriver(config_for(broker)):
            raise AssertionError("entered")
    assert caught.value.__context__ is None
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


async def test_a_refusal_for_good_later_cancels_the_body_and_is_raised(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    unwound = False
    with pytest.raises(RefusedError) as caught:  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker)):
            broker.faults.refuse_connect(0x87)
            broker.drop()
            try:
                await trio.sleep_forever()
            finally:
                unwound = True
    assert unwound
    assert caught.value.terminal
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_a_body_that_raises_while_it_is_cancelled_for_a_refusal_wins(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    error = ValueError("in the finally")
    with pytest.raises(ValueError, match="in the finally") as caught:  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker)):
            broker.faults.refuse_connect(0x87)
            broker.drop()
            try:
                await trio.sleep_forever()
            finally:
                raise error
    assert caught.value is error
    assert isinstance(error.__context__, trio.Cancelled)
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in logged] == ["the driver had stopped before the body raised"]
    assert logged[0].exc_info is not None
    assert isinstance(logged[0].exc_info[1], RefusedError)


async def test_waiting_for_a_link_that_is_refused_raises_the_refusal_itself(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    with pytest.raises(RefusedError) as caught:  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker), start="background") as driver:
            broker.faults.refuse_connect(0x87)
            with trio.CancelScope(shield=True):
                await driver.wait_live()
    assert caught.value.terminal
    assert [record for record in caplog.records if record.levelno == logging.ERROR] == []


def poisoned(broker: MemoryBroker) -> tuple[MQTTDriver, Callable[[], None]]:
    """A driver, and what makes it meet something that it does not expect: our bug, as far as it can tell."""
    dialer = Dialer(broker)
    driver = MQTTDriver(config_for(broker, open_stream=dialer))

    def strike() -> None:
        dialer.streams[-1].poisoned = ZeroDivisionError("bug")
        broker.send(str(driver.client_id), b"\xd0\x00")

    return driver, strike


async def test_a_bug_inside_cancels_the_body_and_is_named_so(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    driver, strike = poisoned(broker)
    with pytest.raises(DriverInternalError, match="please report it") as caught:  # noqa: PT012
        async with driver:
            strike()
            await trio.sleep_forever()
    cause = caught.value.__cause__
    assert pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True).matches(cause)
    assert driver.state is State.CLOSED


async def test_a_bug_inside_while_the_body_raises_is_logged_and_the_body_wins(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    driver, strike = poisoned(broker)
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:  # noqa: PT012  # the body is under test
        async with driver:
            strike()
            try:
                await trio.sleep_forever()
            finally:
                raise error
    assert caught.value is error
    (logged,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged.exc_info is not None
    assert isinstance(logged.exc_info[1], DriverInternalError)


async def test_a_cancellation_while_the_body_raises_does_not_replace_its_error(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    error = ValueError("mine")
    broker.faults.drop(Kind.DISCONNECT, direction=None)
    with trio.CancelScope() as scope, pytest.raises(ValueError, match="mine") as caught:  # noqa: PT012
        async with MQTTDriver(config_for(broker)):
            broker.silence()
            scope.deadline = trio.current_time() + 1
            raise error
    assert caught.value is error
    assert error.__context__ is None
    assert trio.current_time() == 2  # disconnect_timeout: it was cancelled while it waited for the broker
    assert scope.cancel_called
    assert not scope.cancelled_caught


@pytest.mark.parametrize("awaits", [False, True])
async def test_what_a_handler_raises_leaves_if_told_so(
    broker: MemoryBroker, awaits: bool, autojump_clock: MockClock
) -> None:
    error = LookupError("in the handler")
    error.__context__ = context = KeyError("deeper")

    async def handler(message: Message[bytes]) -> None:
        assert message.payload == b"x"
        if awaits:
            await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(LookupError, match="in the handler") as caught:  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker, on_handler_error="raise")) as driver:
            await driver.subscribe("in", handler)
            broker.publish("in", b"x")
            await trio.sleep_forever()
    assert caught.value is error
    assert error.__context__ is context
    check_goodbye(broker)


async def test_ctrl_c_in_a_handler_is_ctrl_c(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    def handler(message: Message[bytes]) -> None:
        assert message.payload == b"x"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker)) as driver:
            await driver.subscribe("in", handler)
            broker.publish("in", b"x")
            await trio.sleep_forever()


# -- the end ----------------------------------------------------------------------------------------------------------


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
    outcome: list[str] = []
    with pytest.raises(RefusedError):  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker)) as driver:
            broker.stop()
            await settled()
            receipt = driver.publish_nowait("queued", qos=1)
            broker.start()
            broker.faults.refuse_connect(0x87)
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True), trio.fail_after(5):
                    for attempt in (
                        receipt.wait,
                        lambda: driver.publish("last", qos=1),
                        lambda: driver.publish("last"),
                        lambda: driver.subscribe("in", print),
                    ):
                        try:
                            await attempt()
                        except (DriverClosedError, MessageLostError) as exc:
                            outcome.append(type(exc).__name__)
    assert outcome == ["MessageLostError", "DriverClosedError", "DriverClosedError", "DriverClosedError"]


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
    with trio.move_on_after(1000 if how != "cancelled" else 1) as scope:
        try:
            async with MQTTDriver(config_for(broker, disconnect_timeout=3, drain_timeout=4)) as driver:
                broker.silence()
                driver.publish_nowait("a", qos=1)
                await trio.sleep(1)
                if how == "error":
                    raise ValueError
        except ValueError:
            assert how == "error"
    assert scope.cancelled_caught is (how == "cancelled")
    assert trio.current_time() == {"normal": 1 + 4 + 3, "error": 1 + 3, "cancelled": 1 + 3}[how]


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
    before = internal_tasks()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the body is under test
        async with trio.open_nursery() as nursery:
            driver = MQTTDriver(config_for(broker, disconnect_timeout=100))
            task = trio.lowlevel.current_task()

            async def interrupt() -> None:
                await trio.sleep(1)
                trio.lowlevel.reschedule  # noqa: B018
                raise_in(task)

            async with driver:
                broker.silence()
                nursery.start_soon(interrupt)
    assert internal_tasks() == before


def raise_in(task: trio.lowlevel.Task) -> None:
    """Deliver Ctrl-C to a task that is blocked, as Trio does to the main task."""

    def raise_cancel() -> None:
        raise KeyboardInterrupt

    task._attempt_abort(raise_cancel)


PROGRAM = """
import sys
import trio
from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver, Will
from trio_mqtt_driver.testing import MemoryBroker

broker = None

async def main():
    global broker
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        config = DriverConfig(
            endpoint=Endpoint(host="memory", port=1883),
            open_stream=lambda endpoint: broker.connect_stream(),
            will=Will(topic="will"),
        )
        try:
            async with MQTTDriver(config) as driver:
                print("live", flush=True)
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.move_on_after(5, shield=True):
                        await driver.publish("last", qos=1)
        except BaseException as exc:
            print(type(exc).__name__, [one.topic for one in broker.published][1:], broker.clients, flush=True)
            raise

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
    try:
        with trio.fail_after(30):
            assert await process.stdout.receive_some() == b"live\n"
            process.send_signal(signal.SIGINT)
            out = b"".join([bytes(part) async for part in process.stdout])
            errors = b"".join([bytes(part) async for part in process.stderr])
            await process.wait()
    finally:
        process.kill()
        await process.aclose()
    assert out == b"KeyboardInterrupt ['last'] []\n"
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
