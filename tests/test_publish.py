"""What publish() promises: results, refusals, order, bounds, and what becomes of a message when the link is cut."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.dialing import TracedStream
from tests.peers import memory_config
from trio_mqtt_driver import (
    DriverClosedError,
    Endpoint,
    Message,
    MessageLostError,
    MQTTDriver,
    NotConnectedError,
    OutboxFullError,
    PayloadFormat,
    PublishRefusedError,
    PublishTimeoutError,
    ReasonCode,
    ServerLimitError,
    State,
)
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker, Publish

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def arrived(broker: MemoryBroker, topic: str) -> list[bytes]:
    """The payloads that the broker took on a topic, in order."""
    return [one.payload for one in broker.published if one.topic == topic]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_publish_returns_how_it_was_acknowledged(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, version: str, qos: int
) -> None:
    async with MQTTDriver(memory_config(broker, protocol=version)) as driver:
        await driver.subscribe("#", print)
        result = await driver.publish("a/b", b"x", qos=qos)
        await settled()
    assert arrived(broker, "a/b") == [b"x"]
    assert (result.reason_code, result.generation, result.attempts) == (ReasonCode.SUCCESS, 1, 1)
    assert result.latency == 0.0


async def test_a_success_code_that_says_more_is_returned(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        result = await driver.publish("nobody/listens", b"x", qos=1)
    assert result.reason_code is ReasonCode.NO_MATCHING_SUBSCRIBERS


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refused_publish_raises(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    broker.faults.refuse_publish("secret/#", 0x87)
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(PublishRefusedError, match=r"'secret/x'.*not authorized \(0x87\)") as caught:
            await driver.publish("secret/x", b"x", qos=qos)
        assert caught.value.reason_code is ReasonCode.NOT_AUTHORIZED
        await driver.publish("open", b"x", qos=qos)
        assert driver.generation == 1
        assert driver.status().in_flight == 0


@pytest.mark.parametrize("reset", [False, True], ids=["eof", "reset"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    "qos, kind, direction",
    [
        (1, Kind.PUBLISH, Direction.IN),
        (1, Kind.PUBACK, Direction.OUT),
        (2, Kind.PUBLISH, Direction.IN),
        (2, Kind.PUBREC, Direction.OUT),
        (2, Kind.PUBREL, Direction.IN),
        (2, Kind.PUBCOMP, Direction.OUT),
    ],
)
async def test_a_message_survives_a_cut_at_each_packet_of_its_exchange(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
    qos: int,
    kind: Kind,
    direction: Direction,
    before: bool,
    reset: bool,
) -> None:
    async with MQTTDriver(memory_config(broker, probe="ping")) as driver:
        broker.faults.cut(kind, direction=direction, before=before, reset=reset)
        result = await driver.publish("a", b"x", qos=qos)
        await trio.sleep(60)  # the acknowledgement may have come just before the cut
        assert (driver.state, driver.generation) == (State.LIVE, 2)
        assert (driver.status().queued, driver.status().in_flight) == (0, 0)
    copies = len(arrived(broker, "a"))
    # On a new session nothing of the old exchange is known: at least once, and once where the broker never saw it.
    never_seen = kind is Kind.PUBLISH and before
    assert copies == 1 if never_seen else 1 <= copies <= 2
    assert result.generation == result.attempts


@pytest.mark.parametrize("qos", [1, 2])
async def test_an_unacknowledged_message_is_sent_again_with_a_new_exchange(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    async with MQTTDriver(memory_config(broker, probe="ping", ack_timeout=5)) as driver:
        broker.faults.drop(Kind.PUBACK if qos == 1 else Kind.PUBREC, times=1)
        result = await driver.publish("a", b"x", qos=qos)
        assert (result.generation, result.attempts) == (2, 2)
        assert result.latency >= 5.0
    sent = [packet for _, packet in broker.received if isinstance(packet, Publish) and packet.topic == "a"]
    assert [packet.dup for packet in sent] == [False, False]


async def test_order_per_topic_is_kept_across_reconnects(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    count = 200
    async with MQTTDriver(memory_config(broker, in_flight=10)) as driver:
        for acknowledged in (30, 60, 120):
            broker.faults.cut(Kind.PUBACK, first=acknowledged, direction=Direction.OUT, before=True)
        receipts = [driver.publish_nowait("t", b"%03d" % number, qos=1) for number in range(count)]
        for receipt in receipts:
            await receipt.wait()
        assert driver.generation == 4
    first_seen = list(dict.fromkeys(arrived(broker, "t")))
    assert first_seen == [b"%03d" % number for number in range(count)]


@pytest.mark.parametrize("options, size", [({"receive_maximum": 7}, 7), ({"versions": (4,)}, 20)])
async def test_the_window_is_what_the_broker_allows(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, options: dict[str, object], size: int
) -> None:
    broker = MemoryBroker(nursery, **options)  # type: ignore[arg-type]
    async with MQTTDriver(memory_config(broker, ack_timeout=1000)) as driver:
        with broker.faults.hold(Kind.PUBACK):
            receipts = [driver.publish_nowait("t", b"%d" % number, qos=1) for number in range(50)]
            await settled()
            assert len(arrived(broker, "t")) == size
            assert (driver.status().in_flight, driver.status().queued) == (size, 50 - size)
        for receipt in receipts:
            await receipt.wait()
    assert not broker.violations


async def test_server_limits_are_checked_at_the_call(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, maximum_qos=1, retain_available=False, maximum_packet_size=1000)
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(ServerLimitError, match="qos is 2, but the broker's Maximum QoS is 1"):
            await driver.publish("t", b"x", qos=2)
        with pytest.raises(ServerLimitError, match="retain is True"):
            await driver.publish("t", b"x", retain=True)
        with pytest.raises(ServerLimitError, match="Maximum Packet Size is 1000"):
            driver.publish_nowait("t", b"x" * 1000)
        assert driver.state is State.LIVE


async def test_a_queued_message_that_the_next_broker_cannot_take_fails_alone(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, maximum_qos=1)
    async with MQTTDriver(memory_config(broker), start="background") as driver:
        bad = driver.publish_nowait("t", b"bad", qos=2)
        good = driver.publish_nowait("t", b"good", qos=1)
        with pytest.raises(ServerLimitError):
            await bad.wait()
        await good.wait()
    assert arrived(broker, "t") == [b"good"]


async def test_while_the_link_is_down_publish_waits_nowait_queues_and_fail_fails(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        broker.stop()
        await settled()
        with pytest.raises(NotConnectedError, match="link is down"):
            await driver.publish("t", b"fail", qos=1, offline="fail")
        receipts = [driver.publish_nowait("t", b"%d" % qos, qos=qos) for qos in (0, 1, 2)]
        assert not any(receipt.done for receipt in receipts)
        assert "waiting" in repr(receipts[0])
        nursery_done = trio.Event()

        async def wait() -> None:
            await driver.publish("t", b"waited", qos=1)
            nursery_done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(100)
            assert not nursery_done.is_set()
            broker.start()
        for receipt in receipts:
            await receipt.wait()
        assert "acknowledged" in repr(receipts[0])
    assert arrived(broker, "t") == [b"0", b"1", b"2", b"waited"]


async def test_a_publish_timeout_says_what_the_driver_knew(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, publish_timeout=20)) as driver:
        broker.stop()
        driver.publish_nowait("t", b"other", qos=1)
        with pytest.raises(PublishTimeoutError, match="publish_timeout=20 s") as caught:
            await driver.publish("t", b"late", qos=1)
        diagnosis = caught.value.diagnosis
        assert diagnosis is not None
        assert diagnosis.state in (State.BACKING_OFF, State.CONNECTING, State.PAUSED)
        assert (diagnosis.generation, diagnosis.queued, diagnosis.in_flight) == (1, 2, 0)
        assert diagnosis.last_error is not None
        for words in ("generation 1", "2 queued", "0 in flight", "no connection", "last error: "):
            assert words in str(caught.value)
        broker.start()
        await driver.wait_live()
        await settled()
    assert arrived(broker, "t") == [b"other"]  # what was given up is not sent


async def test_a_half_open_link_is_noticed_by_a_publish_and_the_message_gets_through(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, publish_timeout=4)) as driver:
        await trio.sleep(10)
        broker.silence()
        with pytest.raises(PublishTimeoutError) as caught:
            await driver.publish("t", b"x", qos=1)
        diagnosis = caught.value.diagnosis
        assert diagnosis is not None
        assert (diagnosis.state, diagnosis.in_flight) == (State.LIVE, 1)
        assert diagnosis.since_last_byte == pytest.approx(14.0)


async def test_the_outbox_is_bounded(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    config = memory_config(broker, outbox_messages=3, outbox_bytes=10_000)
    async with MQTTDriver(config, start="background") as driver:
        broker.stop()
        for _ in range(3):
            driver.publish_nowait("t", b"x", qos=1)
        with pytest.raises(OutboxFullError, match=r"3 messages.*outbox_messages=3"):
            driver.publish_nowait("t", b"x", qos=1)

        async def publish(number: int) -> None:
            await driver.publish("t", b"%d" % number, qos=1)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(publish, number)
                await settled()
            assert driver.status().queued == 3
            broker.start()
        assert arrived(broker, "t") == [b"x", b"x", b"x", b"0", b"1", b"2", b"3"]


async def test_a_message_larger_than_the_outbox_is_let_in_alone(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker, outbox_bytes=1024)) as driver:
        with trio.fail_after(5):
            await driver.publish("t", b"x" * 5000, qos=1)
        broker.stop()
        await settled()
        driver.publish_nowait("t", b"x" * 5000, qos=1)
        with pytest.raises(OutboxFullError, match="outbox_bytes=1024"):
            driver.publish_nowait("t", b"x", qos=1)
        broker.start()


async def test_leaving_waits_for_what_is_still_out(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        receipts = [driver.publish_nowait("t", b"%d" % number, qos=1) for number in range(300)]
    assert len(arrived(broker, "t")) == 300
    assert all(receipt.done for receipt in receipts)
    assert broker.received[-1][1].kind is Kind.DISCONNECT


async def test_leaving_with_a_dead_broker_is_bounded_and_settles_every_receipt(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    start = 0.0
    async with MQTTDriver(memory_config(broker, drain_timeout=3, disconnect_timeout=2)) as driver:
        broker.silence()
        sent = driver.publish_nowait("t", b"sent", qos=1)
        start = trio.current_time()
    assert trio.current_time() - start == pytest.approx(5.0)
    with pytest.raises(MessageLostError, match="'t'"):
        await sent.wait()


async def test_a_driver_that_is_not_entered_or_was_left_takes_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    driver = MQTTDriver(memory_config(broker))
    with pytest.raises(DriverClosedError, match="not entered"):
        await driver.publish("t", b"x")
    async with driver:
        pass
    with pytest.raises(DriverClosedError, match="was left"):
        await driver.publish("t", b"x")
    with pytest.raises(DriverClosedError, match="was left"):
        driver.publish_nowait("t", b"x")
    with pytest.raises(DriverClosedError):
        await driver.subscribe("t", print)
    with pytest.raises(DriverClosedError):
        await driver.ping()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"topic": "a/+"}, "topic.*wildcard"),
        ({"topic": ""}, "topic"),
        ({"topic": "t", "qos": 3}, "qos is 3, allowed are 0, 1, 2"),
        ({"topic": "t", "qos": True}, "qos is True, allowed are 0, 1, 2"),
        ({"topic": "t", "retain": 1}, "retain must be bool, not int"),
        ({"topic": "t", "payload": 5}, "payload.*int"),
        ({"topic": "t", "offline": "drop"}, "drop"),
        ({"topic": "t", "message_expiry": -1}, "message_expiry is -1.* 0 to 4294967295"),
        ({"topic": "t", "content_type": "a\0b"}, r"content_type contains U\+0000"),
        ({"topic": "t", "response_topic": "#"}, "response_topic.*wildcard"),
        ({"topic": "t", "correlation_data": b"x" * 65536}, "correlation_data has 65536 bytes"),
        ({"topic": "t", "nonsense": 1}, "nonsense"),
    ],
)
async def test_bad_arguments_are_refused_at_the_call(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, arguments: dict[str, object], message: str
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises((ValueError, TypeError), match=message):
            await driver.publish(**arguments)  # type: ignore[arg-type]
        assert driver.status().in_flight == 0


async def test_all_properties_arrive_with_version_5_and_are_left_out_with_3_1_1(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    received: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("t", received.append)
        for version in ("5", "3.1.1"):
            driver.apply_settings(memory_config(broker, protocol=version))
            await driver.wait_live()
            await driver.publish(
                "t",
                "é",
                qos=1,
                payload_format=PayloadFormat.UTF8,
                message_expiry=60,
                content_type="text/plain",
                response_topic="answers/here",
                correlation_data=b"\x00\xff",
                user_properties=[("a", "1"), ("a", "2")],
            )
            await settled()
    with_5, with_3 = (message.properties for message in received)
    assert with_5.payload_format is PayloadFormat.UTF8
    assert with_5.message_expiry == 60
    assert with_5.content_type == "text/plain"
    assert with_5.response_topic == "answers/here"
    assert with_5.correlation_data == b"\x00\xff"
    assert with_5.user_properties == (("a", "1"), ("a", "2"))
    assert (with_3.content_type, with_3.user_properties) == (None, ())


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_message_of_qos_0_is_not_handed_to_a_link_that_has_failed_already(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, version: str
) -> None:
    """Between the fault and the change of state the link still calls itself live."""
    seen: list[State] = []

    def publish() -> None:
        seen.append(driver.state)
        if len(seen) == 1:
            for number in range(3):
                driver.publish_nowait("late", b"%d" % number)

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        return TracedStream(await broker.connect_stream(), on_close=publish)

    config = memory_config(broker, open_stream=open_stream, protocol=version)
    async with MQTTDriver(config) as driver:
        await trio.sleep(100)
        broker.drop()
        await trio.sleep(100)
        assert seen[0] is State.LIVE
        assert driver.generation == 2
        assert arrived(broker, "late") == [b"0", b"1", b"2"]
