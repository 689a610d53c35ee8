"""When to let others run, in calls that cost less than a visit to the scheduler."""

from __future__ import annotations

import trio

_CALLS = 64


class Turns:
    """A cancel point each time, and a schedule point every 64th time."""

    def __init__(self) -> None:
        self._calls = 0

    async def take(self) -> None:
        self._calls = (self._calls + 1) % _CALLS
        if self._calls:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
