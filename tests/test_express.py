"""The express lane does what the other way does, byte for byte, and leaves alone what is not for it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests.peers import memory_config
from trio_mqtt_driver import (
    DriverConfig,
    Endpoint,
    Message,
    MQTTDriver,
    NotConnectedError,
    OfflinePolicy,
    OutboxFullError,
    PublishRefusedError,
    PublishResult,
    QoS,
    Receipt,
    ServerLimitError,
)
from trio_mqtt_driver._arguments import make_outgoing
from trio_mqtt_driver._express import ExpressLane
from trio_mqtt_driver._properties import PropertyBlocks
from trio_mqtt_driver._publisher import Publisher
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker, Publish

# pyright: reportPrivateUsage=false

settled = trio.testing.wait_all_tasks_blocked

Call = dict[str, Any]


class Recorder(trio.abc.Stream):
    """Keeps what is written."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self.written = bytearray()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._inner.aclose()


def lane_of(driver: MQTTDriver) -> Any:
    live = driver._supervisor.live
    assert live is not None
    return live.sender.express


def told(exc: Exception) -> tuple[type, str]:
    return type(exc), str(exc)


async def outcome(publishing: Awaitable[PublishResult]) -> object:
    try:
        result = await publishing
    except Exception as exc:  # noqa: BLE001  # whatever it is, both must have it
        return told(exc)
    return result.reason_code, result.generation, result.attempts, result.queued


async def run_calls(
    calls: list[Call], *, awaited: bool, express: bool, limits: dict[str, Any], options: Call
) -> object:
    """Everything that can be seen of the calls."""
    streams: list[Recorder] = []

    async with trio.open_nursery() as nursery:
        peer = MemoryBroker(nursery, **limits)

        async def open_stream(_endpoint: Endpoint) -> trio.abc.Stream:
            streams.append(Recorder(await peer.connect_stream()))
            return streams[-1]

        config: DriverConfig = memory_config(peer, open_stream=open_stream, **options)
        async with MQTTDriver(config) as driver:
            await settled()
            if not express:
                lane_of(driver).close()
            before = len(streams[0].written)
            outcomes: list[object] = []
            receipts: list[Receipt] = []

            def hand_over(call: Call) -> None:
                try:
                    receipts.append(driver.publish_nowait(**call))
                except Exception as exc:  # noqa: BLE001  # whatever it is, both must have it
                    outcomes.append(told(exc))

            for call in calls:
                if awaited:
                    outcomes.append(await outcome(driver.publish(**call)))
                else:
                    hand_over(call)
            outcomes += [await outcome(receipt.wait()) for receipt in receipts]
            await settled()
            counters = driver.status().counters
            seen = {name: counters[name] for name in ("messages_out", "bytes_out", "outbox_refused", "refused")}
            written = bytes(streams[0].written[before:])
            assert driver.undelivered == ()
            live = driver._supervisor.live
            assert live is not None
            assert live._writer.waiting == 0  # else it has miscounted
        nursery.cancel_scope.cancel()
    assert not peer.violations
    return outcomes, written, seen


@pytest.mark.parametrize("in_flight", [100, 1], ids=["at once", "from the outbox"])
@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("size", [0, 100, *range(120, 136), *range(1000, 1026), 16_360, *range(16_370, 16_390)])
async def test_packets_of_every_length_are_the_same_and_counted(qos: int, size: int, in_flight: int) -> None:
    calls = [{"topic": "a/b", "payload": bytes(size), "qos": qos, **more} for more in ({}, {"content_type": "c"}, {})]
    one, other = [
        await run_calls(calls, awaited=False, express=express, limits={}, options={"in_flight": in_flight})
        for express in (True, False)
    ]
    assert one == other


