"""What is promised to those who publish: one test for each cell of the table in ``docs/delivery.md``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tests.guarantees import Cell, Event, Promise, publish_through
from tests.schedules import schedules

CELLS = [
    Cell(qos, stable, event, disk)
    for event in Event
    for disk in (False, True)
    for stable in (False, True)
    for qos in (0, 1, 2)
]
PROTOCOLS = st.sampled_from(["5", "3.1.1"])


def promise(cell: Cell) -> Promise:
    if cell.event is Event.PROCESS_CRASH:
        # Without a file there is nothing left to send; with one, nobody knows what of it had been sent.
        return Promise("acknowledged" if cell.qos else "", at_most_once=not cell.disk or not cell.qos)
    exact = cell.qos == 2 and cell.stable and cell.event is not Event.BROKER_LOSS
    return Promise("accepted" if cell.qos else "", at_most_once=exact or not cell.qos)


def check(cell: Cell, data: st.DataObject, protocol: str) -> None:
    books = publish_through(cell, protocol, data.draw(schedules(cell)))
    books.verify(promise(cell))


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=str)
@settings(max_examples=12)
@given(data=st.data(), protocol=PROTOCOLS)
def test_what_goes_out(cell: Cell, data: st.DataObject, protocol: str) -> None:
    check(cell, data, protocol)


@settings(max_examples=15)
@given(cell=st.sampled_from(CELLS), data=st.data(), protocol=PROTOCOLS)
def test_some_of_what_goes_out(cell: Cell, data: st.DataObject, protocol: str) -> None:
    """A few schedules of all cells, for the runs that leave out what takes long."""
    check(cell, data, protocol)
