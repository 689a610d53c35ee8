"""The farewell of a driver with availability: "offline" whenever a link is given up on purpose, within a bound."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.presence import HERE, TOPIC, last_packets, live, presence_config, present, retained, told
from trio_mqtt_driver import Attempt, Availability, DriverConfig, MQTTDriver, ServerLimitError, State
from trio_mqtt_driver.testing import Connack, Direction, Disconnect, Kind, MemoryBroker, Publish

settled = trio.testing.wait_all_tasks_blocked

PROTOCOLS = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def check_farewell(broker: MemoryBroker, *, qos: int = 1) -> None:
    """The last message was "offline", and DISCONNECT came after it, so that the will was not published."""
    packets = last_packets(broker)
    farewell = [packet for packet in packets if isinstance(packet, Publish)][-1]
    assert (farewell.topic, farewell.payload, farewell.qos, farewell.retain) == (TOPIC, b"offline", qos, True)
    assert isinstance(packets[-1], Disconnect)
    assert not broker.violations


@PROTOCOLS
@pytest.mark.parametrize("how", ["normal", "error", "cancelled"])
async def test_leaving_says_offline_and_disconnects(
    broker: MemoryBroker, protocol: str, how: str, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(1) as scope:
        await trio.lowlevel.checkpoint()
        try:
            async with present(broker, protocol) as driver:
                driver.publish_nowait("last", qos=1)
                if how == "error":
                    raise ValueError
                if how == "cancelled":
                    await trio.sleep_forever()
        except ValueError:
            assert how == "error"
    assert scope.cancelled_caught is (how == "cancelled")
    await settled()
    assert told(broker) == ["online", "offline"]
    assert [message.topic for message in broker.published][-2:] == ["last", TOPIC]
    check_farewell(broker)


@PROTOCOLS
async def test_a_pause_says_offline_and_its_end_online(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol) as driver:
        driver.pause()
        await settled()
        check_farewell(broker)
        await trio.sleep(1000)
        assert (told(broker), retained(broker)) == (["online", "offline"], "offline")
        driver.resume()
        await live(driver)
        assert told(broker) == ["online", "offline", "online"]
        await trio.sleep(5)  # for the echo of the farewell, which must not be answered
    assert told(broker) == ["online", "offline", "online", "offline"]


@PROTOCOLS
async def test_a_reconnect_that_is_asked_for_says_offline_then_online(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol) as driver:
        for _ in range(3):
            driver.force_reconnect(even_if_live=True)
            await live(driver)
            await trio.sleep(5)
        assert told(broker) == ["online", *["offline", "online"] * 3]
        assert driver.status().counters["stale_acknowledgements"] == 0


@pytest.mark.parametrize("qos", [0, 1])
async def test_what_is_published_when_a_link_is_given_up_does_not_go_with_the_farewell(
    qos: int, broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """It is for the next link: the old one may be to another broker, or ends before the acknowledgement comes."""
    async with present(broker, "5") as driver:
        driver.force_reconnect("asked for", even_if_live=True)
        result = await driver.publish_nowait("a", qos=qos).wait()
        assert (result.generation, result.attempts) == (2, 1)
    assert sum(one.topic == "a" for one in broker.published) == 1


@PROTOCOLS
@pytest.mark.parametrize("kind", [Kind.PUBACK, Kind.SUBACK])
async def test_what_is_given_up_before_it_is_live_says_offline(
    broker: MemoryBroker, protocol: str, kind: Kind, autojump_clock: MockClock
) -> None:
    """The retained word may be an older connection's "online"."""
    broker.publish(TOPIC, "online", retain=True)
    with broker.faults.hold(kind, times=1) as hold:
        async with MQTTDriver(presence_config(broker, protocol), start="background") as driver:
            await broker.wait_for(lambda: hold.held, "held packet")
            await settled()
            assert driver.state in (State.VALIDATING, State.REPLAYING)
    assert told(broker) == ["online", "offline"]
    check_farewell(broker)


