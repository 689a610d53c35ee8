"""How much the reader asks for, and that what is handled in a row is acknowledged like everything else."""

from __future__ import annotations

import math
from collections.abc import Awaitable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Acknowledge, DriverClosedError, Message, MQTTDriver, State
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

Outcome = Awaitable[object] | None


class Meter(trio.abc.Stream):
    """Keeps how much was asked for, and how much was got."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self.reads: list[tuple[int, int]] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._inner.receive_some(max_bytes)
        assert max_bytes is not None
        self.reads.append((max_bytes, len(data)))
        return data

    async def aclose(self) -> None:
        await self._inner.aclose()


async def test_a_read_asks_for_as_many_messages_as_the_garbage_collector_leaves_alone(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    meters: list[Meter] = []

    async def connect(_endpoint: object) -> trio.abc.Stream:
        meters.append(Meter(await broker.connect_stream()))
        return meters[-1]

    handled = 0

    def handler(_message: Message[bytes]) -> None:
        nonlocal handled
        handled += 1

    async def flood(count: int, payload: int) -> list[tuple[int, int]]:
        nonlocal handled
        handled = 0
        meter.reads.clear()
        for _ in range(count):
            broker.publish("a", bytes(payload))
        await settled()
        assert handled == count
        return list(meter.reads)

    async with MQTTDriver(memory_config(broker, open_stream=connect, queue_messages=10**6)) as driver:
        await driver.subscribe("a", handler)
        (meter,) = meters
        small = await flood(5000, 64)
        packet = sum(got for _, got in small) / 5000
        assert small[0][0] == 65536
        assert {asked for asked, _ in small[1:-1]} <= {int(packet) * 192, (int(packet) + 1) * 192}
        large = await flood(5, 1_000_000)
        assert {asked for asked, _ in large[1:]} == {65536}
        tiny = await flood(20_000, 0)
        assert {asked for asked, _ in tiny[1:-1]} == {4096}


@pytest.mark.parametrize("wrong", [None, ValueError("of the application's")])
async def test_what_was_handled_before_a_handler_waits_is_acknowledged(
    wrong: Exception | None, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Of messages that are handled without a pause the PUBACKs are written together, but not after a pause."""
    broker = MemoryBroker(nursery)
    forever = trio.Event()
    handled: list[bytes] = []

    def handler(message: Message[bytes]) -> Outcome:
        handled.append(message.payload)
        if wrong is not None and message.payload == b"3":
            raise wrong
        return forever.wait() if message.payload == b"6" else None

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1)
        for number in range(10):
            broker.publish("a", b"%d" % number, qos=1)
        await settled()
        assert handled == [b"%d" % number for number in range(7)]
        assert sum(packet.kind is Kind.PUBACK for _, packet in broker.received) == 6
        forever.set()
        await settled()
        assert sum(packet.kind is Kind.PUBACK for _, packet in broker.received) == 10


async def test_what_was_handled_is_acknowledged_when_the_next_message_ends_the_driver(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    handled = 0

    def handler(_message: Message[bytes]) -> None:
        nonlocal handled
        handled += 1
        if handled == 6:
            raise ValueError("of the application's")

    with pytest.raises(ValueError, match="of the application's"):  # noqa: PT012  # the end is under test
        async with MQTTDriver(memory_config(broker, on_handler_error="raise")) as driver:
            await driver.subscribe("a", handler, qos=1)
            for number in range(10):
                broker.publish("a", b"%d" % number, qos=1)
            await trio.sleep_forever()
    assert handled == 6
    assert sum(packet.kind is Kind.PUBACK for _, packet in broker.received) == 5


@pytest.mark.parametrize("acknowledge", list(Acknowledge))
async def test_in_a_row_each_message_is_acknowledged_once(
    acknowledge: Acknowledge, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    kept: list[Message[bytes]] = []

    def handler(message: Message[bytes]) -> None:
        kept.append(message)
        if len(kept) % 3 == 0:
            assert message.ack() is (acknowledge is not Acknowledge.RECEIVED)
            assert not message.ack()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1, acknowledge=acknowledge)
        for number in range(300):
            broker.publish("a", b"%d" % number, qos=1)
        await settled()
        if acknowledge is Acknowledge.MANUAL:
            assert [message.ack() for message in kept].count(True) == 200
        await settled()
        ids = [getattr(packet, "packet_id", None) for _, packet in broker.received if packet.kind is Kind.PUBACK]
        assert len(ids) == len(set(ids)) == 300
        assert not any(message.ack() for message in kept)
        assert driver.status().counters["stale_acknowledgements"] == 0
        live = driver._supervisor.live  # pyright: ignore[reportPrivateUsage]
        assert live is not None
        assert (len(live.receiver), live.receiver.look_at) == (0, math.inf)  # nothing waits for its turn


async def test_a_last_message_without_acknowledgement_does_not_keep_those_before_it_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    handled: list[int] = []

    def handler(message: Message[bytes]) -> None:
        handled.append(message.qos)

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1)
        for qos in (1, 1, 1, 0):
            broker.publish("a", b"x", qos=qos)
        await settled()
        assert handled == [1, 1, 1, 0]
        assert sum(packet.kind is Kind.PUBACK for _, packet in broker.received) == 3


