"""``python -m tests.benchmarks``: measure, print the tables, and write the JSON file."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterable
from pathlib import Path

from .catalogue import CLIENTS, Client
from .environments import DEFAULT
from .report import lines
from .suite import QUICK_ROUNDS, ROUNDS, measure
from .workloads import WORKLOADS
from .workloads.base import Workload


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.list:
        _print(client.name for client in CLIENTS)
        _print(f"{workload.name}: {workload.title}" for workload in WORKLOADS)
        return
    workloads = _workloads(options.workloads)
    results = measure(
        _clients(options.clients),
        workloads,
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        quick=options.quick,
        environments=options.venvs,
        output=options.output,
        progress=sys.stderr,
    )
    _print(lines(results, workloads))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few messages, for a look; its figures mean little")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help=f"how often each is run ({ROUNDS})")
    parser.add_argument("--clients", default="*", metavar="PATTERNS", help="names or patterns, with commas between")
    parser.add_argument("--workloads", default="*", metavar="PATTERNS", help="names or patterns, with commas between")
    parser.add_argument("--venvs", type=Path, default=DEFAULT, metavar="FOLDER", help="where the peers are installed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"), metavar="FILE", help="the JSON file")
    parser.add_argument("--list", action="store_true", help="print the names of clients and workloads")
    return parser


def _print(texts: Iterable[str]) -> None:
    for text in texts:
        sys.stdout.write(f"{text}\n")


def _workloads(patterns: str) -> list[Workload]:
    found = [one for one in WORKLOADS if _matches(one.name, patterns)]
    if not found:
        raise SystemExit(f"no workload is called {patterns}; --list shows their names")
    return found


def _clients(patterns: str) -> list[Client]:
    found = [one for one in CLIENTS if _matches(one.name, patterns)]
    if not found:
        raise SystemExit(f"no client is called {patterns}; --list shows their names")
    return found


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split(","))


if __name__ == "__main__":
    main()
