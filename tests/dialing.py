"""An ``open_stream`` for tests: it writes down when streams are opened and closed, and fails on request."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from trio_mqtt_driver import Endpoint
from trio_mqtt_driver.testing import MemoryBroker


class TracedStream(trio.abc.Stream):
    """A stream that tells when it is closed; ``broken`` makes everything that is written to it fail."""

    def __init__(self, stream: trio.abc.Stream, on_close: Callable[[], object]) -> None:
        self._stream = stream
        self._on_close = on_close
        self.broken: Exception | None = None
        self.poisoned: BaseException | None = None
        """Raised by the next read that returns something."""
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.broken is not None:
            await trio.lowlevel.checkpoint()
            raise self.broken
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        if self.poisoned is not None:
            raise self.poisoned
        return data

    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            self._on_close()
        await self._stream.aclose()


@attrs.frozen
class Happening:
    """A stream was opened or closed."""

    what: str
    number: int
    at: float
    packets: int
    """How many packets the broker had received by then."""


class Dialer:
    """Opens streams to a memory broker; ``happenings`` tells the order of things."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self.streams: list[TracedStream] = []
        self.happenings: list[Happening] = []
        self.attempts: list[float] = []
        """When each was made, those that failed included."""
        self.errors: list[Exception] = []
        """Raised by the next attempts, one each."""

    async def __call__(self, endpoint: Endpoint) -> trio.abc.Stream:
        assert isinstance(endpoint, Endpoint)
        self.attempts.append(trio.current_time())
        if self.errors:
            await trio.lowlevel.checkpoint()
            raise self.errors.pop(0)
        inner = await self._broker.connect_stream()
        number = len(self.streams) + 1
        stream = TracedStream(inner, lambda: self._note("close", number))
        self.streams.append(stream)
        self._note("open", number)
        return stream

    def _note(self, what: str, number: int) -> None:
        self.happenings.append(Happening(what, number, trio.current_time(), len(self._broker.received)))

    @property
    def order(self) -> list[tuple[str, int]]:
        return [(one.what, one.number) for one in self.happenings]
