"""Overlapping filters on brokers that send a copy per matching filter, marked or not [MQTT-3.3.5-1]."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, Overflow
from trio_mqtt_driver._copies import CopyDealer
from trio_mqtt_driver.testing import MemoryBroker, Subscribe

settled = trio.testing.wait_all_tasks_blocked

FILTERS = ("a/#", "a/+", "+/b", "a/b", "other/x")


def overlap_tests(broker: MemoryBroker) -> int:
    """How often the broker was asked whether it sends copies."""
    return sum(
        any(request.topic_filter.endswith("/copies") for request in packet.requests)
        for _, packet in broker.received
        if isinstance(packet, Subscribe)
    )


@pytest.mark.parametrize("overlapping", ["once", "copies"])
@pytest.mark.parametrize(
    "version, identifiers", [("5", True), ("5", False), ("3.1.1", True)], ids=["5", "5-unmarked", "3.1.1"]
)
async def test_each_subscription_gets_a_message_once(
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
    overlapping: Literal["once", "copies"],
    version: str,
    identifiers: bool,
) -> None:
    broker = MemoryBroker(nursery, overlapping=overlapping, identifiers_available=identifiers)
    received: dict[str, list[Message[bytes]]] = {topic_filter: [] for topic_filter in FILTERS}
    async with MQTTDriver(memory_config(broker, protocol=version)) as driver:
        for topic_filter in FILTERS:
            await driver.subscribe(topic_filter, received[topic_filter].append, qos=1)
        for generation in (1, 2):
            for qos in (0, 1, 2):
                await driver.publish("a/b", f"{generation}-{qos}", qos=qos)
                await driver.publish("a/b", "always the same", qos=qos)
            await settled()
            for topic_filter in FILTERS[:4]:
                payloads = Counter(message.payload for message in received[topic_filter])
                assert payloads[b"always the same"] == 3 * generation, topic_filter
                assert all(payloads[f"{generation}-{qos}".encode()] == 1 for qos in (0, 1, 2)), topic_filter
            broker.drop()
            await trio.sleep(60)
            await driver.wait_live()
    assert not received["other/x"]
    assert not broker.violations
    assert overlap_tests(broker) == (0 if version == "5" and identifiers else 3)  # once per generation


async def test_a_broker_is_not_asked_while_no_filters_overlap(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        for topic_filter in ("a/+", "b/+", "c"):
            await driver.subscribe(topic_filter, print)
        assert overlap_tests(broker) == 0


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "unanswered"])
async def test_a_broker_that_does_not_let_us_ask_is_taken_to_send_one_copy(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, silent: bool
) -> None:
    broker = MemoryBroker(nursery)
    received: list[Message[bytes]] = []
    if silent:
        broker.faults.refuse_publish("trio_mqtt_driver/probe/+/copies")
    else:
        broker.faults.refuse_subscribe("trio_mqtt_driver/probe/#")
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.subscribe("a/+", received.append)
        await driver.subscribe("a/#", received.append)
        await driver.publish("a/b", b"x")
        await settled()
        assert driver.generation == 1
    assert len(received) == 2


async def test_retained_messages_reach_a_later_overlapping_subscription(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Its retained message is the only copy: dealt out, it could go to the earlier subscription."""
    broker = MemoryBroker(nursery, overlapping="copies")
    broker.publish("a/b", b"kept", retain=True)
    first: list[Message[bytes]] = []
    second: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.subscribe("a/+", first.append)
        await driver.subscribe("a/#", second.append)
        await settled()
    assert b"kept" in [message.payload for message in first]
    assert b"kept" in [message.payload for message in second]


@given(st.lists(st.sampled_from("xyz"), max_size=30), st.integers(2, 5), st.randoms(use_true_random=False))
def test_copies_in_any_order_are_dealt_out_evenly(sent: list[str], size: int, rng: Any) -> None:
    """Each registration has a stream of its own, in order; the streams are mixed at random."""
    streams = [list(sent) for _ in range(size)]
    dealer = CopyDealer()
    hands: list[Counter[str]] = [Counter() for _ in range(size)]
    while remaining := [stream for stream in streams if stream]:
        payload = rng.choice(remaining).pop(0)
        hands[dealer.deal(Message("t", payload.encode()), dict.fromkeys(range(size), 0))][payload] += 1
    assert all(hand == Counter(sent) for hand in hands)


