"""The stable-ID mode: what the broker sent and the application was not done with when the link was lost."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.stable import acknowledged, connections, stable_config
from trio_mqtt_driver import Acknowledge, DriverConfig, Message, MQTTDriver, Overflow, ReasonCode, State
from trio_mqtt_driver.testing import Ack, Direction, Kind, MemoryBroker, Publish

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=["5", "3.1.1"])
def config(request: pytest.FixtureRequest, broker: MemoryBroker) -> DriverConfig:
    return stable_config(broker, request.param)


class Desk:
    """A handler that is done with a message when it is told to; one message after the other."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, bool, int]] = []
        """Payload, DUP and generation."""
        self._finish = trio.Semaphore(0)

    async def handle(self, message: Message[bytes]) -> None:
        self.got.append((message.payload, message.dup, message.generation))
        await self._finish.acquire()

    @property
    def payloads(self) -> list[bytes]:
        return [payload for payload, _, _ in self.got]

    async def finish(self, count: int = 1) -> None:
        for _ in range(count):
            self._finish.release()
        await settled()


async def lose_link(driver: MQTTDriver, broker: MemoryBroker, *, keep_sessions: bool = True) -> None:
    broker.stop(keep_sessions=keep_sessions)
    await driver.wait_state(State.BACKING_OFF)


async def find_link(driver: MQTTDriver, broker: MemoryBroker) -> None:
    broker.start()
    await driver.wait_live()
    await settled()


def stale(driver: MQTTDriver) -> int:
    return driver.status().counters["stale_acknowledgements"]


def kinds(broker: MemoryBroker) -> list[Kind]:
    """How the driver acknowledged on its last connection."""
    return [packet.kind for packet in connections(broker)[-1] if isinstance(packet, Ack)]


async def test_a_handler_that_is_done_before_the_broker_repeats_the_message(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        await lose_link(driver, broker)
        await desk.finish()
        await find_link(driver, broker)
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBCOMP]
        assert desk.payloads == [b"1"]
        assert broker.sessions["driver"].in_flight == 0
        assert stale(driver) == 0
    assert not broker.violations


async def test_a_handler_that_is_done_after_the_broker_has_repeated_the_message(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        for _ in range(3):
            await lose_link(driver, broker)
            await find_link(driver, broker)
            assert kinds(broker) == []
            assert driver.status().unacknowledged == 1
        await desk.finish()
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBCOMP]
        assert desk.payloads == [b"1"]
        assert driver.status().unacknowledged == 0
        assert stale(driver) == 0
    assert not broker.violations


async def test_a_handler_that_is_done_while_the_broker_repeats_the_messages_one_by_one(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """The connection is there, but has not brought the second message yet when its handler is done."""
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        for payload in (b"1", b"2"):
            broker.publish("a", payload, qos=2)
        await settled()
        await lose_link(driver, broker)
        held = broker.faults.hold(Kind.PUBLISH)
        await find_link(driver, broker)
        await desk.finish(2)
        assert kinds(broker) == []
        held.remove()
        await settled()
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBREC, Kind.PUBCOMP, Kind.PUBCOMP]
        assert desk.payloads == [b"1", b"2"]
        assert stale(driver) == 0
    assert not broker.violations


@pytest.mark.parametrize("when", ["down", "up again"])
async def test_a_handler_that_is_done_when_the_session_is_lost_acknowledges_nothing(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, when: str
) -> None:
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        await lose_link(driver, broker, keep_sessions=False)
        if when == "down":
            await desk.finish()
            assert stale(driver) == 0  # The session may go on, for all that we know.
        await find_link(driver, broker)
        if when == "up again":
            await desk.finish()
            assert stale(driver) == 1
        assert kinds(broker) == []
        # Its identifier is free: the next message has it.
        broker.publish("a", b"2", qos=2)
        await settled()
        await desk.finish()
        assert desk.payloads == [b"1", b"2"]
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBCOMP]
    assert not broker.violations


