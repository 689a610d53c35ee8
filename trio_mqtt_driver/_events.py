"""What happens to a driver, while it happens: each consumer reads its own stream, with a bounded buffer of its own.

The stream is filled by whoever records the event, which never waits (``put`` is synchronous): a consumer that is too
slow misses the oldest events, and nobody else notices.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from ._errors import DriverClosedError
from ._history import Event, History

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_MAXIMUM_BUFFER = 1_000_000


class EventStream:
    """What ``MQTTDriver.events()`` returns: an iterator of each `Event` from that call on.

    ::

        with driver.events() as events:
            async for event in events:
                print(event.kind, event.text)

    One task at a time may iterate. When the driver has closed, iteration ends after what is left in the buffer, the
    event "closed" included. A stream that is neither closed nor referred to any more is forgotten, too.
    """

    def __init__(self, history: History, buffer: int) -> None:
        whole = isinstance(buffer, int) and not isinstance(buffer, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not whole or not 1 <= buffer <= _MAXIMUM_BUFFER:
            raise ValueError(f"buffer is {buffer!r}, allowed are whole numbers from 1 to {_MAXIMUM_BUFFER}")
        self.missed: int = 0
        """Events that this stream dropped since its buffer was full: always the oldest."""
        self._history = history
        self._events: deque[Event] = deque(maxlen=buffer)
        self._news = trio.Event()
        self._ended = False
        self._receiving = False
        history.add_listener(self)

    def __repr__(self) -> str:
        return f"<EventStream {len(self._events)} waiting, {self.missed} missed>"

    # -- the filling end ----------------------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Take an event in, in the place of the oldest if there is no room."""
        if len(self._events) == self._events.maxlen:
            self.missed += 1
        self._events.append(event)
        self._news.set()

    def end(self) -> None:
        """No event will come any more."""
        self._ended = True
        self._news.set()

    # -- the emptying end ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End iteration, also for a task that waits in it, and let go of what is buffered. May be called again."""
        self._history.remove_listener(self)
        self._events.clear()
        self.end()

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Event:
        """Wait for the next event. Cancelling loses nothing.

        Raises ``DriverClosedError`` once the driver has closed and nothing is buffered, or the stream was closed, and
        ``trio.BusyResourceError`` if another task is waiting here.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this event stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while not self._events:
                if self._ended:
                    raise DriverClosedError("no more events: the driver or the event stream was closed")
                self._news = trio.Event()
                await self._news.wait()
            return self._events.popleft()
        finally:
            self._receiving = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            return await self.receive()
        except DriverClosedError:
            raise StopAsyncIteration from None
