"""What must still go out, across connections: bounded, in order, and every waiter is settled.

A message is *accepted* when it enters the outbox and stays so until it is settled (acknowledged, refused, given up,
lost), whether it waits here or is on the wire: the bounds count accepted messages, so a connection that dies can
always hand its window back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

import attrs
import trio

from ._errors import MessageLostError, OutboxFullError
from ._properties import decode_publish_block
from ._types import PublishProperties, PublishResult

_OVERHEAD = 200
"""Bytes that an accepted message costs besides its topic, payload and properties, roughly."""


@attrs.define(eq=False)
class Outgoing:
    """One message on its way out, from acceptance to its outcome."""

    topic: str
    raw_topic: bytes
    payload: bytes = attrs.field(repr=False)
    qos: int
    retain: bool
    properties: bytes
    """The MQTT 5 property block."""
    accepted_at: float
    attempts: int = 0
    sent_at: float = math.inf
    """When its last byte left for the network; not before that can an acknowledgement be overdue."""
    wire_end: int = 0
    order: int = 0
    """Among the messages of QoS 1 and 2 of its session."""
    queued: bool = False
    """Whether it is in the outbox and not on a connection."""
    result: PublishResult | None = None
    error: Exception | None = None
    on_settled: Callable[[Outgoing], None] | None = None
    _event: trio.Event | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def left_behind(self) -> bool:
        """Whether it has no outcome, or only that the driver ended first."""
        return not self.done or isinstance(self.error, MessageLostError)

    @property
    def size(self) -> int:
        """Bytes that it counts for in the outbox."""
        return len(self.raw_topic) + len(self.payload) + len(self.properties) + _OVERHEAD

    def undelivered(self) -> Undelivered:
        return Undelivered(
            topic=self.topic,
            payload=self.payload,
            qos=self.qos,
            retain=self.retain,
            properties=decode_publish_block(self.properties),
            attempts=self.attempts,
        )

    async def settled(self) -> None:
        if not self.done:
            if self._event is None:
                self._event = trio.Event()
            await self._event.wait()
        else:
            await trio.lowlevel.checkpoint()

    async def wait(self) -> PublishResult:
        await self.settled()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def settle(self, outcome: PublishResult | Exception) -> None:
        """The first outcome counts."""
        if self.done:
            return
        if isinstance(outcome, Exception):
            self.error = outcome
        else:
            self.result = outcome
        if self._event is not None:
            self._event.set()
        if self.on_settled is not None:
            self.on_settled(self)


@attrs.frozen(kw_only=True)
class Undelivered:
    """A message that was accepted and is not acknowledged.

    With 0 ``attempts`` it has not left; else nobody knows whether it arrived.
    """

    topic: str
    payload: bytes = attrs.field(repr=False)
    qos: int
    retain: bool
    properties: PublishProperties
    attempts: int
    """On how many connections it was sent."""


async def wait_settled(messages: Iterable[Outgoing]) -> None:
    """Return when each of them has an outcome. Checkpoints only if it has to wait."""
    for outgoing in messages:
        if not outgoing.done:
            await outgoing.settled()


class Receipt:
    """What became, or will become, of one ``publish_nowait()``."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing

    def __repr__(self) -> str:
        outgoing = self._outgoing
        state = "waiting" if not outgoing.done else "failed" if outgoing.error is not None else "acknowledged"
        return f"<Receipt {outgoing.topic!r} qos={outgoing.qos} {state}>"

    @property
    def done(self) -> bool:
        """Whether the outcome is known, so that ``wait()`` does not block."""
        return self._outgoing.done

    async def wait(self) -> PublishResult:
        """Wait for the QoS guarantee to be met, and return how; any number of tasks may wait.

        Cancelling the wait does not cancel the delivery. Raises ``PublishRefusedError``, ``ServerLimitError``, or
        ``MessageLostError`` if the driver was left first.
        """
        return await self._outgoing.wait()


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
