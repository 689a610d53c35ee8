"""The order of the runs: every client once, then all again, so that none has the quiet hour of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from .catalogue import OURS, Client
from .environments import NotInstalledError, python_of, versions_of
from .job import Job
from .processes import RunError, run_client
from .results import Missing, Results, Run, about
from .workloads.base import Workload

ROUNDS = 5
QUICK_ROUNDS = 1
QUICK = 0.05
"""The share of the messages that a quick run has."""
TIMEOUT = 60.0
"""Seconds for one run; the slowest takes about ten."""


def measure(
    clients: Iterable[Client],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    quick: bool,
    environments: Path,
    output: Path,
    progress: TextIO,
) -> Results:
    """Run all clients through all workloads, one process at a time, and write ``output`` after each."""
    results = Results(about=about(rounds, quick))
    pythons = _install(clients, environments, results, progress)
    for workload in workloads:
        scaled = workload.scaled(QUICK) if quick else workload
        for number in range(rounds):
            for client, python in pythons.items():
                for job in _jobs(client, scaled, results, first=not number):
                    outcome = _measure_one(python, scaled, client, job, number, results)
                    progress.write(f"{workload.name} {number + 1}/{rounds}: {client.name} {job.api}: {outcome}\n")
                    progress.flush()
        results.write(output)  # a full run takes an hour, and should not be lost
    return results


def _install(clients: Iterable[Client], environments: Path, results: Results, progress: TextIO) -> dict[Client, str]:
    pythons: dict[Client, str] = {}
    for client in clients:
        progress.write(f"installing {client.name}\n")
        try:
            pythons[client] = python_of(client, environments)
            results.versions[client.name] = versions_of(client, pythons[client])
        except NotInstalledError as exc:
            results.missing.append(Missing(client.name, "", f"cannot be installed: {exc}"))
    return pythons


def _jobs(client: Client, workload: Workload, results: Results, *, first: bool) -> Iterator[Job]:
    if workload.line:
        if client.name == OURS:
            yield dataclasses.replace(workload.job, client=client.module)
        return
    reason = client.reason(workload)
    if reason is not None:
        if first:
            results.missing.append(Missing(client.name, workload.name, reason))
        return
    for api in client.apis_for(workload.job):
        yield dataclasses.replace(workload.job, client=client.module, api=api)


def _measure_one(python: str, workload: Workload, client: Client, job: Job, number: int, results: Results) -> str:
    label = f"{client.name}, {job.api}" if job.api else client.name
    if any(missing.client == label and missing.workload == workload.name for missing in results.missing):
        return "failed in an earlier round"
    try:
        figures = run_client(python, workload, job, TIMEOUT)
    except RunError as exc:
        results.missing.append(Missing(label, workload.name, f"failed: {exc}"))
        return f"failed: {exc}"
    results.runs.append(Run(workload.name, client.name, job.api, number, {**figures, "count": job.count}))
    return f"{workload.value(figures):.1f} {workload.unit}"
