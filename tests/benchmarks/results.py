"""The figures of a run of the suite, raw and as medians, and the JSON file that keeps them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .catalogue import CLIENTS, FLOOR, OURS, TRIO_PAHO
from .processes import mosquitto_program
from .workloads.base import Workload

PEERS = frozenset(client.name for client in CLIENTS if client.peer)


@dataclasses.dataclass(frozen=True)
class Run:
    """One client, one workload, once."""

    workload: str
    client: str
    api: str
    round: int
    figures: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Missing:
    """What was not measured, and why: nothing is left out silently."""

    client: str
    workload: str
    """Empty: none of them."""
    reason: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The medians of one client in one workload."""

    client: str
    api: str
    value: float
    least: float
    most: float
    extras: dict[str, float]
    rounds: int

    @property
    def label(self) -> str:
        return f"{self.client}, {self.api}" if self.api else self.client


@dataclasses.dataclass
class Results:
    about: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    versions: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict[str, dict[str, str]])
    runs: list[Run] = dataclasses.field(default_factory=list[Run])
    missing: list[Missing] = dataclasses.field(default_factory=list[Missing])

    def rows(self, workload: Workload) -> list[Row]:
        """The best first."""
        runs: dict[tuple[str, str], list[dict[str, float]]] = {}
        for run in self.runs:
            if run.workload == workload.name:
                runs.setdefault((run.client, run.api), []).append(run.figures)
        rows = [_row(workload, client, api, figures) for (client, api), figures in runs.items()]
        return sorted(rows, key=lambda row: row.value)

    def reasons(self, workload: Workload) -> list[Missing]:
        """What is missing in this workload only."""
        return [missing for missing in self.missing if missing.workload == workload.name]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = [Run(**run) for run in data["runs"]]
        missing = [Missing(**one) for one in data["missing"]]
        return cls(about=data["about"], versions=data["versions"], runs=runs, missing=missing)


def _row(workload: Workload, client: str, api: str, runs: list[dict[str, float]]) -> Row:
    # A quick run has fewer messages than the workload says; each run tells its own number.
    values = [_counted(workload, figures).value(figures) for figures in runs]
    extras = [_counted(workload, figures).extras(figures) for figures in runs]
    return Row(
        client,
        api,
        statistics.median(values),
        min(values),
        max(values),
        {name: statistics.median(extra[name] for extra in extras) for name in extras[0]},
        len(runs),
    )


def _counted(workload: Workload, figures: dict[str, float]) -> Workload:
    count = int(figures["count"])
    return dataclasses.replace(workload, job=dataclasses.replace(workload.job, count=count))


@dataclasses.dataclass(frozen=True)
class References:
    """What the others are compared with in one workload; None where there is no such figure."""

    floor: float | None
    best_peer: Row | None
    trio_paho: float | None

    @classmethod
    def of(cls, rows: Iterable[Row]) -> References:
        # In the order of the values: the first of each is its best.
        first: dict[str, Row] = {}
        best: Row | None = None
        for row in rows:
            first.setdefault(row.client, row)
            if best is None and row.client in PEERS:
                best = row
        value = {client: row.value for client, row in first.items()}
        return cls(value.get(FLOOR), best, value.get(TRIO_PAHO))

    def ratios(self, row: Row) -> tuple[str, str, str]:
        """To the floor, the best peer, and paho the trio-paho-mqtt way."""
        best = self.best_peer.value if self.best_peer is not None else None
        return _ratio(row.value, self.floor), _ratio(row.value, best), _ratio(row.value, self.trio_paho)


def _ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.2f}" if reference else "-"


def is_ours(row: Row) -> bool:
    return row.client == OURS


def about(rounds: int, quick: bool) -> dict[str, Any]:
    """The machine and the time."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "mosquitto": _mosquitto_version(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
        "quick": quick,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _mosquitto_version() -> str:
    program = mosquitto_program()
    if program is None:
        return "none"
    # It prints its version with its help, and calls that a failure.
    done = subprocess.run([program, "-h"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else "unknown"
