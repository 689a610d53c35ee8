"""``python -m tests.benchmarks.pages FILE``: the tables of docs/performance.md and its plots, from a JSON file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .plot import draw
from .report import HEAD, number
from .results import References, Results, is_ours
from .workloads import WORKLOADS
from .workloads.base import Workload

DOCS = Path(__file__).parent.parent.parent / "docs"
BEGIN = "<!-- measured: written by tests/benchmarks/pages.py -->"
END = "<!-- end of what was measured -->"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks.pages", description=__doc__)
    parser.add_argument("file", type=Path, help="what `python -m tests.benchmarks` wrote")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of performance.md")
    options = parser.parse_args(arguments)
    results = Results.read(options.file)
    for name, picture in plots(results):
        (options.docs / name).write_text(picture, encoding="utf-8")
    page = options.docs / "performance.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def filled(page: str, results: Results) -> str:
    """The page with what stands between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the page must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{measured(results)}\n{END}{after}"


def measured(results: Results) -> str:
    workloads = [workload for workload in WORKLOADS if results.rows(workload)]
    compared = [workload for workload in workloads if not workload.line]
    parts = [
        *_about(results),
        *_summary(results, compared),
        *(line for workload in compared for line in _details(results, workload)),
        *_lines(results),
    ]
    return "\n".join(parts) + "\n"


def _about(results: Results) -> Iterator[str]:
    about = results.about
    yield (
        f"{about['date'][:10]}, {about['processor']}, {about['cores']} cores, {about['system']}, {about['python']},"
        f" {about['mosquitto']}; median of {about['rounds']}."
    )
    yield ""
    if about["quick"]:
        yield "**A quick run: these figures mean little.**"
        yield ""
    for client, versions in results.versions.items():
        if versions:
            yield f"- {client}: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    for missing in results.missing:
        if not missing.workload:
            yield f"- {missing.client} was not measured: {missing.reason}"
    yield ""


def _summary(results: Results, workloads: Iterable[Workload]) -> Iterator[str]:
    yield "### Overview"
    yield ""
    rows = [("workload", "unit", "floor", "best peer", "paho on Trio", "this driver", "/ best peer")]
    for workload in workloads:
        found = results.rows(workload)
        references = References.of(found)
        best = references.best_peer
        for row in filter(is_ours, found):
            rows.append(  # noqa: PERF401  # a comprehension of two loops with what is computed between them reads worse
                (
                    workload.title,
                    workload.unit,
                    _number(references.floor),
                    f"{number(best.value)} ({best.label})" if best is not None else "-",
                    _number(references.trio_paho),
                    f"{number(row.value)} ({row.api})" if row.api else number(row.value),
                    references.ratios(row)[1],
                )
            )
    yield from _table(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _details(results: Results, workload: Workload) -> Iterator[str]:
    found = results.rows(workload)
    references = References.of(found)
    extras = list(found[0].extras)
    yield f"### {workload.title}"
    yield ""
    rows: list[Sequence[str]] = [("client", workload.unit, *HEAD, *extras, "least to most")]
    for row in found:
        label = f"**{row.label}**" if is_ours(row) else row.label
        numbers = [number(row.extras[name]) for name in extras]
        spread = f"{number(row.least)} to {number(row.most)}"
        rows.append((label, number(row.value), *references.ratios(row), *numbers, spread))
    yield from _table(rows)
    reasons = results.reasons(workload)
    if reasons:
        yield "Not measured: " + "; ".join(f"{missing.client} ({missing.reason})" for missing in reasons) + "."
        yield ""


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *others = rows
    yield _line(head)
    yield _line(["---"] * len(head))
    yield from map(_line, others)
    yield ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _points(results: Results) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for workload in WORKLOADS:
        if workload.line:
            points.setdefault(workload.line, []).extend((workload.x, row.value) for row in results.rows(workload))
    return {line: found for line, found in points.items() if found}


def plots(results: Results) -> Iterator[tuple[str, str]]:
    """Names and contents of the pictures."""
    for line, points in _points(results).items():
        yield _file(line), draw(f"CPU µs per message received, by {line}", points)


def _file(line: str) -> str:
    return f"performance_{re.sub('[^a-z]+', '_', line)}.svg"


def _lines(results: Results) -> Iterator[str]:
    points = _points(results)
    if points:
        yield "### How cost grows"
        yield ""
    for line in points:
        yield f"![CPU per message by {line}]({_file(line)})"
        yield ""


if __name__ == "__main__":
    main()
