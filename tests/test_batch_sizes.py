"""Brokers that end connections over many filters in a packet, and say so nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver, State
from trio_mqtt_driver._batch_sizes import BatchSizes
from trio_mqtt_driver.testing import Kind, MemoryBroker, Subscribe, Unsubscribe

HERE, THERE = (DriverConfig(endpoint=Endpoint(host=host, port=1883)) for host in ("here", "there"))


# -- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes() -> BatchSizes:
    return BatchSizes()


def lost(
    sizes: BatchSizes,
    unanswered: int,
    config: DriverConfig = HERE,
    answered: int = 1,
    by_broker: bool = True,
    now: float = 0,
) -> int | None:
    return sizes.ended(config, now, unanswered, answered, by_broker=by_broker)


def size(sizes: BatchSizes, now: float = 0, config: DriverConfig = HERE) -> int:
    """How many filters a replay has in a packet."""
    return sizes.applied(config, now)[1]


def test_without_a_reason_the_options_hold(sizes: BatchSizes) -> None:
    assert sizes.applied(HERE, 0) == (HERE, 500)
    assert lost(sizes, 500) is None
    assert sizes.applied(HERE, 0) == (HERE, 500)


def test_two_ends_over_a_request_make_it_an_eighth(sizes: BatchSizes) -> None:
    found = [lost(sizes, unanswered) for unanswered in (500, 500, 62, 62, 7, 7)]
    assert found == [None, 62, None, 7, None, 1]
    assert sizes.applied(HERE, 0) == (HERE.evolve(replay_batch=1), 1)
    assert lost(sizes, 1) is lost(sizes, 1) is None  # then it is not their number


def test_as_many_that_were_answered_in_between_say_that_the_number_is_right(sizes: BatchSizes) -> None:
    assert lost(sizes, 500) is None
    assert lost(sizes, 0, answered=500) is None
    assert lost(sizes, 500) is None
    assert lost(sizes, 0, answered=499) is None
    assert lost(sizes, 500) == 62


def test_as_many_that_were_answered_before_are_not_the_reason(sizes: BatchSizes) -> None:
    assert [lost(sizes, 20, answered=answered) for answered in (20, 20, 21, 20)] == [None] * 4
    assert [lost(sizes, 20, answered=19) for _ in range(2)] == [None, 2]


def test_the_least_that_was_not_answered_must_be(sizes: BatchSizes) -> None:
    assert lost(sizes, 20) is None
    assert lost(sizes, 0, answered=20) is None
    assert lost(sizes, 30) is None
    assert lost(sizes, 0, answered=29) is None
    assert lost(sizes, 400) == 50


def test_an_attempt_that_came_to_no_request_says_nothing(sizes: BatchSizes) -> None:
    assert lost(sizes, 500) is None
    assert lost(sizes, 0) is None
    assert lost(sizes, 500) == 62


def test_what_is_not_the_brokers_doing_says_nothing(sizes: BatchSizes) -> None:
    assert lost(sizes, 500, by_broker=False) is lost(sizes, 500, by_broker=False) is None
    assert sizes.applied(HERE, 0) == (HERE, 500)


def test_each_endpoint_for_itself(sizes: BatchSizes) -> None:
    assert lost(sizes, 500) is None
    assert lost(sizes, 500, THERE) is None
    assert lost(sizes, 500) == 62
    assert sizes.applied(THERE, 0) == (THERE, 500)
    assert size(sizes, config=HERE.evolve(replay_batch=8)) == 8  # fewer than it would take
    sizes.forget()
    assert sizes.applied(HERE, 0) == (HERE, 500)


HOUR = 3600


def learnt(unanswered: int, now: float = 0) -> BatchSizes:
    sizes = BatchSizes()
    lost(sizes, unanswered, now=now)
    lost(sizes, unanswered, now=now)
    return sizes


def test_after_an_hour_eight_times_as_many_are_tried() -> None:
    sizes = learnt(500, 5 * HOUR)
    assert [size(sizes, now) for now in (5 * HOUR, 6 * HOUR - 1, 6 * HOUR, 10 * HOUR)] == [62, 62, 496, 496]
    assert sizes.applied(HERE, 10 * HOUR)[0] == HERE.evolve(replay_batch=62)  # for the link that is live
    assert lost(sizes, 0, answered=496, now=10 * HOUR) is None
    assert [size(sizes, now) for now in (11 * HOUR - 1, 11 * HOUR)] == [496, 500]


def test_as_many_as_were_not_answered_say_that_it_was_the_network() -> None:
    sizes = learnt(100)
    lost(sizes, 0, answered=96, now=HOUR)
    assert size(sizes, 2 * HOUR - 1) == 96
    lost(sizes, 0, answered=100, now=2 * HOUR)
    assert sizes.applied(HERE, 2 * HOUR) == (HERE, 500)
    assert [lost(sizes, 300, answered=0, now=3 * HOUR) for _ in range(2)] == [None, 37]  # two ends again


def test_the_least_that_a_try_left_unanswered_counts() -> None:
    sizes = learnt(500)
    lost(sizes, 300, now=HOUR)
    lost(sizes, 0, answered=299, now=3 * HOUR)
    assert size(sizes, 4 * HOUR - 1) == 299
    lost(sizes, 400, now=4 * HOUR)
    lost(sizes, 0, answered=300, now=9 * HOUR)
    assert sizes.applied(HERE, 9 * HOUR) == (HERE, 500)


def test_a_try_that_fails_is_one_and_the_next_is_later() -> None:
    sizes = learnt(64)
    now, holds = 0, []
    for _ in range(10):
        hold = next(hours for hours in range(1, 1000) if size(sizes, now + hours * HOUR) == 64)
        assert size(sizes, now + hold * HOUR - 1) == 8
        holds.append(hold)
        now += hold * HOUR
        assert lost(sizes, 64, now=now) == 8
    assert holds == [1, 2, 4, 8, 16, 32, 64, 128, 168, 168]  # a week at most
    assert lost(sizes, 8, answered=8, now=now) is None
    assert lost(sizes, 8, now=now) is None
    assert lost(sizes, 8, now=now) == 1  # less is still found out as before
    assert size(sizes, now + HOUR) == 8


def test_a_try_that_works_begins_with_an_hour_again() -> None:
    sizes = learnt(64)
    lost(sizes, 64, now=HOUR)
    assert lost(sizes, 0, answered=60, now=3 * HOUR) is None
    assert [size(sizes, now) for now in (4 * HOUR - 1, 4 * HOUR)] == [60, 480]
    assert lost(sizes, 64, now=4 * HOUR) == 60
    assert [size(sizes, now) for now in (6 * HOUR - 1, 6 * HOUR)] == [60, 480]


@pytest.mark.parametrize("unanswered, answered, by_broker", [(0, 0, True), (8, 8, True), (64, 8, False)])
def test_a_try_goes_on_until_something_is_known(unanswered: int, answered: int, by_broker: bool) -> None:
    sizes = learnt(64)
    assert lost(sizes, unanswered, answered=answered, by_broker=by_broker, now=HOUR) is None
    assert size(sizes, HOUR) == 64


def test_ever_new_endpoints_are_forgotten_some_time(sizes: BatchSizes) -> None:
    lost(sizes, 500)
    lost(sizes, 500)
    for number in range(999):
        assert size(sizes) == 62
        lost(sizes, 500, HERE.evolve(endpoint=Endpoint(host=f"h{number}", port=1)))
    lost(sizes, 500, THERE)
    assert sizes.applied(HERE, 0) == (HERE, 500)


# -- a driver ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> Any:
    return request.param


def largest(broker: MemoryBroker) -> int:
    """How many filters the largest SUBSCRIBE has that came since ``broker.forget``."""
    return max(len(packet.requests) for _, packet in broker.received if isinstance(packet, Subscribe))


async def subscribe_all(driver: MQTTDriver, filters: list[str]) -> None:
    async with trio.open_nursery() as nursery:
        for topic_filter in filters:
            nursery.start_soon(driver.subscribe, topic_filter, print)


async def test_a_broker_that_takes_few_filters_has_all_of_them_in_the_end(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    filters = [f"in/{number}" for number in range(100)]
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        with trio.fail_after(60):
            await subscribe_all(driver, filters)
        assert sorted(broker.subscriptions(str(driver.client_id))) == sorted(filters)
        said = [event.text for event in driver.status().history if event.kind == "downgrade"]
        assert [text.rsplit(": ", 1)[1] for text in said] == ["for now they have 12", "for now they have 1"]
        assert "of 100 filters unanswered, and not for the first time" in said[0]
        # What was learnt is not learnt again.
        generation = driver.generation
        broker.forget()
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        assert driver.generation == generation + 1
        assert largest(broker) == 1
        assert driver.status().counters["failures"] == 3
        assert sorted(broker.subscriptions(str(driver.client_id))) == sorted(filters)
    assert not broker.violations


async def test_packets_grow_to_what_a_broker_takes(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    filters = [f"in/{number}" for number in range(100)]

    async def cut(driver: MQTTDriver) -> None:
        broker.forget()
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        assert sorted(broker.subscriptions(str(driver.client_id))) == sorted(filters)

    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await subscribe_all(driver, filters)
        found: list[tuple[int, int]] = []
        for hours in (0, 1, 1, 1, 1, 1, 1):
            await trio.sleep(hours * 3600)
            failures = driver.status().counters["failures"]
            await cut(driver)
            found.append((largest(broker), driver.status().counters["failures"] - failures))
        # That 8 are taken counts when the link ends. Then 64 are tried in vain, and two hours later again.
        assert found == [(1, 0), (8, 0), (8, 0), (64, 1), (8, 0), (64, 1), (8, 0)]
    assert not broker.violations


async def test_no_live_link_is_put_at_stake_for_a_try(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await subscribe_all(driver, [f"in/{number}" for number in range(64)])
        for number in range(5, 64):
            await driver.unsubscribe(f"in/{number}")
        losses, failures = driver.status().counters["losses"], driver.status().counters["failures"]
        for _ in range(3):
            await trio.sleep(3600)
            broker.drop()  # now 64 are tried, but there are only five
            await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
            await trio.sleep(600)
            more = [f"more/{number}" for number in range(20)]
            await subscribe_all(driver, more)
            async with trio.open_nursery() as unsubscribing:
                for topic_filter in more:
                    unsubscribing.start_soon(driver.unsubscribe, topic_filter)
        assert driver.status().counters["losses"] - losses == 3  # ours
        assert driver.status().counters["failures"] == failures
    assert not broker.violations


async def test_what_a_replay_has_shown_holds_for_the_live_link(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        filters = [f"in/{number}" for number in range(100)]
        broker.faults.drop(Kind.SUBACK, times=2)
        await subscribe_all(driver, filters)
        # What a link has shown counts for the others when it is over; 100, as many as were not answered, say that the
        # number was not the reason.
        for expected in (12, 96, 96, 100, 500):
            broker.drop()
            await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
            broker.forget()
            more = [f"more/{number}" for number in range(600)]
            await subscribe_all(driver, more)
            assert largest(broker) == expected
            for topic_filter in more:
                await driver.unsubscribe(topic_filter)
            await trio.sleep(3600)


async def test_many_more_on_a_live_link(autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for number in range(8):
            await driver.subscribe(f"early/{number}", print)
        with trio.fail_after(60):
            await subscribe_all(driver, [f"late/{number}" for number in range(12)])
        assert driver.generation == 2
        assert len(broker.subscriptions(str(driver.client_id))) == 20
        assert driver.status().counters["failures"] == 1


async def test_a_broker_that_only_leaves_them_unanswered(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        broker.faults.drop(Kind.SUBACK, times=2)
        await subscribe_all(driver, [f"in/{number}" for number in range(100)])
        assert driver.status().counters["failures"] == 1
        broker.forget()
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        assert largest(broker) == 12


async def test_who_gives_up_before_the_link_is_back_gets_there_too(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    """Each link is live in between, and answers the little that it replays."""
    broker = MemoryBroker(nursery, maximum_filters=8)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for _ in range(3):
            with trio.move_on_after(0.01):  # shorter than any back-off
                await subscribe_all(driver, [f"in/{number}" for number in range(20)])
            await trio.sleep(100)
            if len(broker.subscriptions(str(driver.client_id))) == 20:
                break
        assert driver.status().counters["losses"] == 2


async def test_many_that_leave_a_live_link_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for _ in range(4):
            filters = [f"in/{number}" for number in range(20)]
            for topic_filter in filters:
                await driver.subscribe(topic_filter, print)
            async with trio.open_nursery() as unsubscribing:
                for topic_filter in filters:
                    unsubscribing.start_soon(driver.unsubscribe, topic_filter)
            await trio.sleep(100)
        assert driver.status().counters["losses"] == 2


async def test_a_broker_that_takes_one_filter_is_asked_whether_it_sends_copies_too(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery, maximum_filters=1, identifiers_available=False)
    async with MQTTDriver(memory_config(broker, protocol=protocol, replay_batch=1)) as driver:
        for topic_filter in ("a/#", "a/+"):
            await driver.subscribe(topic_filter, print)
        assert driver.status().counters["losses"] == 0
        assert not [event for event in driver.status().history if event.kind == "downgrade"]


async def test_one_end_in_a_replay_is_the_networks_doing(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await subscribe_all(driver, [f"in/{number}" for number in range(100)])
        for _ in range(3):
            await trio.sleep(100)
            broker.faults.cut(Kind.SUBSCRIBE, times=1, before=True)
            broker.drop()
            await driver.wait_state(State.REPLAYING)
            await driver.wait_live()
        assert driver.status().counters["failures"] == 3
        assert largest(broker) == 100
        assert not [event for event in driver.status().history if event.kind == "downgrade"]


async def test_other_settings_begin_anew(autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    config = memory_config(broker, protocol=protocol)
    async with MQTTDriver(config) as driver:
        await subscribe_all(driver, [f"in/{number}" for number in range(20)])
        assert largest(broker) == 20
        broker.options.maximum_filters = None
        broker.forget()
        driver.apply_settings(config.evolve(replay_batch=19))
        await driver.wait_live()
        assert largest(broker) == 19


async def test_what_leaves_a_session_that_lasts_leaves_in_small_packets_too(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: Any
) -> None:
    broker = MemoryBroker(nursery, maximum_filters=8)
    config = memory_config(broker, protocol=protocol, stable_id=True, replay_batch=8)
    async with MQTTDriver(config) as driver:
        subscriptions = [await driver.subscribe(f"in/{number}", print) for number in range(20)]
        driver.apply_settings(config.evolve(replay_batch=500))
        await driver.wait_live()
        with trio.fail_after(60):
            async with trio.open_nursery() as unsubscribing:
                for subscription in subscriptions:
                    unsubscribing.start_soon(driver.unsubscribe, subscription)
        assert not broker.subscriptions("driver")
        assert max(len(packet.topic_filters) for _, packet in broker.received if isinstance(packet, Unsubscribe)) == 20
    assert not broker.violations
