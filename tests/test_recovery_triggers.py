"""Every way of losing a connection ends it, is named, and leads to a reconnect; but not more often than allowed."""

from __future__ import annotations

import logging
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import (
    BackoffConfig,
    ConnectionLostError,
    DriverConfig,
    MQTTDriver,
    ProtocolError,
    ServerDisconnectedError,
    State,
)
from trio_mqtt_driver.testing import Direction, Disconnect, Kind, MemoryBroker, Publish, Suback, encode

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **options)


async def gone(driver: MQTTDriver, within: float) -> None:
    """Return when the link is lost, or fail after ``within`` seconds."""
    changed = trio.Event()
    unregister = driver.register_connection_callback(lambda up: None if up else changed.set())
    if driver.state is State.LIVE:
        with trio.fail_after(within):
            await changed.wait()
    unregister()


def check_named(driver: MQTTDriver, caplog: pytest.LogCaptureFixture, error: str) -> None:
    """The cause is in status, history and log."""
    status = driver.status()
    assert error in str(status.last_error)
    lost = [event for event in status.history if event.text.startswith("connection lost")]
    assert len(lost) == 1
    assert error in lost[0].text
    assert lost[0].kind == State.BACKING_OFF.value
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warnings if error in line]) == 1
    assert status.counters["losses"] == 1


async def check_recovery(driver: MQTTDriver, broker: MemoryBroker) -> None:
    """The next generation takes up the subscription and delivers in both directions."""
    with trio.fail_after(60):
        await driver.wait_live()
        assert driver.generation == 2
        await broker.wait_for_subscription("in")
        result = await driver.publish("out", b"again", qos=1)
    assert result.generation == 2
    assert broker.clients == [driver.client_id]
    assert not broker.violations


def eof(broker: MemoryBroker, client_id: str) -> None:
    broker.drop()


def reset(broker: MemoryBroker, client_id: str) -> None:
    broker.drop(reset=True)


def disconnect(broker: MemoryBroker, client_id: str) -> None:
    broker.disconnect(reason_code=0x8B)


def disconnect_with_words(broker: MemoryBroker, client_id: str) -> None:
    broker.send(client_id, Disconnect(reason_code=0x98, properties={"reason_string": "maintenance at noon"}))


def malformed(broker: MemoryBroker, client_id: str) -> None:
    broker.send(client_id, b"\x36\x03\x00\x01a")


def unexpected(broker: MemoryBroker, client_id: str) -> None:
    broker.send(client_id, Suback(packet_id=777, reason_codes=(0,)))


def second_connack(broker: MemoryBroker, client_id: str) -> None:
    broker.send(client_id, b"\x20\x03\x00\x00\x00")


def from_a_client(broker: MemoryBroker, client_id: str) -> None:
    broker.send(client_id, b"\xc0\x00")


IMMEDIATE = [
    (eof, ConnectionLostError, "the broker closed the connection"),
    (reset, ConnectionLostError, "reset by peer"),
    (disconnect, ServerDisconnectedError, "the broker disconnected us: server shutting down (0x8b)"),
    (disconnect_with_words, ServerDisconnectedError, "administrative action (0x98): maintenance at noon"),
    (malformed, ProtocolError, "malformed packet"),
    (unexpected, ProtocolError, "unknown identifier 777"),
    (second_connack, ProtocolError, "CONNACK"),
    (from_a_client, ProtocolError, "PINGREQ"),
]


@pytest.mark.parametrize("break_link, kind, words", IMMEDIATE, ids=[one[0].__name__ for one in IMMEDIATE])
async def test_a_broken_link_is_named_and_replaced(
    broker: MemoryBroker,
    caplog: pytest.LogCaptureFixture,
    break_link: Any,
    kind: type[Exception],
    words: str,
    autojump_clock: MockClock,
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        break_link(broker, str(driver.client_id))
        await gone(driver, within=0.1)
        check_named(driver, caplog, words)
        assert str(driver.status().last_error).startswith(f"{kind.__name__}: ")
        await check_recovery(driver, broker)
        assert trio.current_time() == 100


async def test_what_arrived_before_the_malformed_packet_is_delivered(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload))
        whole = encode(Publish(topic="in", payload=b"whole"), 5)
        broker.send(str(driver.client_id), whole + b"\xf6\x00")
        await settled()
        assert driver.state is State.BACKING_OFF
        assert got == [b"whole"]


