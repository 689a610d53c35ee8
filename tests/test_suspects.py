"""Brokers that refuse a Topic Filter by ending the connection: one subscription must not cost all of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import (
    Attempt,
    DriverConfig,
    Endpoint,
    Message,
    MQTTDriver,
    ReasonCode,
    State,
    SubscribeError,
    UnsubscribeError,
)
from trio_mqtt_driver._suspects import COPIES, EndpointSuspects, Suspects
from trio_mqtt_driver.testing import Access, Direction, Kind, MemoryBroker, Subscribe, Unsubscribe

MINUTE, DAY = 60, 86400
FORBIDDEN = "forbidden/"

# -- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.fixture
def suspects() -> Suspects:
    return Suspects()


ALL = frozenset({"a", "b", "c"})


def blame(suspects: Suspects, name: str, now: float = 0, limit: int = 10, others: bool = True) -> str:
    return suspects.blame(name, now, limit=limit, others=others)


def convict(suspects: Suspects, *names: str, now: float = 0) -> None:
    for name in names:
        for _ in range(3):
            blame(suspects, name, now)


def left_out(suspects: Suspects, now: float) -> list[str]:
    return sorted(suspects.left_out(now, ALL))


def test_nobody_is_suspected_without_a_reason(suspects: Suspects) -> None:
    assert not suspects
    assert suspects.filters == frozenset()
    assert suspects.next_try(ALL) == math.inf
    assert suspects.to_try(1e9, ALL) is None
    assert suspects.left_out(0, ALL) == {}
    suspects.answered("a", 0)


def test_three_ends_are_enough_if_other_requests_were_answered(suspects: Suspects) -> None:
    assert blame(suspects, "a") == "over the SUBSCRIBE of 'a', it seems (1 of 3)"
    assert suspects.filters == {"a"}
    assert suspects.alone("a")
    assert blame(suspects, "a") == "over the SUBSCRIBE of 'a', it seems (2 of 3)"
    assert left_out(suspects, 0) == []
    assert suspects.next_try(ALL) == math.inf
    said = blame(suspects, "a")
    assert (
        said == "over the SUBSCRIBE of 'a', it seems (3 by now): that is taken for refused, the next try is in 10 min"
    )
    assert suspects.left_out(599, ALL) == {"a": "3 connections ended over it"}
    assert suspects.filters == {"a"}


def test_without_that_it_takes_as_many_as_the_options_say(suspects: Suspects) -> None:
    for number in range(1, 10):
        assert f"({number} of 10)" in blame(suspects, "a", others=False)
    assert left_out(suspects, 0) == []
    assert "taken for refused" in blame(suspects, "a", others=False)


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("others", [True, False])
def test_the_options_may_say_less(suspects: Suspects, limit: int, others: bool) -> None:
    said = [blame(suspects, "a", limit=limit, others=others) for _ in range(limit)]
    assert ["taken for refused" in one for one in said] == [False] * (limit - 1) + [True]


def test_an_answer_says_that_it_was_the_network(suspects: Suspects) -> None:
    blame(suspects, "a")
    blame(suspects, "a")
    suspects.answered("a", 0)
    assert not suspects
    assert "(1 of 3)" in blame(suspects, "a")


def test_what_is_long_ago_counts_no_more(suspects: Suspects) -> None:
    assert "(1 of 3)" in blame(suspects, "a")
    assert "(2 of 3)" in blame(suspects, "a", now=3600)
    assert "(1 of 3)" in blame(suspects, "a", now=7201)
    convict(suspects, "b")
    assert "(4 by now)" in blame(suspects, "b", now=DAY)


def test_tries_are_further_and_further_apart(suspects: Suspects) -> None:
    convict(suspects, "a")
    now, holds = 0.0, []
    for _ in range(10):
        at = suspects.next_try(ALL)
        holds.append((at - now) / MINUTE)
        assert (suspects.to_try(at - 1, ALL), left_out(suspects, at - 1)) == (None, ["a"])
        assert (suspects.to_try(at, ALL), left_out(suspects, at)) == ("a", [])
        now = at
        blame(suspects, "a", now)
    assert holds == [10, 20, 40, 80, 160, 320, 640, 1280, 1440, 1440]  # a day at most


def test_one_is_tried_at_a_time_and_no_other_soon_after(suspects: Suspects) -> None:
    convict(suspects, "a", "b")
    convict(suspects, "c", now=300)
    tried = []
    for _ in range(7):
        now = suspects.next_try(ALL)
        name = suspects.to_try(now, ALL)
        assert name is not None
        assert left_out(suspects, now) == sorted(ALL - {name})
        tried.append((name, now / MINUTE))
        blame(suspects, name, now)
    assert tried == [("a", 10), ("b", 20), ("c", 30), ("a", 40), ("b", 50), ("c", 60), ("a", 80)]


def test_when_one_is_answered_the_next_is_tried_at_once(suspects: Suspects) -> None:
    told: list[str] = []
    suspects = EndpointSuspects(told.append).of(Endpoint(host="h", port=1))[0]
    convict(suspects, "a", "b")
    suspects.answered("a", 600)
    assert (suspects.to_try(600, ALL), suspects.to_try(599, ALL)) == ("b", None)
    suspects.answered("b", 600)
    assert suspects.to_try(1e9, ALL) is None
    assert told == [f"mqtt://h:1: {name!r} is not taken for refused any more" for name in ("a", "b")]


def test_what_nobody_wants_is_not_tried_and_not_forgotten(suspects: Suspects) -> None:
    convict(suspects, "a", "b")
    wanted = {"b"}
    blame(suspects, "b", 600)
    assert (suspects.to_try(DAY, wanted), suspects.next_try(wanted)) == ("b", 1800)
    assert (suspects.to_try(DAY, set()), suspects.next_try(set())) == (None, math.inf)
    assert sorted(suspects.left_out(DAY, set())) == ["a", "b"]
    assert suspects.to_try(DAY, {"a"}) == "a"
    assert "the next try is in 20 min" in blame(suspects, "a", DAY)


def test_the_question_about_copies_is_named(suspects: Suspects) -> None:
    assert blame(suspects, COPIES) == "over the question about overlapping filters, it seems (1 of 3)"


def test_several_have_packets_of_their_own_for_an_hour(suspects: Suspects) -> None:
    said = suspects.blame_one_of(["a", "b"], 0)
    assert said == "over a SUBSCRIBE of 2 filters, it seems: each has a packet of its own now"
    assert suspects
    assert suspects.filters == {"a", "b"}
    assert (suspects.alone("a"), left_out(suspects, 0)) == (False, [])
    blame(suspects, "b")
    assert (suspects.alone("a"), suspects.alone("b"), suspects.alone("c")) == (False, True, False)
    suspects.blame_one_of(["b"], 10)
    assert "(2 of 3)" in blame(suspects, "b", 20)
    suspects.answered("a", 3600)
    assert suspects.filters == {"a", "b"}
    suspects.answered("a", 3601)
    assert suspects.filters == {"b"}


def test_ever_new_filters_and_endpoints_are_forgotten_some_time(suspects: Suspects) -> None:
    convict(suspects, "a")
    names = [f"f/{number}" for number in range(9_999)]
    suspects.blame_one_of(names, 0)
    assert suspects.filters == {"a", *names}
    suspects.blame_one_of(["another"], 0)
    assert suspects.filters == {*names, "another"}
    assert left_out(suspects, 0) == []
    everywhere = EndpointSuspects()
    first, _ = everywhere.of(Endpoint(host="first", port=1))
    for number in range(9_999):
        everywhere.of(Endpoint(host=f"h{number}", port=1))
    assert everywhere.of(Endpoint(host="first", port=1))[0] is first
    everywhere.of(Endpoint(host="another", port=1))
    again, _ = everywhere.of(Endpoint(host="first", port=1))
    assert again is not first
    everywhere.forget()
    assert everywhere.of(Endpoint(host="first", port=1))[0] is not again


# -- a driver ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> Any:
    return request.param


def allowed(access: Access) -> bool:
    return not access.topic.startswith(FORBIDDEN)


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery, acl=allowed, denied="close")


def said(driver: MQTTDriver) -> list[str]:
    return [event.text for event in driver.status().history if event.kind == "suspect"]


def broken(driver: MQTTDriver) -> tuple[int, int]:
    """Links that were lost, and attempts that failed."""
    counters = driver.status().counters
    return counters["losses"], counters["failures"]


def on_broker(broker: MemoryBroker, driver: MQTTDriver) -> list[str]:
    return sorted(broker.subscriptions(str(driver.client_id)))


async def lose_link(broker: MemoryBroker, driver: MQTTDriver) -> None:
    broker.drop()
    await driver.wait_state(State.BACKING_OFF, State.PAUSED)
    await driver.wait_live()


async def ignore(_message: Message[bytes]) -> None:
    await trio.lowlevel.checkpoint()


async def refuse(driver: MQTTDriver, name: str) -> None:
    with pytest.raises(SubscribeError):
        await driver.subscribe(name, ignore)


@pytest.mark.parametrize("stable", [False, True])
async def test_a_forbidden_filter_is_refused_and_the_others_stay(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any, stable: bool
) -> None:
    ends = 10 if stable else 3  # a session that goes on asks for nothing else, so nothing else is answered
    async with MQTTDriver(memory_config(broker, protocol=protocol, stable_id=stable)) as driver:
        seen: list[str] = []
        for number in range(3):
            await driver.subscribe(f"in/{number}", lambda message: seen.append(message.topic))
        why = rf"'forbidden/a': unspecified error \(0x80\): {ends} connections ended over it$"
        with pytest.raises(SubscribeError, match=why) as caught:
            await driver.subscribe(FORBIDDEN + "a", ignore)
        assert caught.value.reason_code is ReasonCode.UNSPECIFIED_ERROR
        assert broken(driver) == (1, ends - 1)
        await driver.wait_live()
        first, *others, last = said(driver)
        assert (
            first == "a connection to mqtt://memory:1883 ended over the SUBSCRIBE of 'forbidden/a', it seems (1 of 3)"
        )
        assert [text[-9:] for text in others] == [f" ({number} of {ends})"[-9:] for number in range(2, ends)]
        assert last.endswith(f"({ends} by now): that is taken for refused, the next try is in 10 min")
        await driver.publish("in/1", b"", qos=1)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["in/1"]
        # Nobody wants it any more: no link is put at stake for it.
        await trio.sleep(DAY)
        assert broken(driver) == (1, ends - 1)
        assert on_broker(broker, driver) == ["in/0", "in/1", "in/2"]
    assert not broker.violations


async def test_while_it_is_taken_for_refused_nothing_is_asked(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        for _ in range(5):
            with pytest.raises(SubscribeError):
                await driver.subscribe(FORBIDDEN + "a", ignore)
        assert broken(driver) == (1, 2)


async def test_what_is_forbidden_later_is_degraded_and_comes_back(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        subscriptions = [await driver.subscribe(name, ignore) for name in ("in", FORBIDDEN + "a", "other")]
        broker.options.acl = allowed
        await lose_link(broker, driver)
        assert broken(driver) == (1, 5)  # two more until a packet has one filter
        degraded = subscriptions[1]
        assert degraded.degraded is ReasonCode.UNSPECIFIED_ERROR
        assert driver.status().degraded == (
            (FORBIDDEN + "a", "unspecified error (0x80): 3 connections ended over it"),
        )
        assert on_broker(broker, driver) == ["in", "other"]
        await trio.sleep(11 * MINUTE)  # a try in vain costs the link, once
        assert (driver.state, broken(driver)) == (State.LIVE, (2, 5))
        assert driver.status().degraded == (
            (FORBIDDEN + "a", "unspecified error (0x80): 4 connections ended over it"),
        )
        await trio.sleep(8 * MINUTE)
        broker.options.acl = None
        assert degraded.degraded is not None
        await trio.sleep(12 * MINUTE)
        assert subscriptions[1].degraded is None
        assert (driver.status().degraded, broken(driver)) == ((), (2, 5))
        assert on_broker(broker, driver) == [FORBIDDEN + "a", "in", "other"]
        await lose_link(broker, driver)
        assert on_broker(broker, driver) == [FORBIDDEN + "a", "in", "other"]
    assert not broker.violations


async def test_what_has_come_back_is_unsubscribed(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        subscription = await driver.subscribe(FORBIDDEN + "a", ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        broker.options.acl = None
        await trio.sleep(11 * MINUTE)
        assert on_broker(broker, driver) == [FORBIDDEN + "a", "in"]
        await driver.unsubscribe(subscription)
        assert on_broker(broker, driver) == ["in"]


async def test_a_replay_tries_as_well(autojump_clock: MockClock, broker: MemoryBroker, protocol: Any) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for name in ("in", FORBIDDEN + "a", FORBIDDEN + "b"):
            await driver.subscribe(name, ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        assert [name for name, _ in driver.status().degraded] == [FORBIDDEN + "a", FORBIDDEN + "b"]
        broker.options.acl = None
        broker.down = True
        broker.drop()
        await trio.sleep(20 * MINUTE)
        broker.down = False
        await driver.wait_live()
        await trio.testing.wait_all_tasks_blocked()  # the second one is tried when the first one has worked
        assert (driver.status().degraded, on_broker(broker, driver)) == ((), [FORBIDDEN + "a", FORBIDDEN + "b", "in"])
    assert not broker.violations


async def test_several_are_told_apart_from_many(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    names = [f"in/{number}" if number % 7 else f"{FORBIDDEN}{number}" for number in range(30)]
    good = sorted(name for name in names if not name.startswith(FORBIDDEN))
    refusals: list[str] = []

    async def subscribe(driver: MQTTDriver, name: str) -> None:
        try:
            await driver.subscribe(name, ignore)
        except SubscribeError as exc:
            refusals.append(exc.topic_filter)

    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(subscribe, driver, name)
        assert sorted(refusals) == sorted(set(names) - set(good))
        await driver.wait_live()
        assert on_broker(broker, driver) == good
        before = broken(driver)
        await lose_link(broker, driver)
        assert broken(driver) == (before[0] + 1, before[1])
    assert not broker.violations


async def test_whatever_their_number_no_two_links_are_put_at_stake_within_ten_minutes(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for name in ("in", *(f"{FORBIDDEN}{number}" for number in range(5))):
            await driver.subscribe(name, ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        assert len(driver.status().degraded) == 5
        lost: list[float] = []
        driver.register_connection_callback(lambda up: None if up else lost.append(trio.current_time()))
        await trio.sleep(DAY)
        assert len(lost) == 5 * 7
        assert min(later - earlier for earlier, later in pairwise(lost)) > 599
        assert len(driver.status().degraded) == 5
        broker.options.acl = None
        await trio.sleep(DAY)
        assert (driver.status().degraded, len(lost)) == ((), 5 * 7)
        assert len(on_broker(broker, driver)) == 6
    assert not broker.violations


async def test_who_asks_again_and_again_does_not_cost_more(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        for _ in range(24 * 60):
            await refuse(driver, FORBIDDEN + "a")
            await trio.sleep(MINUTE)
        assert broken(driver) == (1 + 7, 2)
        broker.options.acl = None
        await trio.sleep(DAY)
        await driver.subscribe(FORBIDDEN + "a", ignore)
        assert on_broker(broker, driver) == [FORBIDDEN + "a", "in"]
        assert broken(driver) == (1 + 7, 2)
    assert not broker.violations


@pytest.mark.parametrize("stable", [False, True])
async def test_what_was_never_there_is_not_unsubscribed(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any, stable: bool
) -> None:
    """iotcore leaves that unanswered."""
    async with MQTTDriver(memory_config(broker, protocol=protocol, stable_id=stable)) as driver:
        await driver.subscribe("in", ignore)
        for _ in range(3):
            await refuse(driver, FORBIDDEN + "a")
            await driver.wait_live()
        assert not any(isinstance(packet, Unsubscribe) for _, packet in broker.received)


@pytest.mark.parametrize("stable", [False, True])
async def test_what_is_there_is_unsubscribed(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any, stable: bool
) -> None:
    """In a session that goes on the broker may have what it will not hear of any more."""
    config = memory_config(broker, protocol=protocol, stable_id=stable, quarantine_after=3)
    broker.options.acl = None
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", ignore)
        subscription = await driver.subscribe(FORBIDDEN + "a", ignore)
        broker.options.acl = allowed
        with pytest.raises(SubscribeError):
            await driver.subscribe(FORBIDDEN + "a", ignore)  # asked for again, for the retained messages
        await driver.wait_live()
        assert on_broker(broker, driver) == ([FORBIDDEN + "a", "in"] if stable else ["in"])
        broker.forget()
        await driver.unsubscribe(subscription)
        await trio.testing.wait_all_tasks_blocked()
        assert on_broker(broker, driver) == ["in"]
        assert any(isinstance(packet, Unsubscribe) for _, packet in broker.received) is stable
    assert not broker.violations


@pytest.mark.parametrize("lost, tried", [(1, False), (2, False), (2, True)])
async def test_what_only_an_earlier_session_had_is_not_unsubscribed(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any, lost: int, tried: bool
) -> None:
    config = memory_config(broker, protocol=protocol, stable_id=True, quarantine_after=3)
    broker.options.acl = None
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", ignore)
        subscription = await driver.subscribe(FORBIDDEN + "a", ignore)
        broker.options.acl = allowed
        for _ in range(lost):
            broker.restart(keep_sessions=False)
            await driver.wait_state(State.BACKING_OFF, State.PAUSED)
            await driver.wait_live()
        if tried:
            await trio.sleep(11 * MINUTE)
            assert broken(driver)[0] == lost + 1
        await driver.unsubscribe(subscription)
        assert not any(isinstance(packet, Unsubscribe) for _, packet in broker.received)


async def test_a_wish_for_more_that_is_taken_back_is_not_what_is_tried(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    """Somebody asks for a filter with QoS 2, over which the broker ends connections, and loses patience."""
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        subscription = await driver.subscribe("a", ignore, qos=1)
        rule = broker.faults.cut(Kind.SUBSCRIBE, times=1, direction=Direction.IN, before=True)
        with trio.move_on_after(0.001):
            await driver.subscribe("a", ignore, qos=2)
        rule.remove()
        await driver.wait_live()
        assert subscription.degraded is None
        assert broker.subscriptions(str(driver.client_id))["a"].qos == 1


@pytest.mark.parametrize("after, ends", [(0, math.inf), (1, 3), (4, 4)])
async def test_an_unsubscribe_that_is_never_answered_is_given_up(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any, after: int, ends: float
) -> None:
    config = memory_config(broker, protocol=protocol, stable_id=True, quarantine_after=after)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", ignore)
        subscription = await driver.subscribe("out", ignore)
        broker.faults.drop(Kind.UNSUBACK, times=None)
        with trio.move_on_after(3600) as patience:
            with pytest.raises(UnsubscribeError, match=r"'out': unspecified error \(0x80\)"):
                await driver.unsubscribe(subscription)
            await driver.wait_live()
            assert sum(isinstance(packet, Unsubscribe) for _, packet in broker.received) == ends
        assert patience.cancelled_caught is (after == 0)


async def test_a_question_is_not_asked_again_on_a_live_link(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    broker.options.acl = lambda access: not access.topic.endswith(("/copies", "/+"))
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.subscribe("in/a", ignore)
        await driver.subscribe("in/#", ignore)
        await driver.wait_live()
        assert broken(driver) == (1, 2)
        for number in range(5):
            await trio.sleep(3600)
            await driver.subscribe(f"other/{number}", ignore)
        assert broken(driver) == (1, 2)


async def test_an_unsubscribe_that_nobody_waits_for_does_not_stand_in_the_way(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.subscribe("in/a", ignore)
        for name in ("copies", "+"):
            broker.faults.refuse_subscribe(f"trio_mqtt_driver/probe/{driver.client_id}/{name}", 0x80)
        broker.faults.drop(Kind.UNSUBACK, times=4)
        await driver.subscribe("in/#", ignore)
        assert (said(driver), broken(driver)) == ([], (0, 0))
        await refuse(driver, FORBIDDEN + "a")
        assert broken(driver) == (1, 2)


async def test_filters_that_are_too_much_together_cost_an_attempt_an_hour(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """There are as many short ones in a packet as long ones, so it is not their number. 3.1.1 can announce nothing."""
    broker = MemoryBroker(nursery, maximum_packet_size=1000)
    async with MQTTDriver(memory_config(broker, protocol="3.1.1", replay_batch=20)) as driver:
        for length in (0, 100):
            async with trio.open_nursery() as subscribing:
                for number in range(20):
                    subscribing.start_soon(driver.subscribe, f"{number:02}{length * 'x'}", ignore)
        failures = []
        for _ in range(4):
            for _ in range(5):
                await lose_link(broker, driver)
                assert len(on_broker(broker, driver)) == 40
            failures.append(broken(driver)[1])
            await trio.sleep(3601)
        assert failures == [0, 1, 2, 3]


async def test_the_only_subscription_takes_longer(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol, quarantine_after=6)) as driver:
        with pytest.raises(SubscribeError, match="6 connections ended over it"):
            await driver.subscribe(FORBIDDEN + "a", ignore)
        assert broken(driver) == (1, 5)


async def test_it_can_be_switched_off(autojump_clock: MockClock, broker: MemoryBroker, protocol: Any) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol, quarantine_after=0)) as driver:
        await driver.subscribe("in", ignore)
        with trio.move_on_after(3600):
            await driver.subscribe(FORBIDDEN + "a", ignore)
        assert (said(driver), driver.state) == ([], State.PAUSED)
        assert driver.generation == 1


@pytest.mark.parametrize("times", [1, 2])
async def test_an_outage_at_that_moment_costs_no_subscription(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any, times: int
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        broker.faults.cut(Kind.SUBSCRIBE, times=times, direction=Direction.IN, before=True)
        await driver.subscribe("also", ignore)
        assert (len(said(driver)), driver.status().degraded) == (times, ())
        await lose_link(broker, driver)
        broker.forget()
        await lose_link(broker, driver)
        assert sum(isinstance(packet, Subscribe) for _, packet in broker.received) == 1  # together again
        assert on_broker(broker, driver) == ["also", "in"]


async def test_a_broker_that_is_out_of_order_for_a_while(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    """It closes over every SUBSCRIBE. Some time after that everything is as it was, without anybody's doing."""
    broker.options.acl = None
    names = [f"in/{number}" for number in range(5)]
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for name in names:
            await driver.subscribe(name, ignore)
        broker.options.acl = lambda access: access.action == "publish"
        broker.drop()
        await trio.sleep(2 * 3600)
        broker.options.acl = None
        await trio.sleep(3 * 3600)
        assert driver.state is State.LIVE
        assert (driver.status().degraded, on_broker(broker, driver)) == ((), names)


