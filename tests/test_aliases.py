"""Topic aliases towards the broker: their table, and what the driver sends with them."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import example, given, strategies as st
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import MQTTDriver, ServerLimitError
from trio_mqtt_driver._aliases import TopicAliases
from trio_mqtt_driver.testing import Kind, MemoryBroker, Publish

# -- the table --------------------------------------------------------------------------------------------------------


def test_a_topic_is_written_once_and_its_alias_from_then_on() -> None:
    aliases = TopicAliases(2)
    assert aliases.take(b"topic/a") == (b"topic/a", 1)
    assert aliases.take(b"topic/a") == (b"", 1)
    assert aliases.take(b"topic/b") == (b"topic/b", 2)
    assert aliases.take(b"topic/b") == (b"", 2)
    assert aliases.take(b"topic/a") == (b"", 1)


def test_the_alias_least_recently_used_goes_to_a_new_topic() -> None:
    aliases = TopicAliases(2)
    aliases.take(b"topic/a")
    aliases.take(b"topic/b")
    aliases.take(b"topic/a")
    assert aliases.take(b"topic/c") == (b"topic/c", 2)
    assert aliases.take(b"topic/a") == (b"", 1)
    assert aliases.take(b"topic/b") == (b"topic/b", 2)
    assert aliases.take(b"topic/c") == (b"topic/c", 1)


@pytest.mark.parametrize("topic", [b"a", b"a/b"])
def test_a_topic_that_is_no_longer_than_an_alias_gets_none(topic: bytes) -> None:
    aliases = TopicAliases(2)
    assert [aliases.take(topic) for _ in range(2)] == [(topic, None)] * 2
    assert aliases.take(b"a/bc") == (b"a/bc", 1)


def test_without_room_for_topic_and_alias_none_is_set() -> None:
    aliases = TopicAliases(2)
    assert aliases.take(b"topic/a", room=False) == (b"topic/a", None)
    assert aliases.take(b"topic/a") == (b"topic/a", 1)
    assert aliases.take(b"topic/a", room=False) == (b"", 1)


def test_without_aliases_every_topic_is_written() -> None:
    aliases = TopicAliases(0)
    assert [aliases.take(b"topic/a") for _ in range(2)] == [(b"topic/a", None)] * 2


@given(
    maximum=st.integers(0, 5),
    topics=st.lists(st.integers(0, 8).map(lambda number: b"topic/%d" % number) | st.just(b"t"), max_size=60),
)
@example(maximum=1, topics=[b"topic/1", b"topic/2", b"topic/1"])
def test_whoever_follows_the_aliases_reads_the_same_topics(maximum: int, topics: list[bytes]) -> None:
    aliases = TopicAliases(maximum)
    known: dict[int, bytes] = {}
    recent: OrderedDict[bytes, None] = OrderedDict()
    for topic in topics:
        written, alias = aliases.take(topic)
        if alias is None:
            assert written == topic
            assert not maximum or topic == b"t"
            continue
        assert 1 <= alias <= maximum
        # The alias alone for exactly those topics that were used last.
        assert (written == b"") == (topic in list(recent)[-maximum:])
        recent[topic] = None
        recent.move_to_end(topic)
        if written:
            known[alias] = written
        assert known[alias] == topic


# -- what the driver sends --------------------------------------------------------------------------------------------


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def written(broker: MemoryBroker) -> list[tuple[str, Any]]:
    """Topic and alias of each PUBLISH, as they came over the wire."""
    packets = [packet for _, packet in broker.received if isinstance(packet, Publish)]
    return [(packet.topic, packet.properties.get("topic_alias")) for packet in packets]


def taken(broker: MemoryBroker) -> list[tuple[str, bytes]]:
    """Topic and payload of each message, as the broker understood them."""
    return [(one.topic, one.payload) for one in broker.published]


async def test_each_qos_uses_the_aliases_of_the_connection(broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, topic_aliases=10, probe="ping")) as driver:
        for qos in (0, 1, 2, 0):
            await driver.publish("topic/a", b"%d" % qos, qos=qos)
        await driver.publish("topic/b", b"b", qos=1, content_type="text/plain", user_properties=[("a", "b")])
        await driver.publish("topic/b", b"b", qos=1, message_expiry=60)
        await driver.publish("t", b"t", qos=1)
    assert written(broker) == [
        *(("topic/a", 1), ("", 1), ("", 1), ("", 1)),
        *(("topic/b", 2), ("", 2)),
        ("t", None),
    ]
    assert taken(broker) == [
        *(("topic/a", b"0"), ("topic/a", b"1"), ("topic/a", b"2"), ("topic/a", b"0")),
        *(("topic/b", b"b"), ("topic/b", b"b")),
        ("t", b"t"),
    ]
    first, second = (dict(one.properties) for one in list(broker.published)[4:6])
    assert first == {"content_type": "text/plain", "user_properties": (("a", "b"),), "topic_alias": 2}
    assert second == {"message_expiry": 60, "topic_alias": 2}
    assert not broker.violations


async def test_aliases_are_off_by_default(broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, probe="ping")) as driver:
        await driver.publish("topic/a", qos=1)
        await driver.publish("topic/a", qos=1)
    assert written(broker) == [("topic/a", None)] * 2


@pytest.mark.parametrize("ours, theirs", [(3, 100), (100, 3)])
async def test_more_topics_than_aliases_take_turns(
    autojump_clock: MockClock, nursery: trio.Nursery, ours: int, theirs: int
) -> None:
    broker = MemoryBroker(nursery, topic_alias_maximum=theirs)
    topics = [f"topic/{number % 5 if number % 3 else 0}" for number in range(60)]
    with trio.fail_after(5):  # a broker that is given more ends the connection each time
        async with MQTTDriver(memory_config(broker, topic_aliases=ours, probe="ping")) as driver:
            for number, topic in enumerate(topics):
                await driver.publish(topic, str(number), qos=number % 3)
    assert taken(broker) == [(topic, str(number).encode()) for number, topic in enumerate(topics)]
    assert {alias for _, alias in written(broker)} == {1, 2, 3}
    assert ("", 1) in written(broker)
    assert not broker.violations


async def test_a_broker_that_takes_none_gets_none(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, topic_alias_maximum=0)
    with trio.fail_after(5):
        async with MQTTDriver(memory_config(broker, topic_aliases=10, probe="ping")) as driver:
            await driver.publish("topic/a", qos=1)
            await driver.publish("topic/a", qos=1)
    assert {alias for _, alias in written(broker)} == {None}
    assert not broker.violations


async def test_3_1_1_has_no_aliases(broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, topic_aliases=10, protocol="3.1.1")) as driver:
        await driver.publish("topic/a", b"1", qos=1)
        await driver.publish("topic/a", b"2", qos=1)
    assert taken(broker)[-2:] == [("topic/a", b"1"), ("topic/a", b"2")]
    assert not broker.violations


@pytest.mark.parametrize("stable", [False, True])
async def test_a_new_connection_begins_with_no_aliases_also_for_what_is_sent_again(
    autojump_clock: MockClock, broker: MemoryBroker, stable: bool
) -> None:
    async with MQTTDriver(memory_config(broker, topic_aliases=10, stable_id=stable, probe="ping")) as driver:
        await driver.publish("topic/b", b"0", qos=1)
        await driver.publish("topic/a", b"1", qos=1)
        with broker.faults.drop(Kind.PUBACK), broker.faults.drop(Kind.PUBREC):
            receipts = [
                driver.publish_nowait("topic/a", b"2", qos=1),
                driver.publish_nowait("topic/a", b"3", qos=2),
                driver.publish_nowait("topic/b", b"4", qos=1),
            ]
            await trio.testing.wait_all_tasks_blocked()
        broker.restart()
        for receipt in receipts:
            assert (await receipt.wait()).attempts == 2
    assert written(broker) == [
        *(("topic/b", 1), ("topic/a", 2), ("", 2), ("", 2), ("", 1)),
        *(("topic/a", 1), ("", 1), ("topic/b", 2)),
    ]
    # A broker that kept the session knows the message of QoS 2 already.
    third = [] if stable else [("topic/a", b"3")]
    assert taken(broker)[5:] == [("topic/a", b"2"), *third, ("topic/b", b"4")]
    assert not broker.violations


@pytest.mark.parametrize("message_expiry", [None, 60])
async def test_a_message_that_the_broker_takes_without_an_alias_is_not_too_large_with_it(
    autojump_clock: MockClock, nursery: trio.Nursery, message_expiry: int | None
) -> None:
    """Of all sizes: the longest get no alias, and none is refused for having one."""
    broker = MemoryBroker(nursery, maximum_packet_size=200)
    accepted: list[list[int]] = []
    with trio.fail_after(5):
        for topic_aliases in (0, 200):
            sizes: list[int] = []
            config = memory_config(broker, topic_aliases=topic_aliases, probe="ping")
            async with MQTTDriver(config) as driver:
                for size in range(100, 200):
                    with suppress(ServerLimitError):
                        await driver.publish(f"topic/{size}", bytes(size), qos=1, message_expiry=message_expiry)
                        sizes.append(size)
            accepted.append(sizes)
    assert accepted[0] == accepted[1]
    assert {alias is None for _, alias in written(broker)[len(accepted[0]) :]} == {True, False}
    assert not broker.violations
