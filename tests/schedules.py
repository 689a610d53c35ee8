"""Schedules for the tests of the guarantees, as hypothesis makes them."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.guarantees import LOST, TOPICS, Away, Break, Cell, Event, Hang, Lose, Publish, Step, Wait
from trio_mqtt_driver.testing import Direction

_publish = st.builds(Publish, st.sampled_from(TOPICS), st.integers(2, 7))
_queue = st.builds(Publish, st.sampled_from(TOPICS), st.integers(1, 3), st.just(True))
_outage = st.sampled_from((0.0, 0.05, 2.0, 10.0))
# A PUBLISH here has 9 to 11 bytes, its acknowledgements have 4 each; CONNECT and the test publish come to about 80.
_break = st.builds(Break, st.just(Direction.IN), st.integers(0, 180), _outage) | st.builds(
    Break, st.just(Direction.OUT), st.integers(0, 40), _outage
)
_lose = st.sampled_from(LOST).map(lambda lost: Lose(*lost))
_away = st.builds(Away, st.sampled_from((0.5, 5.0)))
_wait = st.builds(Wait, st.sampled_from((0.0, 0.5, 4.0, 20.0)))


def schedules(cell: Cell) -> st.SearchStrategy[list[list[Step]]]:
    """Lives, and what happens in each; if they end with a crash, one more follows in which all is well."""
    crash = cell.event is Event.PROCESS_CRASH
    mix: list[st.SearchStrategy[Step]] = [_publish]
    if cell.disk:
        mix += [_queue, _away]
    if not crash:
        mix += [_lose, st.builds(Hang), _away]
    one = st.tuples(_wait, st.one_of(mix), _publish, _break, _publish, st.one_of(mix), _wait)
    life = st.lists(one, min_size=1 if crash else 2, max_size=4).map(
        lambda rounds: [step for one in rounds for step in one]
    )
    return (
        st.lists(life, min_size=1, max_size=3).map(lambda lives: [*lives, []])
        if crash
        else life.map(lambda life: [life])
    )
