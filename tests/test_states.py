"""The states of a driver: one table, a whole life through it, waiting for it, and callbacks at its edges."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, DriverClosedError, DriverConfig, MQTTDriver, State
from trio_mqtt_driver._states import TRANSITIONS
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **options)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_names_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


def test_every_state_but_new_can_be_reached_and_every_state_but_closed_can_be_left() -> None:
    reached = {State.NEW}
    while True:
        further = reached.union(*(TRANSITIONS[state] for state in reached))
        if further == reached:
            break
        reached = further
    assert reached == set(State)
    assert State.NEW not in set().union(*TRANSITIONS.values())
    assert [state for state, following in TRANSITIONS.items() if not following] == [State.CLOSED]


def test_from_every_state_the_driver_can_be_closed() -> None:
    for state, following in TRANSITIONS.items():
        assert State.CLOSING in following or state in (State.CLOSING, State.CLOSED)


@pytest.mark.parametrize("state", list(State), ids=[state.value for state in State])
async def test_a_transition_that_is_not_in_the_table_raises(
    broker: MemoryBroker, state: State, autojump_clock: MockClock
) -> None:
    await settled()
    for target in State:
        supervisor = MQTTDriver(config_for(broker))._supervisor
        supervisor._states.current = state
        if target in TRANSITIONS[state]:
            supervisor._to(target, "allowed")
            assert supervisor.state is target
        else:
            with pytest.raises(RuntimeError, match=f"illegal transition from {state} to {target}"):
                supervisor._to(target, "not allowed")
            assert supervisor.state is state


# -- a life -----------------------------------------------------------------------------------------------------------


def told(driver: MQTTDriver) -> list[str]:
    return [event.kind for event in driver.status().history]


ATTEMPT = ["connecting", "validating", "replaying", "live"]


async def test_the_states_of_a_whole_life_follow_the_table(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    driver = MQTTDriver(config_for(broker, backoff=BackoffConfig(pause_after=2)), rng=random.Random(1))
    assert driver.state is State.NEW
    async with driver:
        assert told(driver) == ATTEMPT
        await trio.sleep(100)
        broker.stop()
        await trio.sleep(20)
        assert told(driver) == [*ATTEMPT, "backing off", "connecting", "backing off", "connecting", "paused"]
        broker.start()
        await driver.wait_live()
        assert told(driver)[-5:] == ["paused", *ATTEMPT]
    assert told(driver)[-3:] == ["live", "closing", "closed"]
    assert told(driver)[-1] == driver.state.value
    states: list[State] = [State.NEW, *(State(kind) for kind in told(driver))]
    assert all(after in TRANSITIONS[before] for before, after in pairwise(states))


async def test_a_driver_that_is_left_early_closes_from_where_it_is(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    for kind, state in [(Kind.CONNACK, "connecting"), (Kind.PUBACK, "validating"), (Kind.SUBACK, "replaying")]:
        with broker.faults.hold(kind) as hold:
            async with (
                MQTTDriver(config_for(broker), start="background") as driver,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(driver.subscribe, "in", print)
                await broker.wait_for(partial(getattr, hold, "held"), "held packet")
                await settled()
                assert told(driver)[-1] == state
                nursery.cancel_scope.cancel()
            assert told(driver)[-3:] == [state, "closing", "closed"]


async def test_status_tells_state_time_and_what_comes_next_at_every_stage(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    driver = MQTTDriver(
        config_for(broker, backoff=BackoffConfig(start=8, pause_after=2, pause=50)), start="background"
    )
    new = driver.status()
    assert (new.state, new.since, new.generation, new.client_id) == (State.NEW, 0, 0, None)
    assert (new.next_attempt_in, new.last_error, new.protocol) == (None, None, None)
    broker.down = True
    async with driver:
        await settled()
        backing_off = driver.status()
        assert backing_off.state is State.BACKING_OFF
        assert backing_off.next_attempt_in is not None
        assert 0 < backing_off.next_attempt_in <= 8
        await trio.sleep(10)
        paused = driver.status()
        assert paused.state is State.PAUSED
        assert paused.next_attempt_in == pytest.approx(50 - paused.since)
        assert paused.failures == 2
        broker.start()
        await driver.wait_live()
        await trio.sleep(12)
        live = driver.status()
        assert (live.state, live.protocol, live.next_attempt_in, live.round_trip) == (State.LIVE, "5", None, 0)
        assert live.since == live.since_last_byte == pytest.approx(12)
        assert "Connection refused" in str(live.last_error)
        assert live.as_dict()["state"] == "live"
    closed = driver.status()
    assert (closed.state, closed.client_id, closed.in_flight) == (State.CLOSED, None, 0)


# -- wait_live --------------------------------------------------------------------------------------------------------


async def test_wait_live_returns_at_once_when_live_and_is_a_checkpoint(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        with trio.testing.assert_checkpoints():
            await driver.wait_live()


async def test_wait_live_wakes_all_who_wait(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    woken: list[float] = []
    broker.down = True

    async def wait(driver: MQTTDriver) -> None:
        await driver.wait_live()
        woken.append(trio.current_time())

    async with MQTTDriver(config_for(broker), start="background") as driver, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait, driver)
        await trio.sleep(5)
        broker.start()
        driver.force_reconnect()
    assert woken == [5, 5, 5]


async def test_wait_live_of_a_driver_that_is_left_raises(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.down = True
    raised: list[BaseException] = []

    async def wait(driver: MQTTDriver) -> None:
        try:
            await driver.wait_live()
        except DriverClosedError as exc:
            raised.append(exc)

    driver = MQTTDriver(config_for(broker), start="background")
    with pytest.raises(DriverClosedError, match="not entered yet"):
        await driver.wait_live()
    async with trio.open_nursery() as nursery, driver:
        nursery.start_soon(wait, driver)
        await settled()
    assert len(raised) == 1
    with pytest.raises(DriverClosedError, match="was left"):
        await driver.wait_live()


# -- edges ------------------------------------------------------------------------------------------------------------


async def test_callbacks_are_called_at_edges_only(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    edges: list[tuple[bool, State]] = []
    async with MQTTDriver(config_for(broker)) as driver:
        driver.register_connection_callback(lambda up: edges.append((up, driver.state)))
        await settled()
        assert edges == []  # not at registration
        await trio.sleep(100)
        broker.stop()
        await trio.sleep(300)  # many attempts, one edge
        assert edges == [(False, State.BACKING_OFF)]
        broker.start()
        await driver.wait_live()
        assert edges == [(False, State.BACKING_OFF), (True, State.LIVE)]
        edges.clear()
    assert edges == []  # leaving is no loss


async def test_the_first_connection_is_an_edge_too(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    edges: list[bool] = []
    driver = MQTTDriver(config_for(broker))
    driver.register_connection_callback(edges.append)
    async with driver:
        assert edges == [True]


async def test_subscriptions_are_replayed_on_every_connect_and_callbacks_called_on_edges(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    edges: list[bool] = []
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", print)
        driver.register_connection_callback(edges.append)
        for _ in range(3):
            await trio.sleep(100)
            broker.drop()
            await settled()
            await driver.wait_live()
            assert list(broker.subscriptions(str(driver.client_id))) == ["in"]
        assert edges == [False, True] * 3
        assert driver.status().counters["replays"] == 3


async def test_the_subscriptions_are_there_when_the_callback_says_up(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    seen: list[list[str]] = []

    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", print)
        driver.register_connection_callback(
            lambda up: seen.append(list(broker.subscriptions(str(driver.client_id)))) if up else None
        )
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
    assert seen == [["in"]]


async def test_a_failing_callback_hurts_nobody(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    edges: list[bool] = []

    def fail(up: bool) -> None:
        raise ValueError(up)

    async with MQTTDriver(config_for(broker)) as driver:
        driver.register_connection_callback(fail)
        driver.register_connection_callback(edges.append)
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        assert edges == [False, True]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("connection callback" in record.getMessage() and record.exc_info for record in errors)


async def test_the_same_callback_registered_twice_is_two(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    edges: list[bool] = []
    async with MQTTDriver(config_for(broker)) as driver:
        first = driver.register_connection_callback(edges.append)
        driver.register_connection_callback(edges.append)
        first()
        first()
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
    assert edges == [False, True]


async def test_unregistering_inside_a_callback_takes_effect_at_once(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    calls: list[str] = []
    registered: dict[str, Callable[[], None]] = {}

    def first(up: bool) -> None:
        calls.append(f"first {up}")
        registered["first"]()
        registered["second"]()

    async with MQTTDriver(config_for(broker)) as driver:
        registered["first"] = driver.register_connection_callback(first)
        registered["second"] = driver.register_connection_callback(lambda up: calls.append(f"second {up}"))
        driver.register_connection_callback(lambda up: calls.append(f"third {up}"))
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
    assert calls == ["first False", "third False", "third True"]


async def test_a_callback_registered_inside_a_callback_hears_the_next_edge(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    late: list[bool] = []
    async with MQTTDriver(config_for(broker)) as driver:
        once: list[Callable[[], None]] = []

        def register(_: bool) -> None:
            driver.register_connection_callback(late.append)
            once[0]()

        once.append(driver.register_connection_callback(register))
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
    assert late == [True]


async def test_a_callback_may_ask_the_driver_for_things(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    """It runs inside the transition: what it calls must find the new state."""
    async with MQTTDriver(config_for(broker)) as driver:

        def announce(up: bool) -> None:
            driver.publish_nowait("status", "online" if up else "offline", qos=1)

        driver.register_connection_callback(announce)
        await trio.sleep(100)
        broker.drop()
        await settled()
        await driver.wait_live()
        await settled()
        assert [message.payload for message in broker.published if message.topic == "status"] == [
            b"offline",
            b"online",
        ]
        assert driver.status().queued == 0


async def test_an_edge_inside_an_edge_is_heard_by_all_in_order(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    heard: list[bool] = []
    async with MQTTDriver(config_for(broker)) as driver:
        todo = 3

        def again(up: bool) -> None:
            nonlocal todo
            if up and todo:
                todo -= 1
                driver.force_reconnect(even_if_live=True)

        driver.register_connection_callback(again)
        driver.register_connection_callback(heard.append)
        driver.force_reconnect(even_if_live=True)
        with trio.fail_after(60):
            await broker.wait_for(lambda: len(broker.connects) == 5, "fifth CONNECT")
            await driver.wait_live()
        assert driver.generation == 5
    assert heard == [False, True] * 4
