"""A line as an SVG picture, both axes logarithmic; drawn by hand, as docs/state_diagram.py does it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

LEFT, TOP, WIDTH, HEIGHT = 64, 40, 560, 220
FONT = 'font-family="sans-serif" font-size="12"'
# They can be told apart on a light page and on a dark one.
PLAIN, LINE = "#71808f", "#2b7fc4"


def draw(title: str, points: Sequence[tuple[int, float]]) -> str:
    """The points stand at equal distances: each x is a fixed multiple of the one before it, or the first is 0."""
    lowest = math.floor(math.log10(min(value for _, value in points)))
    highest = math.ceil(math.log10(max(value for _, value in points)))
    highest = max(highest, lowest + 1)
    step = WIDTH / max(len(points) - 1, 1)

    def y(value: float) -> float:
        return TOP + HEIGHT * (highest - math.log10(value)) / (highest - lowest)

    places = [(LEFT + step * number, y(value)) for number, (_, value) in enumerate(points)]
    width, height = LEFT + WIDTH + 40, TOP + HEIGHT + 40
    path = " ".join(f"{x:.1f},{at:.1f}" for x, at in places)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<title>{title}</title>",
        f'<text x="{LEFT}" y="20" fill="{PLAIN}" {FONT}>{title}</text>',
        *(_gridline(10.0**power, y(10.0**power)) for power in range(lowest, highest + 1)),
        f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2"/>',
        *_labels(points, places),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _gridline(value: float, y: float) -> str:
    return (
        f'<path d="M{LEFT} {y:.1f} H{LEFT + WIDTH}" stroke="{PLAIN}" stroke-width="0.5" opacity="0.5"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{PLAIN}" {FONT}>{value:g}</text>'
    )


def _labels(points: Sequence[tuple[int, float]], places: Sequence[tuple[float, float]]) -> Iterator[str]:
    for (count, value), (x, y) in zip(points, places, strict=True):
        bottom = TOP + HEIGHT + 20
        exact = f"<title>{count:,}: {value:.2f} µs</title>"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{LINE}">{exact}</circle>'
        yield f'<text x="{x:.1f}" y="{bottom}" text-anchor="middle" fill="{PLAIN}" {FONT}>{_short(count)}</text>'


def _short(count: int) -> str:
    if count >= 1 << 20 and not count % (1 << 20):
        return f"{count >> 20} Mi"
    if count >= 1 << 10 and not count % (1 << 10):
        return f"{count >> 10} Ki"
    return f"{count:,}"
