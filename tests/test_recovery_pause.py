"""Nothing is permanent: a pause ends by itself, at a success, by changed settings and by ``force_reconnect()``."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, DriverClosedError, DriverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

REFUSED = "TransportError: connecting to mqtt://memory:1883: Connection refused: the memory broker is down"


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **options)


async def paused(driver: MQTTDriver) -> None:
    """Return when the circuit breaker is open."""
    with trio.fail_after(1000):
        await driver.wait_state(State.PAUSED)


async def live(driver: MQTTDriver, within: float) -> None:
    await settled()
    with trio.fail_after(within):
        await driver.wait_live()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trio_mqtt_driver"]


async def test_after_so_many_failures_the_driver_pauses_and_says_so(
    broker: MemoryBroker, dialer: Dialer, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    broker.down = True
    backoff = BackoffConfig(pause_after=8, pause=60)
    async with MQTTDriver(config_for(broker, open_stream=dialer, backoff=backoff), start="background") as driver:
        await paused(driver)
        status = driver.status()
        assert len(dialer.attempts) == 8
        assert status.failures == 8
        assert status.next_attempt_in == pytest.approx(60)
        said = "driver: reconnect paused after 8 failures without a stable link"
        assert [line for line in lines(caplog) if "paused" in line] == [
            f"{said}, last error: {REFUSED}, next trial in 60 s"
        ]


async def test_a_pause_ends_by_itself_with_one_trial_after_another(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    broker.down = True
    backoff = BackoffConfig(pause_after=3, pause=60)
    async with MQTTDriver(config_for(broker, open_stream=dialer, backoff=backoff), start="background") as driver:
        await paused(driver)
        begin = trio.current_time()
        await trio.sleep(601)
        assert [round(at - begin) for at in dialer.attempts[3:]] == list(range(60, 601, 60))
        broker.start()
        await live(driver, within=60)
        await trio.sleep(31)
        assert driver.status().failures == 0


# -- force_reconnect --------------------------------------------------------------------------------------------------


async def test_force_reconnect_ends_a_back_off_at_once_and_clears_the_failures(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    backoff = BackoffConfig(start=30, pause_after=3)
    dialer.errors = [OSError("no route")] * 2
    async with MQTTDriver(config_for(broker, open_stream=dialer, backoff=backoff), start="background") as driver:
        await settled()
        assert driver.state is State.BACKING_OFF
        assert driver.force_reconnect() is True
        await settled()
        assert dialer.attempts == [0, 0]
        assert driver.status().failures == 1
        driver.force_reconnect()
        await live(driver, within=0.1)
        assert dialer.attempts == [0, 0, 0]


async def test_force_reconnect_while_an_attempt_is_made_makes_the_next_one_immediate(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    with broker.faults.hold(Kind.CONNACK):
        async with MQTTDriver(config_for(broker, protocol="5"), start="background") as driver:
            await broker.wait_for(lambda: broker.connects, "CONNECT")
            await trio.sleep(1)
            assert driver.state is State.CONNECTING
            assert driver.force_reconnect() is True
            assert driver.state is State.CONNECTING  # The attempt that is under way may still succeed.
            await trio.sleep(9.5)
            assert len(broker.connects) == 2


async def test_force_reconnect_is_a_logged_no_op_when_live(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO)
    async with MQTTDriver(config_for(broker)) as driver:
        caplog.clear()
        assert driver.force_reconnect("why not") is False
        await settled()
        assert driver.generation == 1
        assert lines(caplog) == ["driver: reconnect asked for (why not), but the link is live: nothing to do"]


async def test_force_reconnect_replaces_a_live_link_if_told_so(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    edges: list[bool] = []
    async with MQTTDriver(config_for(broker)) as driver:
        driver.register_connection_callback(edges.append)
        old = driver.client_id
        assert driver.force_reconnect(even_if_live=True) is True
        assert driver.state is State.BACKING_OFF
        await live(driver, within=0.1)
        assert driver.generation == 2
        assert driver.client_id != old
        goodbyes = [sender for sender, packet in broker.received if packet.kind is Kind.DISCONNECT]
        assert goodbyes == [old]
    assert edges == [False, True]


async def test_force_reconnect_twice_in_a_row_reconnects_once(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        driver.force_reconnect(even_if_live=True)
        driver.force_reconnect(even_if_live=True)
        driver.force_reconnect()
        await live(driver, within=0.1)
        await trio.sleep(60)
        assert driver.generation == 2


async def test_force_reconnect_gets_away_from_a_half_open_link(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, disconnect_timeout=2)) as driver:
        broker.silence()
        driver.force_reconnect(even_if_live=True)
        await live(driver, within=2.1)
        assert driver.generation == 2


async def test_force_reconnect_does_not_wait_for_the_rate_limit(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for generation in range(2, 10):
            driver.force_reconnect(even_if_live=True)
            await live(driver, within=0.1)
            assert driver.generation == generation
        assert trio.current_time() == 0


async def test_force_reconnect_and_apply_settings_need_an_open_driver(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    config = config_for(broker)
    driver = MQTTDriver(config)
    with pytest.raises(DriverClosedError, match="not entered yet"):
        driver.force_reconnect()
    with pytest.raises(DriverClosedError, match="not entered yet"):
        driver.apply_settings(config)
    async with driver:
        pass
    with pytest.raises(DriverClosedError, match="was left"):
        driver.force_reconnect()
    with pytest.raises(DriverClosedError, match="was left"):
        driver.apply_settings(config)


# -- apply_settings ---------------------------------------------------------------------------------------------------


async def in_state(driver: MQTTDriver, broker: MemoryBroker, state: State) -> None:
    """Bring a driver that was just started there."""
    holds = {State.CONNECTING: Kind.CONNACK, State.VALIDATING: Kind.PUBACK, State.REPLAYING: Kind.SUBACK}
    if state in holds:
        broker.faults.hold(holds[state])
    elif state in (State.BACKING_OFF, State.PAUSED):
        broker.down = True
    if state is State.PAUSED:
        await paused(driver)
    elif state is State.LIVE:
        await driver.wait_live()
    await settled()
    assert driver.state is state


STATES = [
    State.CONNECTING,
    State.VALIDATING,
    State.REPLAYING,
    State.LIVE,
    State.BACKING_OFF,
    State.PAUSED,
]


@pytest.mark.parametrize("state", STATES, ids=[state.value for state in STATES])
async def test_changed_settings_take_effect_at_once(
    nursery: trio.Nursery,
    broker: MemoryBroker,
    caplog: pytest.LogCaptureFixture,
    state: State,
    autojump_clock: MockClock,
) -> None:
    other = MemoryBroker(nursery, users={"me": "secret"})
    config = config_for(broker)
    got: list[bytes] = []
    async with MQTTDriver(config, start="background") as driver, trio.open_nursery() as tasks:
        tasks.start_soon(lambda: driver.subscribe("in", lambda message: got.append(message.payload)))
        await in_state(driver, broker, state)
        receipt = driver.publish_nowait("out", b"kept", qos=1) if state is not State.LIVE else None
        now = trio.current_time()
        driver.apply_settings(config_for(other, client_id="other", username="me", password="secret"))
        await live(driver, within=0.1)
        assert trio.current_time() == now
        assert other.clients == [driver.client_id]
        assert str(driver.client_id).startswith("other_")
        assert not broker.clients
        if receipt is not None:
            await receipt.wait()
            assert [message.payload for message in other.published if message.topic == "out"] == [b"kept"]
        await other.wait_for_subscription("in")
        other.publish("in", b"here")
        await settled()
    assert got == [b"here"]
    assert not any("secret" in line for line in lines(caplog))
    assert not other.violations


async def test_changed_settings_heal_an_outage_while_paused(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.down = True
    async with MQTTDriver(config_for(broker), start="background") as driver:
        await paused(driver)
        broker.start()
        driver.apply_settings(driver.config.evolve(keep_alive=7))
        assert driver.status().failures == 0
        await live(driver, within=0.1)
    assert broker.connects[0].keep_alive == 7


async def test_changed_settings_forget_a_downgrade(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.options.versions = (4,)
    async with MQTTDriver(config_for(broker)) as driver:
        assert driver.status().protocol == "3.1.1"
        broker.options.versions = (4, 5)
        driver.force_reconnect(even_if_live=True)
        await live(driver, within=1)
        assert driver.status().protocol == "3.1.1"
        driver.apply_settings(driver.config)
        await live(driver, within=1)
        assert driver.status().protocol == "5"


# -- what is said -----------------------------------------------------------------------------------------------------


async def test_every_transition_is_logged_once_in_plain_words(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO)
    backoff = BackoffConfig(pause_after=2, pause=60, start=10, factor=1, maximum=10)
    config = config_for(broker, backoff=backoff, wall_clock=trio.current_time)
    async with MQTTDriver(config, rng=random.Random(1)) as driver:
        await trio.sleep(100)
        broker.stop()
        await paused(driver)
        broker.start()
        await live(driver, within=61)
        told = driver.status().history
        ids = [connect.client_id for connect in broker.connects]
    connected = "connected to mqtt://memory:1883 with MQTT 5 as"
    probed = "acknowledged in 0.000 s; replaying 0 subscriptions"
    assert [event.text for event in told] == [
        "connecting to mqtt://memory:1883 (attempt 1)",
        f"{connected} {ids[0]!r}",
        f"test publish to 'trio_mqtt_driver/probe/{ids[0]}' {probed}",
        "live: generation 1, 0 subscriptions, 0 messages waiting",
        "connection lost: ConnectionLostError: the broker closed the connection; next attempt at once",
        "connecting to mqtt://memory:1883 (attempt 1)",
        f"attempt failed: {REFUSED}; next attempt in 2.2 s",
        "connecting to mqtt://memory:1883 (attempt 2)",
        f"reconnect paused after 2 failures without a stable link, last error: {REFUSED}, next trial in 60 s",
        "connecting to mqtt://memory:1883 (attempt 3)",
        f"{connected} {ids[1]!r}",
        f"test publish to 'trio_mqtt_driver/probe/{ids[1]}' {probed}",
        "live: generation 2, 0 subscriptions, 0 messages waiting",
    ]
    assert lines(caplog) == [f"driver: {event.text}" for event in told] + ["driver: closing", "driver: closed"]
