"""The exchanges of QoS 1 and 2 that are open on a connection: identifiers, windows, order, a broker that errs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver import ProtocolError
from trio_mqtt_driver._inflight import OutgoingWindow, PacketIds
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver._packets import PUBACK, PUBCOMP, PUBREC, PUBREL, encode_ack
from trio_mqtt_driver._session import Session


def outgoing(qos: int = 1, topic: str = "a") -> Outgoing:
    return Outgoing(topic, topic.encode(), b"", qos, False, b"\0", 0.0)


def window(size: int = 10) -> OutgoingWindow:
    return OutgoingWindow(PacketIds(), size)


def send(sending: OutgoingWindow, *messages: Outgoing) -> list[int]:
    """Each message takes ten bytes of the wire."""
    ids: list[int] = []
    for message in messages:
        ids.append(sending.add(message))
        message.wire_end = ids[-1] * 10
    return ids


# -- packet identifiers ---------------------------------------------------------------------------------------------


def test_packet_identifiers_begin_with_1_and_wrap_round_without_0() -> None:
    ids = PacketIds()
    first = ids.allocate()
    assert first == 1
    for expected in range(2, 65536):
        assert ids.allocate() == expected
        ids.release(expected)
    assert ids.allocate() == 2  # 1 is still in use
    ids.release(first)


def test_a_packet_identifier_in_use_is_not_given_twice() -> None:
    ids = PacketIds()
    assert len({ids.allocate() for _ in range(65535)}) == 65535
    with pytest.raises(RuntimeError, match="all 65535 packet identifiers are in use"):
        ids.allocate()
    ids.release(4711)
    assert ids.allocate() == 4711


# -- outgoing -------------------------------------------------------------------------------------------------------


def test_a_puback_ends_qos_1_and_frees_its_place() -> None:
    sending = window(2)
    message = outgoing(1)
    (packet_id,) = send(sending, message)
    assert (len(sending), sending.free) == (1, 1)
    assert sending.acknowledge(PUBACK, packet_id, 0, 1.0) == (message, b"")
    assert (len(sending), sending.free) == (0, 2)


def test_qos_2_goes_by_pubrec_pubrel_and_pubcomp() -> None:
    sending = window()
    message = outgoing(2)
    (packet_id,) = send(sending, message)
    assert sending.acknowledge(PUBREC, packet_id, 0, 1.0) == (None, encode_ack(PUBREL, packet_id))
    assert len(sending) == 1
    assert sending.acknowledge(PUBREC, packet_id, 0, 2.0) == (None, encode_ack(PUBREL, packet_id))
    assert sending.acknowledge(PUBCOMP, packet_id, 0, 3.0) == (message, b"")
    assert len(sending) == 0


@pytest.mark.parametrize("code", [0x80, 0x97])
def test_a_pubrec_with_a_refusal_ends_qos_2(code: int) -> None:
    sending = window()
    message = outgoing(2)
    (packet_id,) = send(sending, message)
    assert sending.acknowledge(PUBREC, packet_id, code, 1.0) == (message, b"")
    assert len(sending) == 0


def test_an_identifier_is_used_again_only_after_its_exchange() -> None:
    ids = PacketIds()
    sending = OutgoingWindow(ids, 10)
    (packet_id,) = send(sending, outgoing(2))
    sending.acknowledge(PUBREC, packet_id, 0, 1.0)
    others = [ids.allocate() for _ in range(65534)]
    assert packet_id not in others
    sending.acknowledge(PUBCOMP, packet_id, 0, 2.0)
    assert ids.allocate() == packet_id


@pytest.mark.parametrize(
    "first, answer",
    [(PUBACK, b""), (PUBREC, encode_ack(PUBREL, 9)), (PUBCOMP, b"")],
)
def test_an_acknowledgement_of_nothing_is_tolerated(first: int, answer: bytes) -> None:
    assert window().acknowledge(first, 9, 0, 1.0) == (None, answer)


@pytest.mark.parametrize(
    "qos, first, words",
    [
        (1, PUBREC, "PUBREC for packet identifier 1, which was published with QoS 1"),
        (2, PUBACK, "PUBACK for packet identifier 1, which was published with QoS 2"),
        (1, PUBCOMP, "PUBCOMP for packet identifier 1 before its PUBREC"),
        (2, PUBCOMP, "PUBCOMP for packet identifier 1 before its PUBREC"),
    ],
)
def test_an_acknowledgement_of_the_wrong_kind_is_a_protocol_error(qos: int, first: int, words: str) -> None:
    sending = window()
    send(sending, outgoing(qos))
    with pytest.raises(ProtocolError, match=words):
        sending.acknowledge(first, 1, 0, 1.0)


def test_an_acknowledgement_is_due_only_after_the_last_byte_has_left() -> None:
    sending = window()
    assert sending.oldest_sent_at == math.inf
    send(sending, outgoing(), outgoing(), outgoing())
    sending.flushed(9, 1.0)
    assert sending.oldest_sent_at == math.inf
    sending.flushed(20, 2.0)
    assert sending.oldest_sent_at == 2.0
    sending.acknowledge(PUBACK, 1, 0, 3.0)
    sending.acknowledge(PUBACK, 2, 0, 3.0)
    assert sending.oldest_sent_at == math.inf  # the third is still in the write buffer
    sending.flushed(30, 4.0)
    assert sending.oldest_sent_at == 4.0


def test_a_pubrec_gives_the_broker_time_again() -> None:
    sending = window()
    send(sending, outgoing(2))
    sending.flushed(10, 1.0)
    sending.acknowledge(PUBREC, 1, 0, 6.0)
    assert sending.oldest_sent_at == 6.0


def test_what_was_not_acknowledged_is_taken_back_in_the_order_of_sending() -> None:
    sending = window()
    messages = [outgoing(qos, topic=str(number)) for number, qos in enumerate((1, 2, 1, 2, 2))]
    ids = send(sending, *messages)
    sending.acknowledge(PUBREC, ids[3], 0, 1.0)
    sending.acknowledge(PUBREC, ids[1], 0, 1.0)
    sending.acknowledge(PUBACK, ids[2], 0, 1.0)
    assert [message.topic for message in sending.take_back()] == ["0", "1", "3", "4"]
    assert len(sending) == 0
    assert sending.take_back() == []


@given(
    st.lists(
        st.tuples(st.sampled_from([PUBACK, PUBREC, PUBCOMP]), st.integers(1, 6), st.sampled_from([0, 0x10, 0x87])),
        max_size=30,
    ),
    st.lists(st.integers(1, 2), max_size=6),
)
def test_every_message_comes_out_of_the_window_once_whatever_the_broker_acknowledges(
    acknowledgements: list[tuple[int, int, int]], levels: list[int]
) -> None:
    sending = window()
    messages = [outgoing(qos) for qos in levels]
    send(sending, *messages)
    ended: list[Outgoing] = []
    for first, packet_id, code in acknowledgements:
        try:
            done, _ = sending.acknowledge(first, packet_id, code, 1.0)
        except ProtocolError:
            break
        if done is not None:
            ended.append(done)
        assert len(sending) == len(messages) - len(ended)
    out = ended + sending.take_back()
    assert sorted(map(id, out)) == sorted(map(id, messages))


# -- a session that goes on -------------------------------------------------------------------------------------------


def take_up(sending: OutgoingWindow) -> list[tuple[str, bool]]:
    """Everything that may be taken up now: its topic, and whether it goes on with PUBREL."""
    found: list[tuple[str, bool]] = []
    while sending.has_unsent and sending.may_take_up:
        packet_id, message, released = sending.take_unsent()
        message.wire_end = packet_id
        found.append((message.topic, released))
    return found


def test_pubrels_are_taken_up_in_the_order_of_the_pubrecs_and_then_publishes_in_that_of_the_first_sending() -> None:
    sending = window()
    messages = [outgoing(2, topic=str(number)) for number in range(5)]
    ids = send(sending, *messages)
    for number in (3, 1):
        sending.acknowledge(PUBREC, ids[number], 0, 1.0)
    sending.begin_again()
    assert sending.free == 10
    assert take_up(sending) == [("3", True), ("1", True), ("0", False), ("2", False), ("4", False)]
    assert sending.free == 5


def test_what_is_taken_up_keeps_to_a_window_that_has_become_smaller_but_a_pubrel_needs_no_room() -> None:
    sending = window()
    ids = send(sending, *[outgoing(2, topic=str(number)) for number in range(4)])
    sending.acknowledge(PUBREC, ids[0], 0, 1.0)
    sending.acknowledge(PUBREC, ids[1], 0, 1.0)
    sending.begin_again()
    sending.size = 1
    assert take_up(sending) == [("0", True), ("1", True)]
    sending.acknowledge(PUBCOMP, ids[0], 0, 2.0)
    assert take_up(sending) == []
    sending.acknowledge(PUBCOMP, ids[1], 0, 2.0)
    assert take_up(sending) == [("2", False)]


def test_what_was_not_taken_up_yet_is_not_late() -> None:
    sending = window()
    (packet_id,) = send(sending, outgoing(1))
    sending.flushed(10, 1.0)
    assert sending.oldest_sent_at == 1.0
    sending.begin_again()
    assert sending.oldest_sent_at == math.inf
    take_up(sending)
    sending.flushed(packet_id, 5.0)
    assert sending.oldest_sent_at == 5.0


def test_what_was_not_taken_up_yet_is_taken_back_with_the_rest() -> None:
    sending = window()
    messages = [outgoing(2, topic=str(number)) for number in range(3)]
    ids = send(sending, *messages)
    sending.acknowledge(PUBREC, ids[1], 0, 1.0)
    sending.begin_again()
    sending.take_unsent()
    assert sending.take_back() == messages
    assert not sending.has_unsent
    assert sending.free == 10


def test_the_identifiers_of_a_session_that_ended_are_free() -> None:
    session = Session()
    session.begin(present=False)
    message = outgoing(2)
    packet_id = session.outgoing.add(message)
    session.outgoing.drop(packet_id)  # the broker may have it, so its identifier stays in use
    assert packet_id not in [session.ids.allocate() for _ in range(65534)]
    with pytest.raises(RuntimeError, match="in use"):
        session.ids.allocate()
    session.begin(present=False)
    assert packet_id in [session.ids.allocate() for _ in range(65535)]


# -- many PUBACKs at once -------------------------------------------------------------------------------------------


def test_a_row_of_pubacks_ends_its_exchanges_in_order() -> None:
    sending = window()
    messages = [outgoing(1, topic=str(number)) for number in range(4)]
    ids = send(sending, *messages)
    sending.flushed(40, 1.0)
    taken: list[Outgoing] = []
    sending.take_pubacks([ids[0], 77, ids[1], ids[0]], 5.0, taken)  # of nothing, and again: brokers repeat them
    assert taken == messages[:2]
    assert len(sending) == 2
    assert sending.oldest_sent_at == 5.0  # the broker goes on: the third waits since then
    sending.take_pubacks([ids[3]], 6.0, taken)
    assert sending.oldest_sent_at == 5.0
    sending.take_pubacks([ids[2]], 7.0, taken)
    assert taken == [messages[0], messages[1], messages[3], messages[2]]
    assert sending.oldest_sent_at == math.inf


def test_a_row_of_pubacks_with_a_wrong_one_counts_up_to_that() -> None:
    sending = window()
    messages = [outgoing(qos, topic=str(qos)) for qos in (1, 2, 1)]
    ids = send(sending, *messages)
    taken: list[Outgoing] = []
    with pytest.raises(ProtocolError, match="PUBACK for packet identifier 2, which was published with QoS 2"):
        sending.take_pubacks(ids, 1.0, taken)
    assert taken == messages[:1]
    assert len(sending) == 2


def test_a_puback_for_what_is_still_to_be_taken_up_is_no_longer_taken_up() -> None:
    sending = window()
    messages = [outgoing(1, topic=str(number)) for number in range(3)]
    ids = send(sending, *messages)
    sending.begin_again()
    taken: list[Outgoing] = []
    sending.take_pubacks(ids[:2], 1.0, taken)
    assert taken == messages[:2]
    assert take_up(sending) == [("2", False)]


def test_identifiers_go_round_and_leave_out_those_in_use() -> None:
    ids = PacketIds()
    sending = OutgoingWindow(ids, 10)
    ids.last = 65533
    ids.used.add(65535)
    assert [sending.add(outgoing()) for _ in range(3)] == [65534, 1, 2]
    ids.last = 65533
    assert [sending.add(outgoing()), ids.allocate()] == [3, 4]


def test_a_window_and_requests_never_have_more_than_all_identifiers_between_them() -> None:
    ids = PacketIds()
    sending = OutgoingWindow(ids, 10)
    (first, second) = send(sending, outgoing(2), outgoing(1))
    sending.acknowledge(PUBREC, first, 0, 1.0)
    assert {ids.allocate() for _ in range(65533)}.isdisjoint([first, second])
    with pytest.raises(RuntimeError, match="all 65535"):
        sending.add(outgoing())
    sending.take_back()
    assert {ids.allocate(), ids.allocate()} == {first, second}


def test_the_messages_of_a_window_are_in_the_order_of_sending() -> None:
    sending = window(10)
    messages = [outgoing(qos) for qos in (1, 2, 2, 1)]
    for message in messages:
        message.on_settled = lambda _: None
    ids = send(sending, *messages, outgoing(1))
    assert sending.messages() == messages
    for place in (2, 1):
        sending.acknowledge(PUBREC, ids[place], 0, 1.0)
    assert sending.messages() == messages
