"""When to let others run, in calls that cost less than a visit to the scheduler."""

from __future__ import annotations

import trio

_CALLS = 256
_SECONDS = 0.001


class Turns:
    """Whose turn it is: others' at every 256th call, and at the first one after a millisecond."""

    def __init__(self) -> None:
        self._calls = _CALLS
        self._until = 0.0
        self._now = trio.current_time

    def over(self) -> bool:
        """Whether the caller must visit the scheduler now."""
        calls = self._calls + 1
        if calls < _CALLS and self._now() < self._until:
            self._calls = calls
            return False
        self._calls = 0
        self._now = trio.lowlevel.current_clock().current_time
        self._until = self._now() + _SECONDS
        return True

    async def wait(self) -> None:
        """A cancel point each time, and a schedule point if the turn is over."""
        if self.over():
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
