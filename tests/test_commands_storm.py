"""Several tasks that command the driver at random, over a network that breaks at random."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import TracedStream
from tests.network import KINDS, Network
from tests.peers import memory_config
from trio_mqtt_driver import Attempt, DriverConfig, Endpoint, Message, MQTTDriver, Receipt
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked
LENGTH = 600.0
BACK_WITHIN = 60.0


class Storm:
    """Everything at random, from one seed, for ``LENGTH`` seconds."""

    def __init__(self, broker: MemoryBroker, seed: int) -> None:
        self.rng = random.Random(seed)
        self.config = memory_config(broker, open_stream=self._open_stream, options_factory=self._options)
        self.receipts: list[Receipt] = []
        self.got: list[bytes] = []
        self.most = 0
        """The most network connections that were open at a time."""
        self._network = Network(broker, self.rng)
        self._open = 0
        self._end = trio.current_time() + LENGTH

    async def _open_stream(self, endpoint: Endpoint) -> trio.abc.Stream:
        stream = await self._network.open_stream(endpoint)
        self._open += 1
        self.most = max(self.most, self._open)
        return TracedStream(stream, self._closed)

    def _closed(self) -> None:
        self._open -= 1

    async def _options(self, attempt: Attempt) -> DriverConfig:
        if trio.current_time() < self._end:
            await self._wait()
            if self.rng.random() < 0.1:
                raise OSError("the vault is sealed")
        return attempt.config

    async def _wait(self) -> None:
        """A few turns of the scheduler, some seconds, or longer."""
        most = self.rng.choice([0.0, 0.0, 0.1, 3.0, 40.0])
        for _ in range(self.rng.randrange(40)):
            await trio.lowlevel.checkpoint()
        if most:
            await trio.sleep(self.rng.uniform(0, most))

    def command(self, driver: MQTTDriver) -> None:
        commands: list[Callable[[], object]] = [
            driver.force_reconnect,
            lambda: driver.force_reconnect(even_if_live=True),
            driver.pause,
            driver.resume,
            driver.resume,
            lambda: driver.apply_settings(self.config.evolve(keep_alive=self.rng.randint(1, 60))),
        ]
        self.rng.choice(commands)()

    def command_sometimes(self, driver: MQTTDriver) -> None:
        if self.rng.random() < 0.1:
            self.command(driver)

    async def give_commands(self, driver: MQTTDriver) -> None:
        while trio.current_time() < self._end:
            await self._wait()
            self.command(driver)

    async def break_the_network(self) -> None:
        while trio.current_time() < self._end:
            await trio.sleep(self.rng.uniform(0, 40))
            await self.rng.choice(KINDS)(self._network, math.exp(self.rng.uniform(math.log(0.01), math.log(60))))

    async def publish(self, driver: MQTTDriver) -> None:
        while trio.current_time() < self._end:
            await self._wait()
            self.receipts.append(driver.publish_nowait(f"in/{len(self.receipts)}", qos=1))

    def handle(self, message: Message[bytes]) -> None:
        self.got.append(message.payload)


@pytest.mark.parametrize("seed", range(10))
async def test_whatever_is_commanded_the_driver_is_back_and_lost_nothing(
    nursery: trio.Nursery, seed: int, autojump_clock: MockClock
) -> None:
    broker = MemoryBroker(nursery)
    storm = Storm(broker, seed)
    await settled()
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with MQTTDriver(storm.config, rng=random.Random(seed)) as driver:
        await driver.subscribe("in/#", storm.handle, qos=1)
        unregister = driver.register_connection_callback(lambda _up: storm.command_sometimes(driver))
        async with trio.open_nursery() as weather:
            for _ in range(3):
                weather.start_soon(storm.give_commands, driver)
            weather.start_soon(storm.break_the_network)
            weather.start_soon(storm.publish, driver)
        assert driver.generation > 10
        unregister()
        driver.resume()
        with trio.fail_after(BACK_WITHIN):
            await driver.publish("in/last", qos=1)
            for receipt in storm.receipts:
                await receipt.wait()
        broker.publish("in/here", b"here", qos=1)
        await settled()
        assert storm.got[-1] == b"here"
        status = driver.status()
        assert (status.queued, status.in_flight, status.degraded) == (0, 0, ())
    assert {one.topic for one in broker.published} >= {f"in/{number}" for number in range(len(storm.receipts))}
    assert storm.most == 1
    assert not broker.violations
    broker.drop()
    await settled()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
