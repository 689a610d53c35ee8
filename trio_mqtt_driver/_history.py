"""What happened to a driver: its latest events and its counters, as plain data.

Errors are kept as text. A stored exception keeps its traceback, and that every frame with its locals: buffers, tasks,
whole connections.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import attrs

from ._errors import DriverClosedError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAXIMUM_TEXT: Final = 500
"""Characters kept of an error or an event: a broker's reason string may have 65,535 bytes."""


def describe(exc: BaseException) -> str:
    """Return "ClassName: message", with what caused it in brackets where that says something else.

    One line, at most 500 characters. The cause is the innermost of ``raise … from``; of a group, the first one's.
    """
    text = _named(exc)
    root = _root_cause(exc)
    if (str(root) or type(root).__name__) not in text:
        text = f"{text} [{_named(root)}]"
    return _shortened(text)


def _root_cause(exc: BaseException) -> BaseException:
    seen: set[int] = set()
    inner: BaseException | None = exc
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        exc = inner
        inner = _inner(exc)
    return exc


def _inner(exc: BaseException) -> BaseException | None:
    if isinstance(exc, BaseExceptionGroup):
        # Trio tries all addresses of a host: "all attempts failed", from a group with the reason of each.
        return cast("BaseExceptionGroup[BaseException]", exc).exceptions[0]
    return exc.__cause__


def _named(exc: BaseException) -> str:
    message = str(exc)
    return f"{type(exc).__name__}: {message}" if message else type(exc).__name__


def _shortened(text: str) -> str:
    line = " ".join(text[: 2 * _MAXIMUM_TEXT].split())
    return line if len(line) <= _MAXIMUM_TEXT else line[: _MAXIMUM_TEXT - 1] + "…"


@attrs.frozen(kw_only=True)
class Event:
    """One thing that happened."""

    at: float
    """Trio's clock, in seconds: for intervals."""
    wall: float
    """Seconds since the epoch: for people. It may jump."""
    kind: str
    """A word to filter by: the name of a state, "refused", "handler error", …"""
    generation: int
    """The number of the connection, 0 before the first."""
    text: str
    """What the log said."""
    error: str | None = None
    """What `describe` said of the error."""

    def as_dict(self) -> dict[str, Any]:
        """Return the event as what JSON has a form for."""
        return attrs.asdict(self)


@attrs.define(kw_only=True)
class Counters:
    """What is counted from the start of the driver on, over all connections. They never go down."""

    attempts: int = 0
    """Tries to get a connection."""
    failures: int = 0
    """Of these, those that failed."""
    connections: int = 0
    """Of these, those that went live."""
    losses: int = 0
    """Live connections that were lost; not those that were closed on purpose."""
    replays: int = 0
    """Subscriptions sent again after a reconnect."""
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    """From the stream, all packets."""
    bytes_out: int = 0
    dropped: int = 0
    """Messages dropped by a subscription's overflow policy, or that came, or were still queued, when the driver was
    left."""
    unrouted: int = 0
    """Messages that matched no subscription."""
    dead_letters: int = 0
    """Payloads that did not fit their message class."""
    handler_errors: int = 0
    stale_acknowledgements: int = 0
    """Messages acknowledged after their connection had ended: no-ops."""
    refused_messages: int = 0
    """Messages refused with ``Message.refuse()``, once for each subscription that did."""

    expired: int = 0
    """Messages given up in the outbox because their ``message_expiry`` had passed."""
    overdue: int = 0
    """Messages given up because ``publish_timeout`` had passed."""
    refused: int = 0
    """Messages that the broker refused, or ruled out in its CONNACK after they were accepted."""
    superseded: int = 0
    """Messages given up in the outbox for a newer one of their topic (``offline="latest"``)."""
    outbox_waits: int = 0
    """Calls of ``publish()`` that waited for room in the outbox."""
    outbox_refused: int = 0
    """Messages that the outbox had no room for."""
    outbox_dropped: int = 0
    """Messages dropped for newer ones when the outbox was full (``outbox_full="drop_oldest"``)."""
    quarantined: int = 0
    """Messages given up because the broker ended each connection that carried them, or unreadable in a file."""
    store_errors: int = 0
    """Batches that could not be written to the outbox file; they are written later."""

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return attrs.asdict(self)


class Listener(Protocol):
    """What is told of each event. It must neither wait nor raise: whoever records the event runs it."""

    def put(self, event: Event) -> None: ...

    def end(self) -> None:
        """No event will come any more."""
        ...


class History:
    """The latest ``capacity`` events, and the counters. Iterating goes from the oldest to the latest."""

    def __init__(self, capacity: int = 200) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
            raise TypeError(f"capacity: must be an int >= 1, got {capacity!r}")
        if capacity < 1:
            raise ValueError(f"capacity: must be an int >= 1, got {capacity!r}")
        self._events: deque[Event] = deque(maxlen=capacity)
        self._forgotten = 0
        self._last_error: Event | None = None
        # Weak: a consumer that went away without a word must not be fed for the rest of the driver's life.
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._ended = False
        self.counters: Counters = Counters()

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))

    @property
    def last_error(self) -> str | None:
        """The error of the latest event that had one, even if that event is forgotten."""
        return None if self._last_error is None else self._last_error.error

    def record(
        self, *, at: float, wall: float, kind: str, generation: int, text: str, error: BaseException | None = None
    ) -> Event:
        """Append an event, and forget the oldest if there is no room; return it."""
        event = Event(
            at=at,
            wall=wall,
            kind=kind,
            generation=generation,
            text=_shortened(text),
            error=None if error is None else describe(error),
        )
        if len(self._events) == self._events.maxlen:
            self._forgotten += 1
        self._events.append(event)
        if event.error is not None:
            self._last_error = event
        if self._listeners:  # to go through an empty weak set costs more than all the rest
            for listener in list(self._listeners):
                listener.put(event)
        return event

    def add_listener(self, listener: Listener) -> None:
        """Tell it of each event from now on, for as long as somebody else refers to it."""
        if self._ended:
            raise DriverClosedError("the driver has closed: there will be no more events")
        self._listeners.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def end(self) -> None:
        """The driver is closed: the last event is recorded."""
        self._ended = True
        for listener in list(self._listeners):
            listener.end()
        self._listeners.clear()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON has a form for; ``forgotten`` is how many older events there were."""
        return {
            "counters": self.counters.as_dict(),
            "last_error": self.last_error,
            "forgotten": self._forgotten,
            "events": [event.as_dict() for event in self._events],
        }
