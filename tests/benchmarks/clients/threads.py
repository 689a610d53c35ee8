"""What the clients with a thread of their own share."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..gauge import Gauge
from ..job import Job

PATIENCE = 60
"""Seconds for anything; the process is ended from outside anyway if a run takes too long."""


def run(work: Callable[[Job, Gauge], None], job: Job, gauge: Gauge) -> None:
    work(job, gauge)


class Counter:
    """``count`` is a callback, whatever its arguments; it sets ``reached`` at the last message."""

    def __init__(self, expected: int) -> None:
        self.left = expected
        self.reached = threading.Event()

    def count(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            self.reached.set()


class Returns:
    """Waits for one message at a time."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self, *_: object) -> None:
        self._event.set()

    def wait(self) -> None:
        self._event.wait(PATIENCE)
        self._event.clear()