@PROTOCOLS
@pytest.mark.parametrize("how", ["normal", "cancelled"])
async def test_a_dead_broker_does_not_hold_up_the_end_and_has_the_will(
    broker: MemoryBroker, protocol: str, how: str, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(1 if how == "cancelled" else math.inf):
        async with present(broker, protocol, disconnect_timeout=3, keep_alive=60):
            broker.silence(deaf=True)
            await trio.sleep(1)
            if how == "cancelled":
                await trio.sleep_forever()
    assert trio.current_time() == 1 + 3
    assert told(broker) == ["online"]
    await trio.sleep(100)
    assert (told(broker), retained(broker)) == (["online", "offline"], "offline")


@PROTOCOLS
async def test_a_farewell_that_is_not_acknowledged_leaves_it_to_the_will(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """With DISCONNECT the broker would forget the will, and it may not have taken the farewell."""
    async with present(broker, protocol, disconnect_timeout=3):
        broker.faults.drop(Kind.PUBLISH, direction=Direction.IN)
    assert trio.current_time() == 3
    await settled()
    assert not [packet for packet in last_packets(broker) if isinstance(packet, Disconnect)]
    assert told(broker) == ["online", "offline"]


@PROTOCOLS
async def test_a_link_that_dies_during_the_farewell_ends_it(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol, disconnect_timeout=100):
        broker.faults.cut(Kind.PUBACK, before=True)
    assert trio.current_time() == 0
    await settled()
    assert told(broker) == ["online", "offline", "offline"]


@PROTOCOLS
async def test_a_link_that_dies_during_the_farewell_of_a_reconnect_is_no_failure(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol) as driver:
        broker.faults.cut(Kind.PUBACK, before=True)
        driver.force_reconnect(even_if_live=True)
        await live(driver)
        assert driver.status().failures == 0
        assert told(broker)[-1] == "online"


@PROTOCOLS
async def test_a_full_window_leaves_the_farewell_qos_0(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with present(broker, protocol, in_flight=1, drain_timeout=1, ack_timeout=math.inf) as driver:
        broker.faults.drop(Kind.PUBACK)
        driver.publish_nowait("a", qos=1)
        await settled()
    assert trio.current_time() == 1
    assert told(broker) == ["online", "offline"]
    check_farewell(broker, qos=0)


@PROTOCOLS
async def test_a_full_window_leaves_the_birth_qos_0(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """With a stable ID it may be full when the connection begins."""
    async with present(
        broker, protocol, stable_id=True, probe="ping", in_flight=1, drain_timeout=1, ack_timeout=math.inf
    ) as driver:
        broker.faults.drop(Kind.PUBACK)
        driver.publish_nowait("a", qos=1)
        await settled()
        broker.drop()
        await settled()
        await live(driver)
        first, birth = [packet for packet in last_packets(broker) if isinstance(packet, Publish)]
        assert (first.topic, first.dup) == ("a", True)
        assert (birth.topic, birth.payload, birth.qos, birth.retain) == (TOPIC, b"online", 0, True)
        assert retained(broker) == "online"


# -- a stable ID, where the will may wait ---------------------------------------------------------------------------


async def test_who_is_back_within_the_delay_was_never_offline(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    availability = Availability(topic=TOPIC, delay=60)
    async with present(broker, "5", stable_id=True, availability=availability) as driver:
        for _ in range(3):
            broker.drop()
            broker.down = True
            await trio.sleep(50)
            broker.down = False
            await live(driver)
        assert told(broker) == ["online"] * 4
        broker.drop()
        broker.down = True
        await trio.sleep(59)
        assert told(broker) == ["online"] * 4
        await trio.sleep(2)
        assert told(broker) == ["online"] * 4 + ["offline"]
        broker.down = False
        await live(driver)
        await trio.sleep(5)
        assert told(broker)[4:] == ["offline", "online"]
    assert told(broker)[6:] == ["offline"]
    assert not broker.sessions


@PROTOCOLS
async def test_a_stable_id_says_offline_between_its_connections(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    """The session brings the own will along; the birth has answered it."""
    async with present(broker, protocol, stable_id=True) as driver:
        broker.drop()
        await settled()
        await live(driver)
        await trio.sleep(5)
        assert told(broker) == ["online", "offline", "online"]


# -- brokers that cannot --------------------------------------------------------------------------------------------


async def test_a_broker_without_qos_1_takes_qos_0(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.options.maximum_qos = 0
    async with present(broker, "5", availability=Availability(topic=TOPIC, qos=0)):
        broker.publish(TOPIC, "offline")
        await settled()
        assert told(broker) == ["online", "offline", "online"]
    check_farewell(broker, qos=0)


async def test_a_broker_without_retain_takes_what_is_not_retained(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    broker.options.retain_available = False
    async with present(broker, "5", availability=Availability(topic=TOPIC, retain=False)):
        broker.publish(TOPIC, "offline")
        await settled()
        assert told(broker) == ["online", "offline", "online"]
    assert told(broker)[3:] == ["offline"]
    assert not broker.violations


@pytest.mark.parametrize(
    "limit, words",
    [({"maximum_qos": 0}, "qos not supported (0x9b)"), ({"retain_available": False}, "retain not supported (0x9a)")],
)
async def test_a_broker_that_cannot_take_the_will_says_so(
    broker: MemoryBroker, limit: dict[str, int], words: str, autojump_clock: MockClock
) -> None:
    for name, value in limit.items():
        setattr(broker.options, name, value)
    async with MQTTDriver(presence_config(broker, "5"), start="background") as driver:
        await trio.sleep(100)
        assert words in str(driver.status().last_error)
    assert told(broker) == []


@pytest.mark.parametrize("limit", [{"retain_available": 0}, {"maximum_qos": 0}, {"maximum_packet_size": 20}])
async def test_what_a_broker_took_as_a_will_and_announces_not_to_take_is_not_said(
    broker: MemoryBroker, limit: dict[str, int], autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It would end each connection over it."""
    broker.faults.replace(Kind.CONNACK, Connack(properties=limit))
    topic = "a/long/name/of/a/topic"
    async with present(broker, "5", availability=Availability(topic=topic), probe="ping") as driver:
        assert "'a/long/name/of/a/topic' is not told b'online': " in caplog.text
        with pytest.raises(ServerLimitError):
            await driver.publish(topic, "online", qos=1, retain=True)
        await trio.sleep(100)
        assert driver.generation == 1
    assert "'a/long/name/of/a/topic' is not told b'offline': " in caplog.text
    assert isinstance(last_packets(broker)[-1], Disconnect)
    assert told(broker, topic) == []


# -- other settings -------------------------------------------------------------------------------------------------


@PROTOCOLS
async def test_other_settings_say_offline_at_the_old_broker_and_online_at_the_new_one(
    broker: MemoryBroker, protocol: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    other = MemoryBroker(nursery)
    async with present(broker, protocol) as driver:
        driver.apply_settings(presence_config(other, protocol))
        await live(driver)
        check_farewell(broker)
        assert (told(broker), told(other)) == (["online", "offline"], ["online"])
        other.publish(TOPIC, "offline")
        await settled()
        assert told(other) == ["online", "offline", "online"]
    check_farewell(other)


THERE = Availability(topic="elsewhere", online="1", offline="0")


@PROTOCOLS
@pytest.mark.parametrize("stable", [False, True])
async def test_another_availability_is_that_of_the_next_connection(
    broker: MemoryBroker, protocol: str, stable: bool, autojump_clock: MockClock
) -> None:
    config = presence_config(broker, protocol, stable_id=stable)
    client_id = ""
    async with MQTTDriver(config) as driver:
        await settled()
        for availability in (THERE, None, HERE, Availability(topic=TOPIC, online="here")):
            driver.apply_settings(config.evolve(availability=availability))
            await live(driver)
            (client_id,) = broker.clients
            topics = set() if availability is None else {availability.topic}
            assert broker.subscriptions(client_id).keys() == topics
            will = broker.connects[-1].will
            assert {will.topic if will else ""} == (topics or {""})
            before = told(broker, "elsewhere"), told(broker)
            broker.publish("elsewhere", "0")
            broker.publish(TOPIC, "offline")
            await settled()
            answers = [told(broker, "elsewhere")[len(before[0]) + 1 :], told(broker)[len(before[1]) + 1 :]]
            if availability == THERE:
                assert answers == [["1"], []]
            elif availability is None:
                assert answers == [[], []]
            else:
                assert answers == [[], [availability.online.decode()]]
            await trio.sleep(2)
        assert driver.generation == 5
    assert told(broker, "elsewhere") == ["1", "0", "1", "0", "0", "0", "0"]
    assert told(broker)[-1] == "offline"
    assert not broker.violations


@PROTOCOLS
async def test_an_options_factory_may_bring_another_availability(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async def factory(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(availability=HERE if attempt.generation == 2 else None)

    async with present(broker, protocol, availability=None, options_factory=factory) as driver:
        assert told(broker) == []
        driver.force_reconnect(even_if_live=True)
        await live(driver)
        assert told(broker) == ["online"]
        driver.force_reconnect(even_if_live=True)
        await live(driver)
        assert told(broker) == ["online", "offline"]
        (client_id,) = broker.clients
        assert not broker.subscriptions(client_id)
    assert told(broker) == ["online", "offline"]


async def test_a_topic_that_the_application_has_subscribed_otherwise_is_not_watched(
    broker: MemoryBroker, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    config = presence_config(broker, "5", availability=None)
    async with MQTTDriver(config) as driver:
        subscription = await driver.subscribe(TOPIC, print, no_local=True)
        driver.apply_settings(config.evolve(availability=HERE))
        await live(driver)
        assert "driver: a late will cannot be answered: 'state' is subscribed already with" in caplog.text
        broker.publish(TOPIC, "offline")
        await trio.sleep(2)
        assert told(broker) == ["online", "offline"]
        await driver.unsubscribe(subscription)
        driver.force_reconnect(even_if_live=True)
        await live(driver)
        broker.publish(TOPIC, "offline")
        await settled()
        assert told(broker)[2:] == ["offline", "online", "offline", "online"]
