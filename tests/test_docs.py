"""What README and documentation show is true: their code runs, their tables agree with the code.

Of each page all ``python`` blocks are run, from top to bottom, against a broker in memory that listens on loopback. A
block that calls ``trio.run`` is a program and runs by itself. The others share one namespace, as in a session at the
console with top-level ``await``; it has a live ``driver``.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import attrs
import pytest
import trio

from docs.state_diagram import draw
from tests.test_layers import LAYERS
from trio_mqtt_driver import (
    BackoffConfig,
    ConnectionLostError,
    DriverConfig,
    FailoverConfig,
    MQTTDriver,
    TLSError,
)
from trio_mqtt_driver._states import TRANSITIONS
from trio_mqtt_driver.testing import MemoryBroker

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
URL = "mqtt://localhost:1883"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Edges = set[tuple[str, str]]


def blocks(page: Path) -> list[tuple[int, str]]:
    """The ``python`` blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


def compiled(page: Path, line: int, source: str) -> CodeType:
    """The code, with the line numbers of the page in its tracebacks."""
    tree = ast.parse(source)
    ast.increment_lineno(tree, line - 1)
    code: CodeType = compile(tree, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return code


async def run_program(source: str) -> None:
    result = await trio.run_process(
        [sys.executable, "-W", "error", "-c", source],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
async def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        url = f"mqtt://127.0.0.1:{await broker.listen()}"
        async with MQTTDriver(url, client_id="docs") as driver:
            namespace: dict[str, Any] = {"driver": driver, "trio": trio}
            with trio.fail_after(60):
                await trio.lowlevel.checkpoint()
                for line, written in blocks(page):
                    source = written.replace(URL, url)
                    if "trio.run(" in source:
                        await run_program(source)
                        continue
                    code = compiled(page, line, source)
                    outcome = eval(code, namespace)  # the documentation's own code
                    if inspect.iscoroutine(outcome):
                        await outcome
        nursery.cancel_scope.cancel()


def test_the_readme_has_an_example_that_runs() -> None:
    assert any("trio.run(" in source for _, source in blocks(ROOT / "README.md"))


def transitions() -> Edges:
    return {(before.value, after.value) for before, targets in TRANSITIONS.items() for after in targets}


def test_the_diagram_of_the_readme_is_the_state_machine() -> None:
    diagram = re.search(r"^```mermaid\n(.*?)^```$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert diagram is not None
    found = re.findall(r"^ *(\w+) --> (\w+)", diagram[1], re.MULTILINE)
    assert {(before.replace("_", " "), after.replace("_", " ")) for before, after in found} == transitions()


def test_the_drawing_of_the_states_is_the_state_machine() -> None:
    drawing = (ROOT / "docs" / "state_diagram.svg").read_text(encoding="utf-8")
    assert set(re.findall(r"<title>([\w ]+) to ([\w ]+)</title></path>", drawing)) == transitions()
    assert drawing == draw(), "the drawing is old: run `python docs/state_diagram.py`"


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column is called ``heading``, without code marks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").replace("`", "")
    found = re.search(rf"^\| {heading} .*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None, f"no table of {heading} in {page}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]


def test_the_table_of_states_is_the_state_machine() -> None:
    found: Edges = set()
    for name, _, following in table("reconnection.md", "state"):
        found |= {(name, after) for after in following.split(", ") if after != "none"}
    assert found == transitions()


def test_the_table_of_triggers_names_every_error_of_a_lost_link() -> None:
    named = {name for row in table("reconnection.md", "what happened") for name in re.findall(r"\w+Error", row[2])}
    kinds: list[type[Exception]] = [ConnectionLostError, *ConnectionLostError.__subclasses__(), TLSError]
    assert named == {kind.__name__ for kind in kinds}


def test_the_table_of_modules_is_that_of_the_layers() -> None:
    found: list[set[str]] = [set() for _ in LAYERS]
    layer = ""
    for number, modules, _ in table("architecture.md", "layer"):
        layer = number or layer
        found[int(layer)] |= set(modules.split(", "))
    assert found[:-1] == list(LAYERS[:-1])


def test_the_table_of_timers_names_every_timer_and_its_default() -> None:
    in_seconds = {"keep_alive"} | {name for name in defaults(DriverConfig) if name.endswith("_timeout")}
    expected = {name: defaults(DriverConfig)[name] for name in in_seconds}
    expected |= {name: defaults(DriverConfig)[name] for name in ("session_expiry", "read_delay")}
    groups: list[tuple[str, type[BackoffConfig | FailoverConfig]]] = [
        ("backoff", BackoffConfig),
        ("failover", FailoverConfig),
    ]
    for group, config in groups:
        expected |= {f"{group}.{name}": value for name, value in defaults(config).items() if name not in NUMBERS}
    found = {row[0]: float(row[1].removesuffix(" s")) for row in table("reconnection.md", "option")}
    assert found == expected


NUMBERS = ("factor", "pause_after", "fail_after", "redirects")


def defaults(config: type[DriverConfig | BackoffConfig | FailoverConfig]) -> dict[str, Any]:
    return {field.name: field.default for field in attrs.fields(config)}