async def test_an_idle_half_open_link_is_found_by_a_ping_without_answer(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        broker.silence()
        await gone(driver, within=40)
        assert trio.current_time() == 116 + 10  # the ping after the silence began, and its deadline
        check_named(driver, caplog, "KeepAliveError: no answer to PINGREQ within ping_timeout=10 s")
        assert "the link is half-open" in str(driver.status().last_error)
        await check_recovery(driver, broker)


async def test_an_unanswered_pingreq_alone_ends_the_link(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, keep_alive=30, ping_timeout=7)) as driver:
        await driver.subscribe("in", lambda _: None)
        lost_pings = broker.faults.drop(Kind.PINGRESP, times=1)
        await gone(driver, within=36.1)
        assert trio.current_time() == 36
        assert lost_pings.seen == 1
        check_named(driver, caplog, "ping_timeout=7 s, nothing received for 36.0 s")
        await check_recovery(driver, broker)


async def test_an_idle_link_that_answers_stays(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(24 * 3600)
        assert driver.generation == 1
        assert driver.state is State.LIVE
        pings = [packet for _, packet in broker.received if packet.kind is Kind.PINGREQ]
        assert len(pings) == 24 * 3600 // 29
        assert driver.status().round_trip == 0
    assert not broker.violations


async def test_the_brokers_own_keep_alive_is_obeyed(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.options.server_keep_alive = 5
    async with MQTTDriver(config_for(broker, keep_alive=0)) as driver:
        await trio.sleep(101)
        assert driver.generation == 1
        assert len([packet for _, packet in broker.received if packet.kind is Kind.PINGREQ]) == 101 // 4


@pytest.mark.parametrize("keep_alive", [1, 2, 30])
async def test_the_broker_hears_from_us_before_the_keep_alive_is_over(
    broker: MemoryBroker, nursery: trio.Nursery, keep_alive: int, autojump_clock: MockClock
) -> None:
    """nats-server ends a link after one second of silence if the Keep Alive is 1."""
    times: list[float] = []

    @nursery.start_soon
    async def listen() -> None:
        while True:
            await broker.wait_for(lambda: len(broker.received) > len(times), timeout=1000)
            times.append(trio.current_time())

    async with MQTTDriver(config_for(broker, keep_alive=keep_alive)) as driver:
        await trio.sleep(10 * keep_alive)
        await driver.publish("out", qos=0)
        await trio.sleep(10 * keep_alive)
    nursery.cancel_scope.cancel()
    assert len(times) > 20
    assert all(later - earlier < keep_alive for earlier, later in pairwise(times))


async def test_pings_go_out_while_messages_come_in(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    """The broker's deadline is for what it hears, not for what it sends."""
    async with MQTTDriver(config_for(broker, keep_alive=10)) as driver:
        await driver.subscribe("in", lambda _: None)
        for _ in range(100):
            await trio.sleep(1)
            broker.publish("in", b"x")
        assert driver.generation == 1
        assert len([packet for _, packet in broker.received if packet.kind is Kind.PINGREQ]) in (11, 12)


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_half_open_link_is_found_by_a_publish_and_the_message_arrives_on_the_next(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, qos: int, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        broker.silence()
        start = trio.current_time()
        result = await driver.publish("out", b"precious", qos=qos)
        assert trio.current_time() == start + 10
        assert (result.generation, result.attempts, result.latency) == (2, 2, 10)
        check_named(
            driver, caplog, "AckTimeoutError: no acknowledgement within ack_timeout=5 s and no answer to PINGREQ"
        )
        assert [message.payload for message in broker.published if message.topic == "out"] == [b"precious"]
        await check_recovery(driver, broker)


@pytest.mark.parametrize("qos, kind", [(1, Kind.PUBACK), (2, Kind.PUBREC), (2, Kind.PUBCOMP)])
async def test_an_overdue_acknowledgement_ends_a_link_that_otherwise_works(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, qos: int, kind: Kind, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, ack_timeout=3, keep_alive=1)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        broker.faults.drop(kind, times=1)
        start = trio.current_time()
        result = await driver.publish("out", b"precious", qos=qos)
        assert trio.current_time() == start + 3
        assert (result.generation, result.attempts) == (2, 2)
        check_named(
            driver,
            caplog,
            "AckTimeoutError: no acknowledgement within ack_timeout=3 s, although the broker answers PINGREQ",
        )
        await check_recovery(driver, broker)


@pytest.mark.parametrize("qos, kind", [(1, Kind.PUBACK), (2, Kind.PUBREC), (2, Kind.PUBCOMP)])
async def test_an_acknowledgement_that_is_late_ends_no_link_if_it_is_there_before_the_pong(
    broker: MemoryBroker, qos: int, kind: Kind, autojump_clock: MockClock
) -> None:
    """The network stood still: what went out before the PINGREQ is answered before it."""
    async with MQTTDriver(config_for(broker)) as driver, trio.open_nursery() as nursery:
        await trio.sleep(100)
        broker.forget()
        acknowledgement, pong = broker.faults.hold(kind), broker.faults.hold(Kind.PINGRESP)
        nursery.start_soon(partial(driver.publish, "out", b"late", qos=qos))
        await trio.sleep(9.9)
        assert [packet.kind for _, packet in broker.received].count(Kind.PINGREQ) == 1
        acknowledgement.remove()
        pong.remove()
        await trio.sleep(100)
        assert driver.generation == 1
        assert driver.status().last_error is None


async def test_a_broker_that_sends_a_lot_and_acknowledges_nothing_is_given_up(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver, trio.open_nursery() as nursery:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        rules = [broker.faults.drop(kind) for kind in (Kind.PUBACK, Kind.PINGRESP)]
        start = trio.current_time()
        nursery.start_soon(partial(driver.publish, "out", b"precious", qos=1))
        while driver.generation == 1 and driver.state is State.LIVE:
            await trio.sleep(0.5)
            broker.publish("in", b"x")
        for rule in rules:
            rule.remove()
        assert [event.at for event in driver.status().history if event.error is not None] == [start + 5 + 15]
        check_named(driver, caplog, "and no answer to PINGREQ, although other packets arrive")
        await check_recovery(driver, broker)


async def test_acknowledgements_that_come_slowly_but_in_time_do_not_end_the_link(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver, trio.open_nursery() as nursery:
        with broker.faults.hold(Kind.PUBACK) as hold:
            for number in range(10):
                nursery.start_soon(partial(driver.publish, "out", str(number), qos=1))
                await trio.sleep(4)
                hold.release()
        assert driver.generation == 1


async def test_a_write_that_fails_ends_the_link(
    broker: MemoryBroker, dialer: Dialer, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        dialer.streams[0].broken = trio.BrokenResourceError("the network cable is out")
        result = await driver.publish("out", b"precious", qos=1)
        assert (result.generation, result.attempts) == (2, 2)
        check_named(driver, caplog, "writing to the broker: the network cable is out")
        await check_recovery(driver, broker)


async def test_a_bad_file_descriptor_is_a_lost_link_like_any_other(
    broker: MemoryBroker, dialer: Dialer, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        dialer.streams[0].broken = OSError(9, "Bad file descriptor")
        assert (await driver.publish("out", qos=1)).generation == 2
        check_named(driver, caplog, "Bad file descriptor")
        await check_recovery(driver, broker)


async def test_a_broker_that_does_not_read_is_found_although_nothing_can_be_written(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        with broker.faults.stop_reading():
            for _ in range(5):
                driver.publish_nowait("out", bytes(65536), qos=0)
            await gone(driver, within=45)
        assert "KeepAliveError" in str(driver.status().last_error)
        with trio.fail_after(60):
            await driver.wait_live()


async def test_a_subscribe_that_is_not_answered_ends_the_link_and_is_granted_on_the_next(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        broker.faults.drop(Kind.SUBACK, times=1)
        start = trio.current_time()
        await driver.subscribe("in", lambda _: None)
        assert trio.current_time() == start + 10
        assert driver.generation == 2
        assert "SUBSCRIBE was not answered within subscribe_timeout=10 s" in str(driver.status().last_error)
        assert list(broker.subscriptions(str(driver.client_id))) == ["in"]


async def test_an_unsubscribe_that_is_not_answered_ends_the_link_and_is_done_on_the_next(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", lambda _: None)
        await trio.sleep(100)
        broker.faults.drop(Kind.UNSUBACK, times=1)
        await driver.unsubscribe("in")
        await driver.wait_live()
        assert driver.generation == 2
        assert "UNSUBSCRIBE was not answered within subscribe_timeout=10 s" in str(driver.status().last_error)
        assert not broker.subscriptions(str(driver.client_id))


# -- how often --------------------------------------------------------------------------------------------------------


def triggers(driver: MQTTDriver) -> list[float]:
    """When the attempts began."""
    return [event.at for event in driver.status().history if event.kind == State.CONNECTING.value]


async def test_the_first_loss_of_a_stable_link_reconnects_at_once(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for number in (1, 2, 3):
            await trio.sleep(31)
            broker.drop()
            await gone(driver, within=1)
            await driver.wait_live()
            assert trio.current_time() == 31 * number


@pytest.mark.parametrize("interval", [5, 12.5])
async def test_a_flapping_link_reconnects_at_most_every_min_interval(
    broker: MemoryBroker, interval: float, autojump_clock: MockClock
) -> None:
    backoff = BackoffConfig(min_interval=interval, start=0.1, maximum=0.1, stable_after=0, pause_after=1000)
    async with MQTTDriver(config_for(broker, backoff=backoff)) as driver:
        await trio.sleep(100)
        for _ in range(20):
            broker.drop()
            await gone(driver, within=1)
            with trio.fail_after(interval + 0.1):
                await driver.wait_live()
        starts = triggers(driver)[1:]
        assert len(starts) == 20
        assert {round(after - before, 6) for before, after in pairwise(starts)} == {interval}


async def test_a_link_that_flaps_backs_off_although_each_connect_succeeds(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """Accept-then-drop: to count each connection as a success would hammer the broker for ever."""
    broker.faults.cut(Kind.SUBACK, times=None)
    async with MQTTDriver(config_for(broker, subscription_identifiers=False), start="background") as driver:
        with trio.move_on_after(3600):
            await driver.subscribe("in", lambda _: None)
            await trio.sleep_forever()
        status = driver.status()
    assert status.counters["attempts"] < 10 + 3600 / 30
    assert status.failures >= 8
    assert any(event.kind == State.PAUSED.value for event in status.history)


async def test_links_that_do_not_stay_count_as_failures_until_one_stays(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        for failures in range(1, 8):
            await trio.sleep(29)
            broker.drop()
            await gone(driver, within=1)
            assert driver.status().failures == failures - 1
            with trio.fail_after(60):
                await driver.wait_live()
        assert driver.status().failures == 6
        await trio.sleep(29)
        assert driver.status().failures == 6
        await trio.sleep(2)
        assert driver.status().failures == 0


async def test_the_eighth_short_lived_link_opens_the_breaker(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for failures in range(1, 9):
            broker.drop()
            await gone(driver, within=1)
            assert driver.status().failures == failures
            assert driver.state is (State.PAUSED if failures == 8 else State.BACKING_OFF)
            with trio.fail_after(60):
                await driver.wait_live()


async def test_losses_by_our_own_wish_are_none(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for _ in range(3):
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
        status = driver.status()
    assert (status.counters["losses"], status.counters["connections"], status.failures) == (0, 4, 0)
    assert status.last_error is None


async def test_a_connection_that_ends_while_it_is_made_is_a_failed_attempt(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    for kind in (Kind.CONNECT, Kind.PUBLISH, Kind.SUBSCRIBE):
        broker.faults.cut(kind, direction=Direction.IN, before=True)
    async with MQTTDriver(config_for(broker, protocol="5")) as driver:
        await driver.subscribe("in", lambda _: None)
        await driver.wait_live()
        status = driver.status()
    texts = [event.text for event in status.history if event.error is not None]
    assert [text.split(":")[0] for text in texts] == ["attempt failed", "attempt failed", "connection lost"]
    assert all("ConnectionLostError: the broker closed the connection" in text for text in texts)
