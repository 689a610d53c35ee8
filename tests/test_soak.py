"""Very many reconnects leave everything as it was: tasks, threads, files, memory, and what works."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Generator
from typing import Any

import pytest
import trio
import trio.testing

from tests.footprint import Footprint, allocations_traced, resident, traced
from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, DriverConfig, Message, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

# The rings of broker and driver are small, so that the warm-up fills them: they are bounds, not leaks.
WARM_UP = 60
RINGS: dict[str, Any] = {"history_events": 50}


@pytest.fixture(autouse=True)
def _unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps what is logged, which would pass for a leak."""
    caplog.set_level(logging.CRITICAL, logger="trio_mqtt_driver")


@pytest.fixture
def tracing() -> Generator[None, None, None]:
    with allocations_traced():
        yield


class Application:
    """What is in use during all of it: handlers, an iterator, retained messages, publishes at every QoS."""

    def __init__(self, driver: MQTTDriver, broker: MemoryBroker) -> None:
        self.kept: deque[Message[bytes]] = deque(maxlen=WARM_UP // 2)
        self._driver = driver
        self._broker = broker

    async def handle(self, message: Message[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.append(message)

    async def start(self) -> None:
        for number in range(20):
            await self._driver.subscribe(f"a/{number}", self.handle, qos=number % 3)
        self._broker.publish("a/0", b"retained", retain=True)

    async def use(self) -> None:
        for number in range(20):
            await self._driver.publish(f"a/{number}", bytes(100), qos=number % 3)


@pytest.mark.long
async def test_a_thousand_reconnects_in_virtual_time(
    autojump_clock: trio.testing.MockClock, tracing: None, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, history=100)
    rng = random.Random(1)
    async with MQTTDriver(memory_config(broker, **RINGS), rng=random.Random(2)) as driver:
        application = Application(driver, broker)
        await application.start()

        async def lose_and_regain() -> None:
            before = driver.generation
            match rng.randrange(5):
                case 0:
                    broker.drop()
                case 1:
                    broker.drop(reset=True)
                case 2:
                    broker.silence()
                case 3:
                    broker.stop()
                    await trio.sleep(rng.uniform(0, 60))
                    broker.start()
                case _:
                    driver.force_reconnect(even_if_live=True)
            receipt = driver.publish_nowait("a/1", b"on the way", qos=1)
            await receipt.wait()
            await driver.wait_live()
            assert driver.generation == before + 1

        for _ in range(WARM_UP):
            await lose_and_regain()
        await application.use()
        before = await Footprint.take(traced)
        for _ in range(1000):
            await lose_and_regain()
        await application.use()
        after = await Footprint.take(traced)
        after.assert_no_more_than(before)
        assert after.connections == 1
        assert driver.generation == 1 + WARM_UP + 1000
        assert driver.status().counters["connections"] == driver.generation
        assert driver.status().unacknowledged == driver.status().in_flight == driver.status().queued == 0
        assert len(broker.sessions) == 1
        assert not broker.violations


async def test_reconnects_over_sockets(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, history=100)
    port = await broker.listen()
    backoff = BackoffConfig(start=0.001, maximum=0.001, min_interval=0, stable_after=0, pause_after=10_000)
    config = DriverConfig.from_url(f"mqtt://127.0.0.1:{port}", client_id="driver", backoff=backoff, **RINGS)
    with trio.fail_after(120):
        async with MQTTDriver(config) as driver:
            application = Application(driver, broker)
            await application.start()

            async def lose_and_regain(number: int) -> None:
                before = driver.generation
                if number % 3 == 2:
                    driver.force_reconnect(even_if_live=True)
                else:
                    broker.drop(reset=number % 3 == 1)
                    receipt = driver.publish_nowait("a/1", b"on the way", qos=1)
                    await receipt.wait()
                await driver.wait_live()
                assert driver.generation == before + 1

            for number in range(WARM_UP):
                await lose_and_regain(number)
            await application.use()
            before = await Footprint.take(resident)
            for number in range(300):
                await lose_and_regain(number)
            await application.use()
            (await Footprint.take(resident)).assert_no_more_than(before)
            assert driver.generation == 1 + WARM_UP + 300
            assert not broker.violations
