"""Overlapping filters on brokers that send a copy per matching filter, marked or not [MQTT-3.3.5-1]."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver
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
        hands[dealer.deal(Message("t", payload.encode()), range(size))][payload] += 1
    assert all(hand == Counter(sent) for hand in hands)


def test_the_dealer_remembers_a_bounded_number_of_messages() -> None:
    dealer = CopyDealer()
    for number in range(5000):
        assert dealer.deal(Message("t", b"%d" % number), "AB") == "A"
    assert dealer.deal(Message("t", b"4999"), "AB") == "B"
    assert dealer.deal(Message("t", b"0"), "AB") == "A"
