"""What ``driver.status()`` and ``subscription.statistics()`` return: plain values, none of them secret."""

from __future__ import annotations

from typing import Any

import attrs

from ._endpoints import EndpointHealth
from ._history import Event
from ._types import State


@attrs.frozen(kw_only=True)
class Status:
    """A snapshot of a driver. Times are in seconds."""

    state: State
    since: float
    """Seconds in this state."""
    generation: int
    """How many links have been live so far."""
    client_id: str | None
    """Of the present connection."""
    endpoint: str
    protocol: str | None
    """``"5"`` or ``"3.1.1"``; None without a connection."""
    failures: int
    """Failed attempts and short-lived links since the last stable one."""
    next_attempt_in: float | None
    """While backing off or paused."""
    last_error: str | None
    since_last_byte: float | None
    round_trip: float | None
    subscriptions: int
    degraded: tuple[tuple[str, str], ...]
    """(topic filter, reason) of each subscription that the broker refuses."""
    queued: int
    """Messages that wait in the outbox."""
    in_flight: int
    """Publishes on the wire that are not acknowledged yet."""
    unacknowledged: int
    """Incoming messages that are not acknowledged: their handlers have not finished, or it is not their turn."""
    counters: dict[str, int]
    endpoints: tuple[EndpointHealth, ...]
    """In order of preference."""
    history: tuple[Event, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as what JSON can hold."""
        values = attrs.asdict(self)
        values["state"] = self.state.value
        return values


@attrs.frozen(kw_only=True)
class SubscriptionStatistics:
    """A snapshot of what became of a subscription's messages."""

    received: int
    delivered: int
    """Given to the handler or handed out by the iterator."""
    dropped: int
    """By the overflow policy: what need not be acknowledged, or is superseded; or still queued when the driver
    ended."""
    superseded: int
    """Of these, those of any QoS that a newer one of the same topic took the place of (``Overflow.LATEST``)."""
    refused: int
    """With ``Message.refuse()``."""
    dead_letters: int
    """Payloads that fit neither this message class nor that of another subscription of the same filter."""
    handler_errors: int
    queued: int
    queued_bytes: int
    """Of payload."""
