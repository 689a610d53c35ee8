"""Every kind of fault in every stage of a connection is named in status, history and log; the way back is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import TracedStream
from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, Event, Message, MQTTDriver, Receipt, State
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked
Fault = Callable[[MemoryBroker, str], None]

ONE_ATTEMPT = [State.CONNECTING, State.VALIDATING, State.REPLAYING, State.LIVE]


@attrs.frozen
class Stage:
    """Where a connection is kept by holding back the ``awaited`` packet, and how it is half-open there."""

    state: State
    awaited: Kind | None
    qos: int | None
    half_open: str
    found_after: float

    @property
    def words(self) -> str:
        return "connection lost" if self.state is State.LIVE else "attempt failed"

    def error(self, fault: Fault) -> str:
        if fault is half_open:
            return self.half_open
        if self.state is State.CONNECTING and fault in (malformed, disconnect):
            return "ProtocolError: the first packet must be CONNACK [MQTT-3.2.0-1]"
        return FAULTS[fault]


LATE = "AckTimeoutError: no acknowledgement within ack_timeout=5 s and no answer to PINGREQ"
STAGES = {
    "connecting": Stage(
        State.CONNECTING,
        Kind.CONNACK,
        None,
        "TransportError: no CONNACK from mqtt://memory:1883 in connect_timeout",
        10,
    ),
    "validating": Stage(State.VALIDATING, Kind.PUBACK, None, "ProbeError: the test publish to ", 5),
    "replaying": Stage(State.REPLAYING, Kind.SUBACK, None, "AckTimeoutError: SUBSCRIBE was not answered", 10),
    "idle": Stage(State.LIVE, None, None, "KeepAliveError: no answer to PINGREQ within ping_timeout=10 s", 26),
    "publishing": Stage(State.LIVE, Kind.PUBACK, 1, LATE, 10),
    "publishing QoS 2": Stage(State.LIVE, Kind.PUBREC, 2, LATE, 10),
    "releasing QoS 2": Stage(State.LIVE, Kind.PUBCOMP, 2, LATE, 10),
}


def eof(broker: MemoryBroker, client_id: str) -> None:
    broker.drop(client_id)


def reset(broker: MemoryBroker, client_id: str) -> None:
    broker.drop(client_id, reset=True)


def malformed(broker: MemoryBroker, client_id: str) -> None:
    broker.send(client_id, b"\x36\x03\x00\x01a")


def disconnect(broker: MemoryBroker, client_id: str) -> None:
    broker.disconnect(client_id, reason_code=0x8B)


def half_open(broker: MemoryBroker, client_id: str) -> None:
    broker.silence(client_id)


FAULTS: dict[Fault, str] = {
    eof: "ConnectionLostError: the broker closed the connection",
    reset: "ConnectionLostError: reading from the broker: Connection reset by peer",
    malformed: "ProtocolError: malformed packet",
    disconnect: "ServerDisconnectedError: the broker disconnected us: server shutting down (0x8b)",
    half_open: "",  # each stage has its own
}
MATRIX = [
    pytest.param(protocol, stage, fault, id=f"{protocol}-{stage}-{fault.__name__}")
    for protocol in ("5", "3.1.1")
    for stage in STAGES
    for fault in FAULTS
    if protocol == "5" or fault is not disconnect  # 3.1.1 brokers have no DISCONNECT
]


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def check_named(
    driver: MQTTDriver, caplog: pytest.LogCaptureFixture, before: tuple[Event, ...], words: str, error: str
) -> float:
    """The cause is in the status, and once in history and log. Returns when it was found."""
    assert str(driver.status().last_error).startswith(error)
    named = [event for event in driver.status().history[len(before) :] if event.error is not None]
    assert [event.kind for event in named] == [State.BACKING_OFF.value]
    assert named[0].text.startswith(f"{words}: {error}")
    assert str(named[0].error).startswith(error)
    assert len([record for record in caplog.records if f"{words}: {error}" in record.getMessage()]) == 1
    return named[0].at


async def check_way_back(
    driver: MQTTDriver, broker: MemoryBroker, received: list[Message[bytes]], receipt: Receipt | None
) -> None:
    """One whole attempt leads to a link that works in both directions, with everything that was wanted before."""
    with trio.fail_after(60):
        await driver.wait_live()
        assert driver.generation == 2
        if receipt is not None:
            assert (await receipt.wait()).generation == 2
        assert (await driver.publish("out", b"again", qos=1)).generation == 2
    assert [event.kind for event in driver.status().history[-4:]] == [state.value for state in ONE_ATTEMPT]
    assert list(broker.subscriptions(str(driver.client_id))) == ["in"]
    broker.publish("in", b"back")
    await settled()
    assert [(message.payload, message.generation) for message in received] == [(b"back", 2)]
    assert broker.clients == [driver.client_id]
    assert not broker.violations
    assert driver.status().counters["connections"] == 2


@pytest.mark.parametrize("protocol, name, fault", MATRIX)
async def test_a_fault_is_named_and_the_way_back_is_the_same(
    broker: MemoryBroker,
    caplog: pytest.LogCaptureFixture,
    protocol: str,
    name: str,
    fault: Fault,
    autojump_clock: MockClock,
) -> None:
    caplog.set_level(logging.INFO)
    stage = STAGES[name]
    received: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("in", received.append)
        await trio.sleep(100)
        hold = None if stage.awaited is None else broker.faults.hold(stage.awaited)
        receipt = None if stage.qos is None else driver.publish_nowait("out", b"precious", qos=stage.qos)
        if stage.state is not State.LIVE:
            broker.drop()  # so that the fault comes in the next attempt
        if hold is not None:
            await broker.wait_for(lambda: hold.held, f"held {stage.awaited}")
        await settled()
        status = driver.status()
        assert status.state is stage.state
        fault(broker, broker.clients[-1])
        with trio.fail_after(60):
            assert await driver.wait_state(State.BACKING_OFF, State.PAUSED) is State.BACKING_OFF
        if hold is not None:
            hold.remove()
        found_at = check_named(driver, caplog, status.history, stage.words, stage.error(fault))
        assert found_at == 100 + (stage.found_after if fault is half_open else 0)
        counter = "losses" if stage.state is State.LIVE else "failures"
        assert driver.status().counters[counter] == status.counters[counter] + 1
        await check_way_back(driver, broker, received, receipt)


# -- a write that fails -----------------------------------------------------------------------------------------------


class Cable:
    """Opens streams; one of them breaks, once, when the packet that was chosen is to be written."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self.breaks_at: int | None = None

    async def open(self, _endpoint: Endpoint) -> trio.abc.Stream:
        return _Breakable(await self._broker.connect_stream(), self)


