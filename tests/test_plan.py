"""The replay that is kept ready: it says what is wanted now, or it is not used."""

from __future__ import annotations

from itertools import chain

import pytest
import trio
import trio.testing

from trio_mqtt_driver import ReasonCode, SubscriptionOptions
from trio_mqtt_driver._registration import Batch, Registration, Standing, Terms
from trio_mqtt_driver._registry import Registry

TERMS = Terms(3)
REFUSED = ReasonCode.NOT_AUTHORIZED


def registry(filters: int, *, qos: int = 0) -> Registry[str]:
    """With so many filters, each subscribed by itself and granted."""
    wanted = Registry[str](identifiers=False)
    for number in range(filters):
        wanted.add(f"f/{number}", SubscriptionOptions(qos=qos), "m")
        grant(wanted)
    return wanted


def answer(wanted: Registry[str], batch: Batch[str], *refused: str) -> None:
    codes = tuple(
        REFUSED if each.topic_filter in refused else ReasonCode(each.options.qos) for each in batch.registrations
    )
    wanted.answer(batch, codes, 1)


def grant(wanted: Registry[str], terms: Terms = TERMS) -> list[list[str]]:
    """Returns the filters of each packet."""
    batches = wanted.take_due(terms)
    topics = filters(batches)
    for batch in batches:
        answer(wanted, batch)
    return topics


def filters(batches: list[Batch[str]]) -> list[list[str]]:
    return [[packed[2:-1].decode() for packed in batch.filters] for batch in batches]


def replay(wanted: Registry[str], until: str) -> list[Batch[str]]:
    """Begin one, or only get ``before`` it. Returns what was sent."""
    if until != "before":
        wanted.begin()
    batches = wanted.take_due(TERMS) if until in ("sent", "answered") else []
    if until == "answered":
        for batch in batches:
            answer(wanted, batch)
    return batches


def registered(wanted: Registry[str], topic_filter: str) -> Registration[str]:
    return next(each for each in wanted if each.topic_filter == topic_filter)


def test_subscriptions_that_came_one_by_one_are_replayed_together() -> None:
    wanted = registry(7)
    wanted.begin()
    assert (wanted.due, wanted.granted) == (7, 0)
    batches = wanted.take_due(TERMS)
    assert filters(batches) == [["f/0", "f/1", "f/2"], ["f/3", "f/4", "f/5"], ["f/6"]]
    assert [batch.filters for batch in batches[1:]] == [
        [b"\x00\x03f/3\x00", b"\x00\x03f/4\x00", b"\x00\x03f/5\x00"],
        [b"\x00\x03f/6\x00"],
    ]
    assert [batch.codes for batch in batches] == [(ReasonCode.SUCCESS,) * count for count in (3, 3, 1)]
    assert (wanted.due, wanted.granted) == (0, 0)
    counts = []
    for batch in batches:
        answer(wanted, batch)
        counts.append(wanted.granted)
    assert counts == [3, 6, 7]


def test_a_replay_that_is_answered_as_before_is_the_next_one_too() -> None:
    wanted = registry(7)
    batches: list[Batch[str]] = []
    for everything in (False, False, True):
        if everything:
            wanted.resume(everything=True)
        else:
            wanted.begin()
        before, batches = batches, wanted.take_due(TERMS)
        for batch in batches:
            answer(wanted, batch)
        assert batches == before or not before  # the very same: they are compared by identity


def test_only_what_may_share_a_packet_is_joined() -> None:
    wanted = Registry[str](identifiers=False)
    for number in range(4):
        wanted.add(f"plain/{number}", SubscriptionOptions(), "m")
        grant(wanted)
        wanted.add(f"named/{number}", SubscriptionOptions(user_properties=(("a", "b"),)), "m")
        grant(wanted)
        wanted.add(f"mine/{number}", SubscriptionOptions(identifier=5000), "m")
        grant(wanted)
    wanted.begin()
    batches = wanted.take_due(TERMS)
    assert [(len(batch.registrations), batch.identifier, batch.user_properties) for batch in batches] == [
        (3, None, ()),
        (3, None, (("a", "b"),)),
        (3, 5000, ()),
        (1, None, ()),
        (1, None, (("a", "b"),)),
        (1, 5000, ()),
    ]


