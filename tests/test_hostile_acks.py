"""A broker whose acknowledgements are wrong, or that makes us answer and does not listen."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, Message, MQTTDriver
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._writer import Writer
from trio_mqtt_driver.testing import Ack, Connack, Kind, MemoryBroker, Publish, encode, open_pipe

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.mark.parametrize(
    "qos, lost, first_byte",
    [(1, Kind.PUBACK, 0x40), (2, Kind.PUBREC, 0x50), (2, Kind.PUBCOMP, 0x70)],
    ids=["PUBACK", "PUBREC", "PUBCOMP"],
)
async def test_an_acknowledgement_with_an_unknown_code_ends_the_link_and_loses_no_message(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, lost: Kind, first_byte: int
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="5", probe="ping")) as driver:
        with broker.faults.drop(lost):
            receipt = driver.publish_nowait("a", b"precious", qos=qos)
            await settled()
            broker.send(driver.client_id or "", bytes((first_byte, 3, 0, 1, 0x55)))
            await settled()
        words = f"ProtocolError: malformed packet: {lost.name} with unknown reason code 0x55"
        assert words in (driver.status().last_error or "")
        with trio.fail_after(60):
            result = await receipt.wait()
        assert (result.generation, result.attempts) == (2, 2)
        assert driver.status().queued == driver.status().in_flight == 0
    assert not broker.violations


@pytest.mark.parametrize("code", [0x92, 0x97], ids=hex)
async def test_a_message_that_pubrec_accepted_is_delivered_whatever_pubcomp_says(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, code: int
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="5", probe="ping")) as driver:
        with broker.faults.drop(Kind.PUBCOMP):
            receipt = driver.publish_nowait("a", b"x", qos=2)
            await settled()
        broker.send(driver.client_id or "", bytes((0x70, 3, 0, 1, code)))
        assert not (await receipt.wait()).reason_code.is_failure
        assert driver.generation == 1


async def test_with_3_1_1_more_qos_2_messages_than_the_receive_maximum_do_not_stop_the_link(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    """3.1.1 has no Receive Maximum. The PUBREL that makes room is among what is still to be read."""
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker, protocol="3.1.1", receive_maximum=5)) as driver:
        await driver.subscribe("a", lambda message: got.append(message.payload), qos=2)
        for number in range(12):
            broker.publish("a", b"%d" % number, qos=2)
        await trio.sleep(1)
        assert got == [b"%d" % number for number in range(12)]
        with trio.fail_after(1):
            await driver.publish("b", qos=1)
        assert driver.status().unacknowledged == 0
        assert driver.generation == 1


async def test_with_3_1_1_qos_2_messages_whose_handler_is_stuck_still_pause_reading(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    release = trio.Event()
    got: list[bytes] = []

    async def handle(message: Message[bytes]) -> None:
        await release.wait()
        got.append(message.payload)

    async with MQTTDriver(memory_config(broker, protocol="3.1.1", receive_maximum=2)) as driver:
        await driver.subscribe("a", handle, qos=2)
        for number in range(12):
            broker.publish("a", b"%d" % number, qos=2)
            await settled()
        await trio.sleep(100)
        assert driver.status().unacknowledged == 3
        release.set()
        await trio.sleep(1)
        assert got == [b"%d" % number for number in range(12)]
        assert driver.generation == 1


FLOOD = 16 * 2**20
PIECE = 65536


@pytest.mark.parametrize(
    "packet",
    [
        Ack(kind=Kind.PUBREL, packet_id=7),
        Ack(kind=Kind.PUBREC, packet_id=7),
        Publish(topic="a", qos=1, packet_id=7),
    ],
    ids=["PUBREL", "PUBREC", "PUBLISH"],
)
async def test_a_peer_that_makes_us_answer_and_reads_nothing_is_given_up_before_memory_is(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, broker: MemoryBroker, packet: Ack | Publish
) -> None:
    taken = 0

    async def flood(stream: trio.abc.Stream) -> None:
        nonlocal taken
        await stream.receive_some()
        await stream.send_all(encode(Connack(), 5))
        await stream.receive_some()
        await stream.send_all(b"\xd0\x00")
        data = encode(packet, 5)
        data *= PIECE // len(data)
        try:
            while taken < FLOOD:
                await stream.send_all(data)
                taken += len(data)
            await trio.sleep_forever()
        except trio.BrokenResourceError:
            pass

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        if taken:
            return await broker.connect_stream()
        await trio.lowlevel.checkpoint()
        client, server = open_pipe(capacity=PIECE)
        nursery.start_soon(flood, server)
        return client

    config = memory_config(broker, protocol="5", probe="ping", receive_maximum=65535, open_stream=open_stream)
    async with MQTTDriver(config) as driver:
        await trio.sleep(3)  # and not only when a PINGREQ stays unanswered
        assert taken <= FLOOD // 4
        errors = [event.error for event in driver.status().history if event.error is not None]
        assert len(errors) == 1
        assert errors[0].startswith(("ConnectionLostError", "ProtocolError"))
        assert (await driver.publish("a", qos=1)).generation == 2


class Greedy(trio.abc.SendStream):
    """Takes everything at once; each time something more to say has come up in the meantime."""

    def __init__(self) -> None:
        self.rounds = 0
        self.taken = 0
        self.writer: Writer | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.taken += len(data)
        assert self.writer is not None
        if self.rounds:
            self.rounds -= 1
            self.writer.answer(bytes(1000))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_answers_that_the_peer_does_read_are_not_held_against_it(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """On a busy link the way out may never be idle."""
    most = 0
    stream = Greedy()
    stream.rounds = 100

    def flushed() -> None:
        nonlocal most
        most = max(most, writer.answers)

    stream.writer = writer = Writer(trio.StapledStream(stream, open_pipe()[0]), Counters(), flushed)
    nursery.start_soon(writer.run, lambda: None)
    writer.answer(bytes(1000))
    await settled()
    assert writer.flushed == stream.taken == 101_000
    assert most <= 2000
