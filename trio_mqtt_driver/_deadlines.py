"""When a connection must send PINGREQ, and when an answer is overdue. Pure: times in, decisions out.

Two clocks run. Ours to the broker: it must hear from us within Keep Alive [MQTT-3.1.2-20], whatever else happens. And
the broker's to us: if nothing arrives for as long, PINGREQ asks for a sign of life, since on a half-open link writing
goes on "working" for a long time. Bytes that arrive count as that sign, since a PINGRESP may queue behind large
messages; but a broker that goes on to send whole packets and never answers does not answer.

While reading is paused the answers lie unread on our side: only the first clock runs. The same before the link is
live, where each step (CONNACK, test publish, replay) has a deadline of its own, and an error that names it.
"""

from __future__ import annotations

import math
from collections import deque

from ._config import DriverConfig
from ._errors import AckTimeoutError, KeepAliveError, MQTTDriverError
from ._replies import Ping

_PATIENCE = 3
"""So many ping timeouts are too many for one PINGREQ, whatever else arrives."""


class Deadlines:
    """The times of one connection, in seconds on the caller's clock."""

    def __init__(self, config: DriverConfig, now: float) -> None:
        self._ping_timeout = config.ping_timeout
        self._ack_timeout = config.ack_timeout
        self.keep_alive: float = math.inf
        self.sent_at = now
        self.heard_at = now
        """When anything last arrived from the broker."""
        self.pings: deque[Ping] = deque()
        self.mid_packet = False
        """Whether a packet has begun to arrive and is not complete."""
        self.live = False
        self.paused = False
        self._resumed_at = now

    @property
    def listening_since(self) -> float:
        """When reading began or went on; infinite while it is paused."""
        return math.inf if self.paused else self._resumed_at

    def resume(self, now: float) -> None:
        """Reading goes on: what lay unread can be an answer, so all waiting begins anew."""
        self.paused = False
        self.heard_at = self._resumed_at = now

    def ping_due(self, now: float) -> bool:
        """Whether PINGREQ must be sent now."""
        if now >= self.sent_at + self.keep_alive:
            return True
        return self.live and not self.pings and not self.paused and now >= self.heard_at + self.keep_alive

    def overdue(self, now: float, oldest_sent_at: float) -> MQTTDriverError | None:
        """What the link failed to answer in time; ``oldest_sent_at`` is when the oldest open publish was sent."""
        if self.paused or not self.live:
            return None
        silence = f"nothing received for {now - self.heard_at:.1f} s"
        if now >= self._pong_by():
            if now < self.heard_at + self._ping_timeout:
                return KeepAliveError("no answer to PINGREQ although other packets arrive: the broker is stuck")
            return KeepAliveError(
                f"no answer to PINGREQ within ping_timeout={self._ping_timeout:g} s, {silence}: the link is half-open"
            )
        if now >= self._ack_by(oldest_sent_at):
            return AckTimeoutError(f"no acknowledgement within ack_timeout={self._ack_timeout:g} s, {silence}")
        return None

    def look_at(self, now: float, oldest_sent_at: float) -> float:
        """When the next of all this may be due."""
        ping_by = self.sent_at + self.keep_alive
        if not self.live:
            return ping_by
        if self.paused:
            return min(ping_by, now + self._ack_timeout)
        if not self.pings:
            ping_by = min(ping_by, self.heard_at + self.keep_alive)
        return min(ping_by, self._pong_by(), self._ack_by(oldest_sent_at))

    def _pong_by(self) -> float:
        if not self.pings:
            return math.inf
        asked_at = max(self.pings[0].sent_at, self._resumed_at)
        pong_by = max(asked_at, self.heard_at) + self._ping_timeout
        return pong_by if self.mid_packet else min(pong_by, asked_at + _PATIENCE * self._ping_timeout)

    def _ack_by(self, oldest_sent_at: float) -> float:
        return max(oldest_sent_at, self._resumed_at) + self._ack_timeout
