"""The broker's exchanges of QoS 1 and 2 on a connection: the order of our acknowledgements, repetitions, bounds."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver import Endpoint, ProtocolError
from trio_mqtt_driver._incoming import IncomingWindow
from trio_mqtt_driver._packets import PUBACK, PUBCOMP, PUBREC, encode_ack
from trio_mqtt_driver._session import Session, SessionKey
from trio_mqtt_driver._types import Message

# pyright: reportPrivateUsage=false


def incoming(qos: int, packet_id: int = 1, *, dup: bool = False, payload: bytes = b"") -> Message[Any]:
    return Message("a", payload, qos, dup=dup, packet_id=packet_id)


def done(receiving: IncomingWindow, message: Message[Any], now: float = 0.0, code: int = 0) -> bytes:
    """What is sent when all subscriptions are done with a message."""
    message._open = 0
    message._code = code
    answer = receiving.acknowledge(message)
    if not answer:
        receiving.wait(message, now)
    return answer


def lasting_session() -> Session:
    return Session(SessionKey("me", Endpoint(host="broker", port=1883), 5))


def acks(first: int, *packet_ids: int) -> bytes:
    return b"".join(encode_ack(first, packet_id) for packet_id in packet_ids)


def test_qos_1_is_acknowledged_by_puback() -> None:
    receiving = IncomingWindow(10)
    message = incoming(1)
    assert receiving.publish(message) == (True, b"")
    assert len(receiving) == 1
    assert done(receiving, message) == encode_ack(PUBACK, 1)
    assert len(receiving) == 0


@pytest.mark.parametrize("version", [4, 5])
def test_qos_2_is_delivered_once_however_often_it_comes(version: int) -> None:
    receiving = IncomingWindow(10)
    message = incoming(2)
    assert receiving.publish(message) == (True, b"")
    assert receiving.publish(incoming(2)) == (False, b"")  # PUBREC comes when the handler is done
    assert done(receiving, message) == encode_ack(PUBREC, 1)
    assert receiving.publish(incoming(2)) == (False, encode_ack(PUBREC, 1))
    assert len(receiving) == 1
    assert receiving.release(1, version) == encode_ack(PUBCOMP, 1)
    assert len(receiving) == 0
    assert receiving.publish(incoming(2)) == (True, b"")  # the identifier is free for another message


def test_a_pubrel_before_the_pubrec_is_a_protocol_error() -> None:
    receiving = IncomingWindow(10)
    first, second = incoming(2, 1), incoming(2, 2)
    receiving.publish(first)
    receiving.publish(second)
    assert done(receiving, second) == b""
    for packet_id in (1, 2):
        with pytest.raises(ProtocolError, match=f"PUBREL for packet identifier {packet_id} before its PUBREC"):
            receiving.release(packet_id, 5)


def test_a_pubrel_of_nothing_is_completed() -> None:
    receiving = IncomingWindow(10)
    assert receiving.release(7, 4) == encode_ack(PUBCOMP, 7)
    assert receiving.release(7, 5) == encode_ack(PUBCOMP, 7, 0x92)


# -- a session that goes on -------------------------------------------------------------------------------------------


def test_another_connection_of_the_session_knows_what_the_one_before_has_delivered() -> None:
    session = lasting_session()
    first, second, third = (IncomingWindow(10, session.exchanges) for _ in range(3))
    message = incoming(2)
    assert first.publish(message) == (True, b"")
    first.end()
    assert first.keeps(message)
    assert second.publish(incoming(2, dup=True)) == (False, b"")
    assert (len(second), second.unanswered) == (1, 1)
    message._open = 0
    session.processed(message)
    assert second.acknowledge(message) == encode_ack(PUBREC, 1)
    assert (len(second), second.unanswered) == (1, 0)
    assert third.publish(incoming(2, dup=True)) == (False, encode_ack(PUBREC, 1))
    assert third.release(1, 5) == encode_ack(PUBCOMP, 1)
    assert not first.keeps(message)


def test_an_identifier_that_comes_anew_on_another_connection_is_another_message() -> None:
    session = lasting_session()
    first, second = (IncomingWindow(10, session.exchanges) for _ in range(2))
    old, new = incoming(2), incoming(2)
    first.publish(old)
    old._open = 0
    session.processed(old)
    assert second.publish(new) == (True, b"")
    assert not first.keeps(old)
    assert second.keeps(new)
    assert second.publish(incoming(2)) == (False, b"")  # the same connection: a repetition


def test_an_identifier_that_says_something_else_is_another_message_although_it_has_dup() -> None:
    """The broker has lost the exchange, and its first transmission with this identifier was lost with the link."""
    session = lasting_session()
    first, second = (IncomingWindow(10, session.exchanges) for _ in range(2))
    old, new = incoming(2, payload=b"old"), incoming(2, dup=True, payload=b"new")
    first.publish(old)
    assert second.publish(new) == (True, b"")
    assert not first.keeps(old)
    assert second.keeps(new)
    assert done(second, new) == encode_ack(PUBREC, 1)


def test_what_is_repeated_from_its_publish_on_after_its_pubrel_is_answered_and_not_delivered() -> None:
    session = lasting_session()
    first = IncomingWindow(10, session.exchanges)
    message = incoming(2, 7, payload=b"x")
    first.publish(message)
    assert done(first, message) == encode_ack(PUBREC, 7)
    assert first.release(7, 5) == encode_ack(PUBCOMP, 7)
    again = incoming(2, 7, dup=True, payload=b"x")
    IncomingWindow(10, session.exchanges)  # is broken off
    second = IncomingWindow(10, session.exchanges)
    assert second.publish(again) == (False, encode_ack(PUBREC, 7))
    assert (len(second), second.unanswered) == (1, 0)
    assert second.release(7, 5) == encode_ack(PUBCOMP, 7)
    assert len(second) == 0
    assert second.publish(incoming(2, 7, dup=True, payload=b"y")) == (True, b"")


def test_what_the_connection_has_not_brought_yet_is_not_acknowledged_on_it() -> None:
    session = lasting_session()
    first, second = (IncomingWindow(10, session.exchanges) for _ in range(2))
    message = incoming(2)
    first.publish(message)
    assert done(second, message) == b""
    assert second.look_at == math.inf
    assert second.publish(incoming(2, dup=True)) == (False, encode_ack(PUBREC, 1))


def test_repetitions_that_are_processed_wait_for_their_turn_as_well() -> None:
    session = lasting_session()
    first, second = (IncomingWindow(10, session.exchanges) for _ in range(2))
    slow, quick = incoming(2, 1), incoming(2, 2)
    for message in (slow, quick):
        first.publish(message)
    assert done(first, quick) == b""
    assert second.publish(incoming(2, 1, dup=True)) == (False, b"")
    again = incoming(2, 2, dup=True)
    assert second.publish(again) == (False, b"")
    second.wait(again, 0.0)
    assert done(second, slow) == acks(PUBREC, 1, 2)


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos, first", [(1, PUBACK), (2, PUBREC)])
def test_acknowledgements_are_in_the_order_of_arrival(qos: int, first: int) -> None:
    receiving = IncomingWindow(10)
    messages = [incoming(qos, packet_id) for packet_id in range(1, 6)]
    for message in messages:
        receiving.publish(message)
    assert done(receiving, messages[1]) == b""
    assert done(receiving, messages[3]) == b""
    assert receiving.unanswered == 5
    assert done(receiving, messages[0]) == acks(first, 1, 2)
    assert done(receiving, messages[4]) == b""
    assert done(receiving, messages[2]) == acks(first, 3, 4, 5)
    assert receiving.unanswered == 0


def test_qos_1_and_qos_2_stand_in_one_line() -> None:
    receiving = IncomingWindow(10)
    one, two = incoming(1, 1), incoming(2, 2)
    receiving.publish(one)
    receiving.publish(two)
    assert done(receiving, two) == b""
    assert done(receiving, one) == acks(PUBACK, 1) + acks(PUBREC, 2)


def test_who_holds_up_others_for_too_long_is_overtaken_and_acknowledged_when_it_is_done() -> None:
    receiving = IncomingWindow(10, patience=1.0)
    messages = [incoming(1, packet_id) for packet_id in range(1, 7)]
    for message in messages:
        receiving.publish(message)
    assert receiving.look_at == math.inf
    done(receiving, messages[2], 10.0)
    done(receiving, messages[4], 10.5)
    assert receiving.look_at == 11.0
    assert receiving.overtake_late(10.9) == b""
    assert receiving.overtake_late(11.0) == acks(PUBACK, 3)
    assert receiving.look_at == 11.5  # 5 waits for 4
    assert done(receiving, messages[1], 11.2) == acks(PUBACK, 2)
    assert receiving.overtake_late(11.5) == acks(PUBACK, 5)
    assert done(receiving, messages[5], 12.0) == acks(PUBACK, 6)
    assert done(receiving, messages[3], 12.0) == acks(PUBACK, 4)
    assert done(receiving, messages[0], 99.0) == acks(PUBACK, 1)
    assert len(receiving) == 0


def test_without_end_of_patience_nobody_is_overtaken() -> None:
    receiving = IncomingWindow(10)
    messages = [incoming(1, packet_id) for packet_id in (1, 2)]
    for message in messages:
        receiving.publish(message)
    done(receiving, messages[1], 0.0)
    assert receiving.look_at == math.inf
    assert receiving.overtake_late(1e9) == b""
    assert done(receiving, messages[0]) == acks(PUBACK, 1, 2)


@given(st.lists(st.tuples(st.sampled_from(["come", "done", "overtake", "late", "forget"]), st.integers(0, 9))))
def test_everything_is_acknowledged_once_and_in_order_unless_it_is_overtaken(steps: list[tuple[str, int]]) -> None:
    receiving = IncomingWindow(1000, patience=5.0)
    came: list[Message[Any]] = []
    forgotten: set[int] = set()
    overtaken: set[int] = set()
    sent = b""

    def note_overtaken() -> None:
        overtaken.update(one.packet_id for one in came if one._overtaken and one._open)

    for now, (step, choice) in enumerate(steps):
        if step in ("come", "forget"):
            came.append(incoming(1, len(came) + 1, payload=bytes(choice)))
            receiving.publish(came[-1])
            if step == "forget":
                forgotten.add(came[-1].packet_id)
                sent += receiving.forget(came[-1:])
        elif step == "late":
            sent += receiving.overtake_late(now)
        else:
            waiting = [one for one in came if one._open and one.packet_id not in forgotten]
            if waiting:
                message = waiting[choice % len(waiting)]
                sent += done(receiving, message, now) if step == "done" else receiving.overtake(message)
        note_overtaken()
        in_line = [one for one in receiving._line.messages if not one._overtaken]
        assert len(receiving._line.messages) <= 2 * len(in_line)
    for message in came:
        if message._open and message.packet_id not in forgotten:
            sent += done(receiving, message)
    order = [sent[at + 2] << 8 | sent[at + 3] for at in range(0, len(sent), 4)]
    assert sorted(order) == [one.packet_id for one in came if one.packet_id not in forgotten]
    in_order = [packet_id for packet_id in order if packet_id not in overtaken]
    assert in_order == sorted(in_order)
    assert (len(receiving), receiving.unanswered, receiving._bytes, receiving.full) == (0, 0, 0, False)


def test_what_is_passed_over_is_let_go_of_before_it_is_a_lot() -> None:
    receiving = IncomingWindow(1000)
    for packet_id in range(1, 101):
        receiving.publish(incoming(1, packet_id))
    for packet_id in range(101, 151):
        message = incoming(1, packet_id, payload=bytes(100_000))
        receiving.publish(message)
        receiving.overtake(message)
        done(receiving, message)
        assert sum(len(one.payload) for one in receiving._line.messages) <= 2**20
    assert len(receiving) == 100


# -- refusals and bounds ----------------------------------------------------------------------------------------------


def test_a_refused_qos_2_message_ends_its_exchange_with_the_pubrec() -> None:
    receiving = IncomingWindow(10)
    message = incoming(2)
    receiving.publish(message)
    assert done(receiving, message, code=0x97) == encode_ack(PUBREC, 1, 0x97)
    assert len(receiving) == 0
    assert receiving.publish(incoming(2)) == (True, b"")  # [MQTT-4.3.3-9]


def test_a_refusal_while_the_link_is_down_is_said_on_the_next_one() -> None:
    session = lasting_session()
    first, second = (IncomingWindow(10, session.exchanges) for _ in range(2))
    message = incoming(2)
    first.publish(message)
    message._open, message._code = 0, 0x83
    session.processed(message)
    assert second.publish(incoming(2, dup=True)) == (False, encode_ack(PUBREC, 1, 0x83))
    assert len(second) == 0
    assert not session.exchanges.open


@pytest.mark.parametrize("qos", [1, 2])
def test_more_than_the_maximum_is_an_overrun_and_not_yet_full(qos: int) -> None:
    receiving = IncomingWindow(2, most=4)
    for packet_id in range(1, 6):
        assert not receiving.full
        receiving.publish(incoming(qos, packet_id))
        assert receiving.overrun == (packet_id > 2)
    assert receiving.full


@pytest.mark.parametrize("qos", [1, 2])
def test_the_window_is_full_by_messages_or_by_bytes_until_they_are_acknowledged(qos: int) -> None:
    receiving = IncomingWindow(2, maximum_bytes=100)
    messages = [incoming(qos, packet_id, payload=bytes(40)) for packet_id in range(1, 4)]
    for message in messages[:2]:
        receiving.publish(message)
        assert not receiving.full
    receiving.publish(messages[2])
    assert receiving.full
    done(receiving, messages[1])
    assert receiving.full  # it waits for its turn
    done(receiving, messages[0])
    assert not receiving.full
    big = incoming(qos, 9, payload=bytes(61))
    receiving.publish(big)
    assert receiving.full
    done(receiving, messages[2])
    done(receiving, big)
    assert not receiving.full


def test_the_messages_of_a_connection_that_is_over_do_not_keep_each_other() -> None:
    receiving = IncomingWindow(10)
    for qos in (1, 2):
        for packet_id in (1, 2):
            receiving.publish(incoming(qos, packet_id))
    receiving.end()
    assert not receiving._line.messages


# -- many at once ---------------------------------------------------------------------------------------------------


def test_pubacks_of_a_row_are_sent_together_and_in_order() -> None:
    receiving = IncomingWindow(10)
    messages = [incoming(1, number, payload=b"x") for number in range(1, 5)]
    receiving.publish_row(messages, 4)
    assert len(receiving) == 4
    for message in messages[:3]:
        message._open = 0
        receiving.processed.append(message)
    assert len(receiving) == 1
    assert receiving.collect(0.0) == acks(PUBACK, 1, 2, 3)
    assert (len(receiving), receiving._bytes) == (1, 1)


def test_what_is_collected_out_of_turn_waits_for_it() -> None:
    receiving = IncomingWindow(10, patience=0.5)
    messages = [incoming(1, number) for number in range(1, 4)]
    receiving.publish_row(messages, 0)
    for message in (messages[2], messages[1]):
        message._open = 0
        receiving.processed.append(message)
    assert receiving.collect(7.0) == b""
    assert receiving.look_at == 7.5
    assert receiving.overtake_late(7.5) == acks(PUBACK, 2, 3)
    messages[0]._open = 0
    receiving.processed.append(messages[0])  # it has lost its place, and there is no line any more
    assert receiving.collect(8.0) == acks(PUBACK, 1)
    assert len(receiving) == 0


@given(
    qos=st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
    steps=st.lists(st.sampled_from(["process", "process", "collect", "time", "overtake"]), max_size=60),
)
def test_in_rows_the_same_is_sent_in_the_same_order_as_one_by_one(
    qos: list[int], order: random.Random, steps: list[str]
) -> None:
    """But that what was overtaken may come before what has a place: it has none."""

    def in_order(sent: bytes, messages: list[Message[Any]]) -> tuple[list[bytes], list[bytes]]:
        packets = [sent[start : start + 4] for start in range(0, len(sent), 4)]
        overtaken = {message.packet_id for message in messages if message._overtaken}
        return (
            [packet for packet in packets if packet[3] in overtaken],
            [packet for packet in packets if packet[3] not in overtaken],
        )

    now = 0.0
    single, rows = (IncomingWindow(100, patience=0.5) for _ in range(2))
    pairs = [(incoming(one, number), incoming(one, number)) for number, one in enumerate(qos, start=1)]
    for mine, other in pairs:
        single.publish(mine)
        rows.publish(other)
    left = list(pairs)
    order.shuffle(left)
    sent_single = sent_rows = b""
    for step in [*steps, *["process"] * len(pairs), "collect"]:
        if step == "process" and left:
            mine, other = left.pop()
            sent_single += done(single, mine, now)
            if other.qos == 1:
                other._open = 0
                rows.processed.append(other)
            else:
                sent_rows += rows.collect(now) + done(rows, other, now)
        elif step == "collect":
            sent_rows += rows.collect(now)
            assert in_order(sent_rows, [other for _, other in pairs]) == in_order(
                sent_single, [mine for mine, _ in pairs]
            )
            assert (len(rows), rows.unanswered, rows.look_at) == (len(single), single.unanswered, single.look_at)
        elif step == "time":
            sent_rows += rows.collect(now)
            now += 0.3
        else:
            sent_single += single.overtake_late(now)
            sent_rows += rows.collect(now) + rows.overtake_late(now)
    assert len(rows) == len(single)


def test_collecting_counts_the_bytes_of_what_is_left() -> None:
    receiving = IncomingWindow(10, maximum_bytes=100)
    rows = [[incoming(1, 10 * row + number, payload=bytes(40)) for number in range(1, 3)] for row in range(3)]

    def process(messages: list[Message[Any]]) -> None:
        for message in messages:
            message._open = 0
            receiving.processed.append(message)
        receiving.collect(0.0)

    receiving.publish_row(rows[0], 80)
    process(rows[0])  # all of it
    receiving.publish_row(rows[1], 80)
    assert not receiving.full
    receiving.publish_row(rows[2], 80)
    assert receiving.full
    process(rows[1])  # the first half
    assert not receiving.full
    receiving.publish(incoming(2, 50, payload=bytes(40)))
    assert receiving.full
    process(rows[2])  # all of QoS 1
    assert not receiving.full
    receiving.publish(incoming(2, 51, payload=bytes(61)))
    assert receiving.full


def test_collecting_counts_the_bytes_of_what_has_been_overtaken() -> None:
    receiving = IncomingWindow(10, maximum_bytes=100, patience=1.0)
    first, second, third = (incoming(1, number, payload=bytes(60)) for number in range(1, 4))
    receiving.publish_row([first, second], 120)
    second._open = 0
    receiving.processed.append(second)
    assert receiving.collect(0.0) == b""
    assert receiving.overtake_late(1.0) == acks(PUBACK, 2)
    receiving.publish_row([third], 60)
    assert receiving.full
    third._open = 0
    receiving.processed.append(third)
    assert receiving.collect(2.0) == acks(PUBACK, 3)
    assert not receiving.full
    receiving.publish_row([incoming(1, 4, payload=bytes(41))], 41)
    assert receiving.full  # with the first one


def test_collecting_counts_the_bytes_of_what_is_owed_for_qos_2_and_has_been_overtaken() -> None:
    receiving = IncomingWindow(10, maximum_bytes=100)
    exact = incoming(2, 1, payload=bytes(60))
    receiving.publish(exact)
    receiving.overtake(exact)
    message = incoming(1, 2, payload=bytes(60))
    receiving.publish_row([message], 60)
    message._open = 0
    receiving.processed.append(message)
    assert receiving.collect(0.0) == acks(PUBACK, 2)
    receiving.publish_row([incoming(1, 3, payload=bytes(41))], 41)
    assert receiving.full
