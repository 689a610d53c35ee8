"""Which exception leaves ``async with MQTTDriver(...)``: always one, never a group, and the broker is told goodbye."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.goodbye import check_goodbye, config_for, count_tasks
from trio_mqtt_driver import (
    DriverInternalError,
    Message,
    MQTTDriver,
    RefusedError,
    State,
)
from trio_mqtt_driver.testing import Kind, MemoryBroker

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


async def test_a_normal_end_raises_nothing_and_leaves_no_task(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    before = count_tasks()
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda _: None)
        assert count_tasks() > before
    assert driver.state is State.CLOSED
    await settled()
    assert count_tasks() == before
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
    except BaseException as exc:  # noqa: BLE001, ASYNC103  # SystemExit and the like are what this is about
        caught = exc
    assert caught is error
    assert error.__cause__ is cause
    assert error.__context__ is context
    check_goodbye(broker)


async def test_an_exception_group_of_the_body_stays_what_it_is(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    group = ExceptionGroup("mine", [ValueError("in a task of the body")])
    with pytest.raises(ExceptionGroup) as caught:  # noqa: ASYNC401  # pytest 8.2 has no RaisesGroup
        async with MQTTDriver(config_for(broker)):
            raise group
    assert caught.value is group
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
    before = count_tasks()
    with broker.faults.hold(Kind.CONNACK), trio.move_on_after(3) as scope:
        async with MQTTDriver(config_for(broker)):
            raise AssertionError("entered")
    assert scope.cancelled_caught
    assert trio.current_time() == 3
    await settled()
    assert count_tasks() == before
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
    bug = caught.value.__cause__
    while isinstance(bug, BaseExceptionGroup):
        (bug,) = bug.exceptions
    assert isinstance(bug, ZeroDivisionError)
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


@pytest.mark.parametrize("publishers", [1, 20])
@pytest.mark.parametrize("qos", [0, 1])
async def test_ctrl_c_that_hits_a_task_of_the_driver_leaves_a_busy_body_as_ctrl_c(
    broker: MemoryBroker, publishers: int, qos: int, autojump_clock: MockClock
) -> None:
    """Whatever the publishers raise when the driver goes, one by one or as a group: it is none of their errors."""
    before = count_tasks()
    dialer = Dialer(broker)
    turns = 0

    async def publish(driver: MQTTDriver) -> None:
        nonlocal turns
        while True:
            await driver.publish("out", b"x", qos=qos)
            turns += 1
            if turns == 10 * publishers:
                dialer.streams[0].poisoned = KeyboardInterrupt()
                broker.publish("in", b"x")
            await trio.sleep(0.001)

    with pytest.raises(KeyboardInterrupt), trio.fail_after(60):  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
            await driver.subscribe("in", print)
            if publishers == 1:
                await publish(driver)
            async with trio.open_nursery() as nursery:
                for _ in range(publishers):
                    nursery.start_soon(publish, driver)
    await settled()
    assert count_tasks() == before


async def test_ctrl_c_that_hits_a_task_of_the_driver_wins_over_what_the_body_catches_and_raises(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    dialer = Dialer(broker)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the body is under test
        async with MQTTDriver(config_for(broker, open_stream=dialer)):
            dialer.streams[0].poisoned = KeyboardInterrupt()
            broker.publish("in", b"x")
            broker.send(broker.clients[0], b"\xd0\x00")
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while leaving")
