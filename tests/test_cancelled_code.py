"""The application's code that is cancelled and fails in its cleanup: a group of both ends what was cancelled only."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import NoReturn

import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Attempt, DriverConfig, Message, MQTTDriver, OptionsError, TransportError
from trio_mqtt_driver.testing import MemoryBroker


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


async def fail_when_cancelled() -> NoReturn:
    """What a stream does that cannot be closed, in a nursery with another task."""

    async def close_badly() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("cannot be closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        nursery.start_soon(close_badly)
    raise AssertionError("cancelled")


class Hanging:
    """An authenticator."""

    method = "m"
    hangs = False

    async def start(self) -> bytes | None:
        if Hanging.hangs:
            await fail_when_cancelled()
        return None

    async def answer(self, data: bytes | None) -> bytes | None:
        raise AssertionError(data)

    async def finish(self, data: bytes | None) -> None: ...


def challenge(_method: str, _data: bytes | None) -> Generator[bytes, bytes | None, None]:
    """Nothing is asked."""
    yield from ()


def check_logged(caplog: pytest.LogCaptureFixture, what: str) -> None:
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == f"{what} failed when it was cancelled"
    assert record.exc_info is not None
    assert "cannot be closed" in repr(record.exc_info[1])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "where, error",
    [("open_stream", TransportError), ("options_factory", OptionsError), ("authenticator", TransportError)],
)
async def test_an_attempt_that_fails_so_is_one_failed_attempt(
    nursery: trio.Nursery,
    where: str,
    error: type[Exception],
    force: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    hangs = False
    broker = MemoryBroker(nursery, authenticate=challenge if where == "authenticator" else None)

    async def open_stream(_endpoint: object) -> trio.abc.Stream:
        if hangs and where == "open_stream":
            await fail_when_cancelled()
        return await broker.connect_stream()

    async def options(attempt: Attempt) -> DriverConfig:
        if hangs and where == "options_factory":
            await fail_when_cancelled()
        return attempt.config

    authenticator = Hanging if where == "authenticator" else None
    config = memory_config(
        broker, open_stream=open_stream, options_factory=options, authenticator=authenticator, protocol="5"
    )
    async with MQTTDriver(config) as driver:
        hangs = True
        monkeypatch.setattr(Hanging, "hangs", True)
        broker.disconnect()
        await trio.sleep(5)
        hangs = False
        monkeypatch.setattr(Hanging, "hangs", False)
        if force:
            driver.force_reconnect("tired of it", even_if_live=True)
        else:
            await trio.sleep(10)
            assert error.__name__ in str(driver.status().last_error)
        await driver.wait_live()
        assert driver.generation == 2
    check_logged(caplog, where)


async def test_a_handler_that_fails_so_does_not_disturb_the_leaving(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def handle(_: Message[bytes]) -> None:
        await fail_when_cancelled()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handle)
        await driver.publish("a")
        await trio.sleep(1)
    check_logged(caplog, "handler of 'a'")


class Outcome(BaseException):
    """As that of ``pytest.fail()``."""


@pytest.mark.parametrize("where", ["handler", "lone handler", "open_stream"])
async def test_what_is_no_exception_leaves_as_itself(
    broker: MemoryBroker, where: str, autojump_clock: MockClock
) -> None:
    failing = False

    async def open_stream(_endpoint: object) -> trio.abc.Stream:
        if failing:
            raise Outcome(where)
        return await broker.connect_stream()

    async def handle(_: Message[bytes]) -> None:
        raise Outcome(where)

    def handle_at_once(_: Message[bytes]) -> None:
        raise Outcome(where)

    with pytest.raises(Outcome, match=where):  # noqa: PT012
        async with MQTTDriver(memory_config(broker, open_stream=open_stream)) as driver:
            if where == "open_stream":
                failing = True
                broker.disconnect()
            else:
                await driver.subscribe("a", handle if where == "handler" else handle_at_once)
                await driver.publish("a")
            await trio.sleep(60)


async def test_open_stream_must_return_a_stream(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async def open_stream(_endpoint: object) -> None: ...

    async with MQTTDriver(memory_config(broker, open_stream=open_stream), start="background") as driver:
        await trio.sleep(1)
        assert "open_stream must return a trio.abc.Stream, not NoneType" in str(driver.status().last_error)
