"""The bounded queue of a subscription, and what becomes of it when it has grown too long. No I/O.

It takes whatever it is given, since the reader of the connection does not wait; ``put`` says when it is too long.

To count each payload out again would cost a noticeable part of handing a message over, for a bound that is rarely
near. So until ``attended`` the number of bytes is that of all that came since the queue was empty, which is never too
low; when it reaches the bound, the queue is counted, and if it is more than half full it is ``attended`` from then on,
until it is empty again. Who takes a message out of ``messages`` calls ``took`` while it is.
"""

# A message and the queue that it is in belong together.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import deque
from typing import Any

from ._history import Counters
from ._types import Message, Overflow


class MessageQueue:
    """Messages that wait for one subscription's handler or iterator, the oldest first."""

    def __init__(self, overflow: Overflow, most_messages: int, most_bytes: int, counters: Counters) -> None:
        self.overflow: Overflow = overflow
        self.messages: deque[Message[Any]] = deque()
        self.attended: bool = False
        """Whether ``took`` must be called for each message."""
        self.received: int = 0
        self.dropped: int = 0
        self.superseded: int = 0
        """Of those dropped."""
        self._most_messages = most_messages
        self._most_bytes = most_bytes
        self._counters = counters
        self._bytes: int = 0
        """Of payload; exact while ``attended``, and else at most that."""

    @property
    def size(self) -> int:
        """Of payload."""
        return sum(len(message.payload) for message in self.messages)

    @property
    def full(self) -> bool:
        """Whether it has reached a bound."""
        return len(self.messages) >= self._most_messages or self._has(self._most_bytes)

    def put(self, messages: list[Message[Any]], size: int) -> bool:
        """Append messages with so many bytes of payload. True if a bound is reached: call ``shorten``."""
        if not self.messages:
            self._bytes = 0
            self.attended = False
        self.messages.extend(messages)
        self.received += len(messages)
        self._bytes += size
        return len(self.messages) >= self._most_messages or (self._bytes >= self._most_bytes and self.full)

    def took(self, message: Message[Any]) -> None:
        """A message was taken out."""
        self._bytes -= len(message.payload)

    def attend(self) -> None:
        """Have ``took`` called for each message."""
        if not self.attended:
            self._bytes = self.size
            self.attended = True

    def _has(self, size: int) -> bool:
        if self._bytes >= size and not self.attended:
            self._bytes = self.size
            self.attended = 2 * self._bytes >= self._most_bytes
        return self._bytes >= size

    def shorten(self) -> None:
        """Apply the overflow policy if there are too many.

        What is to be acknowledged stays: that is bounded by the connection. But what a connection has brought that is
        over, which nobody can acknowledge any more, goes like QoS 0.
        """
        block = self.overflow is Overflow.BLOCK
        # While reading pauses nothing comes, but each new connection brings a little before it pauses, too.
        factor = 2 if block else 1
        if not self._exceeds(factor):
            return
        self.attend()
        if self.overflow is Overflow.LATEST:
            self._supersede()
        newest = self.overflow is Overflow.DROP_NEWEST
        kept: list[Message[Any]] = []
        while self.messages:
            if len(self.messages) + len(kept) == 1 or not self._exceeds(factor, len(kept)):
                break
            message = self.messages.pop() if newest else self.messages.popleft()
            if message._stale if block else not message._owed:
                self._drop(message)
            else:
                kept.append(message)
        if newest:
            self.messages.extend(reversed(kept))
        else:
            self.messages.extendleft(reversed(kept))

    def _exceeds(self, factor: int, more: int = 0) -> bool:
        """Whether there are ``more`` messages than a multiple of the bounds allows."""
        return len(self.messages) + more > factor * self._most_messages or self._has(factor * self._most_bytes + 1)

    def _supersede(self) -> None:
        """Let go of each message for which there is a newer one of its topic."""
        seen: set[str] = set()
        kept: deque[Message[Any]] = deque()
        for message in reversed(self.messages):
            if message.topic not in seen:
                seen.add(message.topic)
                kept.appendleft(message)
                continue
            self.superseded += 1
            self._drop(message)
            if message._owed:
                message._done()
        self.messages.clear()
        self.messages.extend(kept)

    def _drop(self, message: Message[Any]) -> None:
        self._bytes -= len(message.payload)
        self.dropped += 1
        self._counters.dropped += 1

    def abandon(self) -> None:
        """Drop all: nobody will process it, and no connection is left to acknowledge it on."""
        self.dropped += len(self.messages)
        self._counters.dropped += len(self.messages)
        self.messages.clear()
        self._bytes = 0