async def test_a_row_whose_connection_is_over_is_counted(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery)
    lost = trio.Event()
    handled = 0

    def handler(_message: Message[bytes]) -> Outcome:
        nonlocal handled
        handled += 1
        return lost.wait() if handled == 1 else None

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1)
        for _ in range(10):
            broker.publish("a", b"x", qos=1)
        await settled()
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        lost.set()
        await settled()
        assert handled == 10
        assert driver.status().counters["stale_acknowledgements"] == 10
        assert not any(packet.kind is Kind.PUBACK for _, packet in broker.received)


async def test_a_message_is_processed_when_the_next_is_asked_for_even_if_that_is_cancelled(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with (
        MQTTDriver(memory_config(broker)) as driver,
        driver.subscription("a", qos=1) as messages,
    ):
        for payload in (b"1", b"2"):
            broker.publish("a", payload, qos=1)
        assert (await messages.receive()).payload == b"1"
        with trio.CancelScope() as scope:
            scope.cancel()
            await messages.receive()
        await settled()
        assert sum(packet.kind is Kind.PUBACK for _, packet in broker.received) == 1
        assert (await messages.receive()).payload == b"2"


async def test_whoever_a_message_was_for_has_a_turn_before_its_acknowledgement_is_written(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Or the answer would have to wait for that, too. The scheduler's order is random, so it happens many times."""
    broker = MemoryBroker(nursery)
    arrived = trio.Event()

    def handler(_message: Message[bytes]) -> None:
        arrived.set()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1)
        live = driver._supervisor.live  # pyright: ignore[reportPrivateUsage]
        assert live is not None
        for _ in range(30):
            await settled()
            arrived = trio.Event()
            written = live._writer.written  # pyright: ignore[reportPrivateUsage]
            broker.publish("a", b"x", qos=1)
            await arrived.wait()
            assert live._writer.written == written  # pyright: ignore[reportPrivateUsage]
        await settled()
        assert sum(packet.kind is Kind.PUBACK for _, packet in broker.received) == 30


@pytest.mark.parametrize("iterate", [False, True])
async def test_what_comes_together_after_a_pause_is_handled_in_one_turn(
    iterate: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Each visit to the scheduler costs more than the messages."""
    broker = MemoryBroker(nursery)
    rounds = 0
    seen: list[int] = []
    all_seen = trio.Event()

    async def count_rounds() -> None:
        nonlocal rounds
        while True:
            await trio.lowlevel.checkpoint()
            rounds += 1

    def handler(_message: Message[bytes]) -> None:
        seen.append(rounds)
        if len(seen) == 10:
            all_seen.set()

    async def consume(driver: MQTTDriver) -> None:
        async with driver.subscription("a") as messages:
            subscribed.set()
            async for message in messages:
                handler(message)

    subscribed = trio.Event()
    async with MQTTDriver(memory_config(broker)) as driver, trio.open_nursery() as tasks:
        if iterate:
            tasks.start_soon(consume, driver)
            await subscribed.wait()
        else:
            await driver.subscribe("a", handler)
        await trio.sleep(10)
        tasks.start_soon(count_rounds)
        for _ in range(10):
            broker.publish("a", b"x")
        await all_seen.wait()
        assert len(set(seen)) == 1
        tasks.cancel_scope.cancel()


async def test_to_ask_a_subscription_that_is_ended_is_a_checkpoint(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        async with driver.subscription("a") as messages:
            pass
        with trio.testing.assert_checkpoints(), pytest.raises(DriverClosedError, match="is ended"):
            await messages.receive()
