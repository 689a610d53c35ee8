"""``apply_settings()`` and ``force_reconnect()`` at awkward moments, and with what is no config."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.mark.parametrize("nonsense", ["mqtt://other", None, {"client_id": "other"}])
async def test_settings_that_are_no_config_are_refused_and_change_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, nonsense: Any
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        before = driver.config
        with pytest.raises(TypeError, match=f"config must be a DriverConfig, not {type(nonsense).__name__}"):
            driver.apply_settings(nonsense)
        assert driver.config is before
        assert driver.state is State.LIVE
        broker.drop()
        await trio.sleep(100)
        assert driver.generation == 2
        await driver.publish("a", qos=1)


async def test_new_settings_at_any_moment_of_an_attempt_are_the_ones_that_go_live(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Also when the last answer of the old attempt is there already."""

    async def apply_after(turns: int) -> State:
        broker = MemoryBroker(nursery)
        live_as: list[str] = []
        async with MQTTDriver(memory_config(broker), start="background", rng=random.Random(1)) as driver:
            driver.register_connection_callback(lambda up: live_as.append(driver.client_id or "") if up else None)
            async with trio.open_nursery() as subscribing:
                subscribing.start_soon(driver.subscribe, "a", print)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                before = driver.state
                live_as.clear()
                driver.apply_settings(memory_config(broker, client_id="other"))
                with trio.fail_after(60):
                    await driver.wait_live()
            assert [name.partition("_")[0] for name in live_as] == ["other"], (turns, before)
            assert "a" in broker.subscriptions(driver.client_id or "")
        assert not broker.violations, turns
        return before

    seen = {await apply_after(turns) for turns in range(80)}
    assert seen >= {State.CONNECTING, State.VALIDATING, State.REPLAYING, State.LIVE}


@pytest.mark.parametrize("asked_during", [State.CONNECTING, State.VALIDATING, State.REPLAYING])
@pytest.mark.parametrize("even_if_live", [False, True])
async def test_a_reconnect_asked_for_while_connecting_does_not_shorten_a_later_wait(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, asked_during: State, even_if_live: bool
) -> None:
    kind = {State.CONNECTING: Kind.CONNACK, State.VALIDATING: Kind.PUBACK, State.REPLAYING: Kind.SUBACK}[asked_during]
    backoff = BackoffConfig(start=10, factor=1, maximum=10, stable_after=1000)
    config = memory_config(broker, backoff=backoff)
    async with MQTTDriver(config, start="background", rng=random.Random(1)) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(driver.subscribe, "a", print)
        with broker.faults.hold(kind):
            await settled()
            assert driver.state is asked_during
            driver.force_reconnect(even_if_live=even_if_live)
            await settled()
        await driver.wait_live()
        await trio.sleep(100)
        attempts = driver.status().counters["attempts"]
        broker.stop()
        await settled()
        wait = driver.status().next_attempt_in
        assert driver.state is State.BACKING_OFF
        assert wait is not None
        assert wait > 0
        await trio.sleep(wait / 2)
        assert driver.status().counters["attempts"] == attempts
        broker.start()
        await driver.wait_live()
