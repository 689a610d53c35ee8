"""What must still go out, across connections: bounded, in order, and every waiter is settled.

A message is *accepted* when it enters the outbox and stays so until it is settled (acknowledged, refused, given up,
lost), whether it waits here or is on the wire: the bounds count accepted messages, so a connection that dies can
always hand its window back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import trio

from ._errors import OutboxFullError
from ._outgoing import Outgoing


class Outbox:
    """Accepted messages that wait for a connection, oldest first."""

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._queue: deque[Outgoing] = deque()
        self._waiting_qos0 = 0
        self._given_up = 0  # settled, and still in the queue
        self._turn = trio.StrictFIFOLock()
        self._room = trio.Event()
        self.accepted = 0
        self.accepted_bytes = 0

    def __len__(self) -> int:
        return len(self._queue) - self._given_up

    @property
    def holds_qos0(self) -> bool:
        """Whether a QoS 0 message waits here, which later ones must not overtake."""
        return self._waiting_qos0 > 0

    def _has_room(self, size: int) -> bool:
        # One message is always let in: else a message larger than the bound would wait for ever.
        return not self.accepted or (
            self.accepted < self._max_messages and self.accepted_bytes + size <= self._max_bytes
        )

    async def wait_room(self, size: int) -> None:
        """Return when ``accept`` has room for ``size`` bytes; callers are served in order.

        The caller must accept without an await in between. Checkpoints only if it has to wait.
        """
        if self._has_room(size) and not self._turn.locked():
            return
        async with self._turn:
            while not self._has_room(size):
                self._room = trio.Event()
                await self._room.wait()

    def accept(self, outgoing: Outgoing) -> None:
        """Take a message in, behind all others. Raises ``OutboxFullError``."""
        if not self._has_room(outgoing.size):
            raise OutboxFullError(
                f"the outbox is full: {self.accepted} messages, {self.accepted_bytes} bytes; "
                f"outbox_messages={self._max_messages}, outbox_bytes={self._max_bytes}"
            )
        self.accepted += 1
        self.accepted_bytes += outgoing.size
        outgoing.on_settled = self._settled
        outgoing.queued = True
        self._queue.append(outgoing)
        self._waiting_qos0 += outgoing.qos == 0

    def put_back(self, messages: Iterable[Outgoing]) -> None:
        """A connection died: its unsettled messages, oldest first, go before everything that waits."""
        back = [outgoing for outgoing in messages if not outgoing.done]
        for outgoing in back:
            outgoing.queued = True
        self._queue.extendleft(reversed(back))

    def take(self) -> Outgoing | None:
        """The next message to send; None if there is none."""
        outgoing = self.peek()
        if outgoing is not None:
            self._queue.popleft()
            outgoing.queued = False
            self._waiting_qos0 -= outgoing.qos == 0
        return outgoing

    def peek(self) -> Outgoing | None:
        while self._queue:
            if not self._queue[0].done:
                return self._queue[0]
            self._waiting_qos0 -= self._queue.popleft().qos == 0
            self._given_up -= 1
        return None

    def _settled(self, outgoing: Outgoing) -> None:
        if outgoing.queued:
            # Given up while it waited: it is swept out before such ones are the greater part, payload and all.
            self._given_up += 1
            if 2 * self._given_up > len(self._queue):
                self._queue = deque(one for one in self._queue if not one.done)
                self._waiting_qos0 = sum(one.qos == 0 for one in self._queue)
                self._given_up = 0
        self.accepted -= 1
        self.accepted_bytes -= outgoing.size
        self._room.set()

    def waiting(self) -> list[Outgoing]:
        """What waits, oldest first."""
        return [outgoing for outgoing in self._queue if not outgoing.done]

    def close(self, error: Callable[[Outgoing], Exception]) -> None:
        """Settle everything that waits with ``error(outgoing)``."""
        while (outgoing := self.take()) is not None:
            outgoing.settle(error(outgoing))
