"""Which messages reach which subscriptions, in which form: by topic filter and by message class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs
import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, PayloadError, RetainHandling, State
from trio_mqtt_driver.testing import Kind, MemoryBroker, Publish, Subscribe, Unsubscribe

settled = trio.testing.wait_all_tasks_blocked


@attrs.frozen
class Reading:
    celsius: float


@attrs.frozen
class Alarm:
    level: int


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def topics(messages: list[Message[Any]]) -> list[str]:
    return [message.topic for message in messages]


def subscribed(broker: MemoryBroker) -> list[str]:
    """Every filter in a SUBSCRIBE so far."""
    packets = [packet for _, packet in broker.received if isinstance(packet, Subscribe)]
    return [request.topic_filter for packet in packets for request in packet.requests]


def payloads_to(payloads: list[bytes]) -> Callable[[Message[Any]], None]:
    return lambda message: payloads.append(message.payload)


def topics_to(names: list[str]) -> Callable[[Message[Any]], None]:
    return lambda message: names.append(message.topic)


async def lost(driver: MQTTDriver) -> None:
    """Return when the driver has noticed that its link is gone."""
    await settled()
    assert driver.state is not State.LIVE


async def test_a_message_reaches_the_handlers_whose_filter_matches(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    readings: list[Message[bytes]] = []
    alarms: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("sensors/+/temperature", readings.append)
        await driver.subscribe("alarms/#", alarms.append)
        for topic in ("sensors/a/temperature", "sensors/a/humidity", "alarms", "alarms/fire/1", "sensors/temperature"):
            broker.publish(topic, topic)
        await settled()
        assert topics(readings) == ["sensors/a/temperature"]
        assert topics(alarms) == ["alarms", "alarms/fire/1"]
        assert readings[0].payload == readings[0].value == b"sensors/a/temperature"


async def test_the_handler_gets_its_message_class(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: dict[str, object] = {}

    async def reading(message: Message[Reading]) -> None:
        await trio.lowlevel.checkpoint()
        got["attrs"] = message.value

    def keep(name: str) -> Callable[[Message[Any]], None]:
        def handler(message: Message[Any]) -> None:
            got[name] = message.value

        return handler

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("t", reading, Reading)
        await driver.subscribe("t/d", keep("dict"), dict)
        await driver.subscribe("t/s", keep("str"), str)
        await driver.subscribe("t/b", keep("bytes"))
        broker.publish("t", b'{"celsius": 20.5}')
        broker.publish("t/d", b'{"a": [1, 2]}')
        broker.publish("t/s", "süß")
        broker.publish("t/b", b"\xff")
        await settled()
    assert got == {"attrs": Reading(20.5), "dict": {"a": [1, 2]}, "str": "süß", "bytes": b"\xff"}


async def test_two_message_classes_on_one_filter_each_get_what_fits(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    readings: list[Message[Reading]] = []
    alarms: list[Message[Alarm]] = []
    raw: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("house/#", readings.append, Reading, qos=1)
        await driver.subscribe("house/#", alarms.append, Alarm, qos=1)
        await driver.subscribe("house/#", raw.append, qos=1)
        broker.publish("house/1", b'{"celsius": 1}', qos=1)
        broker.publish("house/2", b'{"level": 3}', qos=1)
        await settled()
        assert [message.value for message in readings] == [Reading(1.0)]
        assert [message.value for message in alarms] == [Alarm(3)]
        assert [message.payload for message in raw] == [b'{"celsius": 1}', b'{"level": 3}']
        assert driver.status().counters["dead_letters"] == 0
        assert driver.status().unacknowledged == 0


async def test_a_payload_that_fits_no_class_is_a_dead_letter_and_the_next_one_is_delivered(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
) -> None:
    readings: list[Message[Reading]] = []
    letters: list[tuple[bytes, PayloadError]] = []

    async def dead_letter(message: Message[Any], error: PayloadError) -> None:
        await trio.lowlevel.checkpoint()
        letters.append((message.payload, error))

    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("r", readings.append, Reading, qos=1, on_dead_letter=dead_letter)
        for payload in (b"\xff", b"[]", b'{"celsius": "warm"}', b'{"celsius": 3}'):
            broker.publish("r", payload, qos=1)
        await settled()
        assert [message.value for message in readings] == [Reading(3.0)]
        assert [payload for payload, _ in letters] == [b"\xff", b"[]", b'{"celsius": "warm"}']
        assert "celsius" in str(letters[2][1])
        assert subscription.statistics().dead_letters == driver.status().counters["dead_letters"] == 3
        assert subscription.statistics().delivered == 1
        assert driver.status().unacknowledged == 0  # a dead letter is acknowledged too: it would only come again


@pytest.mark.parametrize("qos", [0, 1])
async def test_the_value_of_a_dead_letter_is_none(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    letters: list[Message[Any]] = []

    def dead_letter(message: Message[Any], _error: PayloadError) -> None:
        letters.append(message)

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("r", print, Reading, qos=qos, on_dead_letter=dead_letter)
        for _ in range(3):  # the parser has a quicker way for all but the first
            broker.publish("r", b"[]", qos=qos)
        await settled()
    assert [message.value for message in letters] == [None, None, None]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_each_of_several_subscriptions_gets_every_message(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, protocol: str
) -> None:
    got: list[list[Message[bytes]]] = [[], [], [], []]
    payloads = [b"%d" % number for number in range(5)]
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        for topic_filter, arrived in zip(("a/b", "a/b", "a/#", "+/b"), got, strict=True):
            await driver.subscribe(topic_filter, arrived.append, qos=qos)
        for payload in payloads:
            broker.publish("a/b", payload, qos=qos)
        await settled()
        assert driver.status().unacknowledged == 0
    assert [[message.payload for message in arrived] for arrived in got] == [payloads] * 4


async def test_a_dead_letter_without_a_handler_for_it_is_logged(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("r", Reading) as readings:
        broker.publish("r", b"no")
        broker.publish("r", b'{"celsius": 1}')
        assert (await readings.receive()).value == Reading(1.0)
        assert driver.status().counters["dead_letters"] == 1
    assert "dead letter on 'r': payload is not a valid Reading" in caplog.text


async def test_an_exception_in_a_dead_letter_handler_is_treated_as_one_of_the_handler(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    readings: list[Message[Reading]] = []

    def dead_letter(message: Message[Any], error: PayloadError) -> None:
        raise RuntimeError(f"cannot cope with {message.payload!r}: {error}")

    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("r", readings.append, Reading, on_dead_letter=dead_letter)
        broker.publish("r", b"no")
        broker.publish("r", b'{"celsius": 1}')
        await settled()
        assert [message.value for message in readings] == [Reading(1.0)]
        assert subscription.statistics().handler_errors == 1


async def test_a_message_fans_out_to_every_matching_subscription_once(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    first: list[Message[bytes]] = []
    second: list[Message[bytes]] = []
    third: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/b", first.append, qos=1)
        await driver.subscribe("a/b", second.append, qos=1)
        await driver.subscribe("a/+", third.append, qos=1)
        async with driver.subscription("#", qos=1) as everything:
            broker.publish("a/b", b"1", qos=1)
            assert (await everything.receive()).payload == b"1"
            await settled()
            assert [message.payload for message in [*first, *second, *third]] == [b"1"] * 3
            assert first[0] is not second[0]


@pytest.mark.parametrize("overlapping", ["once", "copies"])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_overlapping_filters_each_get_a_message_once_however_many_copies_the_broker_sends(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, overlapping: Literal["once", "copies"], qos: int
) -> None:
    broker = MemoryBroker(nursery, overlapping=overlapping)
    got: dict[str, list[bytes]] = {}
    filters = ("a/#", "a/+", "#", "a/b", "+/b", "other")
    async with MQTTDriver(memory_config(broker)) as driver:
        for topic_filter in filters:
            payloads = got[topic_filter] = []
            await driver.subscribe(topic_filter, payloads_to(payloads), qos=qos)
        for _ in range(3):  # first of topics and properties that are new, then in rows
            broker.forget()
            for payloads in got.values():
                payloads.clear()
            broker.publish("a/b", b"1", qos=qos)
            broker.publish("a", b"2", qos=qos)
            broker.publish("a/b", b"3", qos=qos)
            await settled()
            copies = sum(packet.kind is Kind.PUBLISH for _, packet in broker.sent)
            assert copies == (3 if overlapping == "once" else 12)
            assert got == {
                "a/#": [b"1", b"2", b"3"],
                "a/+": [b"1", b"3"],
                "#": [b"1", b"2", b"3"],
                "a/b": [b"1", b"3"],
                "+/b": [b"1", b"3"],
                "other": [],
            }
            assert driver.status().unacknowledged == 0


async def test_copies_without_identifiers_reach_each_subscription_once_too(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, overlapping="copies", versions=(4,))
    got: dict[str, list[bytes]] = {"a/#": [], "a/+": [], "#": []}
    async with MQTTDriver(memory_config(broker)) as driver:
        for topic_filter, payloads in got.items():
            await driver.subscribe(topic_filter, payloads_to(payloads), qos=1)
        for payload in (b"1", b"2", b"2", b"3"):
            broker.publish("a/b", payload, qos=1)
        await settled()
        assert got == {topic_filter: [b"1", b"2", b"2", b"3"] for topic_filter in got}
        assert driver.status().unacknowledged == 0


async def test_without_identifiers_at_the_broker_one_copy_still_fans_out(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, identifiers_available=False)
    got: list[str] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/#", lambda _message: got.append("a/#"))
        await driver.subscribe("a/+", lambda _message: got.append("a/+"))
        broker.publish("a/b")
        await settled()
        assert sorted(got) == ["a/#", "a/+"]


async def test_an_identifier_of_the_applications_own_comes_back_in_the_properties(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with (
        MQTTDriver(memory_config(broker)) as driver,
        driver.subscription("a/#", identifier=5000) as mine,
        driver.subscription("a/+") as other,
    ):
        broker.publish("a/b", b"1")
        assert 5000 in (await mine.receive()).properties.subscription_identifiers
        assert (await other.receive()).payload == b"1"


async def test_shared_subscriptions_are_routed_by_the_filter_inside(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    shared: list[Message[bytes]] = []
    other: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("$share/workers/jobs/#", shared.append, qos=1)
        await driver.subscribe("other/#", other.append, qos=1)
        broker.publish("jobs/1", b"1", qos=1)
        await settled()
        assert topics(shared) == ["jobs/1"]
        assert not other
        await driver.unsubscribe("$share/workers/jobs/#")
        assert broker.subscriptions(driver.client_id or "").keys() == {"other/#"}


async def test_a_shared_and_a_plain_subscription_of_one_filter_get_a_message_once_each(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: list[str] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("$share/g/jobs/#", lambda _message: got.append("shared"), qos=1)
        await driver.subscribe("jobs/#", lambda _message: got.append("plain"), qos=1)
        broker.publish("jobs/1", b"1", qos=1)  # the broker sends two: the group's, and the plain one
        await settled()
        assert sorted(got) == ["plain", "shared"]


async def test_wildcards_do_not_match_topics_that_begin_with_a_dollar(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: dict[str, list[str]] = {"#": [], "+/uptime": [], "$SYS/#": []}
    async with MQTTDriver(memory_config(broker)) as driver:
        for topic_filter, seen in got.items():
            await driver.subscribe(topic_filter, topics_to(seen))
        broker.publish("$SYS/uptime", b"1")
        broker.publish("x/uptime", b"2")
        await settled()
    assert got == {"#": ["x/uptime"], "+/uptime": ["x/uptime"], "$SYS/#": ["$SYS/uptime"]}


async def test_subscribers_of_one_filter_share_a_broker_subscription_until_the_last_one_leaves(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
) -> None:
    got: list[str] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        client = driver.client_id or ""
        first = await driver.subscribe("a", lambda _message: got.append("first"), qos=0)
        second = await driver.subscribe("a", lambda _message: got.append("second"), qos=1)
        assert broker.subscriptions(client)["a"].qos == 1
        await driver.unsubscribe(first)
        broker.publish("a")
        await settled()
        assert got == ["second"]
        assert not any(isinstance(packet, Unsubscribe) for _, packet in broker.received)
        await driver.unsubscribe(second)
        assert not broker.subscriptions(client)
        assert sum(isinstance(packet, Unsubscribe) for _, packet in broker.received) == 1


async def test_unsubscribing_by_filter_ends_all_its_handlers_and_no_iterator(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a") as messages:
        await driver.subscribe("a", got.append)
        await driver.subscribe("a", got.append)
        await driver.unsubscribe("a")
        broker.publish("a", b"1")
        assert (await messages.receive()).payload == b"1"
        assert not got
        with pytest.raises(ValueError, match="nothing is subscribed with 'a'"):
            await driver.unsubscribe("a")


async def test_a_subscription_that_comes_after_its_topic_was_seen_gets_the_next_message(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    got: list[str] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/#", lambda _message: got.append("a/#"))
        broker.publish("a/b")
        await settled()
        late = await driver.subscribe("a/b", lambda _message: got.append("a/b"))
        broker.publish("a/b")
        await settled()
        await driver.unsubscribe(late)
        broker.publish("a/b")
        await settled()
        assert sorted(got) == ["a/#", "a/#", "a/#", "a/b"]


async def test_a_message_for_nobody_is_counted_and_acknowledged(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", lambda _message: None, qos=1)
        with broker.faults.hold(Kind.UNSUBSCRIBE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.unsubscribe, subscription)
                await settled()
                broker.publish("a", qos=1)  # the broker has not heard yet
                await settled()
                assert driver.status().counters["unrouted"] == 1
                assert driver.status().unacknowledged == 0
                broker.faults.clear()


async def test_messages_that_arrive_before_the_suback_are_delivered(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    broker.publish("a/old", b"retained", retain=True)
    got: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        with broker.faults.hold(Kind.SUBACK):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.subscribe, "a/#", got.append)
                await broker.wait_for_subscription("a/#")
                await settled()
                broker.publish("a/new", b"new")
                await settled()
                assert topics(got) == ["a/old", "a/new"]
                broker.faults.clear()
        assert subscribed(broker) == ["a/#"]


async def test_retained_messages_are_marked_and_repetitions_after_a_replay_too(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    broker.publish("a", b"old", retain=True)
    got: list[tuple[bytes, bool, bool, int]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe(
            "a", lambda message: got.append((message.payload, message.retain, message.replayed, message.generation))
        )
        broker.publish("a", b"live")
        await settled()
        broker.drop()
        await lost(driver)
        await driver.wait_live()
        broker.publish("a", b"live again")
        await settled()
    assert got == [
        (b"old", True, False, 1),
        (b"live", False, False, 1),
        (b"old", True, True, 2),
        (b"live again", False, False, 2),
    ]


async def test_a_second_local_subscriber_gets_the_retained_message_as_well(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    broker.publish("a", b"old", retain=True)
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a") as first:
        assert (await first.receive()).payload == b"old"
        async with driver.subscription("a") as second:
            assert (await second.receive()).payload == b"old"


async def test_subscription_options_reach_the_broker_again_at_the_replay(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with (
        MQTTDriver(memory_config(broker)) as driver,
        driver.subscription(
            "a",
            qos=2,
            no_local=True,
            retain_as_published=True,
            retain_handling=RetainHandling.DO_NOT_SEND,
            identifier=2000,
            user_properties=(("k", "v"),),
        ),
    ):
        before = broker.subscriptions(driver.client_id or "")["a"]
        broker.drop()
        await lost(driver)
        await driver.wait_live()
        after = broker.subscriptions(driver.client_id or "")["a"]
        assert before == after
        assert (after.qos, after.no_local, after.retain_as_published, after.retain_handling) == (2, True, True, 2)
        packets = [packet for _, packet in broker.received if isinstance(packet, Subscribe)]
        assert [packet.properties for packet in packets] == [
            {"subscription_identifiers": (2000,), "user_properties": (("k", "v"),)}
        ] * 2


@pytest.mark.parametrize("identifiers", [False, True])
async def test_what_one_read_brings_for_several_is_dealt_out_in_order(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, identifiers: bool
) -> None:
    """Messages of topics, and with properties, that have come before are put into the queues in rows."""
    got: dict[str, list[bytes]] = {"a": [], "b": [], "both": []}
    async with MQTTDriver(memory_config(broker, subscription_identifiers=identifiers)) as driver:
        await driver.subscribe("a/#", payloads_to(got["a"]))
        await driver.subscribe("b/#", payloads_to(got["b"]))
        await driver.subscribe("+/both", payloads_to(got["both"]))
        for topic in ("a/1", "a/2", "b/1", "b/both"):
            broker.publish(topic, "first")
        await settled()
        for row in ("a/1 a/2", "b/1 a/1 a/2 b/1 b/1", "b/both a/1 b/both", "a/1 b/1 b/both", "a/1 a/new a/1"):
            for values in got.values():
                values.clear()
            expected: dict[str, list[bytes]] = {"a": [], "b": [], "both": []}
            for number, topic in enumerate(row.split()):
                broker.publish(topic, str(number))
                expected[topic[0]].append(b"%d" % number)
                if topic == "b/both":
                    expected["both"].append(b"%d" % number)
            await settled()
            assert got == expected


async def test_a_message_goes_where_its_identifiers_say_also_if_one_subscription_matches(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    """The others of its topic are in a row, and what is remembered of that must not hold for this one."""
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/#", payloads_to(got))
        for number, identifiers in enumerate([(1,), (1,), (2,), (1,), (2, 1), (2,), (), (2,), (2, 1)]):
            properties: dict[str, Any] = {"subscription_identifiers": identifiers} if identifiers else {}
            packet = Publish(topic="a/b", payload=b"%d" % number, properties=properties)
            broker.send(driver.client_id or "", packet)
        await settled()
        assert got == [b"0", b"1", b"3", b"4", b"6", b"8"]
        assert driver.status().counters["unrouted"] == 3


async def test_what_is_remembered_of_topics_and_identifiers_is_bounded(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_mqtt_driver._dispatch._CACHED_TOPICS", 20)
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/#", payloads_to(got))
        for number in range(2, 200):
            properties: dict[str, Any] = {"subscription_identifiers": (1, number)}
            for _ in range(2):
                packet = Publish(topic=f"a/{number % 10}", payload=b"%d" % number, properties=properties)
                broker.send(driver.client_id or "", packet)
                await settled()
        assert got == [b"%d" % number for number in range(2, 200) for _ in range(2)]
        remembered = driver._dispatcher._sole
        assert 0 < sum(len(topics) for topics in remembered.values()) <= 20
