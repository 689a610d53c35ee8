"""What is promised to those who subscribe: one test for each cell of the table in ``docs/delivery.md``."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from tests.guarantees import Cell, Event, Promise, receive_through
from tests.schedules import schedules

CELLS = [
    Cell(qos, stable, event)
    for event in (Event.DISCONNECT, Event.PROCESS_CRASH)
    for stable in (False, True)
    for qos in (0, 1, 2)
]
PROTOCOLS = st.sampled_from(["5", "3.1.1"])
SEEDS = st.integers(0, 1000)


def promise(cell: Cell) -> Promise:
    """A process that has just begun begins a session, too: what the broker kept for the old one is gone with that."""
    kept = cell.stable and cell.qos > 0 and cell.event is Event.DISCONNECT
    return Promise("accepted" if kept else "", at_most_once=not kept or cell.qos == 2)


def check(cell: Cell, data: st.DataObject, protocol: str, seed: int) -> None:
    books = receive_through(cell, protocol, data.draw(schedules(cell)), random.Random(seed))
    books.verify(promise(cell))


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=str)
@settings(max_examples=12)
@given(data=st.data(), protocol=PROTOCOLS, seed=SEEDS)
def test_what_comes_in(cell: Cell, data: st.DataObject, protocol: str, seed: int) -> None:
    check(cell, data, protocol, seed)


@settings(max_examples=10)
@given(cell=st.sampled_from(CELLS), data=st.data(), protocol=PROTOCOLS, seed=SEEDS)
def test_some_of_what_comes_in(cell: Cell, data: st.DataObject, protocol: str, seed: int) -> None:
    """A few schedules of all cells, for the runs that leave out what takes long."""
    check(cell, data, protocol, seed)
