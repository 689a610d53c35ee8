"""A message over which the broker ends each connection must not keep the driver from delivering the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, MQTTDriver, QuarantinedError, State
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


class PoisonedStream(trio.abc.Stream):
    """Ends instead of carrying a piece with "poison" in it."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if b"poison" in bytes(data):
            await self._inner.aclose()
        else:
            await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            return await self._inner.receive_some(max_bytes)
        except trio.ClosedResourceError:
            return b""  # as a driver sees a broker that closes

    async def aclose(self) -> None:
        await self._inner.aclose()


def poisoned(broker: MemoryBroker) -> Callable[[Endpoint], Awaitable[trio.abc.Stream]]:
    async def open_stream(_endpoint: Endpoint) -> trio.abc.Stream:
        return PoisonedStream(await broker.connect_stream())

    return open_stream


def arrived(broker: MemoryBroker) -> list[bytes]:
    return [message.payload for message in broker.published if message.topic == "t"]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_message_that_ends_every_connection_is_given_up_and_the_next_ones_go_out(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int, stable: bool, reset: bool
) -> None:
    config = memory_config(broker, probe="ping", in_flight=1, stable_id=stable, quarantine_after=5)
    async with MQTTDriver(config) as driver:
        broker.faults.cut(Kind.PUBLISH, times=5, direction=Direction.IN, before=True, reset=reset)
        bad = driver.publish_nowait("t", b"bad", qos=qos)
        good = [driver.publish_nowait("t", str(number), qos=qos) for number in range(3)]
        with pytest.raises(QuarantinedError, match="'t' is not sent any more: the broker ended 5 connections"):
            await bad.wait()
        for receipt in good:
            await receipt.wait()
        counters = driver.status().counters
        assert counters["quarantined"] == 1
        # A session goes on before the test publish, so that the later ones are attempts that failed.
        assert (counters["losses"], counters["failures"]) == ((1, 4) if stable else (5, 0))
    assert arrived(broker) == [b"0", b"1", b"2"]
    assert not broker.violations


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("qos", [1, 2])
async def test_of_several_that_were_sent_together_only_the_guilty_one_is_given_up(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int, stable: bool
) -> None:
    """The broker dies of what comes in one piece, before it has acknowledged what stands before the bad message."""
    options = {"probe": "ping", "quarantine_after": 3, "stable_id": stable}
    config = memory_config(broker, open_stream=poisoned(broker), **options)
    async with MQTTDriver(config) as driver:
        names = ["0", "1", "2", "poison", "3", "4"]
        receipts = {name: driver.publish_nowait("t", name, qos=qos) for name in names}
        with trio.fail_after(10_000):
            for name, receipt in receipts.items():
                if name == "poison":
                    with pytest.raises(QuarantinedError):
                        await receipt.wait()
                else:
                    await receipt.wait()
        late = [driver.publish_nowait("t", str(number), qos=qos) for number in (5, 6, 7)]
        for receipt in late:
            await receipt.wait()
        assert driver.status().counters["quarantined"] == 1
    assert arrived(broker) == [b"%d" % number for number in range(8)]


async def test_what_a_session_left_open_waits_for_connack(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    """Also if a message that was given up leaves suspects behind, which nothing on the wire seems to be in the way of.

    Before CONNACK nobody knows whether the session goes on; what is sent then is sent again.
    """
    config = memory_config(broker, probe="ping", stable_id=True, quarantine_after=3)
    async with MQTTDriver(config) as driver:
        broker.faults.cut(Kind.PUBLISH, times=3, direction=Direction.IN, before=True)
        held = broker.faults.hold(Kind.CONNACK, first=3, times=1)
        receipts = [driver.publish_nowait("t", str(number), qos=1) for number in range(3)]
        with pytest.raises(QuarantinedError):
            await receipts[0].wait()
        while held.seen < 3:  # noqa: ASYNC110  # the rule has no event
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert arrived(broker) == []
        held.release()
        for receipt in receipts[1:]:
            await receipt.wait()
    assert arrived(broker) == [b"1", b"2"]


@pytest.mark.parametrize("stable", [False, True])
async def test_a_broker_that_ends_connections_before_connack_does_not_do_it_over_a_message(
    autojump_clock: MockClock, broker: MemoryBroker, stable: bool
) -> None:
    config = memory_config(broker, probe="ping", stable_id=stable, quarantine_after=2)
    async with MQTTDriver(config) as driver:
        broker.faults.cut(Kind.PUBLISH, direction=Direction.IN, before=True)
        broker.faults.cut(Kind.CONNECT, times=5, direction=Direction.IN, before=True)
        await driver.publish("t", b"0", qos=1)
        assert driver.status().counters["attempts"] == 7
        assert driver.status().counters["quarantined"] == 0
    assert arrived(broker) == [b"0"]


async def test_suspects_that_a_rate_holds_back_are_sent_when_it_is_their_turn(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, refill_rate=10)) as driver:
        broker.stop()
        await settled()
        receipts = [driver.publish_nowait("t", str(number), qos=1) for number in range(5)]
        for receipt in receipts[:4]:
            assert isinstance(receipt, Outgoing)
            receipt.suspected = True  # as after two lost connections
        broker.start()
        with trio.fail_after(1000):
            for receipt in receipts:
                await receipt.wait()
    assert arrived(broker) == [b"0", b"1", b"2", b"3", b"4"]


