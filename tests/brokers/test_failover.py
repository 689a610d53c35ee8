"""Two real brokers: one dies, is cut off, or speaks another version of MQTT; and what has arrived in the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from tests.brokers.grounds import QUICK, require
from trio_mqtt_driver import DriverConfig, Endpoint, FailoverConfig, Message, MQTTDriver, State
from trio_mqtt_driver.testing import BrokerProcess, EmbeddedBroker, FaultProxy, Mosquitto

pytestmark = pytest.mark.broker

FAILOVER = FailoverConfig(fail_after=2, cool_down=1, check_every=0.2, return_after=0.4)


@pytest.fixture
async def primary() -> AsyncGenerator[BrokerProcess, None]:
    async with require(Mosquitto()) as broker:
        yield broker


@pytest.fixture(params=[Mosquitto, EmbeddedBroker], ids=["mosquitto", "nats"])
async def fallback(request: pytest.FixtureRequest) -> AsyncGenerator[BrokerProcess, None]:
    async with require(request.param()) as broker:
        yield broker


def config_for(port: int, fallback: BrokerProcess) -> DriverConfig:
    def at(port: int) -> Endpoint:
        return Endpoint(host=fallback.host, port=port)

    return DriverConfig(
        endpoint=at(port), fallbacks=[at(fallback.port)], client_id="driver", failover=FAILOVER, **QUICK
    )


class Seen:
    """The numbers that arrived at any of the brokers."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self._changed = trio.Event()

    def handle(self, message: Message[bytes]) -> None:
        self.numbers.add(int(message.payload))
        self._changed.set()

    async def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed = trio.Event()
            await self._changed.wait()

    async def wait_beyond(self, number: int) -> None:
        await self.wait(lambda: max(self.numbers, default=0) > number)


@asynccontextmanager
async def observed(seen: Seen, broker: BrokerProcess) -> AsyncGenerator[MQTTDriver, None]:
    """An observer at a broker."""
    config = DriverConfig(endpoint=Endpoint(host=broker.host, port=broker.port), client_id="observer", **QUICK)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("numbers", seen.handle, qos=1)
        yield driver


class Load:
    """Publishes numbers with QoS 1, one after the other, and remembers where the driver was after each."""

    def __init__(self, driver: MQTTDriver, seen: Seen) -> None:
        self.count = 0
        self._driver = driver
        self._seen = seen
        self._stopped = False

    async def run(self) -> None:
        while not self._stopped:
            self.count += 1
            await self._driver.publish("numbers", str(self.count), qos=1)
            await trio.sleep(0.005)

    async def wait_at(self, broker: BrokerProcess | FaultProxy) -> None:
        """Until the driver is there, and what it publishes there has arrived."""
        where = f"mqtt://127.0.0.1:{broker.port}"
        while True:
            await self._seen.wait_beyond(self.count + 4)
            if self._driver.status().endpoint == where:
                return

    async def stop(self) -> None:
        self._stopped = True
        await self._driver.drain()


async def test_the_primary_is_killed_and_started_again(
    primary: BrokerProcess, fallback: BrokerProcess, nursery: trio.Nursery
) -> None:
    """What a killed broker acknowledged and had not yet passed on is lost with it: mosquitto passes a message on
    first. The driver is kept from it until the observer is there again, who would miss messages otherwise."""
    proxy = FaultProxy(nursery, primary.port)
    seen = Seen()
    with trio.fail_after(40):
        async with (
            observed(seen, primary) as observer,
            observed(seen, fallback),
            MQTTDriver(config_for(proxy.port, fallback)) as driver,
            trio.open_nursery() as loading,
        ):
            load = Load(driver, seen)
            loading.start_soon(load.run)
            for _ in range(2):
                await load.wait_at(proxy)
                with observer.events() as events, proxy.refuse():
                    await primary.kill()
                    await load.wait_at(fallback)
                    assert driver.status().protocol == ("5" if isinstance(fallback, Mosquitto) else "3.1.1")
                    await primary.start()
                    while (await events.__anext__()).kind != State.LIVE.value:
                        pass
            await load.wait_at(proxy)
            assert driver.status().protocol == "5"
            await load.stop()
            await seen.wait(lambda: seen.numbers >= set(range(1, load.count + 1)))
            texts = [event.text for event in driver.status().history]
            assert texts.count(f"reconnecting: mqtt://127.0.0.1:{proxy.port} is back and preferred") == 2


@pytest.mark.parametrize("fallback", [Mosquitto], indirect=True)
async def test_the_primary_is_cut_off_and_comes_back(
    primary: BrokerProcess, fallback: BrokerProcess, nursery: trio.Nursery
) -> None:
    """The observer at the primary is not behind the black hole."""
    proxy = FaultProxy(nursery, primary.port)
    seen = Seen()
    with trio.fail_after(40):
        async with (
            observed(seen, primary),
            observed(seen, fallback),
            MQTTDriver(config_for(proxy.port, fallback).evolve(connect_timeout=0.5, ack_timeout=0.5)) as driver,
            trio.open_nursery() as loading,
        ):
            load = Load(driver, seen)
            loading.start_soon(load.run)
            await load.wait_at(proxy)
            with proxy.blackhole():
                await load.wait_at(fallback)
                # Nothing comes through: tests of the primary fail.
                await seen.wait(lambda: driver.status().endpoints[0].failures > 3)
                assert driver.status().endpoint == str(driver.config.fallbacks[0])
            await load.wait_at(proxy)
            await load.stop()
            await seen.wait(lambda: seen.numbers >= set(range(1, load.count + 1)))