async def test_a_request_that_has_not_left_accuses_nobody(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        connection = driver._supervisor.connection
        assert connection is not None
        held = connection._writer.hold()
        assert held
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.subscribe, "also", ignore)
            await trio.testing.wait_all_tasks_blocked()
            assert connection.requests
            broker.drop()
        assert said(driver) == []


@pytest.mark.parametrize("protocol", ["3.1.1"])
async def test_the_question_about_copies_is_not_asked_for_ever(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    broker.options.acl = lambda access: not access.topic.endswith(("/copies", "/+"))
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in/a", ignore)
        await driver.subscribe("in/#", ignore)
        assert broken(driver) == (1, 2)
        assert all("over the question about overlapping filters" in text for text in said(driver))
        assert on_broker(broker, driver) == ["in/#", "in/a"]
        await lose_link(broker, driver)
        assert broken(driver) == (2, 2)
        await trio.sleep(11 * MINUTE)
        assert broken(driver) == (2, 2)
        await lose_link(broker, driver)  # asked again
        assert broken(driver) == (3, 3)
        forbidding, broker.options.acl = broker.options.acl, None
        await trio.sleep(30 * MINUTE)
        await lose_link(broker, driver)
        assert broken(driver) == (4, 3)
        assert on_broker(broker, driver) == ["in/#", "in/a"]
        broker.options.acl = forbidding  # all over again
        await lose_link(broker, driver)
        assert broken(driver) == (5, 6)
        driver.apply_settings(driver.config)
        await driver.wait_live()
        assert broken(driver) == (5, 9)


@pytest.mark.parametrize("stable", [False, True])
async def test_what_was_not_asked_about_copies_is_asked_on_a_later_connection(
    autojump_clock: MockClock, nursery: trio.Nursery, stable: bool
) -> None:
    broker = MemoryBroker(nursery, overlapping="copies")
    seen: list[bytes] = []
    async with MQTTDriver(memory_config(broker, protocol="3.1.1", stable_id=stable)) as driver:
        await driver.subscribe("in/a", lambda message: seen.append(message.payload))
        broker.faults.cut(Kind.SUBSCRIBE, times=3, direction=Direction.IN, before=True)
        await driver.subscribe("in/#", ignore)
        assert "is taken for refused" in said(driver)[-1]
        await trio.sleep(11 * MINUTE)
        await lose_link(broker, driver)
        await driver.publish("in/a", b"once", qos=1)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [b"once"]


async def test_a_question_that_nobody_answers_accuses_nobody_later(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.subscribe("in/a", ignore)
        broker.faults.drop(Kind.SUBACK, times=2)
        await driver.subscribe("in/#", ignore)
        assert (said(driver), broken(driver)) == ([], (0, 0))
        await refuse(driver, FORBIDDEN + "a")
        assert broken(driver) == (1, 2)
        assert all("over the SUBSCRIBE of 'forbidden/a'" in text for text in said(driver))


async def test_options_that_switch_it_off_hold_for_what_was_learnt(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    after = 3

    async def options(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(quarantine_after=after)

    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol, options_factory=options)) as driver:
        await driver.subscribe("in", ignore)
        await driver.subscribe(FORBIDDEN + "a", ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        assert len(driver.status().degraded) == 1
        broker.options.acl, after = None, 0
        await lose_link(broker, driver)
        assert driver.status().degraded == ()


@pytest.mark.parametrize("protocol", ["3.1.1"])
async def test_once_it_is_answered_it_is_not_to_blame(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in/a", ignore)
        await driver.subscribe("in/#", ignore)
        with pytest.raises(SubscribeError, match="3 connections ended over it"):
            await driver.subscribe(FORBIDDEN + "a", ignore)


async def test_when_the_guilty_one_is_found_the_others_are_together_again(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(driver.subscribe, f"in/{number}", ignore)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.subscribe, "in/x", ignore)
            nursery.start_soon(refuse, driver, FORBIDDEN + "a")
            nursery.start_soon(driver.subscribe, "in/y", ignore)
        assert "over a SUBSCRIBE of 3 filters, it seems: each has a packet of its own now" in said(driver)[0]
        broker.forget()
        await lose_link(broker, driver)
        assert sum(isinstance(packet, Subscribe) for _, packet in broker.received) == 3
        await trio.sleep(3600)
        for expected in (3, 1):
            broker.forget()
            await lose_link(broker, driver)
            assert sum(isinstance(packet, Subscribe) for _, packet in broker.received) == expected


async def test_it_is_not_the_number_of_what_stands_behind(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker)) as driver:
        for number in range(3):  # with properties of their own, and so in packets of their own
            await driver.subscribe(f"{FORBIDDEN}{number}", ignore, user_properties=(("number", str(number)),))
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(driver.subscribe, f"in/{number}", ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        assert [event.text for event in driver.status().history if event.kind == "downgrade"] == []
        assert len(driver.status().degraded) == 3
        broker.forget()
        await lose_link(broker, driver)
        assert sum(isinstance(packet, Subscribe) for _, packet in broker.received) == 1


async def test_what_the_broker_says_itself_is_said(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        await driver.subscribe(FORBIDDEN + "a", ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        broker.options.denied = "refuse"
        await trio.sleep(11 * MINUTE)
        code = "not authorized (0x87)" if protocol == "5" else "unspecified error (0x80)"
        assert driver.status().degraded == ((FORBIDDEN + "a", code),)
        assert broken(driver)[0] == 1


async def test_a_try_that_cannot_be_made_is_none(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("in", ignore)
        await driver.subscribe(FORBIDDEN + "#", ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        broker.options.wildcard_available = False
        await lose_link(broker, driver)
        await trio.sleep(DAY)
        assert broken(driver)[0] == 2
        assert driver.status().degraded == ((FORBIDDEN + "#", "wildcard subscriptions not supported (0xa2)"),)


async def test_a_link_that_goes_silent_accuses_nobody(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    options = {"keep_alive": 5, "ping_timeout": 5, "subscribe_timeout": 60, "protocol": protocol}
    async with MQTTDriver(memory_config(broker, **options)) as driver:
        await driver.subscribe("in", ignore)
        broker.silence()
        await driver.subscribe("also", ignore)
        assert "KeepAliveError" in str(driver.status().last_error)
        assert said(driver) == []


async def test_new_settings_begin_anew(autojump_clock: MockClock, broker: MemoryBroker, protocol: Any) -> None:
    broker.options.acl = None
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", ignore)
        await driver.subscribe(FORBIDDEN + "a", ignore)
        broker.options.acl = allowed
        await lose_link(broker, driver)
        assert len(driver.status().degraded) == 1
        broker.options.acl = None
        config = driver.config
        assert isinstance(config, DriverConfig)
        driver.apply_settings(config)
        await driver.wait_live()
        assert (driver.status().degraded, on_broker(broker, driver)) == ((), [FORBIDDEN + "a", "in"])


async def test_a_forbidden_test_publish_is_named(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: Any
) -> None:
    broker.options.acl = lambda _access: False
    async with MQTTDriver(memory_config(broker, protocol=protocol), start="background") as driver:
        await driver.wait_state(State.BACKING_OFF)
        assert "closed the connection before the test publish to 'trio_mqtt_driver/probe/driver_" in str(
            driver.status().last_error
        )
        assert "if it always does, allow it in the broker's access list" in str(driver.status().last_error)
        broker.options.acl = None
        await driver.wait_live()
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        assert "test publish" not in str(driver.status().last_error)
