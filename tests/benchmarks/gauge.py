"""What a client's process measures of itself, from the word "go" to the end of the work."""

from __future__ import annotations

import gc
import resource
import socket
import time
from pathlib import Path
from time import perf_counter

from .job import HOST, Job

REST = 0.1
"""Seconds before a connection is cut. Links are lost out of the quiet, and not a millisecond after the subscribing,
whose code a reconnect would find in the processor's caches."""


class Gauge:
    """CPU time of the whole process, threads included, of the measured phase only; never of start-up."""

    def __init__(self, job: Job) -> None:
        self._control = socket.create_connection((HOST, job.control)) if job.control else None
        self._rest = REST if job.work == "reconnect" else 0
        self._began = 0.0
        self._cpu = 0.0
        self.figures: dict[str, float] = {}

    def start(self) -> None:
        """The client is ready: all is subscribed, nothing is under way."""
        if self._rest:
            time.sleep(self._rest)  # noqa: TID251  # all of the process is to rest, whatever loop it has
        self._began = perf_counter()
        self._cpu = _cpu()
        self.go()

    def go(self) -> None:
        """Tell the server."""
        if self._control is not None:
            self._control.sendall(b"g")

    def stop(self) -> None:
        self.figures["cpu"] = _cpu() - self._cpu
        self.figures["wall"] = perf_counter() - self._began

    def trips(self, seconds: list[float]) -> None:
        """Round-trip times."""
        ordered = sorted(seconds)
        self.figures["p50"] = ordered[len(ordered) // 2]
        self.figures["p99"] = ordered[len(ordered) * 99 // 100]

    def memory(self, figure: str = "memory") -> None:
        """Resident memory that was added since the last call, in bytes (Linux)."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        resident = pages * resource.getpagesize()
        self.figures[figure] = resident - self.figures.get("resident", 0)
        self.figures["resident"] = resident

    def close(self) -> None:
        if self._control is not None:
            self._control.close()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
