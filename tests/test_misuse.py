"""Mistakes of the caller: said at the call, in words that name what is wrong; and what 3.1.1 cannot do."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Generator
from typing import Any, cast

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, OfflinePolicy, Overflow, State
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


async def a_coroutine_function(up: bool) -> None:
    raise AssertionError("never called")


class AsyncCallable:
    async def __call__(self, up: bool) -> None:
        raise AssertionError(up)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_shared_subscription_may_not_be_no_local(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, version: str
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=version)) as driver:
        with pytest.raises(ValueError, match=r"no_local is True.*'\$share/group/a'"):
            await driver.subscribe("$share/group/a", print, no_local=True)
        assert not broker.subscriptions(driver.client_id or "")
        await driver.subscribe("$share/group/a", print)
        assert driver.generation == 1
    assert not broker.violations


@pytest.mark.parametrize("callback", [3, None, "print", a_coroutine_function, AsyncCallable().__call__])
async def test_a_connection_callback_must_be_a_plain_function(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, callback: Any
) -> None:
    driver = MQTTDriver(memory_config(broker))
    with pytest.raises(TypeError, match="callback must be a plain function of one bool"):
        driver.register_connection_callback(callback)
    async with driver:
        assert driver.state is State.LIVE


@pytest.mark.parametrize(
    "word, text",
    [
        (State.LIVE, "live"),
        (State.BACKING_OFF, "backing off"),
        (Overflow.BLOCK, "block"),
        (OfflinePolicy.FAIL, "fail"),
    ],
)
def test_a_word_equals_its_text_and_is_written_as_it(word: Any, text: str) -> None:
    assert word == text
    assert str(word) == f"{word}" == text


@pytest.mark.parametrize("call", ["publish", "publish_nowait"])
async def test_an_unknown_keyword_of_publish_is_named(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, call: str
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(TypeError, match=r"publish\(\) got an unexpected keyword argument 'nonsense'"):  # noqa: PT012  # either call
            if call == "publish":
                await driver.publish("a", b"x", nonsense=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
            else:
                driver.publish_nowait("a", b"x", nonsense=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        assert "a" not in [message.topic for message in broker.published]


@pytest.mark.parametrize("call", ["subscribe", "subscription"])
async def test_an_unknown_keyword_of_subscribe_is_named(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, call: str
) -> None:
    options: dict[str, Any] = {"nonsense": 1}
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'nonsense'"):  # noqa: PT012  # either call
            if call == "subscribe":
                await driver.subscribe("a", print, **options)
            else:
                async with driver.subscription("a", **options):
                    pass
        assert not broker.subscriptions(driver.client_id or "")


async def test_what_3_1_1_cannot_say_is_warned_of_once_for_each_connection(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(words: str) -> int:
        return sum(
            words in record.getMessage() and "left out" in record.getMessage()
            for record in caplog.records
            if record.levelno == logging.WARNING
        )

    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.publish("a", b"x", qos=1)
        await driver.subscribe("plain", print)
        assert warnings("") == 0
        for generation in (1, 2):
            for _ in range(3):
                await driver.publish("a", b"x", qos=1, content_type="text/plain")
                await driver.publish("a", b"x", user_properties=[("name", "value")])
            for number in range(3):
                await driver.subscribe(f"{generation}/{number}", print, no_local=True)
            assert warnings("properties of PUBLISH") == generation
            assert warnings("no_local") == generation
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()


async def test_with_5_nothing_is_warned_of(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        await driver.publish("a", b"x", qos=1, content_type="text/plain")
        await driver.subscribe("a", print, no_local=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_options_factory_that_is_not_async_is_named_so(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    config = memory_config(broker)
    made = memory_config(broker, options_factory=lambda _: config)
    async with MQTTDriver(made, start="background") as driver:
        await settled()
        assert driver.status().last_error == (
            "OptionsError: options_factory must be an async function, but it returned a DriverConfig"
        )


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("keepalive", r"MQTTDriver\(\) got an unexpected keyword argument 'keepalive'; did you mean 'keep_alive'\?"),
        ("nonsense", r"MQTTDriver\(\) got an unexpected keyword argument 'nonsense'$"),
    ],
)
def test_an_unknown_option_is_named_with_what_it_may_have_been(wrong: str, words: str) -> None:
    options: dict[str, Any] = {wrong: 3}
    with pytest.raises(TypeError, match=words):
        MQTTDriver("mqtt://127.0.0.1", **options)


async def test_a_source_of_randomness_is_checked_at_once() -> None:
    with pytest.raises(TypeError, match=r"rng must be a random\.Random, not int"):
        MQTTDriver("mqtt://127.0.0.1", rng=cast(Any, 5))


async def test_a_handler_that_would_run_nothing_is_refused(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async def asynchronous(_message: Message[bytes]) -> AsyncGenerator[None, None]:
        yield

    def plain(_message: Message[bytes]) -> Generator[None, None, None]:
        yield

    async with MQTTDriver(memory_config(broker)) as driver:
        for handler in (asynchronous, plain):
            with pytest.raises(TypeError, match="handler has a 'yield' in it"):
                await driver.subscribe("a", handler)
        with pytest.raises(TypeError, match="handler must be callable, not str"):
            await driver.subscribe("a", cast("Any", "handler"))


@pytest.mark.parametrize("call", ["pause", "unsubscribe_nowait", "force_reconnect", "apply_settings"])
async def test_a_call_from_another_thread_changes_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, call: str
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("in", lambda message: got.append(message.payload))
        calls: dict[str, Any] = {
            "pause": lambda: driver.pause("maintenance"),
            "unsubscribe_nowait": lambda: driver.unsubscribe_nowait(subscription),
            "force_reconnect": lambda: driver.force_reconnect("now", even_if_live=True),
            "apply_settings": lambda: driver.apply_settings(driver.config.evolve(keep_alive=7)),
        }
        before = driver.config, driver.status().history
        with pytest.raises(RuntimeError, match="must be called from async context"):
            await trio.to_thread.run_sync(calls[call])
        assert (driver.config, driver.status().history) == before
        broker.publish("in", b"x")
        await driver.publish("out", qos=1)
        assert driver.state is State.LIVE
        assert got == [b"x"]
        driver.force_reconnect("again", even_if_live=True)
        await driver.wait_live()
        assert driver.generation == 2
