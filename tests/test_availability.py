"""Availability: "online" after each connect, by will "offline", and whoever says so wrongly is answered."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.presence import HERE, TOPIC, last_packets, live, presence_config, present, retained, told
from trio_mqtt_driver import Availability, Message, MQTTDriver, RefusedError, State
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker, Publish, Subscribe

settled = trio.testing.wait_all_tasks_blocked

pytestmark = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def publishes(broker: MemoryBroker) -> list[Publish]:
    """Those of the last connection, without its test publish."""
    return [packet for packet in last_packets(broker) if isinstance(packet, Publish) and "probe" not in packet.topic]


async def test_each_generation_has_the_will_and_says_online(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol) as driver:
        for _ in range(3):
            broker.drop()
            await settled()
            await live(driver)
        assert driver.generation == 4
        assert told(broker) == ["online", *["offline", "online"] * 3]
        assert retained(broker) == "online"
    wills = [connect.will for connect in broker.connects]
    assert [(will.topic, will.payload, will.qos, will.retain) for will in wills if will] == [
        (TOPIC, b"offline", 1, True)
    ] * 4
    assert not broker.violations


async def test_the_birth_is_the_first_message_after_the_replay(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """Before the outbox, and before what a callback publishes when it hears of the link."""
    broker.down = True
    async with MQTTDriver(presence_config(broker, protocol), start="background") as driver:
        driver.publish_nowait("waiting", qos=1)
        driver.register_connection_callback(lambda up: up and driver.publish_nowait("callback"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.subscribe, "in", print)
            await settled()
            broker.down = False
        await live(driver)
        packets = last_packets(broker)
        birth, *others = publishes(broker)
        replayed = max(number for number, packet in enumerate(packets) if isinstance(packet, Subscribe))
        assert packets.index(birth) > replayed
        assert (birth.topic, birth.payload, birth.qos, birth.retain) == (TOPIC, b"online", 1, True)
        assert {packet.topic for packet in others} == {"waiting", "callback"}


@pytest.mark.parametrize(
    "availability", [HERE, Availability(topic=TOPIC, qos=0, retain=False, online="1", offline="0")]
)
async def test_words_qos_and_retain_are_those_of_the_config(
    broker: MemoryBroker, protocol: str, availability: Availability, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol, availability=availability):
        (birth,) = publishes(broker)
    farewell = publishes(broker)[-1]
    will = broker.connects[0].will
    assert will is not None
    for one, words in ((birth, availability.online), (will, availability.offline), (farewell, availability.offline)):
        assert (one.topic, one.payload, one.qos, one.retain) == (TOPIC, words, availability.qos, availability.retain)


# -- late wills -----------------------------------------------------------------------------------------------------


async def test_the_late_will_of_a_half_open_connection_is_answered(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """We notice after 3 s, the broker after 15."""
    async with present(broker, protocol, keep_alive=10, ack_timeout=1, ping_timeout=1) as driver:
        (dead,) = broker.clients
        broker.silence(dead, deaf=True)
        await driver.publish("anything", qos=1)
        assert (driver.generation, trio.current_time() < 5) == (2, True)
        assert told(broker) == ["online"] * 2
        assert dead in broker.clients
        await trio.sleep(20)
        assert dead not in broker.clients
        assert told(broker) == ["online", "online", "offline", "online"]
        assert retained(broker) == "online"
        assert driver.generation == 2


@pytest.mark.parametrize(
    "kind, state",
    [
        (Kind.CONNACK, State.CONNECTING),
        (Kind.PUBACK, State.VALIDATING),
        (Kind.SUBACK, State.REPLAYING),
        (None, State.LIVE),
    ],
)
async def test_a_late_will_at_any_stage_of_the_next_connection_does_not_last(
    broker: MemoryBroker, protocol: str, kind: Kind | None, state: State, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol, disconnect_timeout=0.5) as driver:
        (dead,) = broker.clients
        broker.silence(dead, deaf=True)
        if kind is None:
            driver.force_reconnect(even_if_live=True)
            await live(driver)
            broker.drop(dead)
        else:
            with broker.faults.hold(kind, times=1) as hold:
                driver.force_reconnect(even_if_live=True)
                await broker.wait_for(lambda: hold.held, "held packet")
                await settled()
                assert driver.state is state
                broker.drop(dead)
                await settled()
            await driver.wait_live()
        await trio.sleep(5)
        before = ["online"] if kind is None else []
        assert told(broker) == ["online", *before, "offline", "online"]
        assert retained(broker) == "online"


async def test_a_late_will_before_the_birth_is_acknowledged_does_not_last(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol, disconnect_timeout=0.5) as driver:
        (dead,) = broker.clients
        broker.silence(dead, deaf=True)
        with broker.faults.hold(Kind.PUBACK, first=2, times=1):
            driver.force_reconnect(even_if_live=True)
            await live(driver)
            broker.drop(dead)
            await settled()
        await settled()
        assert told(broker) == ["online", "online", "offline", "online"]


async def test_wills_of_several_dead_connections_are_answered(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol, disconnect_timeout=0.5) as driver:
        for _ in range(3):
            broker.silence(deaf=True)
            driver.force_reconnect(even_if_live=True)
            await live(driver)
        *dead, _ = broker.clients
        assert len(dead) == 3
        for one in dead:
            await trio.sleep(0.4)
            broker.drop(one)
        await trio.sleep(3)
        assert retained(broker) == "online"
        assert told(broker).count("offline") == 3
        assert told(broker)[:5] == ["online"] * 4 + ["offline"]


async def test_what_was_retained_before_the_birth_is_not_answered_twice(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """It comes with the subscription, and the birth answers it."""
    broker.publish(TOPIC, "offline", retain=True)
    async with present(broker, protocol):
        await trio.sleep(5)
        assert told(broker) == ["offline", "online"]


async def test_two_drivers_that_contradict_each_other_do_not_flood_the_broker(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    one = Availability(topic=TOPIC, online="1", offline="0")
    other = Availability(topic=TOPIC, online="0", offline="1")
    budget = iter(range(1000))
    broker.options.acl = lambda _: next(budget, None) is not None  # a flood has an end, and the clock goes on
    async with (
        present(broker, protocol, availability=one) as driver,
        present(broker, protocol, availability=other, client_id="other"),
    ):
        broker.forget()
        await trio.sleep(100)
        assert 100 <= len(told(broker)) <= 202
        assert driver.generation == 1


async def test_two_drivers_that_share_a_topic_agree_that_somebody_is_there(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol):
        async with present(broker, protocol, client_id="other"):
            await trio.sleep(10)
            assert told(broker) == ["online"] * 2
        await trio.sleep(10)
        assert told(broker) == ["online", "online", "offline", "online"]
    assert told(broker)[4:] == ["offline"]


async def test_a_flood_of_contradictions_is_answered_once_a_second(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol) as driver:
        for _ in range(100):
            for _ in range(50):
                broker.publish(TOPIC, "offline", qos=1)
            await trio.sleep(0.1)
        await trio.sleep(2)
        assert 10 <= told(broker).count("online") - 1 <= 12
        assert told(broker)[-1] == "online"
        assert driver.status().unacknowledged == 0


# -- the application and its own subscriptions ----------------------------------------------------------------------


async def test_the_application_may_listen_too(broker: MemoryBroker, protocol: str, autojump_clock: MockClock) -> None:
    """On a broker that sends a copy for each filter."""
    broker.options.overlapping = "copies"
    heard: list[tuple[str, str]] = []

    def hear(message: Message[str]) -> None:
        heard.append(("all", message.value))

    async with present(broker, protocol) as driver:
        await driver.subscribe("#", hear, str)
        own = await driver.subscribe(TOPIC, lambda message: heard.append(("own", message.value)), str)
        await settled()
        heard.clear()  # what was retained
        broker.publish(TOPIC, "offline")
        await trio.sleep(1)
        assert sorted(heard) == [("all", "offline"), ("all", "online"), ("own", "offline"), ("own", "online")]

        await driver.unsubscribe(TOPIC)
        assert own._registration is not None
        with pytest.raises(ValueError, match=r"nothing is subscribed with 'state'"):
            await driver.unsubscribe(TOPIC)
        heard.clear()
        broker.publish(TOPIC, "offline")
        await trio.sleep(1)
        assert heard == [("all", "offline"), ("all", "online")]
        assert told(broker)[-1] == "online"


async def test_a_subscription_of_the_application_may_differ_in_qos_only(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    broker.down = True
    async with MQTTDriver(presence_config(broker, protocol), start="background") as driver:
        with trio.fail_after(60):
            with pytest.raises(ValueError, match=r"'state' is subscribed already with .*may differ in qos only"):
                await driver.subscribe(TOPIC, print, no_local=True)
            broker.down = False
            await driver.subscribe(TOPIC, print, qos=2)


async def test_it_is_no_handler_of_the_application(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """Whatever bytes come: it neither fails nor is counted."""
    async with present(broker, protocol, on_handler_error="raise") as driver:
        for payload in (b"\xff\xfe", b"", b"offline", b"online"):
            broker.publish(TOPIC, payload)
        await trio.sleep(2)
        assert driver.state is State.LIVE
        counters = driver.status().counters
        assert (counters["handler_errors"], counters["dead_letters"], counters["dropped"]) == (0, 0, 0)


# -- brokers that cannot or will not --------------------------------------------------------------------------------


async def test_where_subscribing_is_forbidden_the_birth_is_said_and_a_warning_logged(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    broker.options.acl = lambda access: access.action == "publish" or access.topic != TOPIC
    async with present(broker, protocol) as driver:
        assert [topic for topic, _ in driver.status().degraded] == [TOPIC]
        assert "the broker refuses 'state'" in caplog.text
        broker.drop()
        await settled()
        await live(driver)
        assert told(broker) == ["online", "offline", "online"]
        broker.options.acl = None
        driver.force_reconnect(even_if_live=True)
        await live(driver)
        broker.publish(TOPIC, "offline")
        await settled()
        assert told(broker)[-3:] == ["online", "offline", "online"]
        assert not driver.status().degraded
    assert told(broker)[-1] == "offline"


async def test_where_publishing_is_forbidden_the_link_works_and_a_warning_is_logged(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    broker.options.acl = lambda access: access.action == "subscribe" or access.topic != TOPIC
    async with present(broker, protocol) as driver:
        await driver.publish("other", qos=1)
        await settled()
        caplog.set_level(logging.INFO)
        broker.publish(TOPIC, "offline")
        await trio.sleep(5)
        assert driver.generation == 1
    assert last_packets(broker)[-1].kind is Kind.DISCONNECT
    assert told(broker) == ["offline"]
    # 3.1.1 cannot say that it forgets a message.
    assert ("'state' is not told b'online': the broker refused 'state'" in caplog.text) is (protocol == "5")
    assert ("'state' is not told b'offline': the broker refused 'state'" in caplog.text) is (protocol == "5")


async def test_a_refusal_for_good_says_nothing_more(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    with pytest.raises(RefusedError):  # noqa: PT012  # the body is under test
        async with present(broker, protocol):
            broker.faults.refuse_connect(0x87)
            broker.drop()
            await trio.sleep_forever()
    assert told(broker) == ["online", "offline"]


async def test_the_birth_says_nothing_twice_when_the_outbox_is_long(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    broker.down = True
    async with MQTTDriver(presence_config(broker, protocol, in_flight=1), start="background") as driver:
        for number in range(100):
            driver.publish_nowait(f"waiting/{number}", qos=1)
        broker.down = False
        await driver.wait_live()
        await driver.drain()
        assert told(broker) == ["online"]
        topics = [packet.topic for packet in publishes(broker)]
        assert topics == [TOPIC, *(f"waiting/{number}" for number in range(100))]
        acknowledged = [packet for packet in last_packets(broker) if isinstance(packet, Ack)]
        assert len(acknowledged) == 1  # of the echo of our birth
