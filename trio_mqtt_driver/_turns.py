"""When to let others run, in calls that cost less than a visit to the scheduler."""

from __future__ import annotations

_CALLS = 32
_SECONDS = 0.001


class Turns:
    """Whose turn it is: others' at every 32nd call, and at the first one after a millisecond."""

    def __init__(self) -> None:
        self._calls = 0
        self._until = 0.0

    def over(self, now: float) -> bool:
        """Whether the caller must visit the scheduler now."""
        self._calls += 1
        if self._calls < _CALLS and now < self._until:
            return False
        self._calls = 0
        self._until = now + _SECONDS
        return True
