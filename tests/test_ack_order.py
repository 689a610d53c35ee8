"""Acknowledgements are in the order of arrival over the whole connection, as long as nobody holds up the others."""

from __future__ import annotations

import gc
import math
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from tests.stable import stable_config
from trio_mqtt_driver import Acknowledge, Message, MQTTDriver, State
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker, Publish

settled = trio.testing.wait_all_tasks_blocked
KINDS = [(1, Kind.PUBACK), (2, Kind.PUBREC)]


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def acknowledged(broker: MemoryBroker, kind: Kind = Kind.PUBACK) -> list[str]:
    """The payloads of what the driver acknowledged so far, in that order."""
    sent = {packet.packet_id: packet.payload for _, packet in broker.sent if isinstance(packet, Publish)}
    return [
        sent[packet.packet_id].decode()
        for _, packet in broker.received
        if isinstance(packet, Ack) and packet.kind is kind
    ]


def messages_in_memory() -> int:
    gc.collect()
    return sum(type(one) is Message for one in gc.get_objects())


def taking(seconds: float) -> Callable[[Message[bytes]], Awaitable[None]]:
    async def handle(message: Message[bytes]) -> None:
        await trio.sleep(seconds)

    return handle


@pytest.mark.parametrize("qos, kind", KINDS)
async def test_handlers_of_different_speed_acknowledge_in_the_order_of_arrival(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("slow", taking(0.01), qos=qos)
        await driver.subscribe("quick", taking(0.001), qos=qos)
        broker.forget()
        for number in range(20):
            broker.publish("slow", f"s{number}", qos=qos)
            broker.publish("quick", f"q{number}", qos=qos)
        await trio.sleep(0.105)
        assert len(acknowledged(broker, kind)) == 20
        await trio.sleep(1)
        expected = [f"{name}{number}" for number in range(20) for name in "sq"]
        assert acknowledged(broker, kind) == expected
        assert driver.status().unacknowledged == 0


@pytest.mark.parametrize("qos, kind", KINDS)
async def test_a_handler_that_sleeps_is_overtaken_once_and_holds_up_nobody_afterwards(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    async with MQTTDriver(memory_config(broker, ack_patience=2.0, keep_alive=0)) as driver:
        await driver.subscribe("slow", taking(5), qos=qos)
        await driver.subscribe("quick", taking(0), qos=qos)
        broker.forget()
        for number in range(3):
            broker.publish("slow", f"s{number}", qos=qos)
            broker.publish("quick", f"q{number}", qos=qos)
        await trio.sleep(1.9)
        assert acknowledged(broker, kind) == []
        await trio.sleep(0.2)
        assert acknowledged(broker, kind) == ["q0", "q1", "q2"]
        for number in range(3, 6):  # while s0 is with its handler: those behind it have no place to lose
            broker.publish("slow", f"s{number}", qos=qos)
            broker.publish("quick", f"q{number}", qos=qos)
            await settled()
            assert acknowledged(broker, kind)[-1] == f"q{number}"
        await trio.sleep(100)
        assert acknowledged(broker, kind)[6:] == [f"s{number}" for number in range(6)]
        broker.forget()
        broker.publish("slow", "s6", qos=qos)  # it has caught up: the order holds again
        broker.publish("quick", "q6", qos=qos)
        await settled()
        assert acknowledged(broker, kind) == []
        assert driver.status().unacknowledged == 2
        await trio.sleep(3)
        assert acknowledged(broker, kind) == ["q6"]


async def test_without_end_of_patience_the_order_holds_for_ever(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, ack_patience=math.inf)) as driver:
        await driver.subscribe("slow", taking(1000), qos=1)
        await driver.subscribe("quick", taking(0), qos=1)
        broker.forget()
        for topic in ("slow", "quick"):
            broker.publish(topic, topic, qos=1)
        await trio.sleep(999)
        assert acknowledged(broker) == []
        await trio.sleep(2)
        assert acknowledged(broker) == ["slow", "quick"]


async def test_qos_1_and_qos_2_stand_in_one_line(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, ack_patience=math.inf)) as driver:
        await driver.subscribe("slow", taking(10), qos=1)
        await driver.subscribe("quick", taking(0), qos=2)
        broker.publish("slow", "1", qos=1)
        broker.publish("quick", "2", qos=2)
        await settled()
        assert acknowledged(broker, Kind.PUBREC) == []
        await trio.sleep(11)
        assert acknowledged(broker) == ["1"]
        assert acknowledged(broker, Kind.PUBREC) == ["2"]


