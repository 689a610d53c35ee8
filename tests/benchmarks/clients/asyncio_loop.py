"""What the clients on asyncio share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..gauge import Gauge
from ..job import Job

TASKS = 100
"""Publishing tasks, for a client whose ``publish`` returns when it is acknowledged."""
TURN = 100
"""Publishes between two visits to the event loop, for a client whose ``publish`` never waits."""


def run(work: Callable[[Job, Gauge], Awaitable[None]], job: Job, gauge: Gauge) -> None:
    async def main() -> None:
        await work(job, gauge)

    asyncio.run(main())


class Counter:
    """``count`` is a callback, whatever its arguments; it sets ``reached`` at the last message."""

    def __init__(self, expected: int) -> None:
        self.left = expected
        self.reached = asyncio.Event()

    def count(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            self.reached.set()


async def in_tasks(job: Job, publish: Callable[[range], Awaitable[None]]) -> None:
    await asyncio.gather(*(publish(range(task, job.count, TASKS)) for task in range(TASKS)))


class Returns:
    """Waits for one message at a time."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def __call__(self, *_: object) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()