WAYS: dict[str, tuple[Any, Call]] = {
    "QoS 0": (ExpressLane.publish_0, {"qos": 0}),
    "QoS 1": (ExpressLane.publish_1, {"qos": 1}),
    "QoS 1, queued": (ExpressLane.publish_1, {"qos": 1, "content_type": "a"}),
    "QoS 2": (Publisher._send_at_once, {"qos": 2}),
    "QoS 2, queued": (Publisher._queue, {"qos": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_does_not_tear_a_publish(way: str) -> None:
    """Wherever it lands, the message is handed over as a whole or not at all, and it is raised thereafter."""
    function, options = WAYS[way]
    lines = 0
    while True:
        landed = trio.run(interrupted_publish, function, options, lines, way.endswith("queued"))
        if not landed:
            break
        lines += 1
    assert lines > 3


class Interruption:
    """For ``sys.settrace``: Ctrl-C after so many ``lines`` of a function, if it has so many."""

    def __init__(self, function: Any, lines: int) -> None:
        self._code = function.__code__
        self._left = lines
        self.landed = False

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code is not self._code:
            return None
        if event == "line" and not self.landed:
            self._left -= 1
            if self._left < 0:
                self.landed = True
                signal.raise_signal(signal.SIGINT)
        return self.trace


async def interrupted_publish(function: Any, options: Call, lines: int, full: bool) -> bool:
    """Publish, with a signal after so many ``lines`` of ``function``; False if it does not have so many."""
    interruption = Interruption(function, lines)
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        async with MQTTDriver(memory_config(broker, in_flight=1)) as driver:
            await settled()
            before = [driver.publish_nowait("b", qos=2)] if full else []
            tracing = sys.gettrace()
            sys.settrace(interruption.trace)
            try:
                receipt = driver.publish_nowait("a", b"x", **options)
            finally:
                sys.settrace(tracing)
            if interruption.landed:
                with pytest.raises(KeyboardInterrupt):
                    await trio.lowlevel.checkpoint()
            for one in (*before, receipt):
                assert (await one.wait()).attempts == 1
            status = driver.status()
            assert (status.queued, status.in_flight) == (0, 0)
            assert driver._outbox.accepted == driver._outbox.accepted_bytes == 0
        nursery.cancel_scope.cancel()
    return interruption.landed


def test_ctrl_c_does_not_tear_what_leaves_the_outbox() -> None:
    """Wherever it lands, each message is in the outbox or in the window, and is sent once."""
    lines = 0
    while trio.run(interrupted_refill, lines):
        lines += 1
    assert lines > 30


async def interrupted_refill(lines: int) -> bool:
    """Publish more than the window holds, with a signal after so many ``lines`` of ``ExpressLane.refill``."""
    interruption = Interruption(ExpressLane.refill, lines)
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        async with MQTTDriver(memory_config(broker, in_flight=2)) as driver:
            await settled()
            receipts = [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(6)]
            caught = False
            tracing = sys.gettrace()
            sys.settrace(interruption.trace)
            try:
                await receipts[-1].wait()
            except KeyboardInterrupt:
                caught = True
            finally:
                sys.settrace(tracing)
            if interruption.landed and not caught:
                with pytest.raises(KeyboardInterrupt):
                    await trio.lowlevel.checkpoint()
            for one in receipts:
                assert (await one.wait()).attempts == 1
            status = driver.status()
            assert (status.queued, status.in_flight) == (0, 0)
            assert driver._outbox.accepted == driver._outbox.accepted_bytes == 0
        payloads = [packet.payload for _, packet in broker.received if isinstance(packet, Publish)]
        assert payloads[1:] == [b"%d" % number for number in range(6)]  # behind the test publish
        nursery.cancel_scope.cancel()
    return interruption.landed


class Odd:
    """No payload."""


topics = st.sampled_from(
    ["a", "plant/7/temperature", "ä/ü", "t" * 300, "", "a/+", "a\0b", "x" * 65_536, b"a", ["a"], 1]
)
payloads = st.sampled_from(
    [b"", b"x" * 64, b"x" * 120, b"x" * 130, b"y" * 900, b"z" * 20_000, bytearray(b"b"), "text", None, {"a": 1}, Odd()]
)
properties = st.sampled_from(
    [
        {},
        {"content_type": "text/plain"},
        {"content_type": None},
        {"content_type": "text/plain", "user_properties": (("a", "1"), ("b", "2"))},
        {"user_properties": [("a", "1")]},
        {"user_properties": (["a", "1"],)},
        {"user_properties": ((1, "1"),)},
        {"response_topic": "a/b"},
        {"response_topic": "a/#"},
        {"content_type": 5},
        {"content_type": "c" * 400},
        {"correlation_data": b"1"},
        {"message_expiry": 60},
        {"payload_format": 1},
        {"unknown": 1},
    ]
)
calls = st.builds(
    lambda topic, payload, qos, more, other: {"topic": topic, "payload": payload, "qos": qos, **more, **other},
    topics,
    payloads,
    st.sampled_from([0, 1, 1, 2, QoS.AT_LEAST_ONCE, True, False, 3, None]),
    properties,
    st.sampled_from(
        [{}, {}, {}, {"retain": True}, {"retain": 0}, {"priority": 1}, {"priority": 11}, {"offline": "fail"}]
    ),
)


@given(
    calls=st.lists(calls, max_size=12),
    awaited=st.booleans(),
    version=st.sampled_from(["5", "3.1.1"]),
    limits=st.sampled_from(
        [{}, {}, {"maximum_qos": 0}, {"maximum_packet_size": 150}, {"receive_maximum": 2}, {"retain_available": False}]
    ),
    options=st.sampled_from(
        [
            {},
            {"write_buffer": 1024},
            {"outbox_messages": 2, "outbox_full": "fail"},
            {"in_flight": 1},
            {"topic_aliases": 5},
            {"offline": "queue"},
            {"publish_timeout": 100},
        ]
    ),
)
def test_it_does_what_the_other_way_does(
    calls: list[Call], awaited: bool, version: str, limits: dict[str, Any], options: dict[str, Any]
) -> None:
    if version == "3.1.1":
        limits = {}

    def run(express: bool) -> object:
        return trio.run(
            lambda: run_calls(
                calls,
                awaited=awaited,
                express=express,
                limits=limits,
                options={"protocol": version, "client_id": "x", "probe": "ping", **options},
            ),
            clock=trio.testing.MockClock(autojump_threshold=0),
        )

    assert run(express=True) == run(express=False)


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("limits", [{"maximum_packet_size": 100}, {"maximum_qos": 0}])
def test_what_comes_near_a_limit_is_decided_as_the_other_way_decides(limits: dict[str, Any], qos: int) -> None:
    calls = [{"topic": "a/b", "payload": bytes(size), "qos": qos} for size in range(70, 105)]
    options = {"client_id": "x", "probe": "ping"}

    def run(express: bool) -> object:
        return trio.run(
            lambda: run_calls(calls, awaited=False, express=express, limits=limits, options=options),
            clock=trio.testing.MockClock(autojump_threshold=0),
        )

    assert run(express=True) == run(express=False)


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"payload": b"x" * 200},
        {"payload": b"x" * 200, "qos": 1},
        {"qos": QoS.AT_LEAST_ONCE, "content_type": "text/plain"},
        {"user_properties": (("a", "b"),)},
    ],
)
async def test_plain_publishes_take_it(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, call: Call
) -> None:
    """Else the tests above would compare nothing."""
    async with MQTTDriver(memory_config(broker)) as driver:
        lane = lane_of(driver)
        used = 0

        def count(name: str) -> None:
            original = getattr(lane, name)

            def publish(*args: Any) -> Any:
                nonlocal used
                done = original(*args)
                used += done is not None
                return done

            setattr(lane, name, publish)

        count("publish_0")
        count("publish_1")
        await driver.publish("a", **call)
        await driver.publish_nowait("a", **call).wait()
    assert used == 2


