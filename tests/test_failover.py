"""Several endpoints: when the driver goes to another one, what goes with it, and what it does when all are dead.

How it comes back is in ``test_way_back.py``, where brokers send it in ``test_references.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.several import Several, at, place, told
from trio_mqtt_driver import (
    Availability,
    FailoverConfig,
    Message,
    MQTTDriver,
    State,
)
from trio_mqtt_driver.testing import Kind

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def several(nursery: trio.Nursery) -> Several:
    return Several(nursery)


def stay(**options: Any) -> FailoverConfig:
    """No test connections."""
    return FailoverConfig(return_after=float("inf"), **options)


# -- going over -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_after", [1, 2, 3])
async def test_after_so_many_failures_the_next_endpoint_has_its_turn(
    several: Several, fail_after: int, autojump_clock: MockClock
) -> None:
    several["a"].stop()
    async with MQTTDriver(several.config(failover=stay(fail_after=fail_after))) as driver:
        assert several.order == "a" * fail_after + "b"
        assert place(driver) == "b"
        a, b = driver.status().endpoints
        assert (a.endpoint, a.failures, a.links, a.live_for) == ("mqtt://a:1883", fail_after, 0, None)
        assert a.cool_down_left > 0
        assert "memory broker is down" in str(a.last_error)
        assert (b.endpoint, b.failures, b.links, b.live_for, b.last_error) == ("mqtt://b:1883", 0, 1, 0, None)
    several.check()


async def test_subscriptions_handlers_queued_messages_and_availability_move_along(
    several: Several, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []
    edges: list[bool] = []

    def take(message: Message[bytes]) -> None:
        got.append(message.payload)

    async with MQTTDriver(several.config(failover=stay(), availability=Availability(topic="here"))) as driver:
        driver.register_connection_callback(edges.append)
        await driver.subscribe("in/#", take, qos=1)
        await trio.sleep(60)
        with several["a"].faults.hold(Kind.PUBACK):
            receipt = driver.publish_nowait("out", b"in flight", qos=1)
            await settled()
            several["a"].stop()
        late = driver.publish_nowait("out", b"queued", qos=2)
        async with driver.subscription("late/#") as messages:
            assert place(driver) == "b"
            await receipt.wait()
            await late.wait()
            several["b"].publish("in/x", b"from b", qos=1)
            several["b"].publish("late/x", b"late", qos=1)
            assert (await messages.__anext__()).payload == b"late"
        await settled()
        assert got == [b"from b"]
        assert edges == [False, True]
        assert [one.payload for one in several["b"].published if one.topic == "out"] == [b"in flight", b"queued"]
        assert several["b"].retained["here"].payload == b"online"
        assert several["b"].connects[0].will is not None
    several.check()


async def test_a_stable_link_that_is_lost_is_looked_for_where_it_was(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config()) as driver:
        for _ in range(5):
            await trio.sleep(60)
            several["a"].drop()
            await settled()
        await driver.wait_live()
        assert several.order == "a" * 6


async def test_a_link_is_stable_also_if_a_subscription_waits_for_its_answer_just_then(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config(subscribe_timeout=10)) as driver:
        for _ in range(3):
            since = trio.current_time()
            await trio.sleep(25)
            several["a"].silence()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.subscribe, f"a/{since}", print)
                await driver.wait_state(State.BACKING_OFF)
                assert trio.current_time() - since >= 30
                await driver.wait_live()
        assert several.order == "a" * 4
        assert driver.status().endpoints[0].failures == 0


async def test_a_broker_that_accepts_and_drops_is_left(several: Several, autojump_clock: MockClock) -> None:
    async with MQTTDriver(several.config(), start="background") as driver:
        for _ in range(2):
            await driver.wait_live()
            assert place(driver) == "a"
            await trio.sleep(10)
            several["a"].drop()
            await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        assert several.order == "aab"
    several.check()


async def test_where_the_driver_is_told_while_it_has_no_connection(
    several: Several, autojump_clock: MockClock
) -> None:
    several["a"].stop()
    several.swallowed.add("b")
    async with MQTTDriver(several.config(), start="background") as driver:
        await settled()
        assert (driver.state, place(driver)) == (State.BACKING_OFF, "a")
        await trio.sleep(9)
        assert (driver.state, place(driver)) == (State.CONNECTING, "b")


# -- when nothing works -----------------------------------------------------------------------------------------------


def kill(several: Several, name: str, how: str) -> None:
    several[name].stop()
    if how == "swallowed":
        several.swallowed.add(name)


def revive(several: Several, name: str) -> None:
    several[name].start()
    several.swallowed.discard(name)


@pytest.mark.parametrize("how", ["refused", "swallowed"])
@pytest.mark.parametrize("names", ["a", "ab", "abc"])
async def test_dead_brokers_are_hammered_no_more_than_a_single_one(
    nursery: trio.Nursery, names: str, how: str, autojump_clock: MockClock
) -> None:
    several = Several(nursery, names)
    async with MQTTDriver(several.config()) as driver:
        await trio.sleep(60)
        begin = len(several.dialled)
        for name in names:
            kill(several, name, how)
        await trio.sleep(3600)
        assert any("reconnect paused after" in text for text in told(driver, "paused"))
        for name in names:
            times = [one.at for one in several.dialled[begin:] if one.name == name]
            # One for each pause, and before the first of them some more.
            assert len(times) <= 3600 / 30 + 8
            assert len(times) >= 3600 / (30 + 11 * len(names)) - 1
            for later, earlier in zip(times[8:], times[7:], strict=False):
                assert later - earlier >= 29
    several.check()


class Unlucky(random.Random):
    """Every delay is the longest that it may be."""

    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


@pytest.mark.parametrize("luck", [random.Random, Unlucky])
@pytest.mark.parametrize("how", ["refused", "swallowed"])
async def test_back_within_a_minute_of_the_return_of_any_one(
    several: Several, how: str, luck: type[random.Random], autojump_clock: MockClock
) -> None:
    lengths = [*range(5, 200, 6), 1000, 1013, 1027, 1031, 1042]
    async with MQTTDriver(several.config(), rng=luck(1)) as driver:
        for number, length in enumerate(lengths):
            for name in "ab":
                kill(several, name, how)
            await trio.sleep(length)
            revive(several, "ab"[number % 2])
            with trio.fail_after(60):
                await driver.wait_live()
            for name in "ab":
                revive(several, name)
            await trio.sleep(40)
    several.check()


async def test_two_that_accept_and_drop_keep_the_least_interval(several: Several, autojump_clock: MockClock) -> None:
    """However many there are, a link that is lost is followed by the next one after ``min_interval``."""
    async with MQTTDriver(several.config(), start="background") as driver:
        began: list[float] = []
        driver.register_rebuild_callback(lambda _: began.append(trio.current_time()))
        for _ in range(30):
            await driver.wait_live()
            for name in "ab":
                several[name].drop()
            await driver.wait_state(State.BACKING_OFF, State.PAUSED)
        assert all(later - earlier >= 4.99 for later, earlier in zip(began[1:], began, strict=False))
        assert {one.name for one in several.dialled} == {"a", "b"}


# -- commands ---------------------------------------------------------------------------------------------------------


async def on_fallback(several: Several, driver: MQTTDriver) -> None:
    await driver.wait_live()
    several["a"].stop()
    await settled()
    await driver.wait_live()
    assert place(driver) == "b"
    several.dialled.clear()


def reconnect(driver: MQTTDriver) -> None:
    driver.force_reconnect("asked for", even_if_live=True)


def pause_and_resume(driver: MQTTDriver) -> None:
    driver.pause("asked for")
    driver.resume()


def other_settings(driver: MQTTDriver) -> None:
    driver.apply_settings(driver.config.evolve(keep_alive=10))


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("command", [reconnect, pause_and_resume, other_settings], ids=lambda one: one.__name__)
async def test_who_asks_for_another_connection_gets_the_primary_if_it_can_be_had(
    several: Several, command: Callable[[MQTTDriver], None], alive: bool, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config()) as driver:
        await on_fallback(several, driver)
        if alive:
            several["a"].start()
        command(driver)
        await driver.wait_live()
        assert several.order == ("a" if alive else "aab")
    several.check()


async def test_other_settings_bring_other_endpoints(several: Several, autojump_clock: MockClock) -> None:
    async with MQTTDriver(several.config()) as driver:
        await on_fallback(several, driver)
        driver.apply_settings(driver.config.evolve(endpoint=at("b"), fallbacks=()))
        await driver.wait_live()
        await trio.sleep(1000)
        assert several.order == "b"
        assert [one.endpoint for one in driver.status().endpoints] == ["mqtt://b:1883"]


async def test_reconnect_in_the_cool_down_of_all(several: Several, autojump_clock: MockClock) -> None:
    async with MQTTDriver(several.config()) as driver:
        several["a"].stop()
        several["b"].stop()
        await driver.wait_state(State.PAUSED)
        assert all(one.failures for one in driver.status().endpoints)
        several.dialled.clear()
        several["a"].start()
        driver.force_reconnect("the cable is in again")
        with trio.fail_after(0.1):
            await driver.wait_live()
        assert several.order == "a"