async def test_an_acknowledged_message_ahead_takes_no_blame_and_the_count_is_each_message_s_own(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """The bad one stands behind good ones, whose acknowledgements come in time."""
    config = memory_config(broker, probe="ping", quarantine_after=2)
    async with MQTTDriver(config) as driver:
        broker.faults.cut(Kind.PUBLISH, first=3, times=1, direction=Direction.IN, before=True)
        receipts = [driver.publish_nowait("t", str(number), qos=1) for number in range(4)]
        await trio.sleep(1)
        broker.faults.cut(Kind.PUBLISH, first=1, times=1, direction=Direction.IN, before=True)
        driver.force_reconnect(even_if_live=True)
        for receipt in receipts:
            await receipt.wait()
        assert driver.status().counters["quarantined"] == 0
    assert sorted(arrived(broker)) == [b"0", b"1", b"2", b"3"]


async def test_a_network_that_breaks_at_other_times_too_blames_no_message(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """Each connection that reaches the message is lost with it, but so is one in between that does not."""
    config = memory_config(broker, probe="ping", quarantine_after=2)
    async with MQTTDriver(config) as driver:
        receipt = None
        with broker.faults.cut(Kind.PUBLISH, times=None, direction=Direction.IN, before=True):
            for _ in range(5):
                await driver.wait_live()
                receipt = receipt or driver.publish_nowait("t", b"x", qos=1)
                with broker.faults.cut(Kind.CONNACK, times=1, before=True):
                    await driver.wait_state(State.VALIDATING)
        assert receipt is not None
        result = await receipt.wait()
        assert result.attempts > 2
        assert driver.status().counters["quarantined"] == 0
    assert arrived(broker) == [b"x"]


Fault = Callable[[MemoryBroker], object]


@pytest.mark.parametrize(
    "fault",
    [
        lambda broker: broker.disconnect(reason_code=0x8B),  # the server shuts down
        lambda broker: broker.disconnect(reason_code=0x9F),  # connection rate exceeded
        lambda broker: broker.silence(),
    ],
    ids=["shutting down", "too many connections", "half-open"],
)
async def test_a_link_that_is_lost_for_a_reason_of_its_own_blames_no_message(
    autojump_clock: MockClock, broker: MemoryBroker, fault: Fault
) -> None:
    config = memory_config(broker, quarantine_after=1)
    async with MQTTDriver(config) as driver:
        for losses in range(1, 4):
            with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN):
                receipt = driver.publish_nowait("t", str(losses), qos=1)
                await settled()
                fault(broker)
                await trio.sleep(20)
            await receipt.wait()
        assert driver.status().counters["losses"] >= 3
        assert driver.status().counters["quarantined"] == 0


async def test_a_disconnect_that_names_a_fault_of_ours_blames_the_message(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, quarantine_after=1)) as driver:
        with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN):
            receipt = driver.publish_nowait("t", b"x", qos=1)
            await settled()
            broker.disconnect(reason_code=0x99)  # payload format invalid
            with pytest.raises(QuarantinedError, match="payload format invalid"):
                await receipt.wait()


async def test_it_can_be_switched_off(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    config = memory_config(broker, probe="ping", quarantine_after=0)
    async with MQTTDriver(config) as driver:
        broker.faults.cut(Kind.PUBLISH, times=20, direction=Direction.IN, before=True)
        receipt = driver.publish_nowait("t", b"x", qos=1)
        result = await receipt.wait()
        assert result.attempts == 21
    assert arrived(broker) == [b"x"]