async def test_a_receipt_of_qos_0_is_done_at_once(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        receipt = driver.publish_nowait("a", b"1")
        assert receipt.done
        assert repr(receipt) == "<Receipt qos=0 sent>"
        result = await receipt.wait()
        assert (result.generation, result.attempts, result.latency) == (1, 1, 0.0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await receipt.wait()
        assert scope.cancelled_caught


async def test_it_is_closed_while_the_link_is_down_and_open_on_the_next(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        lane = lane_of(driver)
        driver.pause()
        await settled()
        # Whoever still had the old connection's lane would come to nothing.
        assert lane.publish_0("a", b"x", {}) is None
        assert lane.publish_1("a", b"x", {}) is None
        waiting = [driver.publish_nowait("a", b"%d" % number, qos=qos) for number, qos in enumerate((0, 1))]
        assert not any(receipt.done for receipt in waiting)
        with pytest.raises(NotConnectedError):
            driver.publish_nowait("a", offline="fail")
        driver.resume()
        for receipt in waiting:
            await receipt.wait()
        assert (await driver.publish("a", b"2")).generation == 2
        await settled()
    assert [one.payload for one in broker.published if one.topic == "a"] == [b"0", b"1", b"2"]


async def test_messages_of_both_ways_keep_their_order(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    """Also when the write buffer and the window fill up in between."""
    received: list[int] = []

    def handle(message: Message[bytes]) -> None:
        received.append(int(message.payload))

    async with MQTTDriver(memory_config(broker, write_buffer=1024, in_flight=5)) as driver:
        await driver.subscribe("a", handle, qos=1)
        receipts = [
            driver.publish_nowait("a", b"%04d" % number, qos=1, priority=0, retain=False, offline=offline)
            for number in range(200)
            for offline in ("wait" if number % 3 == 1 else None,)
        ]
        for receipt in receipts:
            await receipt.wait()
        await settled()
    assert received == list(range(200))


@pytest.mark.parametrize("released", [False, True])
async def test_its_packet_identifiers_go_round_and_leave_out_those_in_use(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, *, released: bool
) -> None:
    async with MQTTDriver(memory_config(broker, probe="ping")) as driver:
        window = lane_of(driver)._window
        window._ids.last = 65533
        broker.faults.hold(Kind.PUBCOMP if released else Kind.PUBACK, times=1)
        driver.publish_nowait("a", b"held", qos=2 if released else 1)
        await settled()
        assert len(window) == 1
        window._ids.last = 65533
        window._ids.used.add(2)
        receipts = [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(3)]
        assert sorted(set(window._sent) - {65534}) == [1, 3, 65535]
        for receipt in receipts:
            await receipt.wait()
        driver.force_reconnect(even_if_live=True)
    assert sorted(one.payload for one in broker.published if one.topic == "a")[:3] == [b"0", b"1", b"2"]
    assert not broker.violations


async def test_it_does_not_overtake_what_the_refill_rate_holds_back(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, refill_rate=1)) as driver:
        driver.pause()
        receipts = [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(3)]
        driver.resume()
        await driver.wait_live()
        receipts += [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(3, 5)]
        for receipt in receipts:
            await receipt.wait()
    assert [one.payload for one in broker.published if one.topic == "a"] == [b"%d" % number for number in range(5)]


@pytest.mark.parametrize("bound", [{"outbox_messages": 2}, {"outbox_bytes": 1024}])
async def test_the_bounds_of_the_outbox_hold(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, bound: dict[str, int]
) -> None:
    async with MQTTDriver(memory_config(broker, **bound)) as driver:
        receipts = [driver.publish_nowait("a", bytes(200), qos=1) for _ in range(2)]
        with pytest.raises(OutboxFullError, match=next(iter(bound))):
            driver.publish_nowait("a", bytes(300), qos=1)
        for receipt in receipts:
            await receipt.wait()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("properties", [{}, {"content_type": "text/plain"}])
async def test_a_message_counts_for_as_many_bytes_as_on_the_other_way(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, version: str, properties: Any
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=version)) as driver:
        lane, publish = lane_of(driver), ("a/ä", bytes(200))
        other = make_outgoing(*publish, 1, False, 0, OfflinePolicy.WAIT, properties)
        sent = lane.publish_1(*publish, properties)
        if sent is None:
            assert (version, properties) == ("3.1.1", {"content_type": "text/plain"})
        else:
            assert (sent.size, lane._outbox.accepted_bytes) == (other.size, other.size)


async def test_what_is_lost_on_the_way_is_sent_again(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        broker.faults.cut(Kind.PUBLISH, direction=Direction.IN, before=True)
        result = await driver.publish("a", b"1", qos=1, content_type="text/plain")
        assert result.attempts == 2
    (message,) = [one for one in broker.published if one.topic == "a"]
    assert message.properties["content_type"] == "text/plain"


async def test_more_topics_than_are_kept_cost_time_only(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_mqtt_driver._express._CACHED_TOPICS", 2)
    topics = ["a", "b", "c", "a", "t" * 300, "b"]
    async with MQTTDriver(memory_config(broker, probe="ping")) as driver:
        for topic in topics:
            await driver.publish(topic, qos=1)
    assert [one.topic for one in broker.published] == topics


async def test_a_refusal_reaches_whoever_published(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, acl=lambda access: access.topic != "secret")
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(PublishRefusedError):
            await driver.publish("secret", qos=1)
        assert isinstance(await driver.publish("open", qos=1), PublishResult)


def test_a_topic_is_kept_for_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_mqtt_driver._properties._CACHED_BLOCKS", 2)
    blocks = PropertyBlocks()
    for name in ("a", "b", "c", "a"):
        assert blocks.find({"content_type": name}) == b"\x04\x03\0\1" + name.encode()
    assert blocks.find({"content_type": "x" * 300}) is not None
    assert blocks.find({"message_expiry": 1}) is None


async def test_what_waited_for_the_window_is_sent_on_whatever_link_there_is(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It was made for MQTT 5, waits in the outbox, and leaves on a link that speaks 3.1.1, or has topic aliases."""
    broker = MemoryBroker(nursery)
    config = memory_config(broker, in_flight=2, probe="ping")
    async with MQTTDriver(config) as driver:
        broker.faults.hold(Kind.PUBACK, times=2)
        receipts = [
            driver.publish_nowait("a/b/c", b"%d" % number, qos=1, content_type="text/plain") for number in range(4)
        ]
        assert [one.attempts for one in driver.undelivered] == [1, 1, 0, 0]
        driver.apply_settings(config.evolve(protocol="3.1.1"))
        for receipt in receipts:
            result = await receipt.wait()
            assert (result.generation, result.attempts) in ((2, 1), (2, 2))
        broker.faults.hold(Kind.PUBACK, times=2)
        driver.apply_settings(config.evolve(protocol="5"))
        await driver.wait_live()
        receipts = [driver.publish_nowait("a/b/c", b"%d" % number, qos=1) for number in range(4, 8)]
        driver.apply_settings(config.evolve(topic_aliases=5))
        for receipt in receipts:
            await receipt.wait()
    arrived = [int(one.payload) for one in broker.published if one.topic == "a/b/c"]
    assert sorted(set(arrived)) == list(range(8))
    assert not broker.violations


# What waits for room in the window was made for the lane, and yet may not be for it when there is room.


async def test_what_waited_for_the_window_is_refused_if_the_next_broker_takes_no_such_packets(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    first, second = MemoryBroker(nursery), MemoryBroker(nursery, maximum_packet_size=300)
    config = memory_config(first, in_flight=1)
    async with MQTTDriver(config) as driver:
        await settled()
        first.faults.hold(Kind.PUBACK)
        receipts = [driver.publish_nowait("a", bytes(size), qos=1) for size in (1, 2, 1000, 3, 1000, 4)]
        driver.apply_settings(config.evolve(open_stream=lambda _endpoint: second.connect_stream()))
        await driver.wait_live()
        for receipt, size in zip(receipts, (1, 2, 1000, 3, 1000, 4), strict=True):
            if size == 1000:
                with pytest.raises(ServerLimitError, match="300"):
                    await receipt.wait()
            else:
                await receipt.wait()
    assert [len(one.payload) for one in second.published if one.topic == "a"] == [1, 2, 3, 4]
    assert not second.violations


async def test_what_was_dropped_while_it_waited_for_the_window_is_not_sent(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    config = memory_config(broker, in_flight=1, outbox_messages=6, outbox_full="drop_oldest")
    async with MQTTDriver(config) as driver:
        await settled()
        held = broker.faults.hold(Kind.PUBACK, times=1)
        receipts = [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(8)]
        assert [receipt.done for receipt in receipts] == [False, True, True, *[False] * 5]
        held.remove()
        for receipt in (receipts[0], *receipts[3:]):
            await receipt.wait()
        assert driver._outbox.accepted == driver._outbox._waiting == 0
    assert [one.payload for one in broker.published if one.topic == "a"] == [b"0", *(b"%d" % n for n in range(3, 8))]


async def test_what_went_back_to_the_outbox_as_the_latest_leaves_no_trace_there(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Or the next message of its topic would be taken to supersede it while it is on its way."""
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker, in_flight=3, offline="latest")) as driver:
        await settled()
        broker.faults.hold(Kind.PUBACK, times=3)
        receipts = [driver.publish_nowait(topic, b"1", qos=1) for topic in "abc"]
        await settled()
        driver.apply_settings(driver.config.evolve(in_flight=1))
        await driver.wait_live()
        for receipt in receipts:
            assert (await receipt.wait()).attempts in (1, 2)
        assert driver._outbox._latest == {}
        assert driver._outbox.accepted == driver._outbox._waiting == 0


async def test_what_went_back_to_the_outbox_is_paced(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    config = memory_config(broker, in_flight=3, refill_rate=1)
    async with MQTTDriver(config) as driver:
        await settled()
        broker.faults.hold(Kind.PUBACK, times=3)
        receipts = [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(3)]
        await settled()
        driver.apply_settings(config.evolve(in_flight=1))
        await driver.wait_live()
        begin = trio.current_time()
        for number, receipt in enumerate(receipts):
            await receipt.wait()
            assert trio.current_time() - begin == pytest.approx(number, abs=0.2)


async def test_properties_that_wait_for_the_window_are_warned_of_if_the_next_link_cannot_take_them(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    broker = MemoryBroker(nursery)
    config = memory_config(broker, in_flight=1)
    async with MQTTDriver(config) as driver:
        await settled()
        broker.faults.hold(Kind.PUBACK, times=1)
        plain = [driver.publish_nowait("a", b"%d" % number, qos=1) for number in range(2)]
        with_properties = driver.publish_nowait("a", b"2", qos=1, content_type="text/plain")
        driver.apply_settings(config.evolve(protocol="3.1.1"))
        for receipt in (*plain, with_properties):
            await receipt.wait()
    assert caplog.text.count("properties of PUBLISH need MQTT 5") == 1


async def test_the_window_holds_when_what_leaves_the_outbox_is_written_at_once(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written makes room in the write buffer, which more may use: before the call that wrote it returns."""
    monkeypatch.setattr("trio_mqtt_driver._writer._QUIET", -1)
    broker = MemoryBroker(nursery, receive_maximum=20)
    port = await broker.listen()
    most = 0
    async with MQTTDriver(DriverConfig.from_url(f"mqtt://127.0.0.1:{port}", write_buffer=1024)) as driver:
        live = driver._supervisor.live
        assert live is not None
        held = broker.faults.hold(Kind.PUBACK, times=20)
        receipts = [driver.publish_nowait("a", bytes(300), qos=1) for _ in range(100)]
        await broker.wait_for(lambda: held.seen == 20, "a full window")
        held.release()  # all at once, so that there is room for more than the write buffer takes
        for receipt in receipts:
            most = max(most, live.sender.in_flight)
            await receipt.wait()
        assert most == 20
    assert not broker.violations
    nursery.cancel_scope.cancel()
