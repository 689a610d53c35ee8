"""A network whose links are cut after any byte, and lose acknowledgements without being cut."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import attrs
import trio

from trio_mqtt_driver import Endpoint
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker

ACKS = (Kind.PUBACK, Kind.PUBREC, Kind.PUBREL, Kind.PUBCOMP)


class CutStream(trio.abc.Stream):
    """A stream that breaks after so many bytes in each direction; what is too much is lost."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        to_send: float = math.inf,
        to_receive: float = math.inf,
        *,
        on_cut: Callable[[], object] = lambda: None,
    ) -> None:
        self._stream = stream
        self._to_send = to_send
        self._to_receive = to_receive
        self._on_cut = on_cut

    def limit(self, to_send: float, to_receive: float) -> None:
        """From now on."""
        self._to_send = to_send
        self._to_receive = to_receive

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        size = int(min(len(data), self._to_send))
        self._to_send -= size
        await self._stream.send_all(data[:size])
        if size < len(data):
            await self._break()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._to_receive < 1:
            await self._break()
        data = await self._stream.receive_some(int(min(max_bytes or 65536, self._to_receive)))
        if data and self._to_receive < 1:  # the limit may be younger than the call
            await self._break()
        data = data[: int(min(len(data), self._to_receive))]
        self._to_receive -= len(data)
        return data

    async def _break(self) -> None:
        self._on_cut()
        await self._stream.aclose()
        raise trio.BrokenResourceError("cut")

    async def aclose(self) -> None:
        await self._stream.aclose()


@attrs.define
class BadNetwork:
    """While it is bad, a link lasts for ``mean`` bytes in one of its directions, more or less."""

    broker: MemoryBroker
    rng: random.Random
    mean: float
    bad: bool = True
    cuts: int = 0

    async def open_stream(self, _endpoint: Endpoint) -> trio.abc.Stream:
        stream = await self.broker.connect_stream()
        if not self.bad:
            return stream
        self.cuts += 1
        limits = [self.rng.expovariate(1 / self.mean), math.inf]
        self.rng.shuffle(limits)
        return CutStream(stream, *limits)

    async def lose_acknowledgements(self) -> None:
        while True:
            kind, direction = self.rng.choice(ACKS), self.rng.choice(list(Direction))
            with self.broker.faults.drop(kind, times=1, direction=direction):
                await trio.sleep(self.rng.uniform(1, 20))

    async def lose_sessions(self) -> None:
        while True:
            await trio.sleep(self.rng.uniform(5, 30))
            self.broker.restart(keep_sessions=False, reset=self.rng.random() < 0.5)
