"""Handlers that do not keep up, or fail: who waits, who does not, what is dropped, when it is acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.peers import memory_config, pings
from trio_mqtt_driver import Message, MQTTDriver, Overflow, PayloadError
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker, Publish

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@attrs.frozen
class Reading:
    celsius: float


class Gate:
    """A handler that waits before it returns, until ``open()``."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.done: list[bytes] = []
        self._event = trio.Event()

    async def handle(self, message: Message[Any]) -> None:
        self.begun.append(message.payload)
        await self._event.wait()
        self.done.append(message.payload)

    def open(self) -> None:
        self._event.set()


def acknowledged(broker: MemoryBroker, kind: Kind = Kind.PUBACK) -> list[int]:
    return [packet.packet_id for _, packet in broker.received if isinstance(packet, Ack) and packet.kind is kind]


async def test_a_slow_handler_holds_up_neither_others_nor_acknowledgements_nor_the_keep_alive(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    slow = Gate()
    quick: list[bytes] = []
    async with MQTTDriver(memory_config(broker, keep_alive=10)) as driver:
        await driver.subscribe("slow", slow.handle, qos=1)
        await driver.subscribe("quick", lambda message: quick.append(message.payload), qos=1)
        broker.forget()
        for number in range(3):
            broker.publish("slow", f"s{number}", qos=1)
            broker.publish("quick", f"q{number}", qos=1)
        await trio.sleep(1000)
        assert slow.begun == [b"s0"]
        assert quick == [b"q0", b"q1", b"q2"]
        sent = {packet.packet_id: packet.topic for _, packet in broker.sent if isinstance(packet, Publish)}
        assert [sent[packet_id] for packet_id in acknowledged(broker)] == ["quick"] * 3
        assert driver.generation == 1
        assert pings(broker) >= 99
        assert (await driver.publish("out", b"", qos=1)).generation == 1
        slow.open()
        await settled()
        assert slow.done == [b"s0", b"s1", b"s2"]
        assert len(acknowledged(broker)) == 6
        assert not broker.violations


@pytest.mark.parametrize("qos, kind", [(1, Kind.PUBACK), (2, Kind.PUBREC)])
async def test_a_message_is_acknowledged_when_its_handler_has_returned(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", gate.handle, qos=qos)
        broker.publish("a", b"1", qos=qos)
        await trio.sleep(60)
        assert gate.begun == [b"1"]
        assert not acknowledged(broker, kind)
        assert driver.status().unacknowledged == 1
        gate.open()
        await settled()
        assert len(acknowledged(broker, kind)) == 1
        assert driver.status().unacknowledged == 0
        assert not broker.violations


async def test_a_message_for_several_is_acknowledged_when_the_last_one_is_done(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", lambda _message: None, qos=1)
        await driver.subscribe("+", gate.handle, qos=1)
        broker.publish("a", b"1", qos=1)
        await settled()
        assert not acknowledged(broker)
        gate.open()
        await settled()
        assert len(acknowledged(broker)) == 1


async def test_an_acknowledgement_for_a_dead_connection_is_a_counted_no_op(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", gate.handle, qos=1)
        broker.publish("a", b"1", qos=1)
        await settled()
        broker.drop()
        await settled()
        await driver.wait_live()
        assert driver.generation == 2
        broker.forget()
        gate.open()
        await settled()
        assert gate.done == [b"1"]  # the reconnect did not interrupt the handler
        assert driver.status().counters["stale_acknowledgements"] == 1
        assert not acknowledged(broker)
        assert not broker.violations
        broker.publish("a", b"2", qos=1)
        await settled()
        assert len(acknowledged(broker)) == 1


@pytest.mark.parametrize(
    "overflow, kept",
    [(Overflow.DROP_OLDEST, [0, 8, 9, 10]), (Overflow.DROP_NEWEST, [0, 1, 2, 3])],
    ids=["oldest", "newest"],
)
async def test_an_overflowing_queue_drops_by_policy_and_counts(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow, kept: list[int]
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", gate.handle, overflow=overflow, queue_messages=3)
        for number in range(11):
            broker.publish("a", str(number))
            await settled()
        gate.open()
        await settled()
        assert gate.done == [str(number).encode() for number in kept]
        statistics = subscription.statistics()
        assert (statistics.received, statistics.delivered, statistics.dropped) == (11, 4, 7)
        assert driver.status().counters["dropped"] == 7


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.DROP_NEWEST])
async def test_a_drop_policy_never_drops_what_must_be_acknowledged(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow
) -> None:
    gate = Gate()
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", gate.handle, qos=2, overflow=overflow, queue_messages=2)
        for number in range(12):
            broker.publish("a", str(number), qos=number % 3)
        await settled()
        gate.open()
        await settled()
        reliable = [str(number).encode() for number in range(12) if number % 3]
        assert [payload for payload in gate.done if payload in reliable] == reliable
        assert subscription.statistics().dropped == 3  # QoS 0: the first one was with the handler already
        assert driver.status().unacknowledged == 0


@pytest.mark.parametrize("overflow", list(Overflow))
async def test_a_handler_that_is_fast_enough_loses_nothing_of_a_burst(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", lambda m: got.append(m.payload), overflow=overflow, queue_messages=2)
        for number in range(1000):
            broker.publish("a", str(number))
        await settled()
        assert got == [str(number).encode() for number in range(1000)]
        assert driver.status().counters["dropped"] == 0


async def test_a_dead_letter_handler_that_sleeps_holds_up_nobody_else(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    quick: list[bytes] = []
    letters: list[bytes] = []

    async def bury(message: Message[Any], error: PayloadError) -> None:
        letters.append(message.payload)
        assert "not JSON" in str(error)
        await trio.sleep(100)

    async with MQTTDriver(memory_config(broker, keep_alive=10)) as driver:
        subscription = await driver.subscribe("a", print, Reading, on_dead_letter=bury, queue_messages=2)
        await driver.subscribe("quick", lambda message: quick.append(message.payload))
        for _ in range(5):
            broker.publish("a", b"no")
        broker.publish("quick", b"1")
        await trio.sleep(99)
        assert quick == [b"1"]
        assert letters == [b"no"]
        assert subscription.statistics().dropped == 2
        assert driver.generation == 1


async def test_block_pauses_reading_keeps_the_link_alive_and_loses_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    payloads = [f"{number}:".encode() + bytes(10_000) for number in range(100)]
    async with MQTTDriver(memory_config(broker, keep_alive=10)) as driver:
        await driver.subscribe("a", gate.handle, overflow=Overflow.BLOCK, queue_messages=2)
        broker.forget()
        for payload in payloads:
            broker.publish("a", payload)
        waiting = driver.publish_nowait("out", b"", qos=1)
        await trio.sleep(500)
        assert gate.begun == payloads[:1]
        assert pings(broker) >= 49  # or the broker would have closed the link
        assert not waiting.done  # its PUBACK lies unread
        assert driver.status().counters["messages_in"] < 20
        gate.open()
        assert (await waiting.wait()).generation == 1
        await settled()
        assert gate.done == payloads
        assert driver.generation == 1
        await trio.sleep(100)
        assert driver.generation == 1


async def test_unsubscribing_a_blocked_subscription_lets_reading_go_on(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    gate = Gate()
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        blocked = await driver.subscribe("a", gate.handle, overflow=Overflow.BLOCK, queue_messages=1)
        await driver.subscribe("b", lambda message: got.append(message.payload))
        for _ in range(100):
            broker.publish("a", bytes(10_000))
        await settled()
        broker.publish("b", b"1")
        await settled()
        assert not got
        await driver.unsubscribe(blocked)
        await settled()
        assert got == [b"1"]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_broker_that_exceeds_the_receive_maximum_is_borne_with(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
    caplog: pytest.LogCaptureFixture,
    qos: int,
    at_once: bool,
) -> None:
    """mosquitto 2.0.11 does, if a handler is slow; and a connection that ends loses what waits in the broker."""
    gate = Gate()
    async with MQTTDriver(memory_config(broker, receive_maximum=2)) as driver:
        await driver.subscribe("a", gate.handle, qos=qos)

        async def send(packet_ids: range) -> None:
            for packet_id in packet_ids:
                broker.send(
                    driver.client_id or "", Publish(topic="a", payload=b"%d" % packet_id, qos=qos, packet_id=packet_id)
                )
                if not at_once:
                    await settled()
            await settled()

        await send(range(1, 3))
        assert "Receive Maximum" not in caplog.text
        await send(range(3, 21))
        assert driver.status().unacknowledged == 20
        assert caplog.text.count("the broker sends more than our Receive Maximum of 2 [MQTT-3.3.4-9]") == 1
        assert await driver.ping() >= 0  # it goes on reading
        await send(range(21, 22))
        with trio.move_on_after(100) as waiting:
            await driver.ping()
        assert waiting.cancelled_caught  # until there are ten times as many
        gate.open()
        await settled()
        assert gate.done == [b"%d" % packet_id for packet_id in range(1, 22)]
        assert driver.generation == 1


async def test_with_3_1_1_the_receive_maximum_pauses_reading(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    other: list[bytes] = []
    async with MQTTDriver(memory_config(broker, protocol="3.1.1", receive_maximum=2, keep_alive=10)) as driver:
        await driver.subscribe("a", gate.handle, qos=1)
        await driver.subscribe("b", lambda message: other.append(message.payload))
        for number in range(5):
            broker.publish("a", str(number), qos=1)
            await settled()
        broker.publish("b", b"1")
        await trio.sleep(100)
        assert driver.status().unacknowledged == 3
        assert not other
        gate.open()
        await settled()
        assert gate.done == [b"0", b"1", b"2", b"3", b"4"]
        assert other == [b"1"]
        assert driver.generation == 1
    assert "Receive Maximum" not in caplog.text  # of which that broker does not know


async def test_a_handlers_exception_is_logged_and_counted_and_the_next_message_comes(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[bytes] = []

    async def fail(message: Message[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        got.append(message.payload)
        raise LookupError(message.payload)

    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", fail, qos=1)
        broker.publish("a", b"1", qos=1)
        broker.publish("a", b"2", qos=1)
        await settled()
        assert got == [b"1", b"2"]
        assert subscription.statistics().handler_errors == driver.status().counters["handler_errors"] == 2
        assert len(acknowledged(broker)) == 2
    assert "handler of 'a' failed on <Message 'a' b'1' qos=1>" in caplog.text
    assert "LookupError" in caplog.text


@pytest.mark.parametrize("sync", [True, False])
async def test_with_raise_the_handlers_exception_leaves_the_driver_as_itself(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, sync: bool
) -> None:
    error = LookupError("mine")

    def fail(_message: Message[bytes]) -> None:
        raise error

    async def fail_later(_message: Message[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    handler: Callable[[Message[bytes]], object] = fail if sync else fail_later

    async def live() -> None:
        async with MQTTDriver(memory_config(broker, on_handler_error="raise")) as driver:
            await driver.subscribe("a", handler)
            broker.publish("a")
            await trio.sleep_forever()

    with pytest.raises(LookupError) as caught:
        await live()
    assert caught.value is error
    assert not broker.clients
