"""A broker that is slow and steady is not a dead one; one that stops is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.dialing import TracedStream
from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, MQTTDriver, PublishResult
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker, Publish, encode

WINDOW = 100


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


class Slowly:
    """Acknowledges one message each 0.1 s, in place of the broker, whose own acknowledgements are lost."""

    def __init__(self, broker: MemoryBroker, qos: int) -> None:
        self._broker = broker
        self._qos = qos
        self._seen = 0
        self.acknowledged = 0

    def _next(self) -> int | None:
        received = self._broker.received
        while self._seen < len(received):
            packet = received[self._seen][1]
            self._seen += 1
            if isinstance(packet, Publish) and packet.qos == self._qos and packet.topic == "out":
                return packet.packet_id
        return None

    async def run(self, client_id: Callable[[], str | None], limit: int | None = None) -> None:
        kinds = [Kind.PUBACK] if self._qos == 1 else [Kind.PUBREC, Kind.PUBCOMP]
        while self.acknowledged != limit:
            await trio.sleep(0.1)
            packet_id = self._next()
            if packet_id is not None:
                for kind in kinds:
                    self._broker.send(client_id() or "", encode(Ack(kind=kind, packet_id=packet_id), 5))
                    await trio.lowlevel.checkpoint()
                self.acknowledged += 1


class Narrow(TracedStream):
    """A link that carries 100 bytes each second towards us."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await super().receive_some(min(100, max_bytes or 100))
        await trio.sleep(len(data) / 100)
        return data


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_slow_broker_is_kept_while_acknowledgements_keep_coming(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    """The last message of a full window waits for 10 s: longer than the ack_timeout, and nothing is wrong."""
    async with MQTTDriver(memory_config(broker, probe="ping", ack_timeout=5, in_flight=WINDOW)) as driver:
        broker.forget()
        for kind in (Kind.PUBACK, Kind.PUBREC, Kind.PUBCOMP):
            broker.faults.drop(kind)
        slow = Slowly(broker, qos)
        receipts = [driver.publish_nowait("out", b"%d" % number, qos=qos) for number in range(3 * WINDOW)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.run, lambda: driver.client_id)
            results: list[PublishResult] = []
            with trio.fail_after(60):
                for receipt in receipts:
                    results.append(await receipt.wait())  # noqa: PERF401  # flake8-async does not look into a comprehension
            nursery.cancel_scope.cancel()
        broker.faults.clear()
        assert {(result.generation, result.attempts) for result in results} == {(1, 1)}
        assert results[-1].latency > 20
        assert driver.generation == 1


async def test_a_slow_broker_that_stops_is_given_up_after_the_ack_timeout(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, probe="ping", ack_timeout=5, in_flight=WINDOW)) as driver:
        broker.forget()
        with broker.faults.drop(Kind.PUBACK):
            receipts = [driver.publish_nowait("out", b"%d" % number, qos=1) for number in range(WINDOW)]
            await Slowly(broker, 1).run(lambda: driver.client_id, limit=80)
            await trio.sleep(4.9)
            assert driver.generation == 1
            assert driver.status().last_error is None
            await trio.sleep(0.2)
        assert "AckTimeoutError" in str(driver.status().last_error)
        results = [await receipt.wait() for receipt in receipts]
        assert [result.generation for result in results] == [1] * 80 + [2] * 20


async def test_one_message_that_is_never_acknowledged_is_found_though_later_ones_are(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, probe="ping", ack_timeout=5)) as driver:
        broker.faults.drop(Kind.PUBACK, times=1)
        start = trio.current_time()
        lost = driver.publish_nowait("out", b"lost", qos=1)
        while driver.generation == 1:
            await trio.sleep(0.5)
            assert trio.current_time() < start + 30
            driver.publish_nowait("out", b"later", qos=1)
        assert (await lost.wait()).attempts == 2
        assert "AckTimeoutError" in str(driver.status().last_error)


async def test_an_acknowledgement_behind_a_large_message_on_a_slow_link_is_waited_for(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async def dial(_endpoint: Endpoint) -> trio.abc.Stream:
        return Narrow(await broker.connect_stream(), lambda: None)

    async with MQTTDriver(memory_config(broker, open_stream=dial, ack_timeout=5, ping_timeout=6)) as driver:
        await driver.subscribe("in", lambda _: None)
        broker.publish("in", bytes(6000))
        result = await driver.publish("out", b"x", qos=1)
        assert result.latency > 59
        assert (result.generation, result.attempts) == (1, 1)
