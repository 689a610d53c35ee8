"""Starts the processes of one run, one client and its server, and ends them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TextIO

from trio_mqtt_driver.testing._ports import free_port

from .job import HOST, Job
from .workloads.base import Workload

TESTS = Path(__file__).parent.parent
"""The folder that child processes are started in; see ``__init__.py``."""


class RunError(Exception):
    """A client did not come to its end; the text says what it said last."""


def run_client(python: str, workload: Workload, job: Job, timeout: float) -> dict[str, float]:
    """One run of one client in a process of its own: its figures. Raises `RunError`."""
    with _servers(workload, job) as ready:
        command = [python, "-m", "benchmarks.child", ready.to_json()]
        # Files: a line that a client logs into a pipe would wake this process, in the middle of what is measured.
        with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
            try:
                done = subprocess.run(
                    command,
                    cwd=TESTS,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    timeout=timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired as exc:
                raise RunError(f"not done after {timeout:.0f} s") from exc
            if done.returncode:
                raise RunError(_last_line(errors) or f"exit code {done.returncode}")
            figures: dict[str, float] = json.loads(_last_line(out))
    return figures


def _last_line(file: TextIO) -> str:
    file.seek(0)
    lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else ""


@contextlib.contextmanager
def _servers(workload: Workload, job: Job) -> Generator[Job, None, None]:
    """The job with the ports of what was started for it."""
    if workload.server == "mosquitto":
        with _mosquitto() as port:
            yield dataclasses.replace(job, port=port)
    elif workload.server.startswith("mosquitto and "):
        role = workload.server.removeprefix("mosquitto and ")
        with _mosquitto() as port, _server(role, dataclasses.replace(job, port=port)) as ready:
            yield ready
    else:
        with _server(workload.server, job) as ready:
            yield ready


@contextlib.contextmanager
def _server(role: str, job: Job) -> Generator[Job, None, None]:
    command = [sys.executable, "-m", "benchmarks.servers", role, job.to_json()]
    with subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RunError(f"the {role} did not start")
            ports = json.loads(line)
            yield dataclasses.replace(job, port=ports["port"], control=ports["control"])
        finally:
            process.kill()


def mosquitto_program() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


@contextlib.contextmanager
def _mosquitto() -> Generator[int, None, None]:
    program = mosquitto_program()
    if program is None:
        raise RunError("mosquitto was not found: apt-get install mosquitto")
    port = free_port()
    with TemporaryDirectory() as directory:
        config = Path(directory) / "mosquitto.conf"
        # Nothing is dropped for a slow client: it has to take all.
        config.write_text(
            f"listener {port} {HOST}\nallow_anonymous true\nmax_queued_messages 0\nset_tcp_nodelay true\n"
            "log_dest stderr\nlog_type information\nlog_type error\nconnection_messages false\n",
            encoding="utf-8",
        )
        with subprocess.Popen([program, "-c", str(config)], stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if "running" in line:
                        break
                yield port
            finally:
                process.kill()
