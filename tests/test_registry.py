"""The registry: sharing and classes of filters, batches, answers; a broker that ends up knowing what is wanted.

The state machine below plays the application (add, remove), the connection (a worker that goes through the same steps
as ``_replay.synchronise``, with the application coming in between any two of them) and reconnects.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trio_mqtt_driver import DriverClosedError, ReasonCode, RetainHandling, SubscriptionOptions
from trio_mqtt_driver._registration import OWN_IDENTIFIERS, Batch, Registration, Standing, Terms
from trio_mqtt_driver._registry import Registry
from trio_mqtt_driver.testing._filters import matches, split_share  # the independent, plain ones

OK = ReasonCode.SUCCESS
LEVELS = ("a", "b", "$x")
TOPICS = ["/".join(levels) for depth in (1, 2, 3) for levels in product(LEVELS, repeat=depth)]
FILTERS = [
    "a",
    "b",
    "a/b",
    "a/+",
    "+/b",
    "a/#",
    "#",
    "+",
    "+/+",
    "a/b/a",
    "$x/#",
    "$x/+",
    "$share/g/a/b",
    "$share/g/#",
]


def options(qos: int = 0, **more: int) -> SubscriptionOptions:
    return SubscriptionOptions(qos=qos, **more)  # type: ignore[arg-type]  # the tests pass numbers only


def registry(*, identifiers: bool = True) -> Registry[str]:
    return Registry[str](identifiers=identifiers)


def overlap(one: str, other: str) -> bool:
    """By trying all topics."""
    plain = [split_share(topic_filter)[1] for topic_filter in (one, other)]
    return any(all(matches(topic_filter, topic) for topic_filter in plain) for topic in TOPICS)


def grant_all(wanted: Registry[str], generation: int = 1) -> None:
    for batch in wanted.take_due(Terms(100)):
        wanted.answer(batch, (OK,) * len(batch.registrations), generation)


def answer(
    wanted: Registry[Any], registration: Registration[Any], revision: int, code: ReasonCode = OK, generation: int = 1
) -> None:
    """The broker answers for one filter."""
    wanted.answer(
        Batch([registration], [revision], [registration.packed], registration.identifier, ()), (code,), generation
    )


# -- sharing --------------------------------------------------------------------------------------------------------


def test_subscriptions_of_one_filter_share_a_registration_with_the_higher_qos() -> None:
    wanted = registry()
    first, revision1 = wanted.add("a", options(1), "m1")
    second, revision2 = wanted.add("a", options(2), "m2")
    third, _ = wanted.add("a", options(0), "m3")
    assert first is second is third
    assert (revision1, revision2, len(wanted)) == (1, 2, 1)
    assert first.options.qos == 2
    assert first.members == ["m1", "m2", "m3"]


def test_subscriptions_of_one_filter_must_agree_in_their_other_options() -> None:
    wanted = registry()
    wanted.add("a", options(), "m1")
    with pytest.raises(ValueError, match=r"'a' is subscribed already with .* may differ in qos only"):
        wanted.add("a", SubscriptionOptions(no_local=True), "m2")
    with pytest.raises(ValueError, match="'a' is subscribed already"):
        wanted.add("a", options(identifier=5000), "m2")
    (registration,) = wanted
    assert registration.members == ["m1"]


def test_only_the_last_member_takes_the_filter_off_the_broker() -> None:
    wanted = registry()
    registration, _ = wanted.add("a", options(), "m1")
    wanted.add("a", options(), "m2")
    grant_all(wanted)
    assert wanted.remove(registration, "m1") is None
    assert wanted.leaving == []
    leaving = wanted.remove(registration, "m2")
    assert leaving is not None
    assert wanted.leaving == ["a"]
    assert len(wanted) == 0
    assert wanted.remove(registration, "m2") is None  # once is enough


def test_a_filter_that_the_broker_was_never_told_of_leaves_without_unsubscribe() -> None:
    wanted = registry()
    registration, _ = wanted.add("a", options(), "m1")
    assert wanted.remove(registration, "m1") is None
    assert wanted.leaving == []
    assert wanted.take_due(Terms(10)) == []
    again, _ = wanted.add("a", options(), "m1")
    grant_all(wanted)
    wanted.begin()  # the session that was told is over
    assert wanted.remove(again, "m1") is None
    assert wanted.leaving == []


@pytest.mark.parametrize("anew", [False, True])
def test_a_filter_that_the_session_was_told_of_leaves_with_unsubscribe(anew: bool) -> None:
    """Told on an older connection of it, or told again in a new one."""
    wanted = registry()
    registration, _ = wanted.add("a", options(), "m1")
    grant_all(wanted)
    if anew:
        wanted.begin()
        grant_all(wanted)
    wanted.resume(everything=False)
    assert wanted.due == 0
    assert wanted.remove(registration, "m1") is not None
    assert wanted.leaving == ["a"]


def test_a_filter_that_left_and_came_back_is_subscribed_after_its_unsubscribe() -> None:
    """Else the broker would forget it, while the registry holds it for granted."""
    wanted = registry()
    registration, _ = wanted.add("a", options(), "m1")
    grant_all(wanted)
    wanted.remove(registration, "m1")
    wanted.add("a", options(), "m2")
    assert wanted.leaving == ["a"]
    assert wanted.take_due(Terms(10)) == []
    wanted.left("a", OK)
    (batch,) = wanted.take_due(Terms(10))
    assert [each.topic_filter for each in batch.registrations] == ["a"]


def test_matching_follows_what_is_wanted() -> None:
    wanted = registry()
    version = wanted.version
    registration, _ = wanted.add("$share/g/a/+", options(), "m1")
    assert wanted.match("a/b") == [registration]
    assert wanted.version != version
    wanted.remove(registration, "m1")
    assert wanted.match("a/b") == []


# -- answers --------------------------------------------------------------------------------------------------------


def test_a_refusal_is_visible_until_a_later_session_grants() -> None:
    wanted = registry()
    registration, revision = wanted.add("a", options(), "m1")
    wanted.take_due(Terms(10))
    answer(wanted, registration, revision, ReasonCode.NOT_AUTHORIZED)
    assert wanted.degraded == [registration]
    assert registration.generation == 1
    wanted.begin()
    assert wanted.degraded == []
    grant_all(wanted, generation=2)
    assert registration.standing is Standing.GRANTED
    assert registration.generation == 1  # it is an answer to the same revision
    wanted.add("a", options(), "m2")
    grant_all(wanted, generation=3)
    assert registration.generation == 3


def test_when_a_newcomer_s_wish_was_refused_and_it_leaves_the_others_wish_is_asked_for_again() -> None:
    wanted = registry()
    registration, _ = wanted.add("a", options(1), "m1")
    grant_all(wanted)
    _, revision = wanted.add("a", options(2), "m2")
    (batch,) = wanted.take_due(Terms(10))
    assert [each.packed for each in batch.registrations] == [b"\x00\x01a\x02"]
    answer(wanted, registration, revision, ReasonCode.NOT_AUTHORIZED)
    wanted.remove(registration, "m2")
    (batch,) = wanted.take_due(Terms(10))
    assert [each.packed for each in batch.registrations] == [b"\x00\x01a\x01"]


def test_an_answer_to_an_older_revision_leaves_the_newer_one_due() -> None:
    wanted = registry()
    registration, old = wanted.add("a", options(), "m1")
    wanted.take_due(Terms(10))
    wanted.add("a", options(2), "m2")
    answer(wanted, registration, old)
    assert registration.standing is Standing.DUE
    (batch,) = wanted.take_due(Terms(10))
    assert (batch.registrations, batch.revisions) == ([registration], [old + 1])
    assert batch.registrations[0].packed == b"\x00\x01a\x02"


async def test_who_subscribes_waits_for_the_answer_to_its_own_revision() -> None:
    wanted = registry()
    registration, first = wanted.add("a", options(), "m1")
    _, second = wanted.add("a", options(), "m2")
    codes: list[ReasonCode] = []

    async def wait(revision: int) -> None:
        codes.append(await wanted.wait_answer(registration, revision))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, first)
        nursery.start_soon(wait, second)
        await trio.testing.wait_all_tasks_blocked()
        answer(wanted, registration, first)
        await trio.testing.wait_all_tasks_blocked()
        assert codes == [OK]
        answer(wanted, registration, second, ReasonCode.QUOTA_EXCEEDED)
    assert codes == [OK, ReasonCode.QUOTA_EXCEEDED]


async def test_who_unsubscribes_waits_for_the_answer_or_for_the_end_of_the_session() -> None:
    wanted = registry()
    for topic_filter in ("a", "b"):
        wanted.add(topic_filter, options(), "m")
    grant_all(wanted)
    leaving = [wanted.remove(registration, "m") for registration in list(wanted)]
    assert leaving[0] is not None
    assert leaving[1] is not None
    wanted.left("a", ReasonCode.NO_SUBSCRIPTION_EXISTED)
    assert await wanted.wait_left(leaving[0]) == ReasonCode.NO_SUBSCRIPTION_EXISTED
    wanted.begin()
    assert await wanted.wait_left(leaving[1]) == OK


async def test_closing_wakes_everybody_who_waits() -> None:
    wanted = registry()
    waiting, revision = wanted.add("a", options(), "m")
    going, _ = wanted.add("b", options(), "m")
    grant_all(wanted)
    leaving = wanted.remove(going, "m")
    assert leaving is not None
    _, revision = wanted.add("a", options(), "m2")

    async def answer() -> None:
        with pytest.raises(DriverClosedError, match="left before the broker answered"):
            await wanted.wait_answer(waiting, revision)

    async def left() -> None:
        with pytest.raises(DriverClosedError, match="left before the broker answered"):
            await wanted.wait_left(leaving)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        nursery.start_soon(left)
        await trio.testing.wait_all_tasks_blocked()
        wanted.close()


async def test_work_is_announced_when_something_is_due() -> None:
    wanted = registry()
    seen: list[str] = []

    async def work() -> None:
        while True:
            await wanted.wait_work()
            seen.extend(wanted.leaving)
            for topic_filter in wanted.leaving:
                wanted.left(topic_filter, OK)
            seen.extend(each.topic_filter for batch in wanted.take_due(Terms(9)) for each in batch.registrations)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        registration, _ = wanted.add("a", options(), "m")
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["a"]
        wanted.remove(registration, "m")
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["a", "a"]
        nursery.cancel_scope.cancel()


# -- batches --------------------------------------------------------------------------------------------------------


def test_batches_hold_what_may_share_a_packet() -> None:
    wanted = registry(identifiers=False)
    for number in range(5):
        wanted.add(f"plain/{number}", options(), "m")
    wanted.add("mine", options(identifier=5000), "m")
    wanted.add("named", SubscriptionOptions(user_properties=(("a", "b"),)), "m")
    batches = wanted.take_due(Terms(2))
    assert [len(batch.registrations) for batch in batches] == [2, 2, 1, 1, 1]
    assert [batch.identifier for batch in batches] == [None, None, None, 5000, None]
    assert [batch.user_properties for batch in batches] == [(), (), (), (), (("a", "b"),)]
    assert wanted.take_due(Terms(2)) == []


@given(st.integers(50, 400), st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_a_subscribe_packet_keeps_within_the_broker_s_maximum(limit: int, lengths: list[int]) -> None:
    wanted = registry(identifiers=False)
    for number, length in enumerate(lengths):
        wanted.add(f"{number}/".ljust(length, "ä"), options(), "m")
    batches = wanted.take_due(Terms(100, limit))
    assert sum(len(batch.registrations) for batch in batches) == len(lengths)
    for batch in batches:
        # 5 of fixed header, 2 of identifier, up to 9 of properties, 3 and the filter for each.
        size = 16 + sum(3 + len(each.topic_filter.encode()) for each in batch.registrations)
        assert size <= limit or len(batch.registrations) == 1


# -- classes --------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(FILTERS), unique=True))
def test_overlapping_filters_never_share_an_identifier(filters: list[str]) -> None:
    wanted = registry()
    for topic_filter in filters:
        wanted.add(topic_filter, options(), "m")
    for one, other in combinations(wanted, 2):
        assert one.identifier != other.identifier or not overlap(one.topic_filter, other.topic_filter)
    shared = any(overlap(one, other) for one, other in combinations(filters, 2))
    assert wanted.overlapping or not shared


def test_filters_that_do_not_overlap_share_one_identifier() -> None:
    wanted = registry()
    for number in range(100):
        wanted.add(f"device/{number}/+", options(), "m")
    assert {registration.identifier for registration in wanted} == {1}
    assert not wanted.overlapping


def test_identifiers_of_the_application_are_kept_and_the_driver_s_are_bounded() -> None:
    wanted = registry()
    for number in range(OWN_IDENTIFIERS + 3):
        wanted.add(f"$share/{number}/a", options(), "m")  # which all overlap
    mine, _ = wanted.add("a", options(identifier=OWN_IDENTIFIERS + 1), "m")
    given_out = [registration.identifier for registration in wanted]
    assert given_out[:OWN_IDENTIFIERS] == list(range(1, OWN_IDENTIFIERS + 1))
    assert given_out[OWN_IDENTIFIERS:-1] == [None] * 3
    assert mine.identifier == OWN_IDENTIFIERS + 1


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"qos": 3}, "qos is 3, allowed are 0, 1, 2"),
        ({"qos": True}, "qos is True, allowed are 0, 1, 2"),
        ({"no_local": 1}, "no_local must be bool, not int"),
        ({"retain_as_published": "x"}, "retain_as_published must be bool, not str"),
        ({"retain_handling": 3}, "retain_handling is 3, allowed are"),
        ({"identifier": OWN_IDENTIFIERS}, "identifier is 1023, allowed are whole numbers from 1024 to 268435455"),
        ({"identifier": 268_435_456}, "identifier is 268435456, allowed are"),
        ({"user_properties": (("a",),)}, "user_properties must hold .name, value. pairs"),
    ],
)
def test_bad_options_are_refused_where_they_are_written(bad: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        SubscriptionOptions(**bad)  # type: ignore[arg-type]  # that is the point
    assert SubscriptionOptions(retain_handling=RetainHandling.SEND_IF_NEW).retain_handling == 1


# -- a broker that must end up knowing what is wanted ---------------------------------------------------------------


class RegistryMachine(RuleBasedStateMachine):
    """``known`` is the broker: filter -> (QoS, identifier). What it refuses changes now and then."""

    @initialize(identifiers=st.booleans())
    def start(self, identifiers: bool) -> None:
        self.wanted = Registry[int](identifiers=identifiers)
        self.generation = 1
        self.members: list[tuple[Registration[int], int, int]] = []
        self.count = 0
        self.known: dict[str, tuple[int, int | None]] = {}
        self.refuses = "$x"
        self.refused: set[str] = set()
        self.terms = Terms(2)
        self.under_way = False
        self.worker = self.work()

    def work(self) -> Iterator[None]:
        """What ``_replay.synchronise`` does, for ever; a ``yield`` is where the application may come in."""
        while True:
            removals = self.wanted.leaving
            for topic_filter in removals:
                yield
                self.known.pop(topic_filter, None)
            for topic_filter in removals:
                self.wanted.left(topic_filter, OK)
            yield
            for batch in self.wanted.take_due(self.terms):
                assert len(batch.registrations) <= self.terms.size
                requests = list(batch.filters)
                self.under_way = True
                yield
                codes = [self.subscribe(packed, batch.identifier) for packed in requests]
                yield
                self.under_way = False
                self.wanted.answer(batch, tuple(codes), self.generation)
            yield

    def subscribe(self, packed: bytes, identifier: int | None) -> ReasonCode:
        topic_filter, qos = packed[2:-1].decode(), packed[-1]
        if topic_filter.startswith(self.refuses):
            self.known.pop(topic_filter, None)
            self.refused.add(topic_filter)
            return ReasonCode.NOT_AUTHORIZED
        self.known[topic_filter] = (qos, identifier)
        self.refused.discard(topic_filter)
        return ReasonCode(qos)

    @rule(topic_filter=st.sampled_from(FILTERS), qos=st.integers(0, 2))
    def add(self, topic_filter: str, qos: int) -> None:
        self.count += 1
        registration, revision = self.wanted.add(topic_filter, options(qos), self.count)
        self.members.append((registration, self.count, revision))

    @precondition(lambda self: bool(cast(RegistryMachine, self).members))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.members) - 1))
        registration, member, _ = self.members.pop(index)
        self.wanted.remove(registration, member)

    @rule(steps=st.integers(1, 6))
    def proceed(self, steps: int) -> None:
        for _ in range(steps):
            next(self.worker)

    @rule()
    def send(self) -> None:
        """Leave an answer open: by chance alone, too, that is rare."""
        for _ in range(8):
            next(self.worker)
            if self.under_way:
                break

    @rule()
    def settle(self) -> None:
        """A plan comes of what all was granted: by chance alone that is rare."""
        self.refuses = "nothing"
        for _ in range(100):
            next(self.worker)

    @rule(refuses=st.sampled_from(["$x", "a", "nothing"]))
    def change_mind(self, refuses: str) -> None:
        self.refuses = refuses

    @rule(size=st.sampled_from([2, 2, 3]))
    def reconnect(self, size: int) -> None:
        self.next_connection(size)
        self.known = {}
        self.wanted.begin()

    @rule(size=st.sampled_from([2, 2, 3]), everything=st.booleans())
    def resume(self, size: int, everything: bool) -> None:
        self.next_connection(size)
        self.wanted.resume(everything=everything)

    def next_connection(self, size: int) -> None:
        self.generation += 1
        self.terms = Terms(size)
        self.under_way = False
        self.worker = self.work()

    @invariant()
    def no_more_is_granted_than_the_broker_knows(self) -> None:
        assert 0 <= self.wanted.granted <= len(self.known)
        assert 0 <= self.wanted.due <= len(self.wanted)

    @invariant()
    def overlapping_filters_have_different_identifiers(self) -> None:
        for one, other in combinations(self.wanted, 2):
            if one.identifier is not None and one.identifier == other.identifier:
                assert not overlap(one.topic_filter, other.topic_filter)

    @invariant()
    def messages_go_to_what_is_wanted(self) -> None:
        for topic in ("a", "a/b", "$x/a"):
            expected = {
                registration.topic_filter
                for registration, _, _ in self.members
                if matches(split_share(registration.topic_filter)[1], topic)
            }
            assert {registration.topic_filter for registration in self.wanted.match(topic)} == expected

    def teardown(self) -> None:
        if not hasattr(self, "wanted"):
            return
        for _ in range(200):
            next(self.worker)
        expected: dict[str, tuple[int, int | None]] = {}
        for registration, _, revision in self.members:
            assert registration.answered >= revision
            refused = registration.topic_filter in self.refused
            assert registration.standing is (Standing.REFUSED if refused else Standing.GRANTED)
            if not refused:
                expected[registration.topic_filter] = (registration.options.qos, registration.identifier)
                assert registration.reason_code == registration.options.qos
        assert self.known == expected
        assert self.wanted.granted == len(expected)
        assert self.wanted.leaving == []
        assert self.wanted.due == 0


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
