"""When a connection must send PINGREQ, and when an answer is overdue. Pure: times in, decisions out.

Two clocks run. Ours to the broker: it must hear from us within Keep Alive [MQTT-3.1.2-20], whatever else happens, so
PINGREQ goes out a little before that. And the broker's to us: if nothing arrives for as long, PINGREQ asks for a sign
of life, since on a half-open link writing goes on "working" for a long time. Bytes that arrive count as that sign,
since a PINGRESP may queue behind large messages; but a broker that goes on to send whole packets and never answers
does not answer.

A link is *in doubt* when an acknowledgement is late, or when the machine was suspended: PINGREQ goes out at once, and
what comes of it decides. A late acknowledgement alone does not tell a dead link from a slow one, nor from an event
loop that was blocked while the answer lay in the socket; and after a suspension nobody knows, since the wall clock
also jumps when it is set. So a link that answers is never ended because of a clock.

A question that lies behind others in the write buffer is not asked yet: as long as bytes leave its time begins anew.
And an answer may lie behind others on its way to us: as long as bytes arrive it has three times as long, and behind a
packet that takes longer, or that we have not come to read, whatever that takes.

While reading is paused the answers lie unread on our side: only the first clock runs. The same before the link is
live, where each step has a deadline of its own, and an error that names it: that of CONNACK is kept by whoever waits
for it, those of the test publish and of each SUBSCRIBE and UNSUBSCRIBE, live or not, are kept here (``begin``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import attrs

from ._config import DriverConfig
from ._errors import (
    AckTimeoutError,
    ConnectionLostError,
    KeepAliveError,
    MQTTDriverError,
    ProtocolError,
    ServerDisconnectedError,
    SuspendedError,
)
from ._replies import Ping
from ._types import ReasonCode

_PATIENCE = 3
"""So many timeouts are too many for one answer, whatever else arrives."""
_SLOWEST = 100
"""Bytes in a second that make a packet one that takes long; one that trickles in more slowly is no excuse."""
_EARLIER = 1.0
_EARLIER_AT_MOST = 0.25
"""Seconds, and of the Keep Alive: so much before it is over PINGREQ goes out. The loop may be busy then and the
network slow, and nats-server has no patience beyond a Keep Alive of 1: it rounds one and a half times that down."""
_GIVEN_UP_AFTER = 1.5
"""In keep-alives: a broker that hears nothing for so long closes the connection [MQTT-3.1.2-22]."""
_FORGOTTEN_AFTER = 60.0
"""Without a keep-alive the broker waits for ever, but routers and firewalls forget connections that are silent."""
CLOCKS_EVERY = 5.0
"""How often the clocks are compared. A shorter time finds a suspension little sooner than the PINGREQ that follows can
be answered; each look costs what a timer of Trio costs, and a process may hold a thousand connections."""


@attrs.define
class _Doubt:
    """A reason to ask the broker for a sign of life."""

    since: float
    asked_from: float
    """The PINGRESP of a PINGREQ that was sent earlier says nothing: it may be older than what is in doubt."""
    answered: bool = False


@attrs.define(eq=False)
class Wait:
    """For the answer to a request that ends at ``wire_end`` among the bytes of the connection."""

    seconds: float
    asked_at: float
    wire_end: int
    late: Callable[[], object]


class Deadlines:
    """The times of one connection, in seconds on the caller's clock. ``wall`` is the wall clock, for comparison."""

    def __init__(self, config: DriverConfig, now: float, wall: float) -> None:
        self._ping_timeout = config.ping_timeout
        self._ack_timeout = config.ack_timeout
        self._doubt_timeout = min(config.ping_timeout, config.ack_timeout)
        self._keep_alive = self._ping_after = math.inf
        self.sent_at = now
        self.heard_at = now
        """When anything last arrived from the broker."""
        self.pings: deque[Ping] = deque()
        self._flushed = 0
        self._partial = 0
        self._partial_since = now
        self._behind = False
        """Whether the answer that is waited for may be behind a packet that takes long, or that we have not read."""
        self.live = False
        self.paused = False
        self._resumed_at = now
        self._waiting_since = math.inf
        self._waits: set[Wait] = set()
        self._late: _Doubt | None = None
        self._ahead = wall - now
        self._suspended: _Doubt | None = None
        self._suspended_for = 0.0

    def agree(self, keep_alive: float) -> None:
        """CONNACK is there: the Keep Alive that holds, in seconds, infinite for none."""
        self._keep_alive = keep_alive
        self._ping_after = keep_alive - min(_EARLIER, _EARLIER_AT_MOST * keep_alive)

    def resume(self, now: float) -> None:
        """Reading goes on: what lay unread can be an answer, so all waiting begins anew."""
        self.paused = False
        self.heard_at = self._resumed_at = now

    def heard(self, now: float, size: int, partial: int, *, more: bool) -> None:
        """So many bytes have arrived. Of these and those before, the last ``partial`` are of a packet that is not
        complete; and ``more`` may lie unread."""
        self.heard_at = now
        if not self._partial or partial != self._partial + size:
            self._partial_since = now
        self._partial = partial
        self._behind = more or (partial > 0 and partial >= _SLOWEST * (now - self._partial_since))

    def flushed(self, now: float, position: int) -> None:
        """Bytes have left, all up to ``position``."""
        self.sent_at = now
        if self.pings or self._waits:
            questions: list[Ping | Wait] = [*self.pings, *self._waits]
            for question in questions:
                if question.wire_end > self._flushed:
                    question.asked_at = now
        self._flushed = position

    def begin(self, now: float, seconds: float, wire_end: int, late: Callable[[], object]) -> Wait:
        """Somebody waits for an answer, until ``end``."""
        wait = Wait(seconds, now, wire_end, late)
        self._waits.add(wait)
        return wait

    def end(self, wait: Wait) -> None:
        self._waits.discard(wait)

    def missed(self, now: float) -> list[Callable[[], object]]:
        """What to call for the answers that are overdue, once for each."""
        if self.paused:
            return []
        over = [wait for wait in self._waits if self._answer_by(wait.asked_at, wait.seconds) <= now]
        self._waits.difference_update(over)
        return [wait.late for wait in over]

    def observe(self, now: float, wall: float, oldest_sent_at: float) -> str | None:
        """Take in how things stand, before the questions below are asked.

        ``oldest_sent_at`` is since when the first open publish waits. Returns what is worth telling, if anything.
        """
        self._compare_clocks(now, wall)
        self._waiting_since = max(oldest_sent_at, self._resumed_at)
        if self._late is not None and self._late.asked_from != self._waiting_since:
            self._late = None  # it was acknowledged; or reading was paused, and all waiting begins anew
        if self._late is None and self.live and now >= self._waiting_since + self._ack_timeout:
            self._late = _Doubt(since=now, asked_from=self._waiting_since)
        if self._suspended is None or not self._suspended.answered:
            return None
        text = (
            f"the wall clock jumped ahead by {self._suspended_for:.0f} s: the machine was suspended, or the clock was "
            "set; the broker answers, so the link stays"
        )
        self._suspended = None
        self._suspended_for = 0.0
        return text

    def _compare_clocks(self, now: float, wall: float) -> None:
        # Trio's clock stands still while the machine is suspended, the wall clock does not.
        jump = wall - now - self._ahead
        self._ahead = wall - now
        if jump > (_FORGOTTEN_AFTER if self._keep_alive == math.inf else _GIVEN_UP_AFTER * self._keep_alive):
            self._suspended_for += jump
            self._suspended = _Doubt(since=now, asked_from=now)

    def pong(self) -> Ping | None:
        """PINGRESP has come: the PINGREQ that it answers."""
        if not self.pings:
            return None
        ping = self.pings.popleft()
        for doubt in (self._late, self._suspended):
            if doubt is not None and ping.sent_at >= doubt.asked_from:
                doubt.answered = True
        return ping

    def ping_due(self, now: float) -> bool:
        """Whether PINGREQ must be sent now."""
        if now >= self.sent_at + self._ping_after:
            return True
        if not self.live or self.paused:
            return False
        last = self.pings[-1].sent_at if self.pings else -math.inf
        return (not self.pings and now >= self.heard_at + self._ping_after) or any(
            doubt is not None and not doubt.answered and last < doubt.asked_from
            for doubt in (self._late, self._suspended)
        )

    def overdue(self, now: float) -> MQTTDriverError | None:
        """What the link failed to answer in time."""
        if self.paused or not self.live:
            return None
        silence = f"nothing received for {now - self.heard_at:.1f} s"
        if self._late is not None:
            late = f"no acknowledgement within ack_timeout={self._ack_timeout:g} s"
            if self._late.answered:
                return AckTimeoutError(f"{late}, although the broker answers PINGREQ")
            if now >= self._doubt_by(self._late):
                if now < self.heard_at + self._doubt_timeout:
                    return AckTimeoutError(f"{late} and no answer to PINGREQ, although other packets arrive")
                return AckTimeoutError(f"{late} and no answer to PINGREQ, {silence}: the link is half-open")
        if self._suspended is not None and now >= self._doubt_by(self._suspended):
            return KeepAliveError(f"no answer to PINGREQ within {self._doubt_timeout:g} s, {silence}")
        if now >= self._pong_by():
            if now < self.heard_at + self._ping_timeout:
                return KeepAliveError("no answer to PINGREQ although other packets arrive: the broker is stuck")
            return KeepAliveError(
                f"no answer to PINGREQ within ping_timeout={self._ping_timeout:g} s, {silence}: the link is half-open"
            )
        return None

    def look_at(self, now: float) -> float:
        """When the next of all this may be due."""
        ping_by = self.sent_at + self._ping_after
        if self.paused:
            return min(ping_by, now + self._ack_timeout)
        answer_by = min((self._answer_by(wait.asked_at, wait.seconds) for wait in self._waits), default=math.inf)
        if not self.live:
            return min(ping_by, answer_by)
        if not self.pings:
            ping_by = min(ping_by, self.heard_at + self._ping_after)
        ack_by = self._waiting_since + self._ack_timeout
        if self._late is not None:
            ack_by = self._doubt_by(self._late)
        if self._suspended is not None:
            ack_by = min(ack_by, self._doubt_by(self._suspended))
        return min(ping_by, answer_by, self._pong_by(), ack_by)

    def explain(self, error: MQTTDriverError, now: float, wall: float) -> MQTTDriverError:
        """The error that ends the connection: ``error``, or that the machine was suspended, if it may be due to that.

        A broker that gives another reason in its DISCONNECT is believed, and nonsense is nonsense.
        """
        self._compare_clocks(now, wall)
        if self._suspended is None or self._suspended.answered or not isinstance(error, ConnectionLostError):
            return error
        if isinstance(error, ProtocolError):
            return error
        if isinstance(error, ServerDisconnectedError) and error.reason_code != ReasonCode.KEEP_ALIVE_TIMEOUT:
            return error
        explained = SuspendedError(f"the machine was suspended for about {self._suspended_for:.0f} s: {error}")
        explained.__cause__ = error
        return explained

    def _pong_by(self) -> float:
        return self._answer_by(self.pings[0].asked_at, self._ping_timeout) if self.pings else math.inf

    def _doubt_by(self, doubt: _Doubt) -> float:
        asked_at = next((ping.asked_at for ping in self.pings if ping.sent_at >= doubt.asked_from), doubt.since)
        return self._answer_by(max(asked_at, doubt.since), self._doubt_timeout)

    def _answer_by(self, asked_at: float, timeout: float) -> float:
        asked_at = max(asked_at, self._resumed_at)
        answer_by = max(asked_at, self.heard_at) + timeout
        return answer_by if self._behind else min(answer_by, asked_at + _PATIENCE * timeout)
