"""What a memory broker has seen, in bounded rings, and waiting for something to turn up in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import trio

from ._access import Access
from ._describe import describe
from ._packets import Connect, Packet
from ._session import Published

T = TypeVar("T")

_SHOWN = 20
_SHOWN_FAULTS = 5


class Journal:
    def __init__(self, size: int) -> None:
        self.received: deque[tuple[str, Packet]] = deque(maxlen=size)
        self.sent: deque[tuple[str, Packet]] = deque(maxlen=size)
        self.published: deque[Published] = deque(maxlen=size)
        self.connects: deque[Connect] = deque(maxlen=size)
        self.violations: deque[tuple[str, str]] = deque(maxlen=size)
        self.denied: deque[Access] = deque(maxlen=size)
        self._order: deque[tuple[float, str, str, Packet]] = deque(maxlen=_SHOWN)
        self._changed: trio.Event | None = None

    def note_received(self, client_id: str, packet: Packet) -> None:
        self.received.append((client_id, packet))
        self._order.append((trio.current_time(), "<-", client_id, packet))
        self.note()

    def note_sent(self, client_id: str, packet: Packet) -> None:
        self.sent.append((client_id, packet))
        self._order.append((trio.current_time(), "->", client_id, packet))
        self.note()

    def note(self) -> None:
        """Something changed: whoever waits looks again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def clear(self) -> None:
        for ring in (
            self.received,
            self.sent,
            self.published,
            self.connects,
            self.violations,
            self.denied,
            self._order,
        ):
            ring.clear()

    async def wait_for(self, predicate: Callable[[], T], what: str, timeout: float) -> T:
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(timeout):
            while True:
                value = predicate()
                if value:
                    return value
                if self._changed is None:
                    self._changed = trio.Event()
                await self._changed.wait()
        raise AssertionError(f"no {what} within {timeout:g} s; {self.tail()}")

    def tail(self) -> str:
        """The last packets in words, and what went wrong before."""
        if not self._order:
            return "no packet was seen"
        now = trio.current_time()
        lines = ["the last packets (seconds before now, <- from a client, -> to it):"]
        lines += [
            f"  {now - moment:9.3f} {arrow} {client_id or '?'}: {describe(packet)}"
            for moment, arrow, client_id, packet in self._order
        ]
        lines += [
            f"  MQTT forbids what {client_id or '?'} did: {rule}"
            for client_id, rule in list(self.violations)[-_SHOWN_FAULTS:]
        ]
        lines += [
            f"  the ACL denied {access.client_id} to {access.action} {access.topic!r}"
            for access in list(self.denied)[-_SHOWN_FAULTS:]
        ]
        return "\n".join(lines)