def test_the_dealer_remembers_a_bounded_number_of_messages() -> None:
    dealer, both = CopyDealer(), {"A": 0, "B": 0}
    for number in range(5000):
        assert dealer.deal(Message("t", b"%d" % number), both) == "A"
    assert dealer.deal(Message("t", b"4999"), both) == "B"
    assert dealer.deal(Message("t", b"0"), both) == "A"


@given(
    st.lists(st.sampled_from([0, 1, 2]), max_size=30),
    st.lists(st.sampled_from([0, 1, 2]), min_size=2, max_size=5),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_copies_are_for_those_whose_qos_they_have(sent: list[int], granted: list[int], away: bool, rng: Any) -> None:
    """While we are ``away`` the broker keeps no copy of QoS 0."""
    streams = [
        [(str(number), qos) for number, qos in enumerate(sent) if not away or min(qos, most)] for most in granted
    ]
    registrations = dict(enumerate(granted))
    dealer = CopyDealer()
    hands = [Counter[str]() for _ in granted]
    expected = [Counter(payload for payload, _ in stream) for stream in streams]
    while remaining := [number for number, stream in enumerate(streams) if stream]:
        number = rng.choice(remaining)
        payload, qos = streams[number].pop(0)
        copy: Message[bytes] = Message("t", payload.encode(), qos=min(qos, granted[number]))
        hands[dealer.deal(copy, registrations)][payload] += 1
    assert hands == expected


def test_a_filter_that_is_refused_gets_no_copies() -> None:
    dealer = CopyDealer()
    registrations = {"A": -1, "B": 0, "C": 1}
    dealt = [dealer.deal(Message("t", b"same", qos=qos), registrations) for qos in (0, 1, 0, 1)]
    assert dealt == ["B", "C", "B", "C"]


@pytest.mark.parametrize("overlapping", ["once", "copies"])
async def test_a_question_asked_while_reading_pauses_is_not_answered_wrongly(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, overlapping: Literal["once", "copies"]
) -> None:
    """The answer lies unread behind the messages of a full subscription: silence is no answer."""
    broker = MemoryBroker(nursery, overlapping=overlapping)
    release = trio.Event()
    received: dict[str, list[bytes]] = {"a/#": [], "a/b": []}

    async def slow(message: Message[bytes]) -> None:
        await release.wait()

    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver, trio.open_nursery() as subscribing:
        await driver.subscribe("z", slow, overflow=Overflow.BLOCK, queue_messages=1)
        for _ in range(3):
            broker.publish("z", b"x")
        await settled()

        async def subscribe(topic_filter: str) -> None:
            await driver.subscribe(topic_filter, lambda message: received[topic_filter].append(message.payload))

        for topic_filter in received:
            subscribing.start_soon(subscribe, topic_filter)
        await trio.sleep(60)
        release.set()
        await trio.sleep(60)
        for number in range(3):
            broker.publish("a/b", b"%d" % number)
        await settled()
        assert received == {"a/#": [b"0", b"1", b"2"], "a/b": [b"0", b"1", b"2"]}
        assert driver.generation == 1
    assert not broker.violations


@pytest.mark.parametrize("second", ["a/b", "$share/group/a/b", "+/b"])
@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_overlapping_filters_may_not_share_an_identifier_of_the_application(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, version: str, second: str
) -> None:
    """A copy with it could be for either."""
    broker = MemoryBroker(nursery, overlapping="copies")
    received: list[str] = []
    async with MQTTDriver(memory_config(broker, protocol=version)) as driver:
        first = await driver.subscribe("a/#", lambda _: received.append("a/#"), identifier=5000)
        with pytest.raises(ValueError, match="5000"):
            await driver.subscribe(second, print, identifier=5000)
        assert set(broker.subscriptions(driver.client_id or "")) == {"a/#"}
        await driver.subscribe("other", lambda _: received.append("other"), identifier=5000)
        await driver.subscribe("a/b", lambda _: received.append("a/b"), identifier=5001)
        await driver.publish("a/b")
        await driver.publish("other")
        await settled()
        assert sorted(received) == ["a/#", "a/b", "other"]
        await driver.unsubscribe(first)
        await driver.subscribe("a/+", print, identifier=5000)