class _Breakable(TracedStream):
    def __init__(self, stream: trio.abc.Stream, cable: Cable) -> None:
        super().__init__(stream, lambda: None)
        self._cable = cable

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if data[0] == self._cable.breaks_at:
            self._cable.breaks_at = None
            self.broken = trio.BrokenResourceError("the cable is out")
        await super().send_all(data)


@pytest.mark.parametrize(
    "state, first_byte, publishes",
    [
        (State.CONNECTING, 0x10, False),
        (State.VALIDATING, 0x32, False),
        (State.REPLAYING, 0x82, False),
        (State.LIVE, 0xC0, False),
        (State.LIVE, 0x32, True),
    ],
    ids=["CONNECT", "test publish", "SUBSCRIBE", "PINGREQ", "PUBLISH"],
)
async def test_a_write_that_fails_is_named_and_the_way_back_is_the_same(
    broker: MemoryBroker,
    caplog: pytest.LogCaptureFixture,
    state: State,
    first_byte: int,
    publishes: bool,
    autojump_clock: MockClock,
) -> None:
    caplog.set_level(logging.INFO)
    cable = Cable(broker)
    received: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, protocol="5", open_stream=cable.open)) as driver:
        await driver.subscribe("in", received.append)
        await trio.sleep(100)
        cable.breaks_at = first_byte
        if state is not State.LIVE:
            broker.drop()
            with trio.fail_after(60):
                await driver.wait_state(state)
        status = driver.status()
        receipt = driver.publish_nowait("out", b"precious", qos=1) if publishes else None
        with trio.fail_after(60):
            await driver.wait_state(State.BACKING_OFF)
        words = "connection lost" if state is State.LIVE else "attempt failed"
        check_named(
            driver, caplog, status.history, words, "ConnectionLostError: writing to the broker: the cable is out"
        )
        await check_way_back(driver, broker, received, receipt)
