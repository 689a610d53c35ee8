"""PUBACKs that were only noted are written before anything else that acknowledges, and when the writer sends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._packets import PUBACK, PUBREC, encode_ack
from trio_mqtt_driver._receiver import Receiver
from trio_mqtt_driver._session import Session
from trio_mqtt_driver._types import Message
from trio_mqtt_driver._writer import Writer
from trio_mqtt_driver.testing import MemoryBroker

# pyright: reportPrivateUsage=false


class Bench:
    """A receiver whose writer does not run."""

    def __init__(self, nursery: trio.Nursery) -> None:
        stream = trio.testing.memory_stream_pair()[0]
        counters = Counters()
        self.writer = Writer(stream, counters, lambda: None)
        self.looks: list[float] = []
        self.receiver = Receiver(
            memory_config(MemoryBroker(nursery)),
            Session(),
            self.writer,
            counters,
            version=5,
            expect_by=self.looks.append,
            warn_once=lambda _: None,
        )

    def take(self, qos: int, packet_id: int) -> Message[Any]:
        message: Message[Any] = Message("a", b"x", qos, packet_id=packet_id)
        message._source = self.receiver
        assert self.receiver.take(message)
        return message

    @property
    def written(self) -> bytes:
        return b"".join(self.writer.buffer)


@pytest.fixture
def bench(nursery: trio.Nursery) -> Bench:
    return Bench(nursery)


async def test_a_puback_is_noted_until_the_writer_collects(bench: Bench) -> None:
    for message in [bench.take(1, number) for number in (1, 2)]:
        assert message.ack()
    assert bench.written == b""
    assert len(bench.receiver) == 0
    bench.receiver.collect()
    assert bench.written == encode_ack(PUBACK, 1) + encode_ack(PUBACK, 2)


@pytest.mark.parametrize(
    "act",
    [
        lambda bench, _late, _exact: bench.take(2, 9),
        lambda bench, late, _exact: bench.receiver.overtake(late),
        lambda bench, _late, _exact: bench.receiver.overtake_late(math.inf),
        lambda bench, late, _exact: bench.receiver.forget([late]),
        lambda _bench, _late, exact: exact.ack(),
        lambda _bench, late, _exact: late.refuse(0x97),
    ],
    ids=["QoS 2", "overtake", "overtake late", "forget", "acknowledge QoS 2", "refuse"],
)
async def test_what_was_noted_comes_before_whatever_else_is_done(
    bench: Bench, act: Callable[[Bench, Message[Any], Message[Any]], object]
) -> None:
    first, exact, late = bench.take(1, 1), bench.take(2, 2), bench.take(1, 3)
    first.ack()
    assert bench.written == b""
    act(bench, late, exact)
    assert bench.written.startswith(encode_ack(PUBACK, 1))


async def test_acknowledgements_of_all_kinds_keep_the_order_of_the_messages(bench: Bench) -> None:
    messages = [bench.take(qos, number) for number, qos in enumerate((1, 2, 1, 1, 2, 1), start=1)]
    for number in (0, 2, 3, 1, 5, 4):
        messages[number].ack()
    bench.receiver.collect()
    kinds = (PUBACK, PUBREC, PUBACK, PUBACK, PUBREC, PUBACK)
    assert bench.written == b"".join(encode_ack(kind, number) for number, kind in enumerate(kinds, start=1))


async def test_what_is_out_of_turn_has_the_timer_look(bench: Bench) -> None:
    bench.take(1, 1)
    second = bench.take(1, 2)
    second.ack()
    bench.receiver.collect()
    assert bench.written == b""
    assert bench.looks[-1] < math.inf
    bench.receiver.overtake_late(math.inf)
    assert bench.written == encode_ack(PUBACK, 2)


async def test_whoever_waits_for_room_gets_what_was_noted(bench: Bench) -> None:
    message = bench.take(1, 1)
    bench.receiver._window.most = 0
    message.ack()
    assert bench.receiver.full
    await bench.receiver.wait_room()
    assert bench.written == encode_ack(PUBACK, 1)


async def test_of_a_row_that_is_of_both_kinds_only_qos_1_is_kept_account_of(bench: Bench) -> None:
    row: list[Message[Any]] = [
        Message("a", bytes(5), number % 2, packet_id=number % 2 * number) for number in range(5)
    ]
    assert bench.receiver.take_row(row, 2, 25)
    assert len(bench.receiver) == 2
    assert bench.receiver._window._bytes == 10
    assert list(bench.receiver._window._line.messages) == [row[1], row[3]]


@pytest.mark.parametrize("by", ["itself", "a handler's turn"])
async def test_a_writer_that_is_stuck_does_not_keep_reading_paused(
    bench: Bench, nursery: trio.Nursery, by: str
) -> None:
    """A broker that waits until we read what it sends need not read itself."""
    bench.receiver._window.most = 1
    messages = [bench.take(1, number) for number in (1, 2)]
    bench.writer.idle = False  # and nobody runs it
    with trio.fail_after(1):
        async with trio.open_nursery() as waiting:
            waiting.start_soon(bench.receiver.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            assert bench.receiver.full
            if by == "itself":
                messages[0].ack()
            else:
                messages[0]._open = 0
                bench.receiver.note(messages[0])
                bench.receiver.noted()
    assert bench.written == encode_ack(PUBACK, 1)


async def test_when_nothing_is_taken_any_more_nothing_waits_for_room(bench: Bench) -> None:
    bench.receiver._window.most = 1
    kept = [bench.take(1, number) for number in (1, 2)]
    with trio.fail_after(1):
        async with trio.open_nursery() as waiting:
            waiting.start_soon(bench.receiver.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            bench.receiver.retire()
    assert bench.receiver.full
    assert len(bench.receiver) == len(kept)
