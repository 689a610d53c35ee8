"""A workload: a job that each client gets, what stands at the other end, and which figures come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from ..job import Job

Server = Literal["feeder", "sink", "cutter", "mosquitto", "mosquitto and publisher", "mosquitto and relay"]
Figures = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    title: str
    server: Server
    job: Job
    """With no client in it yet."""
    figure: str = "cpu"
    """The one that is compared; see ``value``."""
    line: str = ""
    """The curve that it is a point of, and ``x`` where on it: then only this driver is measured."""
    x: int = 0
    least: int = 1
    """The smallest count that makes sense in a quick run."""

    @property
    def unit(self) -> str:
        return UNITS[self.figure]

    def value(self, figures: Figures) -> float:
        """The figure that is compared, in ``unit``."""
        if self.figure == "cpu":
            return figures["cpu"] / self.job.count * 1e6
        if self.figure == "wall":
            return figures["wall"] * 1e3
        if self.figure == "memory":
            return figures["memory"] / 1024 / max(self.job.count, self.job.filters)
        return figures[self.figure] * 1e6

    def extras(self, figures: Figures) -> Figures:
        """What else is worth showing."""
        if self.figure == "cpu":
            return {"messages/s": self.job.count / figures["wall"]}
        if self.figure == "wall":
            return {"CPU ms": figures["cpu"] * 1e3}
        if self.figure == "p50":
            return {"p99 µs": figures["p99"] * 1e6}
        return {}

    def scaled(self, by: float) -> Workload:
        """The same with fewer messages."""
        if not self.job.count:
            return self
        return dataclasses.replace(
            self, job=dataclasses.replace(self.job, count=max(self.least, int(self.job.count * by)))
        )


UNITS = {"cpu": "CPU µs/message", "wall": "ms", "p50": "p50 µs", "memory": "KiB each"}