async def test_the_acknowledgement_of_a_lost_session_is_not_taken_for_that_of_the_next(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    one, two = Desk(), Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", one.handle, qos=2)
        await driver.subscribe("b", two.handle, qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        await lose_link(driver, broker, keep_sessions=False)
        await find_link(driver, broker)
        broker.publish("b", b"2", qos=2)
        await settled()
        await one.finish()
        assert kinds(broker) == []
        assert stale(driver) == 1
        await two.finish()
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBCOMP]


async def test_a_pubrel_is_answered_on_whatever_connection_it_comes(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        await desk.finish(2)
        lost = [(b"1", Kind.PUBREL, Direction.OUT), (b"2", Kind.PUBCOMP, Direction.IN)]
        for payload, kind, direction in lost:
            with broker.faults.cut(kind, before=True, direction=direction):
                broker.publish("a", payload, qos=2)
                await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
            await settled()
            assert kinds(broker) == [Kind.PUBCOMP]
            assert broker.sessions["driver"].in_flight == 0
        assert desk.payloads == [b"1", b"2"]
    assert not broker.violations


async def test_messages_of_qos_1_come_again_and_their_old_acknowledgements_are_counted(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=1)
        broker.publish("a", b"1", qos=1)
        await settled()
        await lose_link(driver, broker)
        await find_link(driver, broker)
        await desk.finish()
        assert stale(driver) == 1
        assert kinds(broker) == []
        await desk.finish()
        assert kinds(broker) == [Kind.PUBACK]
        assert desk.got == [(b"1", False, 1), (b"1", True, 2)]
        assert broker.sessions["driver"].in_flight == 0
    assert not broker.violations


async def test_several_handlers_of_one_message_are_waited_for_across_connections(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    one, two = Desk(), Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", one.handle, qos=2)
        await driver.subscribe("a", two.handle, qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        await one.finish()
        await lose_link(driver, broker)
        await find_link(driver, broker)
        assert kinds(broker) == []
        await two.finish()
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBCOMP]
        assert one.payloads == two.payloads == [b"1"]


async def test_an_identifier_that_comes_without_dup_on_another_connection_is_another_message(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """A broker that has lost its half: the embedded one keeps no identifiers, others are older after a crash. To take
    the message for the one that we remember would lose it."""
    one, two = Desk(), Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", one.handle, qos=2)
        await driver.subscribe("b", two.handle, qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        packet_id = next(packet.packet_id for _, packet in broker.sent if isinstance(packet, Publish))
        await lose_link(driver, broker)
        with broker.faults.drop(Kind.PUBLISH):
            await find_link(driver, broker)
        broker.send("driver", Publish(topic="b", payload=b"2", qos=2, packet_id=packet_id))
        await settled()
        assert two.payloads == [b"2"]
        # The acknowledgement of the old one must not be taken for that of the new one.
        await one.finish()
        assert kinds(broker) == []
        assert stale(driver) == 1
        await two.finish()
        assert acknowledged(connections(broker)[-1], Kind.PUBREC) == [packet_id]


async def test_a_broker_that_has_forgotten_its_pubrel_may_begin_again_with_the_publish(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """As mosquitto does when a connection broke while it took the session up: not delivered again, but answered."""
    got: list[bytes] = []
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", lambda message: got.append(message.payload), qos=2)
        broker.publish("a", b"1", qos=2)
        await settled()
        packet_id = next(packet.packet_id for _, packet in broker.sent if isinstance(packet, Publish))
        for _ in range(2):
            await lose_link(driver, broker)
            await find_link(driver, broker)
        again = Publish(topic="a", payload=b"1", qos=2, dup=True, packet_id=packet_id)
        broker.send("driver", again)
        await settled()
        assert got == [b"1"]
        assert kinds(broker) == [Kind.PUBREC, Kind.PUBCOMP]
        assert driver.status().unacknowledged == 0
        broker.send("driver", Publish(topic="a", payload=b"2", qos=2, dup=True, packet_id=packet_id))
        await settled()
        assert got == [b"1", b"2"]


async def test_an_identifier_that_comes_twice_on_one_connection_is_one_message(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """With or without DUP [MQTT-4.3.3-10]."""
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        packet = Publish(topic="a", payload=b"1", qos=2, packet_id=7)
        for _ in range(2):
            broker.send("driver", packet)
            await settled()
        with broker.faults.drop(Kind.PUBREL):
            await desk.finish()
            broker.send("driver", packet)
            await settled()
        assert desk.payloads == [b"1"]
        assert acknowledged(connections(broker)[-1], Kind.PUBREC) == [7, 7]


async def test_what_the_session_has_forgotten_may_be_dropped_and_what_it_knows_may_not(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """The queue of a handler that hangs stays bounded however often the session is lost."""
    desk = Desk()
    async with MQTTDriver(config) as driver:
        subscription = await driver.subscribe("a", desk.handle, qos=2, queue_messages=5)
        for number in range(10):
            broker.publish("a", b"%d" % number, qos=2)
        await settled()
        for _ in range(3):
            await lose_link(driver, broker)
            await find_link(driver, broker)
        assert (subscription.statistics().queued, subscription.statistics().dropped) == (9, 0)
        for round_ in range(1, 4):
            await lose_link(driver, broker, keep_sessions=False)
            await find_link(driver, broker)
            for number in range(10):
                broker.publish("a", b"%d" % (10 * round_ + number), qos=2)
            await settled()
        assert subscription.statistics().queued == 10
        await desk.finish(20)
        assert desk.payloads == [b"0", *(b"%d" % number for number in range(30, 40))]
    assert not broker.violations


async def test_a_receive_maximum_is_held_across_connections(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    desk = Desk()
    async with MQTTDriver(stable_config(broker, "5", receive_maximum=3)) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        for number in range(10):
            broker.publish("a", b"%d" % number, qos=2)
        for _ in range(10):
            await settled()
            assert driver.status().unacknowledged <= 3
            await lose_link(driver, broker)
            await desk.finish()
            await find_link(driver, broker)
        assert desk.payloads == [b"%d" % number for number in range(10)]
        assert not any("protocol error" in event.text for event in driver.status().history)
    assert not broker.violations


async def test_a_session_with_more_in_flight_than_the_receive_maximum_is_taken_up(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """mosquitto 2.0.11 sends more, and all of them again on the next connection."""
    desk = Desk()
    async with MQTTDriver(stable_config(broker, "5", receive_maximum=2)) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        for dup in (False, True):
            for packet_id in range(1, 6):
                payload = b"%d" % packet_id
                broker.send("driver", Publish(topic="a", payload=payload, qos=2, packet_id=packet_id, dup=dup))
            await settled()
            assert driver.status().unacknowledged == 5
            if not dup:
                await lose_link(driver, broker)
                await find_link(driver, broker)
        await desk.finish(5)
        assert desk.payloads == [b"1", b"2", b"3", b"4", b"5"]
        assert acknowledged(connections(broker)[-1], Kind.PUBREC) == [1, 2, 3, 4, 5]


async def test_an_unsubscribe_acknowledges_what_is_queued_of_an_older_connection(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    desk = Desk()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", desk.handle, qos=2)
        for number in range(3):
            broker.publish("a", b"%d" % number, qos=2)
        await settled()
        await lose_link(driver, broker)
        await find_link(driver, broker)
        await driver.unsubscribe("a")
        await desk.finish()
        assert broker.sessions["driver"].in_flight == 0
        assert desk.payloads == [b"0"]
        assert stale(driver) == 0
    assert not broker.violations


# -- a backlog that comes before the answer to the test publish -------------------------------------------------------


@pytest.mark.parametrize("probe", ["publish", "ping"])
@pytest.mark.parametrize(
    "protocol, overflow, options",
    [
        ("5", Overflow.BLOCK, {}),
        ("3.1.1", Overflow.BLOCK, {}),
        ("3.1.1", Overflow.DROP_OLDEST, {"receive_maximum": 20}),
        ("5", Overflow.DROP_OLDEST, {"receive_bytes": 1024}),
    ],
    ids=["5-block", "3.1.1-block", "3.1.1-window", "5-bytes"],
)
async def test_a_backlog_that_stops_the_reading_does_not_fail_the_test_publish(
    broker: MemoryBroker,
    protocol: str,
    overflow: Overflow,
    options: dict[str, Any],
    probe: Literal["publish", "ping"],
    autojump_clock: MockClock,
) -> None:
    """Its answer lies behind the backlog, on our side, until the handler has come that far."""
    got: list[int] = []

    async def slow(message: Message[bytes]) -> None:
        got.append(int(message.payload[:3]))
        await trio.sleep(0.5)

    config = stable_config(broker, protocol).evolve(probe=probe, **options)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", slow, qos=1, overflow=overflow, queue_messages=10)
        await settled()
        driver.pause()
        await trio.sleep(10)
        for number in range(120):
            broker.publish("in", b"%03d" % number + bytes(1500), qos=1)
        driver.resume()
        await trio.sleep(100)
        assert driver.state is State.LIVE
        assert driver.status().counters["failures"] == 0
        assert got == list(range(120))


async def test_a_refusal_that_is_lost_with_the_link_is_said_again(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    got: list[Message[bytes]] = []
    async with MQTTDriver(stable_config(broker, "5")) as driver:
        await driver.subscribe("in", got.append, qos=2, acknowledge=Acknowledge.MANUAL)
        await settled()
        broker.publish("in", b"unwanted", qos=2)
        await settled()
        with broker.faults.stop_reading():
            assert got[0].refuse(ReasonCode.QUOTA_EXCEEDED)
            await settled()
            broker.drop()
        await trio.sleep(60)
        assert driver.state is State.LIVE
        assert driver.generation == 2
        assert [message.payload for message in got] == [b"unwanted"]
        codes = [
            packet.reason_code
            for _, packet in broker.received
            if isinstance(packet, Ack) and packet.kind is Kind.PUBREC
        ]
        assert codes == [ReasonCode.QUOTA_EXCEEDED]
        broker.publish("in", b"wanted", qos=2)
        await settled()
        assert [message.payload for message in got] == [b"unwanted", b"wanted"]
    assert not broker.violations
