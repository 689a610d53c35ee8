"""A network between a driver and a broker in memory, and the ways in which it breaks."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from trio_mqtt_driver import Endpoint
from trio_mqtt_driver.testing import MemoryBroker


class Network:
    """The driver's way to the broker, and what may happen to it. Everybody else has a way of their own.

    An outage returns when it is over.
    """

    def __init__(self, broker: MemoryBroker, rng: random.Random) -> None:
        self._broker = broker
        self._rng = rng
        self._swallows = False

    async def open_stream(self, _endpoint: Endpoint) -> trio.abc.Stream:
        if self._swallows:
            await trio.sleep_forever()  # what was begun in an outage does not heal with the network
        return await self._broker.connect_stream()

    async def broker_stopped(self, length: float) -> None:
        self._broker.stop(reset=self._rng.random() < 0.5)
        await trio.sleep(length)
        self._broker.start()

    async def cable_cut_and_refused(self, length: float) -> None:
        self._broker.silence(deaf=True)
        self._broker.down = True
        await trio.sleep(length)
        self._broker.down = False

    async def cable_cut_and_swallowed(self, length: float) -> None:
        self._broker.silence(deaf=True)
        self._swallows = True
        try:
            await trio.sleep(length)
        finally:
            self._swallows = False

    async def reset_and_refused(self, length: float) -> None:
        self._broker.drop(reset=True)
        self._broker.down = True
        await trio.sleep(length)
        self._broker.down = False

    async def accepted_and_hanging(self, length: float) -> None:
        with self._broker.faults.stop_reading():
            await trio.sleep(length)

    async def broker_restarting(self, length: float) -> None:
        """It stays for a moment each time."""
        end = trio.current_time() + length
        self._broker.stop()
        while trio.current_time() < end:
            await trio.sleep(self._rng.uniform(0, end - trio.current_time()))
            self._broker.start()
            await trio.sleep(self._rng.uniform(0, 3))
            self._broker.stop()
        self._broker.start()


KINDS: list[Callable[[Network, float], Awaitable[None]]] = [
    Network.broker_stopped,
    Network.cable_cut_and_refused,
    Network.cable_cut_and_swallowed,
    Network.reset_and_refused,
    Network.accepted_and_hanging,
    Network.broker_restarting,
]
