"""pause() and resume(): from every state, from handlers and callbacks, against everything else that moves the link."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, DriverClosedError, DriverConfig, Endpoint, Message, MQTTDriver, State, Will
from trio_mqtt_driver.testing import Disconnect, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked
DAY = 24 * 3600


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def config(broker: MemoryBroker) -> DriverConfig:
    return memory_config(broker)


@asynccontextmanager
async def in_state(broker: MemoryBroker, config: DriverConfig, state: State) -> AsyncGenerator[MQTTDriver, None]:
    """A driver that stays in ``state`` until something happens to it."""
    held = {State.CONNECTING: Kind.CONNACK, State.VALIDATING: Kind.PUBACK, State.REPLAYING: Kind.SUBACK}
    if state is State.REPLAYING:
        async with MQTTDriver(config) as driver:
            await driver.subscribe("a/#", lambda _message: None)
            with broker.faults.hold(Kind.SUBACK, times=1):
                broker.drop()
                await driver.wait_state(State.REPLAYING)
                await settled()
                yield driver
        return
    if state in (State.BACKING_OFF, State.PAUSED):
        pause_after = 1 if state is State.PAUSED else 1000
        config = config.evolve(backoff=BackoffConfig(start=10, maximum=10, pause=DAY, pause_after=pause_after))
        broker.stop()
    async with MQTTDriver(config, start="background") as driver:
        if state in held:
            with broker.faults.hold(held[state], times=1):
                await driver.wait_state(state)
                await settled()
                yield driver
        else:
            await driver.wait_state(state)
            broker.start()
            yield driver


STATES = [state for state in State if state not in (State.NEW, State.CLOSING, State.CLOSED)]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.value)
async def test_from_every_state(
    broker: MemoryBroker, config: DriverConfig, state: State, autojump_clock: MockClock
) -> None:
    async with in_state(broker, config, state) as driver:
        assert driver.state is state
        driver.pause("maintenance")
        await driver.wait_state(State.PAUSED)
        await settled()
        connects = len(broker.connects)
        await trio.sleep(DAY)
        assert driver.state is State.PAUSED
        assert len(broker.connects) == connects
        assert not broker.clients
        assert driver.resume()
        await driver.wait_live()
        await driver.publish("a/b", b"x", qos=1)
    assert not broker.violations
    assert driver.status().next_attempt_in is None


async def test_before_the_first_attempt(broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock) -> None:
    driver = MQTTDriver(config, start="background")
    found: list[State] = []

    async def pause() -> None:
        await trio.lowlevel.checkpoint()
        found.append(driver.state)
        driver.pause()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause)
        async with driver:
            await driver.wait_state(State.PAUSED)
            await trio.sleep(DAY)
            assert not broker.connects
            driver.resume()
            await driver.wait_live()
    assert found == [State.NEW]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.value)
async def test_resumed_at_once(
    broker: MemoryBroker, config: DriverConfig, state: State, autojump_clock: MockClock
) -> None:
    async with in_state(broker, config, state) as driver:
        driver.pause()
        assert driver.resume()
        with trio.fail_after(1):
            await driver.wait_live()
        await settled()
        assert len(broker.clients) == 1
    assert not broker.violations


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.value)
async def test_left_while_pausing(
    broker: MemoryBroker, config: DriverConfig, state: State, autojump_clock: MockClock
) -> None:
    async with in_state(broker, config, state) as driver:
        driver.pause()
    assert driver.state is State.CLOSED


async def test_left_while_paused(config: DriverConfig, autojump_clock: MockClock) -> None:
    with trio.fail_after(1):
        async with MQTTDriver(config) as driver:
            driver.pause()
            await settled()
    assert driver.state is State.CLOSED
    for method in (driver.pause, driver.resume):
        with pytest.raises(DriverClosedError):
            method()


async def test_a_live_link_ends_with_disconnect_and_no_will(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    edges: list[bool] = []
    async with MQTTDriver(config.evolve(will=Will(topic="here", payload=b"offline"))) as driver:
        driver.register_connection_callback(edges.append)
        driver.pause("maintenance")
        assert driver.state is State.PAUSED
        await broker.wait_for(lambda: not broker.clients, "end of the connection")
        assert isinstance(broker.received[-1][1], Disconnect)
        assert edges == [False]
        assert driver.status().history[-1].text == "paused: maintenance"
        assert driver.status().counters["losses"] == 0
        driver.resume()
        await driver.wait_live()
        assert edges == [False, True]
    assert "here" not in [message.topic for message in broker.published]


async def test_publishes_and_subscriptions_wait(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(config) as driver, trio.open_nursery() as nursery:
        await driver.subscribe("a/#", lambda message: got.append(message.payload), qos=1)
        driver.pause()
        nursery.start_soon(lambda: driver.publish("a/1", b"kept", qos=1))
        await trio.sleep(DAY)
        assert not got
        driver.resume()
        await broker.wait_for_publish("a/1")
        await settled()
        assert got == [b"kept"]


async def test_only_the_first_reason_is_a_transition(
    config: DriverConfig, broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        for reason in ("one", "two"):
            driver.pause(reason)
            await settled()
        kinds = [(event.kind, event.text) for event in driver.status().history][-2:]
        assert kinds == [("paused", "paused: one"), ("pause", "pausing: two")]
        assert driver.resume()
        assert driver.resume()  # not yet live: nothing is lost by asking again
        await driver.wait_live()
        assert not driver.resume()
        await settled()
        assert driver.generation == 2


async def test_force_reconnect_ends_it(config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:
        driver.pause()
        await settled()
        assert driver.force_reconnect("enough")
        await driver.wait_live()


async def test_settings_wait_for_the_end_of_the_pause(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:
        driver.pause()
        driver.apply_settings(config.evolve(client_id="other", endpoint=Endpoint(host="elsewhere", port=1)))
        await trio.sleep(DAY)
        assert driver.state is State.PAUSED
        driver.resume()
        await driver.wait_live()
        assert broker.clients[0].startswith("other_reconnect_")
        assert driver.status().endpoint == "mqtt://elsewhere:1"


async def test_from_a_handler(broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config) as driver:

        async def handle(message: Message[str]) -> None:
            await trio.lowlevel.checkpoint()
            driver.pause(message.value)

        await driver.subscribe("command", handle, str, qos=1)
        broker.publish("command", "told to", qos=1)
        await driver.wait_state(State.PAUSED)
        await settled()
        driver.resume()
        await driver.wait_live()


@pytest.mark.parametrize("edge", [True, False])
async def test_from_a_connection_callback(
    broker: MemoryBroker, config: DriverConfig, edge: bool, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config) as driver:

        def on_link(up: bool) -> None:
            if up is edge:
                unregister()
                driver.pause()

        unregister = driver.register_connection_callback(on_link)
        broker.drop()
        await driver.wait_state(State.PAUSED)
        await trio.sleep(DAY)
        assert not broker.clients
        driver.resume()
        await driver.wait_live()


async def test_pause_and_resume_in_turns_never_make_two_connections(
    broker: MemoryBroker, config: DriverConfig, autojump_clock: MockClock
) -> None:
    most = 0

    def count() -> bool:
        nonlocal most
        most = max(most, len(broker.clients))
        return False

    async with trio.open_nursery() as nursery, MQTTDriver(config) as driver:
        nursery.start_soon(lambda: broker.wait_for(count, timeout=10 * DAY))
        for steps in range(60):
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            driver.pause()
            for _ in range(steps % 7):
                await trio.lowlevel.checkpoint()
            driver.resume()
        await driver.wait_live()
        await driver.publish("a", b"x", qos=1)
        nursery.cancel_scope.cancel()
    assert most == 1
    assert not broker.violations
