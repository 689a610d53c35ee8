"""A queue counts its bytes only when they may matter: it must say what one would that always does."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from trio_mqtt_driver import Message, Overflow
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._queue import MessageQueue

MOST = 5
MOST_BYTES = 100

# Payloads that come together; or how many messages are taken out.
steps = st.lists(
    st.one_of(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 6)), min_size=1, max_size=30
)


def take(queue: MessageQueue) -> Message[Any]:
    message = queue.messages.popleft()
    if queue.attended:
        queue.took(message)
    return message


@hypothesis.given(steps, st.sampled_from(Overflow))
def test_a_bound_is_reached_when_it_is(steps: list[list[int] | int], overflow: Overflow) -> None:
    counters = Counters()
    queue = MessageQueue(overflow, MOST, MOST_BYTES, counters)
    most = 2 if overflow is Overflow.BLOCK else 1
    taken = 0
    for step in steps:
        if isinstance(step, int):
            for _ in range(min(step, len(queue.messages))):
                take(queue)
                taken += 1
        else:
            too_long = queue.put([Message("a", bytes(size)) for size in step], sum(step))
            reached = len(queue.messages) >= MOST or queue.size >= MOST_BYTES
            assert too_long == reached
            before = list(queue.messages)
            if too_long:
                queue.shorten()
            gone = [message for message in before if message not in queue.messages]
            if overflow is Overflow.BLOCK:
                assert not gone  # there is nothing stale
            elif gone:
                assert len(queue.messages) <= most * MOST
                assert queue.size <= most * MOST_BYTES or len(queue.messages) == 1
        assert queue.full == (len(queue.messages) >= MOST or queue.size >= MOST_BYTES)
        assert queue.received == taken + queue.dropped + len(queue.messages)
        assert counters.dropped == queue.dropped


def test_a_queue_that_is_nearly_empty_is_counted_and_not_attended() -> None:
    """Many bytes came, and nearly all are gone."""
    queue = MessageQueue(Overflow.DROP_OLDEST, 1000, MOST_BYTES, Counters())
    assert not queue.put([Message("a", bytes(10)) for _ in range(9)], 90)
    for _ in range(8):
        take(queue)
    assert not queue.put([Message("a", bytes(10))], 10)
    assert not queue.attended
    assert queue.put([Message("a", bytes(85))], 85)
    assert queue.attended
    assert queue.full
    take(queue)
    assert not queue.full


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.DROP_NEWEST])
def test_once_it_is_empty_nothing_is_remembered(overflow: Overflow) -> None:
    queue = MessageQueue(overflow, 1000, MOST_BYTES, Counters())
    assert queue.put([Message("a", bytes(99)), Message("a", bytes(99))], 198)
    queue.shorten()
    assert queue.attended
    take(queue)
    assert not queue.put([Message("a", bytes(99))], 99)
    assert not queue.attended


def test_an_abandoned_queue_is_not_full() -> None:
    queue = MessageQueue(Overflow.DROP_OLDEST, 1000, MOST_BYTES, Counters())
    assert queue.put([Message("a", bytes(100))], 100)
    assert queue.attended
    queue.abandon()
    assert (queue.dropped, queue.size, queue.full) == (1, 0, False)
