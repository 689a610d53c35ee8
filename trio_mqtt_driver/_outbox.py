"""What must still go out, across connections: bounded, in order, and every waiter is settled.

A message is *accepted* when it enters the outbox and stays so until it is settled (acknowledged, refused, expired,
given up, lost), whether it waits here or is on the wire: the bounds count accepted messages, so a connection that
dies can always hand its window back.

What waits here stands in lanes, one per priority, each in the order of acceptance. A message that is settled while it
waits stays in its lane until it comes to the front, or until such ones are the greater part.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Literal

import trio

from ._errors import (
    MessageDroppedError,
    MessageExpiredError,
    MessageLostError,
    OutboxFileError,
    OutboxFullError,
    QuarantinedError,
    SupersededError,
)
from ._history import Counters
from ._outgoing import Outgoing, Plain
from ._store import Store
from ._types import OfflinePolicy, ReasonCode

logger = logging.getLogger("trio_mqtt_driver")

WhenFull = Literal["wait", "fail", "drop_oldest"]


class Outbox:
    """Accepted messages that wait for a connection: the highest priority first, then the oldest."""

    def __init__(self, *, max_messages: int, max_bytes: int, counters: Counters, when_full: WhenFull = "wait") -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._counters = counters
        self._when_full = when_full
        self._store: Store | None = None
        self._lanes: list[tuple[int, deque[Outgoing]]] = []
        """Highest priority first."""
        self._waiting = 0
        self.waiting_qos0 = 0
        """How many QoS 0 messages wait here, which later ones must not overtake."""
        self._given_up = 0  # settled, and still in a lane
        self._latest: dict[bytes, Outgoing] = {}
        """By topic: the one that waits with ``OfflinePolicy.LATEST``."""
        self._expiring: list[tuple[float, int, Outgoing]] = []
        """A heap; most entries of messages that have left are swept out now and then."""
        self._pushed = 0
        self._timer = trio.CancelScope()
        self._turn = trio.StrictFIFOLock()
        self._room = trio.Event()
        self._on_settled = self._settled
        self.accepted = 0
        self.accepted_bytes = 0
        self.accused: Outgoing | None = None
        """The message that was blamed for the end of the last connection."""

    def __len__(self) -> int:
        return self._waiting - self._given_up

    # -- in -----------------------------------------------------------------------------------------------------------

    def attach(self, store: Store) -> None:
        """Keep what is accepted in a file, too; what the file holds goes out first, whatever the bounds are now."""
        self._store = store
        for outgoing in store.messages:
            self._enter(outgoing)
            self._expire_later(outgoing)
        self.expire(trio.current_time())

    def _has_room(self, outgoing: Outgoing) -> bool:
        count, size = self.accepted + 1, self.accepted_bytes + outgoing.size
        if self._latest and (older := self._superseded_by(outgoing)) is not None:
            count, size = count - 1, size - older.size
        # One message is always let in: else a message larger than the bound would wait for ever.
        return count <= 1 or (count <= self._max_messages and size <= self._max_bytes)

    def _superseded_by(self, outgoing: Outgoing) -> Outgoing | None:
        return self._latest.get(outgoing.raw_topic) if outgoing.offline is OfflinePolicy.LATEST else None

    @property
    def crowded(self) -> bool:
        """Whether somebody waits for room."""
        return self._turn.locked()

    @trio.lowlevel.enable_ki_protection
    async def wait_room(self, outgoing: Outgoing) -> None:
        """Return when ``accept`` takes the message, or refuses it for good; callers are served in order.

        The caller must accept without an await in between. Checkpoints only if it has to wait.
        """
        if not self.crowded and self._decided(outgoing):
            return
        self._counters.outbox_waits += 1
        async with self._turn:
            while not self._decided(outgoing):
                self._room = trio.Event()
                await self._room.wait()

    def _decided(self, outgoing: Outgoing) -> bool:
        if self._when_full == "fail" or self._has_room(outgoing):
            return True
        return self._when_full == "drop_oldest" and (self._waiting > self._given_up)

    def accept(self, outgoing: Outgoing, *, live: bool = False) -> None:
        """Take a message in, behind all others of its priority. Raises ``OutboxFullError``.

        With a ``live`` link it is about to leave: then one of QoS 0 does not go into the file.
        """
        if self._when_full == "drop_oldest":
            self._make_room(outgoing)
        if not self._has_room(outgoing):
            self._counters.outbox_refused += 1
            nothing = "" if self._when_full != "drop_oldest" else "; nothing waits that could be dropped for it"
            raise OutboxFullError(
                f"the outbox is full: {self.accepted} messages, {self.accepted_bytes} bytes; "
                f"outbox_messages={self._max_messages}, outbox_bytes={self._max_bytes}{nothing}"
            )
        older = self._superseded_by(outgoing)
        if older is not None:
            self._supersede(older)
        self._enter(outgoing)
        if self._store is not None and (outgoing.qos or not live):
            self._store.add(outgoing)
        if outgoing.expiry is not None:
            self._expire_later(outgoing)

    def admit(self, outgoing: Outgoing) -> bool:
        """Take a message in that is sent at once: if there is room, and nothing waits before it."""
        size = self.accepted_bytes + outgoing.size
        if self._waiting or (
            self.accepted and (self.accepted >= self._max_messages or size > self._max_bytes)  # as _has_room
        ):
            return False
        self.accepted += 1
        self.accepted_bytes = size
        outgoing.on_settled = self._on_settled
        if self._store is not None:
            self._store.add(outgoing)
        return True

    def enqueue(self, outgoing: Plain) -> bool:
        """As ``accept``, on a live link; False, and nothing is done, if it is not as simple as nearly always."""
        size = self.accepted_bytes + outgoing.size
        if self._store is not None or (
            self.accepted and (self.accepted >= self._max_messages or size > self._max_bytes)  # as _has_room
        ):
            return False
        self.accepted += 1
        self.accepted_bytes = size
        outgoing.on_settled = self._on_settled
        self._lane(outgoing.priority).append(outgoing)
        outgoing.queued = True
        self._waiting += 1
        return True

    def _make_room(self, outgoing: Outgoing) -> None:
        """Drop what waits, the lowest priority and then the oldest first, but nothing of a higher one."""
        for priority, lane in reversed(self._lanes):
            if priority > outgoing.priority:
                return
            for oldest in list(lane):
                if self._has_room(outgoing):
                    return
                if not oldest.done:
                    self._counters.outbox_dropped += 1
                    oldest.settle(
                        MessageDroppedError(f"{oldest.topic!r} was dropped for newer messages: the outbox is full")
                    )

    def _supersede(self, older: Outgoing) -> None:
        self._counters.superseded += 1
        older.settle(SupersededError(f"a newer message to {older.topic!r} took its place in the outbox"))

    def _count(self, outgoing: Outgoing) -> None:
        self.accepted += 1
        self.accepted_bytes += outgoing.size
        outgoing.on_settled = self._on_settled

    def _enter(self, outgoing: Outgoing) -> None:
        self._count(outgoing)
        self._lane(outgoing.priority).append(outgoing)
        self._queued(outgoing)

    def _queued(self, outgoing: Outgoing) -> None:
        outgoing.queued = True
        self._waiting += 1
        self.waiting_qos0 += outgoing.qos == 0
        if outgoing.offline is OfflinePolicy.LATEST:
            self._latest[outgoing.raw_topic] = outgoing

    def _lane(self, priority: int) -> deque[Outgoing]:
        place = 0
        for place, (found, lane) in enumerate(self._lanes):  # noqa: B007  # the place is needed below
            if found == priority:
                return lane
            if found < priority:
                break
        else:
            place = len(self._lanes)
        lane = deque[Outgoing]()
        self._lanes.insert(place, (priority, lane))
        return lane

    def put_back(self, messages: Iterable[Outgoing]) -> None:
        """A connection died: its unsettled messages, oldest first, go before everything of their priority."""
        for outgoing in reversed(list(messages)):
            if outgoing.done:
                continue
            if self._superseded_by(outgoing) is not None:
                self._supersede(outgoing)
            elif outgoing.expiry is not None and outgoing.expires_at <= trio.current_time():
                self._expire(outgoing)
            else:
                self._lane(outgoing.priority).appendleft(outgoing)
                self._queued(outgoing)
                if outgoing.expiry is not None:
                    self._expire_later(outgoing)

    # -- out ----------------------------------------------------------------------------------------------------------

    def take(self) -> Outgoing | None:
        """The next message to send; None if there is none."""
        outgoing = self.peek()
        if outgoing is not None:
            self.pop(outgoing)
        return outgoing

    def pop(self, outgoing: Outgoing) -> None:
        """Take out what ``peek`` has just returned."""
        self._lanes[0][1].popleft()
        outgoing.queued = False
        self._left(outgoing)

    def peek(self) -> Outgoing | None:
        while self._lanes:
            lane = self._lanes[0][1]
            while lane:
                if not lane[0].done:
                    return lane[0]
                self._left(lane.popleft())
                self._given_up -= 1
            del self._lanes[0]
        return None

    def _left(self, outgoing: Outgoing) -> None:
        self._waiting -= 1
        self.waiting_qos0 -= outgoing.qos == 0
        if self._latest and self._latest.get(outgoing.raw_topic) is outgoing:
            del self._latest[outgoing.raw_topic]

    def waiting(self) -> list[Outgoing]:
        """What waits, in the order in which it will be sent."""
        return [outgoing for outgoing in self._everything() if not outgoing.done]

    def _everything(self) -> Iterator[Outgoing]:
        for _, lane in self._lanes:
            yield from lane

    async def take_out_qos0(self) -> None:
        """A link is there: what waits with QoS 0 leaves the file before it goes out, since a process that dies in
        between would send it a second time when it is started again. Gives no turn to others unless it has to wait."""
        await trio.lowlevel.checkpoint_if_cancelled()
        store = self._store
        while store is not None and (kept := [one for one in self._everything() if one.row and not one.qos]):
            rows = [outgoing.row for outgoing in kept]
            for outgoing in kept:
                store.remove(outgoing)
            with suppress(OutboxFileError):  # it is logged; and a disk that fails is no reason to have no link
                await store.wait_removed(rows)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _settled(self, outgoing: Outgoing) -> None:
        if outgoing.queued:
            # Given up while it waited: it is swept out before such ones are the greater part, payload and all.
            self._given_up += 1
            if self._latest.get(outgoing.raw_topic) is outgoing:
                del self._latest[outgoing.raw_topic]
            if 2 * self._given_up > self._waiting:
                self._sweep()
        self.accepted -= 1
        self.accepted_bytes -= outgoing.size
        self._room.set()
        if outgoing.row and self._store is not None and not isinstance(outgoing.error, MessageLostError):
            self._store.remove(outgoing)

    def acknowledged(self, messages: Iterable[Outgoing], generation: int, now: float) -> None:
        """The guarantee of their QoS is met, with success. As ``Outgoing.acknowledged``, for many at a time."""
        outcome = ReasonCode.SUCCESS, generation, now
        on_settled = self._on_settled
        count = size = 0
        for outgoing in messages:
            if outgoing.done:
                continue
            if outgoing.row or outgoing.on_settled is not on_settled:
                outgoing.acknowledged(ReasonCode.SUCCESS, generation, now)
                continue
            count += 1
            size += outgoing.size
            outgoing.outcome = outcome
            outgoing.done = True
            if outgoing.waiter is not None:
                outgoing.waiter.set()
        self.accepted -= count
        self.accepted_bytes -= size
        self._room.set()

    def _sweep(self) -> None:
        self._lanes = [
            (priority, kept) for priority, lane in self._lanes if (kept := deque(one for one in lane if not one.done))
        ]
        self._waiting = sum(len(lane) for _, lane in self._lanes)
        self.waiting_qos0 = sum(one.qos == 0 for one in self._everything())
        self._given_up = 0

    def quarantine(self, outgoing: Outgoing, reason: str) -> None:
        """Give a message up that no broker seems to survive; in a file it stays where it can be looked at."""
        self._counters.quarantined += 1
        logger.warning("the message %r is given up: %s", outgoing.topic, reason)
        if outgoing.row and self._store is not None:
            self._store.quarantine(outgoing, reason)
            outgoing.row = 0
        outgoing.settle(QuarantinedError(f"{outgoing.topic!r} is not sent any more: {reason}"))

    def close(self, error: Callable[[Outgoing], Exception]) -> None:
        """Settle everything that waits with ``error(outgoing)``."""
        while (outgoing := self.take()) is not None:
            outgoing.settle(error(outgoing))

    # -- expiry -------------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """End messages whose time has passed while they waited. Runs until cancelled."""
        while True:
            with trio.CancelScope() as self._timer:
                self._timer.deadline = self._expiring[0][0] if self._expiring else math.inf
                await trio.sleep_forever()
            self.expire(trio.current_time())

    def _expire_later(self, outgoing: Outgoing) -> None:
        if len(self._expiring) > 2 * self._waiting + 100:
            self._expiring = [entry for entry in self._expiring if entry[2].queued and not entry[2].done]
            heapq.heapify(self._expiring)
        self._pushed += 1
        heapq.heappush(self._expiring, (outgoing.expires_at, self._pushed, outgoing))
        self._timer.deadline = min(self._timer.deadline, outgoing.expires_at)

    def expire(self, now: float) -> None:
        """Settle what waits and has expired; what is on the wire is the broker's to expire."""
        while self._expiring and self._expiring[0][0] <= now:
            outgoing = heapq.heappop(self._expiring)[2]
            if outgoing.queued and not outgoing.done:
                self._expire(outgoing)

    def _expire(self, outgoing: Outgoing) -> None:
        self._counters.expired += 1
        outgoing.settle(MessageExpiredError(expired_text(outgoing)))


def expired_text(outgoing: Outgoing) -> str:
    return f"{outgoing.topic!r} was not acknowledged within message_expiry={outgoing.expiry} s; {outgoing.sent_text}"
