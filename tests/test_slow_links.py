"""Links that are well and slow: what takes long on them is not taken for a fault, and nothing is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import DriverConfig, Message, MQTTDriver, State, Will
from trio_mqtt_driver.testing import Kind, MemoryBroker

RATE = 50_000
"""Bytes in a second."""


class SlowStream(trio.abc.Stream):
    """Passes so many bytes in a second each way, and loses none."""

    def __init__(self, stream: trio.abc.Stream, up: float, down: float) -> None:
        self._stream = stream
        self._up = up
        self._down = down

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        for start in range(0, len(data), 1000):
            piece = data[start : start + 1000]
            await trio.sleep(len(piece) / self._up)
            await self._stream.send_all(piece)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(min(1000, max_bytes or 1000))
        await trio.sleep(len(data) / self._down)
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def slow_config(
    broker: MemoryBroker, protocol: str, up: float = math.inf, down: float = math.inf, **options: Any
) -> DriverConfig:
    async def open_stream(_endpoint: object) -> trio.abc.Stream:
        return SlowStream(await broker.connect_stream(), up, down)

    return memory_config(broker, open_stream=open_stream, protocol=protocol, **options)


def untroubled(driver: MQTTDriver) -> bool:
    counters = driver.status().counters
    return driver.state is State.LIVE and not counters["losses"] and not counters["failures"]


@pytest.mark.parametrize("rate", [1000, RATE])
async def test_a_message_may_take_longer_than_any_timeout(
    broker: MemoryBroker, protocol: str, rate: int, autojump_clock: MockClock
) -> None:
    """PINGREQ lies behind it."""
    async with MQTTDriver(slow_config(broker, protocol, up=rate)) as driver:
        with trio.fail_after(60):
            result = await driver.publish("out", bytes(50 * rate), qos=1)
        assert result.attempts == 1
        assert result.latency > 49
        assert untroubled(driver)


async def test_a_flood_is_no_fault(broker: MemoryBroker, protocol: str, autojump_clock: MockClock) -> None:
    async with MQTTDriver(slow_config(broker, protocol, up=RATE)) as driver:
        with trio.move_on_after(300):
            while True:
                await driver.publish("out", bytes(10_000))
        await driver.publish("out", b"last", qos=1)
        assert untroubled(driver)
        sent = driver.status().counters["messages_out"]
    arrived = sum(packet.kind is Kind.PUBLISH for _, packet in broker.received)
    assert arrived == sent > 1000


async def test_a_request_may_lie_behind_other_bytes(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(slow_config(broker, protocol, up=RATE)) as driver:
        for _ in range(20):
            driver.publish_nowait("out", bytes(50_000))
        await driver.subscribe("in", lambda _: None)
        assert trio.current_time() > 15
        await driver.unsubscribe("in")
        assert untroubled(driver)


async def test_the_test_publish_may_lie_behind_what_goes_on(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    config = slow_config(broker, protocol, up=RATE, stable_id=True)
    async with MQTTDriver(config) as driver:
        receipt = driver.publish_nowait("out", bytes(400_000), qos=1)
        await trio.sleep(7)
        broker.disconnect()
        with trio.fail_after(30):
            assert (await receipt.wait()).attempts == 2
            await driver.wait_live()
        assert driver.generation == 2
        assert not driver.status().counters["failures"]


async def test_its_answer_may_lie_behind_a_backlog(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []

    def handle(message: Message[bytes]) -> None:
        got.append(message.payload[:1])

    async with MQTTDriver(slow_config(broker, protocol, down=RATE, stable_id=True)) as driver:
        await driver.subscribe("in", handle, qos=1)
        broker.disconnect()
        for number in range(4):
            broker.publish("in", bytes([number]) + bytes(100_000), qos=1)
        await driver.wait_state(State.VALIDATING)
        await driver.wait_live()
        assert driver.generation == 2
        assert not driver.status().counters["failures"]
        await trio.sleep(30)
    assert got == [b"\0", b"\1", b"\2", b"\3"]


async def test_an_answer_to_subscribe_may_lie_behind_retained_messages(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    for number in range(10):
        broker.publish(f"r/{number}", bytes(100_000), retain=True)
    async with MQTTDriver(slow_config(broker, protocol, down=RATE)) as driver:
        for topic_filter in ("r/#", "+/1", "other"):
            await driver.subscribe(topic_filter, lambda _: None)
        assert trio.current_time() > 15
        assert untroubled(driver)


async def test_leaving_sends_what_is_in_the_write_buffer(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    config = slow_config(broker, protocol, up=RATE, will=Will(topic="will", payload=b"gone"))
    async with MQTTDriver(config) as driver:
        for _ in range(200):
            driver.publish_nowait("out", bytes(1000))
        began = trio.current_time()
    assert 4 < trio.current_time() - began < 5
    assert [message.topic for message in broker.published].count("out") == 200
    assert "will" not in [message.topic for message in broker.published]


async def test_leaving_waits_for_it_no_longer_than_for_all_else(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(slow_config(broker, protocol, up=RATE, drain_timeout=2, disconnect_timeout=1)) as driver:
        for _ in range(200):
            driver.publish_nowait("out", bytes(1000))
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(3)


async def test_nobody_waits_for_the_write_buffer_of_a_link_that_is_lost(
    broker: MemoryBroker, nursery: trio.Nursery, protocol: str, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(slow_config(broker, protocol, up=RATE)) as driver:
        for _ in range(200):
            driver.publish_nowait("out", bytes(1000))

        @nursery.start_soon
        async def lose() -> None:
            await trio.sleep(1)
            broker.down = True
            broker.disconnect()

        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(1, abs=0.1)
