"""Draws the table of states: ``python docs/state_diagram.py`` writes ``state_diagram.svg`` beside this file.

The states stand in one column, in their order. An arrow to the next state goes straight down. All others go along the
rail of the state that they lead to, downwards on the right and upwards on the left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trio_mqtt_driver import State
from trio_mqtt_driver._states import TRANSITIONS

STATES = list(State)
BOX_WIDTH, BOX_HEIGHT, STEP = 128, 34, 62
RAIL, BEND = 30, 9
LEFT = 56
RIGHT = LEFT + BOX_WIDTH
FONT = 'font-family="sans-serif" font-size="14"'
# They can be told apart on a light page and on a dark one.
PLAIN = "#71808f"
COLOURS = {
    State.CONNECTING: "#2b7fc4",
    State.BACKING_OFF: "#c2740c",
    State.PAUSED: "#9163cf",
    State.LIVE: "#2e9358",
    State.CLOSING: "#cc4b4b",
}

Edge = tuple[State, State]


def draw() -> str:
    straight = [edge for edge in _edges() if _jump(edge) == 1]
    down = [edge for edge in _edges() if _jump(edge) > 1]
    up = [edge for edge in _edges() if _jump(edge) < 0]
    rails = sorted({after for _, after in down}, key=STATES.index)
    width = RIGHT + RAIL * (len(rails) + 1)
    height = STEP * (len(STATES) - 1) + BOX_HEIGHT + 4
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        "<title>The states of a driver, and which can follow which</title>",
        *(_marker(colour) for colour in sorted({PLAIN, *COLOURS.values()})),
        *(_straight(edge) for edge in straight),
        *(_down(edge, rails) for edge in down),
        *(_up(edge) for edge in up),
        *(_box(state) for state in STATES),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _edges() -> Iterator[Edge]:
    return ((before, after) for before in STATES for after in STATES if after in TRANSITIONS[before])


def _jump(edge: Edge) -> int:
    return STATES.index(edge[1]) - STATES.index(edge[0])


def _top(state: State) -> int:
    return 2 + STEP * STATES.index(state)


def _straight(edge: Edge) -> str:
    x = LEFT + BOX_WIDTH // 2
    return _arrow(edge, f"M{x} {_top(edge[0]) + BOX_HEIGHT} V{_top(edge[1]) - 1}")


def _down(edge: Edge, rails: list[State]) -> str:
    before, after = edge
    place = rails.index(after)
    x = RIGHT + RAIL * (place + 1)
    # Of several that leave the same box, each has its own height: the outermost the highest, so that none meet.
    start = _top(before) + BOX_HEIGHT - 8 - 9 * place
    end = _top(after) + BOX_HEIGHT - 6  # below whatever leaves that box
    return _arrow(edge, f"M{RIGHT} {start} H{x - BEND} Q{x} {start} {x} {start + BEND} {_into(x, end, RIGHT, -1)}")


def _up(edge: Edge) -> str:
    before, after = edge
    x = LEFT - RAIL
    start = _top(before) + BOX_HEIGHT // 2
    end = _top(after) + BOX_HEIGHT // 2
    return _arrow(edge, f"M{LEFT} {start} H{x + BEND} Q{x} {start} {x} {start - BEND} {_into(x, end, LEFT, 1)}")


def _into(x: int, y: int, side: int, direction: int) -> str:
    """From the rail at ``x`` round the corner and into the ``side`` of a box."""
    return f"V{y + direction * BEND} Q{x} {y} {x + direction * BEND} {y} H{side - direction}"


def _arrow(edge: Edge, path: str) -> str:
    before, after = edge
    colour = COLOURS.get(after, PLAIN)
    head = f"url(#{colour[1:]})"
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="{head}">'
        f"<title>{before.value} to {after.value}</title></path>"
    )


def _marker(colour: str) -> str:
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8"'
        f' orient="auto" markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
    )


def _box(state: State) -> str:
    x, y = LEFT + BOX_WIDTH // 2, _top(state) + 22
    colour = COLOURS.get(state, PLAIN)
    return (
        f'<rect x="{LEFT}" y="{_top(state)}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{colour}"/>'
        f'<text x="{x}" y="{y}" text-anchor="middle" fill="#fff" {FONT}>{state.value}</text>'
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