def test_batches_are_joined_up_to_the_broker_s_maximum_packet_size() -> None:
    terms = Terms(100, 16 + 3 * 6)
    wanted = Registry[str](identifiers=False)
    for number in range(7):
        wanted.add(f"f/{number}", SubscriptionOptions(), "m")
        grant(wanted, terms)
    wanted.begin()
    batches = wanted.take_due(terms)
    assert [len(batch.registrations) for batch in batches] == [3, 3, 1]
    assert [batch.length for batch in batches] == [34, 34, 22]


@pytest.mark.parametrize(
    "terms", [Terms(2), Terms(4), Terms(3, 30), Terms(3, shared=False), Terms(3, wildcards=False)], ids=str
)
def test_other_terms_make_another_plan(terms: Terms) -> None:
    wanted = registry(5)
    wanted.begin()
    batches = wanted.take_due(terms)
    assert all(batch.codes is None for batch in batches)  # so that they are checked against what the broker takes
    assert sorted(chain.from_iterable(filters(batches))) == [f"f/{number}" for number in range(5)]
    for batch in batches:
        answer(wanted, batch)
    wanted.begin()
    assert wanted.take_due(terms) == batches


def test_a_newcomer_is_sent_beside_the_plan_and_belongs_to_the_next_one() -> None:
    wanted = registry(2)
    wanted.begin()
    wanted.add("new", SubscriptionOptions(), "m")
    assert wanted.due == 3
    assert grant(wanted) == [["f/0", "f/1"], ["new"]]
    wanted.begin()
    assert grant(wanted) == [["f/0", "f/1", "new"]]


def test_a_refusal_at_a_replay_is_seen_and_ends_when_the_broker_changes_its_mind() -> None:
    wanted = registry(4)
    wanted.begin()
    for batch in wanted.take_due(TERMS):
        answer(wanted, batch, "f/1")
    refused = registered(wanted, "f/1")
    assert wanted.degraded == [refused]
    assert (refused.reason_code, wanted.granted) == (REFUSED, 3)
    wanted.begin()
    assert (wanted.due, wanted.granted, wanted.degraded) == (4, 0, [])
    grant(wanted)
    assert (refused.reason_code, wanted.granted) == (ReasonCode.SUCCESS, 4)


def test_another_qos_than_before_is_taken_in() -> None:
    wanted = registry(2, qos=2)
    wanted.begin()
    (batch,) = wanted.take_due(TERMS)
    wanted.answer(batch, (ReasonCode.GRANTED_QOS_1, ReasonCode.GRANTED_QOS_2), 2)
    assert [each.granted_qos for each in wanted] == [1, 2]
    wanted.begin()
    assert grant(wanted) == [["f/0", "f/1"]]
    assert [each.granted_qos for each in wanted] == [2, 2]


@pytest.mark.parametrize("when", ["before", "due", "sent", "answered"])
def test_a_wish_that_changes_is_what_the_broker_is_told(when: str) -> None:
    """Whatever has become of the plan by then."""
    wanted = registry(3)
    batches = replay(wanted, when)
    wanted.add("f/1", SubscriptionOptions(qos=2), "other")
    if when == "sent":
        assert wanted.granted == 0
        wanted.answer(batches[0], (ReasonCode.SUCCESS,) * 3, 1)
        assert (wanted.due, wanted.granted) == (1, 2)
    grant(wanted)
    wanted.begin()
    batches = wanted.take_due(TERMS)
    assert sorted(chain.from_iterable(batch.filters for batch in batches)) == [
        b"\x00\x03f/0\x00",
        b"\x00\x03f/1\x02",
        b"\x00\x03f/2\x00",
    ]


def test_an_answer_to_an_older_wish_is_no_part_of_a_plan() -> None:
    wanted = Registry[str](identifiers=False)
    wanted.add("a", SubscriptionOptions(), "m")
    (batch,) = wanted.take_due(TERMS)
    wanted.add("a", SubscriptionOptions(qos=2), "other")
    wanted.answer(batch, (ReasonCode.SUCCESS,), 1)
    wanted.begin()
    assert wanted.due == 1
    assert [batch.filters for batch in wanted.take_due(TERMS)] == [[b"\x00\x01a\x02"]]


