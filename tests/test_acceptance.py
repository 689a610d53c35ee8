"""What the driver promises about outages, in virtual time, with the default settings."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.network import KINDS, Network
from tests.peers import memory_config
from trio_mqtt_driver import DriverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import MemoryBroker

BACK_WITHIN = 60.0


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def config_for(broker: MemoryBroker, network: Network) -> DriverConfig:
    return memory_config(broker, open_stream=network.open_stream)


async def check_works(driver: MQTTDriver, broker: MemoryBroker) -> None:
    """Messages go out, and the subscription of ``in`` is there."""
    await driver.publish("out", b"again", qos=1)
    assert driver.state is State.LIVE
    assert "in" in broker.subscriptions(str(driver.client_id))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("outage", [10, 60])
async def test_an_outage_is_over_within_a_minute_of_the_networks_return(
    broker: MemoryBroker, outage: float, seed: int, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(memory_config(broker), rng=random.Random(seed)) as driver:
        await driver.subscribe("in", lambda _: None, qos=1)
        await trio.sleep(100)
        broker.stop()
        meanwhile = driver.publish_nowait("out", b"meanwhile", qos=1)
        await trio.sleep(outage)
        assert driver.state is not State.LIVE
        broker.start()
        with trio.fail_after(BACK_WITHIN):
            await driver.wait_live()
            await check_works(driver, broker)
        assert driver.generation == (await meanwhile.wait()).generation == 2


@pytest.mark.parametrize("seed", range(5))
async def test_three_minutes_open_the_breaker_and_the_link_is_back_within_a_minute_all_the_same(
    broker: MemoryBroker, seed: int, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(memory_config(broker), rng=random.Random(seed)) as driver:
        await driver.subscribe("in", lambda _: None, qos=1)
        await trio.sleep(100)
        broker.stop()
        with trio.fail_after(180):
            await driver.wait_state(State.PAUSED)
        await trio.sleep_until(280)
        assert driver.state is State.PAUSED
        broker.start()
        with trio.fail_after(BACK_WITHIN):
            await driver.wait_live()
            await check_works(driver, broker)
        assert driver.generation == 2


async def test_settings_changed_while_paused_take_effect_at_once(
    broker: MemoryBroker, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    other = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("in", lambda _: None, qos=1)
        broker.stop()
        meanwhile = driver.publish_nowait("out", b"meanwhile", qos=1)
        await driver.wait_state(State.PAUSED)
        await trio.sleep(7)
        now = trio.current_time()
        driver.apply_settings(memory_config(other))
        await driver.wait_live()
        assert trio.current_time() == now
        await meanwhile.wait()
        assert [message.payload for message in other.published if message.topic == "out"] == [b"meanwhile"]
        await check_works(driver, other)


async def test_a_reconnect_by_hand_while_paused_is_made_at_once(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(memory_config(broker, open_stream=dialer)) as driver:
        await driver.subscribe("in", lambda _: None, qos=1)
        broker.stop()
        await driver.wait_state(State.PAUSED)
        await trio.sleep(3)
        broker.start()
        now = trio.current_time()
        assert driver.force_reconnect("the button was pressed") is True
        assert driver.status().failures == 0
        with trio.fail_after(0.1):
            await driver.wait_live()
        assert dialer.attempts[-1] == now
        assert any("the button was pressed" in event.text for event in driver.status().history)
        await check_works(driver, broker)


# -- with every seed --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_the_default_back_off_keeps_the_minute_with_every_seed(
    broker: MemoryBroker, kind: Callable[[Network, float], Awaitable[None]], autojump_clock: MockClock
) -> None:
    late: list[str] = []
    for seed in range(60):
        rng = random.Random(seed)
        network = Network(broker, rng)
        length = math.exp(rng.uniform(math.log(0.1), math.log(4 * 3600)))
        async with MQTTDriver(config_for(broker, network), rng=random.Random(seed)) as driver:
            await driver.subscribe("in", lambda _: None, qos=1)
            await trio.sleep(100)
            await kind(network, length)
            end = trio.current_time()
            await driver.publish("out", b"again", qos=1)
            await check_works(driver, broker)
            if trio.current_time() > end + BACK_WITHIN:
                late.append(f"seed {seed}: back {trio.current_time() - end} s after an outage of {length} s")
    assert not late


async def test_the_worst_moment_for_the_network_to_return_is_just_after_an_attempt_has_begun(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """The attempt is lost in the old network and times out, and then the breaker's pause is still to come."""
    network = Network(broker, random.Random(1))
    async with MQTTDriver(config_for(broker, network)) as driver, trio.open_nursery() as nursery:
        await driver.subscribe("in", lambda _: None, qos=1)
        nursery.start_soon(network.cable_cut_and_swallowed, math.inf)
        driver.publish_nowait("out", qos=1)
        await driver.wait_state(State.PAUSED)
        await driver.wait_state(State.CONNECTING)
        nursery.cancel_scope.cancel()
        end = trio.current_time()
        with trio.fail_after(BACK_WITHIN):
            await driver.wait_live()
        config = driver.config
        assert trio.current_time() == pytest.approx(end + config.connect_timeout + config.backoff.pause)
        await check_works(driver, broker)
