"""The stable-ID mode: what becomes of the subscriptions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.stable import Log, connections, filters, reconnect, stable_config, starts
from trio_mqtt_driver import DriverConfig, MQTTDriver, State, StateView
from trio_mqtt_driver.testing import Direction, Faults, Kind, MemoryBroker, Rule

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=["5", "3.1.1"])
def config(request: pytest.FixtureRequest, broker: MemoryBroker) -> DriverConfig:
    return stable_config(broker, request.param)


async def test_subscriptions_are_not_replayed_and_what_came_meanwhile_is_delivered(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    log = Log()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", log, qos=1)
        await driver.subscribe("b/#", log, qos=2)
        broker.stop()
        for number in range(5):
            broker.publish("ab"[number % 2], b"%d" % number, qos=2)
        await trio.sleep(10)
        broker.start()
        await driver.wait_live()
        await settled()
        assert sorted(log.payloads) == [b"0", b"1", b"2", b"3", b"4"]
        assert not filters(connections(broker)[-1])
        assert driver.status().counters["replays"] == 0
        assert any("session present" in event.text for event in driver.status().history)
    assert not broker.violations


async def test_changes_that_were_made_while_the_link_was_down_reach_the_broker(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, nursery: trio.Nursery
) -> None:
    async with MQTTDriver(config) as driver:
        for name in ("stays", "leaves", "comes back", "changes"):
            await driver.subscribe(name, Log(), qos=1)
        broker.stop()
        await driver.wait_state(State.BACKING_OFF)
        for name in ("leaves", "comes back"):
            nursery.start_soon(driver.unsubscribe, name)
        await settled()
        nursery.start_soon(driver.subscribe, "comes back", Log())
        nursery.start_soon(driver.subscribe, "new", Log())

        async def change() -> None:
            await driver.subscribe("changes", Log(), qos=2)

        nursery.start_soon(change)
        await settled()
        broker.start()
        await driver.wait_live()
        asked = filters(connections(broker)[-1])
        assert sorted(asked[:2]) == ["-comes back", "-leaves"]
        assert sorted(asked[2:]) == ["changes", "comes back", "new"]
        assert sorted(broker.subscriptions("driver")) == ["changes", "comes back", "new", "stays"]
        assert broker.subscriptions("driver")["changes"].qos == 2


async def test_what_came_and_went_while_the_link_was_down_is_no_matter_for_the_broker(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, nursery: trio.Nursery
) -> None:
    async with MQTTDriver(config) as driver:
        broker.stop()
        await driver.wait_state(State.BACKING_OFF)
        with trio.move_on_after(1):
            await driver.subscribe("a", Log())
        broker.start()
        await driver.wait_live()
        assert not filters(connections(broker)[-1])


@pytest.mark.parametrize("kind", [Kind.SUBSCRIBE, Kind.SUBACK])
async def test_a_subscribe_that_was_not_answered_is_repeated(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, kind: Kind
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log())
        broker.faults.cut(kind, before=True)
        await driver.subscribe("b", Log())
        assert filters(connections(broker)[-1]) == ["b"]
        assert sorted(broker.subscriptions("driver")) == ["a", "b"]
        assert driver.generation == 2


@pytest.mark.parametrize("kind", [Kind.UNSUBSCRIBE, Kind.UNSUBACK])
async def test_an_unsubscribe_that_was_not_answered_is_repeated(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, kind: Kind
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log())
        broker.faults.cut(kind, before=True)
        await driver.unsubscribe("a")
        assert filters(connections(broker)[-1]) == ["-a"]
        assert not broker.subscriptions("driver")
        assert driver.generation == 2


async def test_what_the_broker_refused_is_asked_for_again(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        subscription = await driver.subscribe("a", Log())
        await driver.subscribe("b", Log())
        broker.faults.refuse_subscribe("a", times=1)
        broker.restart(keep_sessions=False)
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        assert subscription.degraded
        await reconnect(driver, broker)
        assert filters(connections(broker)[-1]) == ["a"]
        assert not subscription.degraded


async def test_a_session_that_has_expired_is_replaced_by_one_with_all_subscriptions(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(stable_config(broker, "5", session_expiry=60)) as driver:
        await driver.subscribe("a", Log())
        for outage, replayed in ((55, []), (65, ["a"])):
            broker.stop()
            await trio.sleep(outage)
            broker.start()
            await driver.wait_live()
            assert filters(connections(broker)[-1]) == replayed
    assert starts(broker) == [True, False, False, False]


async def test_a_broker_that_has_lost_its_sessions_gets_all_subscriptions(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log())
        await driver.subscribe("b", Log())
        broker.restart(keep_sessions=False)
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        assert filters(connections(broker)[-1]) == ["a", "b"]
        assert driver.status().counters["replays"] == 2


STAGES: dict[str, Callable[[Faults], Rule]] = {
    "CONNECT lost": lambda faults: faults.cut(Kind.CONNECT, before=True),
    "CONNACK lost": lambda faults: faults.cut(Kind.CONNACK, before=True),
    "after CONNACK": lambda faults: faults.cut(Kind.CONNACK),
    "test publish lost": lambda faults: faults.cut(Kind.PUBLISH, direction=Direction.IN, before=True),
    "its PUBACK lost": lambda faults: faults.cut(Kind.PUBACK, before=True),
    "SUBSCRIBE lost": lambda faults: faults.cut(Kind.SUBSCRIBE, before=True),
    "SUBACK lost": lambda faults: faults.cut(Kind.SUBACK, before=True),
    "second SUBACK lost": lambda faults: faults.cut(Kind.SUBACK, first=2, before=True),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lost", [True, False])
async def test_subscriptions_are_there_whatever_befalls_the_attempts_in_between(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, stage: str, lost: bool
) -> None:
    """An attempt that fails may leave a new session behind, which the next one finds present, and empty."""
    log = Log()
    async with MQTTDriver(config.evolve(replay_batch=1)) as driver:
        for name in ("a", "b", "c"):
            await driver.subscribe(name, log)
        broker.stop(keep_sessions=not lost)
        await driver.wait_state(State.BACKING_OFF)
        rule = STAGES[stage](broker.faults)
        broker.start()
        await driver.wait_live()
        rule.remove()
        assert driver.status().counters["failures"] == (lost or "SUB" not in stage)
        assert sorted(broker.subscriptions("driver")) == ["a", "b", "c"]
        for name in ("a", "b", "c"):
            broker.publish(name, name)
        await settled()
        assert sorted(log.payloads) == [b"a", b"b", b"c"]
        # All was well again, so the next one trusts the session.
        await reconnect(driver, broker)
        assert not filters(connections(broker)[-1])
    assert not broker.violations


async def test_a_state_view_is_complete_again_after_a_resumption(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    log = Log()
    broker.publish("panel/1", b"x", retain=True)
    broker.publish("panel/2", b"y", retain=True)
    async with (
        MQTTDriver(config) as driver,
        StateView(driver, "panel/+", complete=lambda topics: len(topics) == 2) as view,
    ):
        await driver.subscribe("other", log)
        await settled()
        assert view.fresh
        await reconnect(driver, broker)
        await settled()
        assert {topic: message.payload for topic, message in view.snapshot().items()} == {
            "panel/1": b"x",
            "panel/2": b"y",
        }
        assert filters(connections(broker)[-1]) == ["panel/+"]


async def test_whether_the_broker_sends_copies_is_asked_once_in_a_session(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, overlapping="copies")
    logs = Log(), Log()
    async with MQTTDriver(stable_config(broker, "3.1.1")) as driver:
        for log, name in zip(logs, ("a/+", "a/b"), strict=True):
            await driver.subscribe(name, log, qos=2)
        for number in range(3):
            broker.publish("a/b", b"%d" % number, qos=2)
            await settled()
            await reconnect(driver, broker)
            assert not filters(connections(broker)[-1])
        assert [log.payloads for log in logs] == 2 * [[b"0", b"1", b"2"]]
        assert sorted(broker.subscriptions("driver")) == ["a/+", "a/b"]
