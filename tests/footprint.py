"""What a test leaves behind in this process: tasks, threads, files, connections, memory."""

from __future__ import annotations

import gc
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio
import trio.testing

from trio_mqtt_driver._connection import Connection

MIB = 2**20
ALLOWED = 2 * MIB


@attrs.frozen
class Footprint:
    tasks: int
    threads: int
    files: int
    connections: int
    """Connection objects that the garbage collector knows."""
    memory: int
    """As ``measure`` counts it."""

    @classmethod
    async def take(cls, measure: Callable[[], int]) -> Footprint:
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            gc.collect()
        return cls(
            tasks=trio.lowlevel.current_statistics().tasks_living,
            threads=threading.active_count(),
            files=len(os.listdir("/dev/fd")),  # noqa: PTH208  # iterdir() would open one more
            connections=sum(isinstance(thing, Connection) for thing in gc.get_objects()),
            memory=measure(),
        )

    def assert_no_more_than(self, other: Footprint, allowed: int = ALLOWED) -> None:
        both = f"{self} after {other}"
        assert attrs.evolve(self, memory=0, threads=0) == attrs.evolve(other, memory=0, threads=0), both
        # Idle worker threads of earlier tests may end meanwhile.
        assert self.threads <= other.threads, both
        assert abs(self.memory - other.memory) < allowed, both


@contextmanager
def allocations_traced() -> Generator[None, None, None]:
    """Inside the block :func:`traced` works."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def traced() -> int:
    return tracemalloc.get_traced_memory()[0]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def blocks() -> int:
    """Memory blocks that Python has handed out: costs nothing while the test runs, unlike :func:`traced`."""
    return sys.getallocatedblocks()