async def test_a_message_for_several_is_overtaken_for_all_of_them(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    """What queues behind one of its copies is not waited for."""
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/#", taking(100), qos=1)
        await driver.subscribe("a/b", taking(0), qos=1)
        await driver.subscribe("quick", taking(0), qos=1)
        broker.forget()
        broker.publish("a/b", "1", qos=1)
        broker.publish("quick", "q1", qos=1)
        await trio.sleep(1.5)
        assert acknowledged(broker) == ["q1"]
        broker.publish("a/c", "2", qos=1)
        broker.publish("quick", "q2", qos=1)
        await settled()
        assert acknowledged(broker) == ["q1", "q2"]


async def test_what_is_left_to_its_reader_is_overtaken_too(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    """Its handler has returned long ago."""
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("manual", lambda _message: None, qos=1, acknowledge=Acknowledge.MANUAL)
        await driver.subscribe("quick", taking(0), qos=1)
        broker.forget()
        broker.publish("manual", qos=1)
        broker.publish("quick", "1", qos=1)
        await trio.sleep(1.5)
        assert acknowledged(broker) == ["1"]
        broker.publish("manual", qos=1)
        broker.publish("quick", "2", qos=1)
        await settled()
        assert acknowledged(broker) == ["1", "2"]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_on_the_next_connection_of_a_session_nobody_is_held_up_for_long_either(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, protocol: str
) -> None:
    """The broker repeats both messages, and one of them was processed meanwhile."""
    async with MQTTDriver(stable_config(broker, protocol, ack_patience=5.0, drain_timeout=0.1)) as driver:
        await driver.subscribe("slow", taking(1000), qos=2)
        await driver.subscribe("quick", taking(0), qos=2)
        for topic in ("slow", "quick"):
            broker.publish(topic, topic, qos=2)
        await settled()
        broker.stop(keep_sessions=True)
        await driver.wait_state(State.BACKING_OFF)
        broker.start()
        await driver.wait_live()
        await trio.sleep(4)
        assert acknowledged(broker, Kind.PUBREC) == []
        await trio.sleep(2)
        assert acknowledged(broker, Kind.PUBREC) == ["quick"]
        assert driver.status().unacknowledged == 1
    assert not broker.violations


async def test_a_link_that_is_closed_acknowledges_what_waits_for_its_turn_first(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, drain_timeout=0.1)) as driver:
        await driver.subscribe("slow", taking(1000), qos=1)
        await driver.subscribe("quick", taking(0), qos=1)
        broker.forget()
        for topic in ("slow", "quick"):
            broker.publish(topic, topic, qos=1)
        await settled()
    assert acknowledged(broker) == ["quick"]
    assert broker.received[-1][1].kind is Kind.DISCONNECT
    assert not broker.violations


@pytest.mark.parametrize("qos", [1, 2])
async def test_messages_that_come_while_the_driver_is_left_are_not_kept_in_the_order(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, nursery: trio.Nursery, qos: int
) -> None:
    """They are dropped unacknowledged; what its handlers still finish is acknowledged all the same."""
    kept = -1
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        await driver.subscribe("a", taking(1), qos=qos)
        broker.forget()
        broker.publish("a", "1", qos=qos)
        broker.publish("a", "2", qos=qos)
        await settled()

        async def disturb() -> None:
            nonlocal kept
            before = messages_in_memory()
            await trio.sleep(0.5)
            for number in range(1000):
                broker.send(driver.client_id or "", Publish(topic="a", qos=qos, packet_id=1000 + number))
                if not number % 100:
                    await settled()
            await settled()
            kept = messages_in_memory() - before

        nursery.start_soon(disturb)
    assert acknowledged(broker, Kind.PUBACK if qos == 1 else Kind.PUBREC) == ["1", "2"]
    assert driver.status().counters["dropped"] == 1000
    assert kept <= 100  # those of the last read
