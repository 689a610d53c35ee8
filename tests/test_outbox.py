"""What must still go out: bounds, order, and that every waiter is settled."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trio_mqtt_driver import MessageLostError, OutboxFullError, Receipt
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._outbox import Outbox
from trio_mqtt_driver._outgoing import Outgoing, wait_settled
from trio_mqtt_driver._types import PublishResult, ReasonCode

RESULT = PublishResult(reason_code=ReasonCode.SUCCESS, generation=1, attempts=1, latency=0.5)


def outgoing(topic: str = "a", *, qos: int = 1, size: int = 0) -> Outgoing:
    return Outgoing(topic, topic.encode(), b"x" * size, qos, False, b"\0", 0.0)


def outbox(messages: int = 3, size: int = 100_000) -> Outbox:
    return Outbox(max_messages=messages, max_bytes=size, counters=Counters())


def topics_left(box: Outbox) -> list[str]:
    left: list[str] = []
    while (message := box.take()) is not None:
        left.append(message.topic)
    return left


def test_messages_leave_in_the_order_of_acceptance() -> None:
    box = outbox()
    for topic in "abc":
        box.accept(outgoing(topic))
    assert len(box) == 3
    assert box.peek() is box.peek()
    assert topics_left(box) == ["a", "b", "c"]
    assert box.peek() is None


def test_what_a_dead_connection_hands_back_goes_first_and_settled_messages_are_left_out() -> None:
    box = outbox(10)
    for topic in "abcd":
        box.accept(outgoing(topic))
    taken = [message for _ in range(3) if (message := box.take()) is not None]
    taken[1].settle(RESULT)
    box.put_back(taken)
    assert topics_left(box) == ["a", "c", "d"]


def test_a_message_that_was_given_up_while_it_waited_is_not_sent() -> None:
    box = outbox()
    first, second = outgoing("a", qos=0), outgoing("b")
    box.accept(first)
    box.accept(second)
    first.settle(MessageLostError("given up"))
    assert box.peek() is second
    assert box.waiting_qos0 == 0
    assert topics_left(box) == ["b"]


def test_messages_on_the_wire_count_until_they_are_settled() -> None:
    box = outbox(2)
    first = outgoing("a")
    box.accept(first)
    box.take()
    box.accept(outgoing("b"))
    with pytest.raises(OutboxFullError, match=r"2 messages, \d+ bytes; outbox_messages=2, outbox_bytes=100000"):
        box.accept(outgoing("c"))
    first.settle(RESULT)
    assert box.accepted == 1
    box.accept(outgoing("c"))


def test_bytes_are_bounded_and_one_message_is_always_let_in() -> None:
    box = outbox(size=1000)
    large = outgoing(size=5000)
    box.accept(large)
    with pytest.raises(OutboxFullError):
        box.accept(outgoing())
    large.settle(RESULT)
    assert box.accepted_bytes == 0
    box.accept(outgoing(size=500))
    with pytest.raises(OutboxFullError):
        box.accept(outgoing(size=500))


def test_a_message_of_qos_0_that_waits_is_known() -> None:
    box = outbox()
    box.accept(outgoing(qos=1))
    assert box.waiting_qos0 == 0
    box.accept(outgoing(qos=0))
    assert box.waiting_qos0 == 1
    assert topics_left(box) == ["a", "a"]
    assert box.waiting_qos0 == 0


async def test_who_waits_for_room_is_served_in_order(autojump_clock: trio.testing.MockClock) -> None:
    box = outbox(1)
    held = outgoing("first")
    box.accept(held)
    entered: list[str] = []

    async def enter(topic: str) -> None:
        message = outgoing(topic)
        await box.wait_room(message)
        box.accept(message)
        entered.append(topic)
        await trio.sleep(1)
        message.settle(RESULT)

    async with trio.open_nursery() as nursery:
        for topic in "abc":
            nursery.start_soon(enter, topic)
            await trio.testing.wait_all_tasks_blocked()
        assert entered == []
        held.settle(RESULT)
    assert entered == ["a", "b", "c"]
    assert box.accepted == 0


async def test_a_late_comer_does_not_overtake_who_waits_for_room() -> None:
    box = outbox(2)
    held = outgoing()
    box.accept(held)
    box.accept(outgoing())
    order: list[str] = []

    async def enter(name: str) -> None:
        message = outgoing(name)
        await box.wait_room(message)
        box.accept(message)
        order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(enter, "early")
        await trio.testing.wait_all_tasks_blocked()
        held.settle(RESULT)  # there is room now, but it is the other's turn
        nursery.start_soon(enter, "late")
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["early"]
        nursery.cancel_scope.cancel()


async def test_who_gives_up_waiting_for_room_lets_the_next_one_in() -> None:
    box = outbox(1)
    held = outgoing()
    box.accept(held)
    scope = trio.CancelScope()
    entered = trio.Event()

    async def impatient() -> None:
        with scope:
            await box.wait_room(outgoing())

    async def patient() -> None:
        await box.wait_room(outgoing())
        entered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(patient)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        held.settle(RESULT)
    assert entered.is_set()


async def test_any_number_of_tasks_may_wait_for_one_outcome_and_the_first_outcome_counts() -> None:
    message = outgoing()
    results: list[PublishResult] = []

    async def wait() -> None:
        results.append(await message.wait())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        message.settle(RESULT)
        message.settle(MessageLostError("too late"))
    assert results == [RESULT, RESULT]
    with trio.testing.assert_checkpoints():
        assert await message.wait() is RESULT


async def test_a_failure_is_raised_to_whoever_waits() -> None:
    message = outgoing()
    message.settle(MessageLostError("gone"))
    with pytest.raises(MessageLostError, match="gone"):
        await message.wait()


async def test_a_receipt_tells_what_became_of_its_message() -> None:
    message = outgoing("a/b")
    receipt: Receipt = message
    assert not receipt.done
    assert repr(receipt) == "<Receipt 'a/b' qos=1 waiting>"
    message.settle(RESULT)
    assert receipt.done
    assert await receipt.wait() == RESULT
    assert repr(receipt) == "<Receipt 'a/b' qos=1 acknowledged>"
    lost = outgoing()
    lost.settle(MessageLostError("gone"))
    assert repr(lost) == "<Receipt 'a' qos=1 failed>"


async def test_wait_settled_returns_when_all_have_an_outcome() -> None:
    box = outbox()
    messages = [outgoing(), outgoing()]
    for message in messages:
        box.accept(message)
    with trio.testing.assert_no_checkpoints():
        await wait_settled([])
    done: list[str] = []

    async def wait(name: str) -> None:
        await wait_settled(messages)
        done.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "one")
        nursery.start_soon(wait, "two")
        await trio.testing.wait_all_tasks_blocked()
        messages[1].settle(MessageLostError("gone"))
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        messages[0].settle(RESULT)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(done) == ["one", "two"]
        nursery.cancel_scope.cancel()
    with trio.testing.assert_no_checkpoints():
        await wait_settled(messages)
    assert [one.left_behind for one in (*messages, outgoing())] == [False, True, True]


async def test_closing_settles_what_waits() -> None:
    box = outbox()
    messages = [outgoing(topic) for topic in "abc"]
    for message in messages:
        box.accept(message)
    messages[0].settle(RESULT)
    box.close(lambda message: MessageLostError(f"{message.topic} is lost"))
    assert box.accepted == 0
    assert (await messages[0].wait()) is RESULT
    for topic, message in zip("bc", messages[1:], strict=True):
        with pytest.raises(MessageLostError, match=f"{topic} is lost"):
            await message.wait()
