"""Reading state: only what is live, three ways of not being live, and no snapshot from before a disconnect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import (
    ConnectError,
    ConnectionLostError,
    DriverConfig,
    Message,
    MQTTDriver,
    StaleDataError,
    State,
    StateView,
    SubscribeError,
)
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@attrs.frozen
class Zone:
    name: str


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def config(broker: MemoryBroker) -> DriverConfig:
    return memory_config(broker)


def say(broker: MemoryBroker, number: int, name: str, retain: bool = True) -> None:
    broker.publish(f"panel/{number}", json.dumps({"name": name}), qos=1, retain=retain)


def names(topics: Mapping[str, Message[Zone]]) -> dict[str, str]:
    return {topic: message.value.name for topic, message in topics.items()}


def both(topics: Mapping[str, Message[Zone]]) -> bool:
    return {"panel/1", "panel/2"} <= topics.keys()


async def test_the_three_reasons_and_the_data(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    driver = MQTTDriver(config)
    view = StateView(driver, "panel/+", Zone, complete=both, qos=1)
    with pytest.raises(StaleDataError, match=r"'panel/\+': the driver is not started"):
        view.get("panel/1")
    async with driver, view:
        say(broker, 1, "hall")
        await settled()
        with pytest.raises(StaleDataError, match="the link is up, but 1 topics are not all of the data yet"):
            view.get("panel/1")
        assert not view.fresh
        say(broker, 2, "door")
        await settled()
        assert view.fresh
        assert view.get("panel/1").value == Zone("hall")
        assert names(view.snapshot()) == {"panel/1": "hall", "panel/2": "door"}
        with pytest.raises(KeyError):
            view.get("panel/3")
        broker.stop()
        await driver.wait_state(State.BACKING_OFF)
        with pytest.raises(StaleDataError, match=r"the link is down \(backing off\)"):
            view.get("panel/1")
        broker.start()
        await driver.wait_live()
        await settled()
        assert names(view.snapshot()) == {"panel/1": "hall", "panel/2": "door"}
    with pytest.raises(StaleDataError, match="the driver is not started, or the view is not entered"):
        view.snapshot()


def test_it_is_no_connection_error() -> None:
    assert not issubclass(StaleDataError, ConnectError | ConnectionLostError)


async def test_what_changed_while_the_link_was_down(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    say(broker, 1, "old")
    say(broker, 2, "goes")
    async with MQTTDriver(config) as driver, StateView(driver, "panel/+", Zone, qos=1) as view:
        await settled()
        assert len(view) == 2
        broker.stop()
        await driver.wait_state(State.BACKING_OFF)
        say(broker, 1, "new")
        broker.publish("panel/2", b"", retain=True)
        broker.start()
        await driver.wait_live()
        await settled()
        assert names(view.snapshot()) == {"panel/1": "new"}


async def test_nothing_of_an_attempt_that_failed_is_kept(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    """Such a connection brings retained messages, too, but is never live."""
    resets: list[int] = []

    def on_reset() -> None:
        resets.append(len(view))

    say(broker, 1, "hall")
    say(broker, 2, "door")
    async with MQTTDriver(config) as driver:
        view: StateView[Zone] = StateView(driver, "panel/+", Zone, qos=1, on_reset=on_reset)
        async with view:
            await driver.subscribe("other", lambda _message: None)
            await settled()
            with broker.faults.hold(Kind.SUBACK):
                broker.drop()
                await driver.wait_state(State.REPLAYING)
                await settled()
                assert not view.fresh
                broker.publish("panel/2", b"", retain=True)
                broker.drop()
                await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
            await settled()
            assert names(view.snapshot()) == {"panel/1": "hall"}
    assert set(resets) == {0}
    assert len(resets) >= 2


async def test_a_live_link_without_its_first_message_shows_nothing_of_the_last(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with (
        MQTTDriver(config) as driver,
        StateView(driver, "panel/+", Zone, complete=lambda _topics: True, qos=1) as view,
    ):
        say(broker, 1, "hall", retain=False)
        await settled()
        assert len(view) == 1
        # On the way to the handler when the link is given up: it comes after the edge.
        say(broker, 1, "late", retain=False)
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        await settled()
        assert names(view.snapshot()) == {}


async def test_changes_are_collected(broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock) -> None:
    async with (
        MQTTDriver(config) as driver,
        StateView(driver, "panel/+", Zone, complete=both, debounce=5, qos=1) as view,
    ):
        changes = view.changes()
        say(broker, 1, "hall")
        say(broker, 2, "door")
        before = trio.current_time()
        assert names(await anext(changes)) == {"panel/1": "hall", "panel/2": "door"}
        assert trio.current_time() == before  # the first is not waited for
        for name in ("a", "b", "c"):
            say(broker, 1, name)
            await settled()
        assert names(await anext(changes))["panel/1"] == "c"
        assert trio.current_time() == before + 5
        with trio.move_on_after(3600) as scope:
            await anext(changes)
        assert scope.cancelled_caught
        assert names(await anext(view.changes()))["panel/1"] == "c"  # each consumer has its own


async def test_no_snapshot_is_delivered_after_a_disconnect(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    got: list[tuple[State, dict[str, str]]] = []

    async def consume(driver: MQTTDriver, view: StateView[Zone]) -> None:
        async for topics in view.changes():
            got.append((driver.state, names(topics)))  # noqa: PERF401  # looked at while it goes on

    async with (
        trio.open_nursery() as nursery,
        MQTTDriver(config) as driver,
        StateView(driver, "panel/+", Zone, debounce=5, qos=1) as view,
    ):
        nursery.start_soon(consume, driver, view)  # noqa: ASYNC111  # it is to see the view's end
        say(broker, 1, "one")
        await settled()
        say(broker, 1, "due in 5 s")
        await trio.sleep(4.9)
        broker.stop()
        await trio.sleep(60)
        assert [topics for _, topics in got] == [{"panel/1": "one"}]
        say(broker, 1, "two")
        broker.start()
        await driver.wait_live()
        await trio.sleep(10)
        assert [topics for _, topics in got] == [{"panel/1": "one"}, {"panel/1": "two"}]
    assert {state for state, _ in got} == {State.LIVE}


async def test_changes_end_with_the_driver(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """For a task outside its block; what was due then is not delivered."""
    got: list[dict[str, str]] = []
    ended = trio.Event()
    driver = MQTTDriver(config)
    view = StateView(driver, "panel/+", Zone, debounce=5)

    async def follow() -> None:
        async with view:
            async for topics in view.changes():
                got.append(names(topics))  # noqa: PERF401  # looked at while it goes on
            assert [topics async for topics in view.changes()] == []
        ended.set()

    say(broker, 1, "one")
    async with driver:
        nursery.start_soon(follow)
        await settled()
        say(broker, 1, "due in 5 s")
        await trio.sleep(1)
    await ended.wait()
    assert got == [{"panel/1": "one"}]
    assert trio.current_time() == 1 + 4


async def test_misfits_change_nothing(broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock) -> None:
    dead: list[bytes] = []

    def on_dead_letter(message: Message[Any], _error: Exception) -> None:
        dead.append(message.payload)

    async with (
        MQTTDriver(config) as driver,
        StateView(driver, "panel/+", Zone, qos=1, on_dead_letter=on_dead_letter) as view,
        StateView(driver, "panel/+", Zone, qos=1) as other,
    ):
        say(broker, 1, "hall")
        broker.publish("panel/1", b"\xff", qos=1)
        await settled()
        assert names(view.snapshot()) == names(other.snapshot()) == {"panel/1": "hall"}
        broker.publish("panel/1", b"", qos=1)
        await settled()
        assert len(view) == len(other) == 0
    assert dead == [b"\xff"]


async def test_it_is_bounded(broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver, StateView(driver, "panel/+", max_topics=2, qos=1) as view:
        for number in (1, 2, 3, 1, 4):
            broker.publish(f"panel/{number}", b"x", qos=1)
        await settled()
        assert list(view.snapshot()) == ["panel/1", "panel/2"]
        assert view.ignored == 2


async def test_left_in_any_order(broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock) -> None:
    driver = MQTTDriver(config)
    view = StateView(driver, "panel/+")
    async with driver:
        async with view:
            with pytest.raises(RuntimeError, match="in use already"):
                await view.__aenter__()
        await broker.wait_for(lambda: not broker.subscriptions(str(driver.client_id)), "end of the subscription")
        await view.__aenter__()
        changes = view.changes()
    await view.__aexit__(None, None, None)
    with pytest.raises(StopAsyncIteration):
        await anext(changes)


async def test_a_refused_subscription_is_raised_and_leaves_nothing(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        broker.faults.refuse_subscribe("panel/+")
        view = StateView(driver, "panel/+")
        with pytest.raises(SubscribeError):
            await view.__aenter__()
        assert not driver._edges._callbacks
        async with StateView(driver, "other/+"):
            await settled()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"complete": 1}, "complete must be callable, not int"),
        ({"on_reset": 1}, "on_reset must be callable, not int"),
        ({"debounce": -1}, "debounce is -1, allowed are seconds >= 0"),
        ({"max_topics": 0}, "max_topics is 0, allowed is an int >= 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        StateView(MQTTDriver("mqtt://localhost"), "panel/+", **options)
