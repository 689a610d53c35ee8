"""What the terminal shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .results import References, Results, is_ours
from .workloads.base import Workload

HEAD = ("/ floor", "/ best peer", "/ paho on Trio")


def lines(results: Results, workloads: Sequence[Workload]) -> Iterator[str]:
    for key, value in results.about.items():
        yield f"{key}: {value}"
    for workload in workloads:
        yield from table(results, workload)
    for missing in results.missing:
        if not missing.workload:
            yield f"not measured: {missing.client}: {missing.reason}"


def table(results: Results, workload: Workload) -> Iterator[str]:
    rows = results.rows(workload)
    yield ""
    yield f"{workload.title} ({workload.unit}, median)"
    references = References.of(rows)
    extras = list(rows[0].extras) if rows else []
    head = ("", workload.unit, *HEAD, *extras, "min … max")
    cells = [
        (
            ("* " if is_ours(row) else "  ") + row.label,
            number(row.value),
            *references.ratios(row),
            *(number(row.extras[name]) for name in extras),
            f"{number(row.least)} … {number(row.most)}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
    for first, *others in (head, *cells):
        columns = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join((first.ljust(widths[0]), *columns)).rstrip()
    for missing in results.reasons(workload):
        yield f"  not measured: {missing.client}: {missing.reason}"


def number(value: float) -> str:
    """Three digits that count, and no more decimals than that takes."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
