"""When the next read of a busy link should wait for a moment, so that it brings more. Pure: no clock, no sleep.

A broker writes most messages by themselves. A reader that is quick is then woken for each or every second one, which
costs several times what the message does: all of a core, and the broker may want that core. What comes in a
millisecond can be had with few wake-ups. Network cards do the same, and call it interrupt coalescing.

Hazard: a peer may wait for what we make of these messages before it sends more (a small window, requests upon
responses), and would be slowed down. So it is measured, each time anew: how much comes without waiting, and then how
much comes with it. If that is less, it is not tried again for a while, and twice as long if it happens again.

After each wait there are some reads without: of small segments TCP sends only about ten before they are acknowledged,
which they are when they are read, and what has gathered behind them comes then.
"""

from __future__ import annotations

_READS = 8
_SPAN = 0.001
"""So many reads in so many seconds make a link busy."""
_BEFORE = 4
"""For how many times so many reads it must be, before a read waits. What comes without waiting is measured meanwhile,
but not in the first, which may bring what has gathered before."""
_READS_BETWEEN = 3
_SPAN_BETWEEN = 0.004
"""The same between two waits: the peer may have to come round again, too."""
_WAITS = 16
"""Until it is measured again what comes without."""
_JUDGED = 4
"""Waits after which it can be told whether they are of use."""
_ENOUGH = 0.9
"""What must come with waiting, as a share of what comes without."""
_SKIPPED = 64
_MOST_SKIPPED = 4096
"""How often a link is found busy without consequences, after waiting was of no use: at first and at most."""


class Gathering:
    """Looks at the reads of one connection."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._reads = 0
        self._reads_since = 0.0
        self._messages = 0
        self._messages_since = 0.0
        self._rate = 0.0
        """Messages a second that came without waiting."""
        self._busy = 0
        self._waits = 0
        """How often it has waited since then; 0 if it does not."""
        self._waiting = False
        """Whether there was no read since the last wait."""
        self._skip = self._skipped = 0

    def wait_after(self, now: float, messages: int, *, emptied: bool) -> float:
        """How many seconds to wait, now that a read has brought so many messages; ``emptied`` if that was all."""
        self._messages += messages
        if not emptied:
            return 0.0
        if self._waiting:
            self._waiting = False
            if now > self._reads_since + self._delay + _SPAN_BETWEEN:  # nothing came, or timers are coarse here
                self._in_vain()
            self._reads_since = now
        self._reads += 1
        elapsed = now - self._reads_since
        reads, span = (_READS_BETWEEN, _SPAN_BETWEEN) if self._waits else (_READS, _SPAN)
        if self._reads < reads and elapsed <= span:
            return 0.0
        busy = 0 < elapsed <= span  # not on a clock that stands still: there nothing may wait
        self._reads = 0
        self._reads_since = now
        if not busy:
            self._busy = 0
            if self._waits:
                self._in_vain()
        elif self._go_on(now) if self._waits else self._begin(now):
            self._waits += 1
            self._waiting = True
            return self._delay
        return 0.0

    def _begin(self, now: float) -> bool:
        if self._skip:
            self._skip -= 1
            return False
        self._busy += 1
        if self._busy < _BEFORE:
            if self._busy == 1:
                self._measure(now)
            return False
        self._rate = self._messages / (now - self._messages_since)
        self._measure(now)
        return True

    def _go_on(self, now: float) -> bool:
        enough = self._messages >= _ENOUGH * self._rate * (now - self._messages_since)
        if self._waits < _WAITS and (enough or self._waits < _JUDGED):
            return True
        if enough:
            self._skipped = self._busy = self._waits = 0
        else:
            self._in_vain()
        return False

    def _in_vain(self) -> None:
        self._skip = self._skipped = min(max(2 * self._skipped, _SKIPPED), _MOST_SKIPPED)
        self._busy = self._waits = 0

    def _measure(self, now: float) -> None:
        self._messages = 0
        self._messages_since = now
