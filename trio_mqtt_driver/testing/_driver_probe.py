"""Waiting for what a driver is to do, with a failure message that tells what it did instead."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from trio_mqtt_driver import ConnectError, DriverClosedError, Event, MQTTDriver, State, Status

from ._memory_broker import MemoryBroker

T = TypeVar("T")

_PATIENCE = 30.0
_SHOWN = 15
_AWAY = tuple(state for state in State if state is not State.LIVE)


class DriverProbe:
    """Waits for the states of a driver, each time for at most ``timeout`` seconds on Trio's clock.

    ::

        probe = DriverProbe(driver, broker)
        broker.stop()
        await probe.wait_lost()
        ...                             # what does the application do without a link?
        broker.start()
        await probe.wait_live()

    A wait that is in vain raises ``AssertionError`` with the driver's status in words, its latest events, and the
    last packets of ``broker``. Cancelling a wait has no effect.

    :param driver: any driver that has been entered.
    :param broker: the memory broker that it talks to, for its packets; None if there is none.
    """

    def __init__(self, driver: MQTTDriver, broker: MemoryBroker | None = None) -> None:
        self.driver = driver
        self._broker = broker

    async def wait_state(self, *states: State, timeout: float = _PATIENCE) -> State:
        """Wait until the driver is in one of these states, and return which; also if it only passes through."""
        words = " or ".join(state.value for state in states)
        return await self._within(timeout, words, lambda: self.driver.wait_state(*states))

    async def wait_live(self, *, timeout: float = _PATIENCE) -> int:
        """Wait until the link is live, and return its generation."""
        await self._within(timeout, State.LIVE.value, lambda: self.driver.wait_state(State.LIVE))
        return self.driver.generation

    async def wait_lost(self, *, timeout: float = _PATIENCE) -> State:
        """Wait until the link is not live, and return what the driver is at then.

        For what breaks the network at once. If something is awaited between that and this, the driver may be back
        before it is asked, and this would wait for the next loss: use :meth:`reconnect`.
        """
        return await self._within(timeout, "other than live", lambda: self.driver.wait_state(*_AWAY))

    async def wait_generation(self, number: int, *, timeout: float = _PATIENCE) -> int:
        """Wait until the link is live for the ``number``-th time or a later one, and return which."""

        async def reached() -> int:
            while True:
                await self.driver.wait_state(State.LIVE)
                if self.driver.generation >= number:
                    return self.driver.generation
                await self.driver.wait_state(*_AWAY)

        return await self._within(timeout, f"live with generation {number}", reached)

    @asynccontextmanager
    async def reconnect(self, *, timeout: float = _PATIENCE) -> AsyncGenerator[None, None]:
        """Enter, do to the network what you will, and leave when the driver is live with another link than before.

        ::

            async with probe.reconnect():
                await broker.restart()
        """
        before = self.driver.generation
        yield
        await self.wait_generation(before + 1, timeout=timeout)

    def report(self) -> str:
        """Status, latest events and last packets in words, as a failed wait shows them."""
        status = self.driver.status()
        parts = [f"it is {_status(status)}", _history(status.history)]
        if self._broker is not None:
            parts.append(self._broker.tail())
        return "\n".join(parts)

    async def _within(self, timeout: float, what: str, wait: Callable[[], Awaitable[T]]) -> T:
        __tracebackhide__ = True
        with trio.move_on_after(timeout):
            try:
                return await wait()
            except (DriverClosedError, ConnectError) as exc:
                raise AssertionError(f"the driver will not be {what}: {exc}; {self.report()}") from exc
        raise AssertionError(f"the driver was not {what} within {timeout:g} s; {self.report()}")


def _status(status: Status) -> str:
    words = [f"{status.state.value} for {status.since:.3g} s", f"generation {status.generation}"]
    if status.client_id is not None:
        words.append(f"client ID {status.client_id!r}")
    if status.next_attempt_in is not None:
        words.append(f"next attempt in {status.next_attempt_in:.3g} s")
    words += [
        f"{status.failures} failures in a row",
        f"{status.queued} queued, {status.in_flight} in flight",
        f"last error: {status.last_error or 'none'}",
    ]
    return ", ".join(words)


def _history(events: tuple[Event, ...]) -> str:
    if not events:
        return "nothing has happened to it"
    now = trio.current_time()
    lines = [f"  {now - event.at:10.3f} {event.kind}: {event.text}" for event in events[-_SHOWN:]]
    return "\n".join(["its latest events (seconds before now):", *lines])