@pytest.mark.parametrize("when", ["before", "due", "sent", "answered"])
def test_what_is_unsubscribed_is_not_replayed(when: str) -> None:
    wanted = registry(4)
    batches = replay(wanted, when)
    leaving = wanted.remove(registered(wanted, "f/1"), "m")
    assert (leaving is None) == (when == "due")  # that session has not been told of it
    if when == "sent":
        for batch in batches:
            answer(wanted, batch)
    # One more, so that there are as many as before.
    wanted.add("f/9", SubscriptionOptions(), "m")
    grant(wanted)
    for _ in range(2):
        wanted.begin()
        assert sorted(chain.from_iterable(grant(wanted))) == ["f/0", "f/2", "f/3", "f/9"]
        assert wanted.granted == 4


@pytest.mark.parametrize("resumed", [False, True])
def test_a_link_that_is_lost_within_a_replay(resumed: bool) -> None:
    """With its session only what was not answered is asked for again."""
    wanted = registry(5)
    wanted.begin()
    first, second = wanted.take_due(TERMS)
    answer(wanted, first)
    if resumed:
        wanted.resume(everything=False)
        assert (wanted.due, wanted.granted) == (2, 3)
        assert grant(wanted) == filters([second])
    else:
        wanted.begin()
        assert (wanted.due, wanted.granted) == (5, 0)
        assert grant(wanted) == [["f/0", "f/1", "f/2"], ["f/3", "f/4"]]
    assert wanted.granted == 5


def test_a_replay_that_never_began_is_due_to_whatever_session_comes() -> None:
    wanted = registry(4)
    wanted.begin()
    wanted.resume(everything=False)
    assert wanted.due == 4
    assert grant(wanted) == [["f/0", "f/1", "f/2"], ["f/3"]]


async def test_a_replay_is_work(autojump_clock: trio.testing.MockClock) -> None:
    wanted = registry(4)
    wanted.begin()
    with trio.fail_after(1):
        await wanted.wait_work()
    grant(wanted)
    with trio.move_on_after(1) as waiting:
        await wanted.wait_work()
    assert waiting.cancelled_caught


def test_what_the_broker_rules_out_beforehand_is_no_part_of_a_plan() -> None:
    wanted = Registry[str](identifiers=False)
    for topic_filter in ("a", "b/#", "c"):
        wanted.add(topic_filter, SubscriptionOptions(), "m")
    code = ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
    for _ in range(3):
        (batch,) = wanted.take_due(TERMS)
        assert batch.codes is None
        refusals = [code if b"#" in packed else None for packed in batch.filters]
        answer(wanted, wanted.refuse(batch, refusals, 1))
        assert [each.standing for each in wanted] == [Standing.GRANTED, Standing.REFUSED, Standing.GRANTED]
        assert wanted.granted == 2
        wanted.resume(everything=False)
        assert wanted.due == 1  # the refused one only: nothing is left open
        wanted.begin()


def test_what_was_sent_without_what_the_broker_rules_out_is_sent_again() -> None:
    wanted = Registry[str](identifiers=False)
    for topic_filter in ("a", "b/#"):
        wanted.add(topic_filter, SubscriptionOptions(), "m")
    (batch,) = wanted.take_due(TERMS)
    wanted.refuse(batch, [None, ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED], 1)
    wanted.resume(everything=False)
    assert sorted(chain.from_iterable(filters(wanted.take_due(TERMS)))) == ["a", "b/#"]


@pytest.mark.parametrize("left_out", ["f/1", "nobody's"])
def test_what_is_left_out_is_not_sent_by_a_plan(left_out: str) -> None:
    """The same filters are suspected at two endpoints, and refused at one of them."""
    terms = Terms(3, apart=frozenset({"f/1", "f/2"}))
    wanted = registry(4)
    for _ in range(2):
        wanted.begin()
        assert grant(wanted, terms) == [["f/0", "f/3"], ["f/1"], ["f/2"]]
    wanted.begin()
    sent = filters(wanted.take_due(terms, {left_out: "words"}, 2))
    assert sent == [["f/0", "f/3"], *([] if left_out == "f/1" else [["f/1"]]), ["f/2"]]
    assert registered(wanted, "f/1").refusal == (
        "unspecified error (0x80): words" if left_out == "f/1" else "success (0x00)"
    )
