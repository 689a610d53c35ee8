"""The hook before each rebuild: when it is called, between what, and what it may do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import Attempt, BackoffConfig, DriverConfig, Endpoint, MQTTDriver, RefusedError, State, StateView
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


@pytest.fixture
def config(broker: MemoryBroker, dialer: Dialer) -> DriverConfig:
    return memory_config(broker, open_stream=dialer, backoff=BackoffConfig(pause_after=3))


# -- when -------------------------------------------------------------------------------------------------------------


async def test_before_every_attempt_but_the_first(
    broker: MemoryBroker, dialer: Dialer, config: DriverConfig, autojump_clock: MockClock
) -> None:
    attempts: list[Attempt] = []
    driver = MQTTDriver(config)
    driver.register_rebuild_callback(attempts.append)
    async with driver:
        assert attempts == []
        await trio.sleep(100)
        broker.stop()
        with trio.fail_after(60):
            await driver.wait_state(State.PAUSED)
        assert [(attempt.number, attempt.generation) for attempt in attempts] == [(1, 2), (2, 2), (3, 2)]
        assert str(attempts[0].last_error).startswith("ConnectionLostError")
        assert "Connection refused" in str(attempts[1].last_error)
        broker.start()
        await driver.wait_live()
        assert [attempt.number for attempt in attempts] == [1, 2, 3, 4]
        assert len(dialer.attempts) == 5
        await trio.sleep(100)
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        assert (attempts[-1].number, attempts[-1].generation, attempts[-1].config) == (1, 3, config)
    assert len(attempts) == 5  # leaving is no rebuild


async def test_a_second_attempt_counts_also_if_there_was_no_link_yet(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    attempts: list[Attempt] = []
    broker.down = True
    driver = MQTTDriver(config, start="background")
    driver.register_rebuild_callback(attempts.append)
    async with driver:
        await settled()
        assert attempts == []
        broker.start()
        await driver.wait_live()
    assert [(attempt.number, attempt.generation) for attempt in attempts] == [(2, 1)]


async def test_the_fall_back_to_3_1_1_is_part_of_its_attempt(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    broker = MemoryBroker(nursery, versions=(4,))
    attempts: list[Attempt] = []
    driver = MQTTDriver(memory_config(broker))
    driver.register_rebuild_callback(attempts.append)
    async with driver:
        assert driver.status().protocol == "3.1.1"
        assert attempts == []


async def test_a_terminal_refusal_is_not_followed_by_another(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    attempts: list[Attempt] = []

    async def run() -> None:
        async with MQTTDriver(config) as driver:
            driver.register_rebuild_callback(attempts.append)
            broker.faults.refuse_connect(0x87)
            broker.drop()
            await trio.sleep_forever()

    with pytest.raises(RefusedError):
        await run()
    assert len(attempts) == 1


# -- between what -----------------------------------------------------------------------------------------------------


async def test_after_the_old_connection_and_before_anything_of_the_new_one(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    order: list[str] = []

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        order.append("options")
        return attempt.config

    def make_client_id(base: str, generation: int, _at: float) -> str:
        order.append("client ID")
        return f"{base}{generation}"

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        order.append("open")
        stream = await dialer(endpoint)
        dialer.streams[-1]._on_close = lambda: order.append("close")
        return stream

    config = memory_config(
        broker, open_stream=open_stream, options_factory=make, client_id_factory=make_client_id, protocol="5"
    )
    async with MQTTDriver(config) as driver:

        def before(_attempt: Attempt) -> None:
            order.append("rebuild")
            assert driver.state is State.CONNECTING
            assert driver.client_id is None
            assert broker.clients == []

        driver.register_rebuild_callback(before)
        driver.register_connection_callback(lambda up: order.append("up" if up else "down"))
        async with StateView(driver, "panel/+", on_reset=lambda: order.append("reset")):
            broker.publish("panel/1", b"x", qos=1)
            await settled()
            order.clear()
            broker.drop()
            await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
            lost = order[:]
            broker.publish("panel/1", b"x", qos=1)
            await settled()
            order.clear()
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
            replaced = order[:]
    rebuilt = ["rebuild", "options", "client ID", "open", "up"]
    assert lost == ["close", "down", "reset", *rebuilt]
    assert replaced == ["down", "reset", "close", *rebuilt]


@pytest.mark.parametrize("how", ["apply_settings", "resume", "force_reconnect"])
async def test_whatever_asked_for_the_new_connection(
    dialer: Dialer, config: DriverConfig, autojump_clock: MockClock, how: str
) -> None:
    seen: list[tuple[str, int]] = []
    async with MQTTDriver(config) as driver:
        driver.register_rebuild_callback(lambda attempt: seen.append((attempt.config.client_id, len(dialer.order))))
        if how == "apply_settings":
            driver.apply_settings(config.evolve(client_id="other"))
        elif how == "resume":
            driver.pause()
            await settled()
            assert seen == []
            assert driver.resume()
        else:
            driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        # With the settings in force, after the first stream was closed and before the second was opened.
        assert seen == [("other" if how == "apply_settings" else "driver", 2)]
        assert dialer.order == [("open", 1), ("close", 1), ("open", 2)]


# -- the callbacks ----------------------------------------------------------------------------------------------------


async def test_a_failing_callback_hurts_nobody(
    broker: MemoryBroker, config: DriverConfig, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    heard: list[Attempt] = []

    def fail(attempt: Attempt) -> None:
        raise ValueError(attempt.number)

    async with MQTTDriver(config) as driver:
        driver.register_rebuild_callback(fail)
        driver.register_rebuild_callback(heard.append)
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
    assert len(heard) == 1
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["rebuild callback" in record.getMessage() for record in errors] == [True]
    assert all(record.exc_info for record in errors)


async def test_unregistering_inside_a_callback_takes_effect_at_once(
    config: DriverConfig, autojump_clock: MockClock
) -> None:
    calls: list[str] = []
    registered: dict[str, Callable[[], None]] = {}
    async with MQTTDriver(config) as driver:

        def first(_attempt: Attempt) -> None:
            calls.append("first")
            registered["first"]()
            registered["second"]()
            registered["second"]()
            driver.register_rebuild_callback(lambda _: calls.append("fourth"))

        registered["first"] = driver.register_rebuild_callback(first)
        registered["second"] = driver.register_rebuild_callback(lambda _: calls.append("second"))
        driver.register_rebuild_callback(lambda _: calls.append("third"))
        for _ in range(2):
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
    assert calls == ["first", "third", "third", "fourth"]


async def a_coroutine_function(_attempt: Attempt) -> None:
    raise AssertionError("nobody awaits it")


@pytest.mark.parametrize("callback", [3, None, a_coroutine_function])
async def test_it_must_be_a_plain_function(config: DriverConfig, callback: Any) -> None:
    driver = MQTTDriver(config)
    with pytest.raises(TypeError, match="callback must be a plain function of one Attempt"):
        driver.register_rebuild_callback(callback)


# -- what it may do ---------------------------------------------------------------------------------------------------


async def test_it_may_publish_which_waits_for_the_new_link(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        driver.register_rebuild_callback(lambda _: driver.publish_nowait("rebuilt", b"x", qos=1))
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        await settled()
        assert [message.topic for message in broker.published if message.topic == "rebuilt"] == ["rebuilt"]


async def test_it_may_pause_and_then_nothing_is_opened(
    dialer: Dialer, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        unregister = driver.register_rebuild_callback(lambda _: driver.pause("not now"))
        driver.force_reconnect(even_if_live=True)
        await driver.wait_state(State.PAUSED)
        await trio.sleep(3600)
        assert driver.state is State.PAUSED
        assert len(dialer.attempts) == 1
        unregister()
        assert driver.resume()
        await driver.wait_live()
        assert driver.generation == 2


async def test_it_may_ask_for_a_reconnect_which_is_the_one_that_begins(
    dialer: Dialer, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        driver.register_rebuild_callback(lambda _: driver.force_reconnect("twice"))
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        await trio.sleep(3600)
        assert driver.generation == 2
        assert dialer.order == [("open", 1), ("close", 1), ("open", 2)]
