"""What survives an outage: publishes, subscriptions and those who wait for them; and what the driver says about it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import (
    ConnectionLostError,
    DriverClosedError,
    DriverConfig,
    Message,
    MQTTDriver,
    NotConnectedError,
    Overflow,
    PublishTimeoutError,
    ReasonCode,
    ServerLimitError,
    State,
    SubscribeError,
    UnsubscribeError,
)
from trio_mqtt_driver.testing import Ack, Direction, Kind, MemoryBroker, Subscribe, Unsuback, Unsubscribe

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **options)


async def down(driver: MQTTDriver, broker: MemoryBroker) -> None:
    broker.stop()
    await settled()
    assert driver.state is not State.LIVE


async def again(driver: MQTTDriver) -> None:
    await settled()
    with trio.fail_after(60):
        await driver.wait_live()


# -- publishes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_publish_while_the_link_is_down_waits_and_goes_out_after_it(
    broker: MemoryBroker, qos: int, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        await down(driver, broker)

        async def back_later() -> None:
            await trio.sleep(1000)
            broker.start()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back_later)
            result = await driver.publish("out", b"late", qos=qos)
        assert 1000 <= result.latency <= 1060
        assert (result.generation, result.attempts) == (2, 1)
        await broker.wait_for_publish("out")


async def test_a_publish_that_times_out_says_what_the_driver_knew_of_a_link_that_is_down(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, publish_timeout=20)) as driver:
        await trio.sleep(100)
        await down(driver, broker)
        receipt = driver.publish_nowait("first", qos=1)
        with pytest.raises(PublishTimeoutError) as caught:
            await driver.publish("second", qos=1)
        assert trio.current_time() == 120
        diagnosis = caught.value.diagnosis
        assert diagnosis is not None
        assert diagnosis.state in (State.BACKING_OFF, State.CONNECTING)
        assert (diagnosis.generation, diagnosis.since_last_byte) == (1, None)
        assert (diagnosis.queued, diagnosis.in_flight) == (2, 0)
        assert "Connection refused" in str(diagnosis.last_error)
        assert str(caught.value).startswith("'second' was not acknowledged within publish_timeout=20 s (backing off, ")
        for words in ("generation 1", "no connection", "2 queued", "0 in flight", "Connection refused"):
            assert words in str(caught.value)
        broker.start()
        await again(driver)
        await receipt.wait()
        await settled()
    assert [message.topic for message in broker.published if "probe" not in message.topic] == ["first"]


async def test_a_publish_that_times_out_on_a_live_link_says_how_long_it_is_silent(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    config = config_for(broker, publish_timeout=3, ack_timeout=10)
    async with MQTTDriver(config) as driver:
        await trio.sleep(7)
        broker.silence()
        with pytest.raises(PublishTimeoutError) as caught:
            await driver.publish("out", qos=1)
        assert "live, generation 1, last byte 10.0 s ago, 0 queued, 1 in flight, last error: none" in str(caught.value)


async def test_a_message_that_was_given_up_is_not_sent_on_the_next_link(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, publish_timeout=3)) as driver:
        broker.silence()
        with pytest.raises(PublishTimeoutError):
            await driver.publish("out", b"old", qos=1)
        driver.force_reconnect(even_if_live=True)
        await again(driver)
        await driver.publish("out", b"new", qos=1)
    assert [message.payload for message in broker.published if message.topic == "out"] == [b"new"]


# -- acknowledgements and messages of another time -------------------------------------------------------------------


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize(
    "kind, direction",
    [
        (Kind.PUBLISH, Direction.OUT),
        (Kind.PUBACK, Direction.IN),
        (Kind.PUBREC, Direction.IN),
        (Kind.PUBREL, Direction.OUT),
        (Kind.PUBCOMP, Direction.IN),
    ],
)
async def test_a_cut_at_each_packet_of_an_incoming_exchange_leaves_nothing_open(
    broker: MemoryBroker, qos: int, kind: Kind, direction: Direction, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(config_for(broker, probe="ping")) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload), qos=2)
        await trio.sleep(100)
        rule = broker.faults.cut(kind, direction=direction)
        broker.publish("in", b"1", qos=qos)
        await settled()
        cut = rule.seen > 0
        assert cut == (kind is Kind.PUBLISH or (kind is Kind.PUBACK) == (qos == 1))
        await again(driver)
        assert driver.generation == (2 if cut else 1)
        broker.publish("in", b"2", qos=qos)
        await settled()
        assert got == [b"1", b"2"]
        assert driver.status().unacknowledged == 0
    assert not broker.violations


async def test_an_acknowledgement_for_an_older_link_is_a_counted_no_op(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    release = trio.Event()
    got: list[bytes] = []

    async def slow(message: Message[bytes]) -> None:
        if message.payload == b"1":
            await release.wait()
        got.append(message.payload)

    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", slow, qos=1)
        broker.publish("in", b"1", qos=1)
        await settled()
        driver.force_reconnect(even_if_live=True)
        await again(driver)
        broker.publish("in", b"2", qos=1)
        await settled()
        release.set()
        await settled()
        acknowledged = [sender for sender, packet in broker.received if isinstance(packet, Ack)]
        assert acknowledged == [driver.client_id]
        assert got == [b"1", b"2"]
        assert driver.status().counters["stale_acknowledgements"] == 1
    assert not broker.violations


async def test_an_acknowledgement_of_nothing_is_tolerated(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for kind in (Kind.PUBACK, Kind.PUBREC, Kind.PUBCOMP):
            broker.send(str(driver.client_id), Ack(kind=kind, packet_id=4711))
        await settled()
        assert driver.state is State.LIVE
        assert driver.generation == 1


async def test_a_replay_that_waits_behind_retained_messages_for_a_slow_handler_does_not_time_out(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []

    async def slow(message: Message[bytes]) -> None:
        await trio.sleep(7)
        got.append(message.payload)

    for number in range(10):
        broker.publish(f"in/{number}", str(number), retain=True)
    async with MQTTDriver(config_for(broker, replay_batch=1)) as driver:
        await driver.subscribe("in/+", slow, overflow=Overflow.BLOCK, queue_messages=1)
        for name in "abc":
            await driver.subscribe(name, print)
        await trio.sleep(200)
        assert len(got) == 10
        broker.faults.byte_by_byte = True
        driver.force_reconnect(even_if_live=True)
        await trio.sleep(300)
        assert (driver.state, driver.generation, driver.status().failures) == (State.LIVE, 2, 0)
        assert len(got) == 20


async def test_a_full_subscription_does_not_keep_the_link_from_coming_back(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """Reading pauses while a ``block`` subscription is full; the answers of a handshake must be read all the same."""
    release = trio.Event()

    async def slow(message: Message[bytes]) -> None:
        assert message.topic == "in"
        await release.wait()

    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("in", slow, overflow=Overflow.BLOCK, queue_messages=2)
        for number in range(10):
            broker.publish("in", str(number))
        await settled()
        driver.force_reconnect(even_if_live=True)
        with trio.fail_after(10):
            await driver.wait_live()
        assert driver.generation == 2
        assert driver.status().failures == 0
        release.set()


# -- subscriptions ----------------------------------------------------------------------------------------------------


async def test_a_refused_subscription_raises_and_is_gone(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.faults.refuse_subscribe("secret/#")
    async with MQTTDriver(config_for(broker)) as driver:
        with pytest.raises(
            SubscribeError, match=r"refused to subscribe to 'secret/#': not authorized \(0x87\)"
        ) as caught:
            await driver.subscribe("secret/#", print)
        assert caught.value.reason_code is ReasonCode.NOT_AUTHORIZED
        assert caught.value.topic_filter == "secret/#"
        with pytest.raises(SubscribeError):
            async with driver.subscription("secret/#"):
                raise AssertionError("entered")
        assert (driver.status().subscriptions, driver.status().degraded) == (0, ())
        assert driver.state is State.LIVE
        broker.faults.clear()
        await driver.subscribe("secret/#", print)


async def test_3_1_1_says_only_that_it_refused(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.faults.refuse_subscribe("secret/#")
    async with MQTTDriver(config_for(broker, protocol="3.1.1")) as driver:
        with pytest.raises(SubscribeError, match=r"unspecified error \(0x80\)"):
            await driver.subscribe("secret/#", print)


async def test_a_subscription_that_is_refused_at_the_replay_degrades_alone_and_visibly(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    got: list[str] = []
    async with MQTTDriver(config_for(broker)) as driver:
        first = await driver.subscribe("a", lambda message: got.append(message.topic), qos=1)
        second = await driver.subscribe("b", lambda message: got.append(message.topic), qos=1)
        assert (first.degraded, first.granted_qos) == (None, 1)
        broker.faults.refuse_subscribe("a", 0x97, times=1)
        driver.force_reconnect(even_if_live=True)
        await again(driver)
        assert driver.generation == 2
        assert driver.status().degraded == (("a", "quota exceeded (0x97)"),)
        assert driver.status().subscriptions == 1
        assert (first.degraded, first.granted_qos) == (ReasonCode.QUOTA_EXCEEDED, None)
        assert second.degraded is None
        assert "live: generation 2, 2 subscriptions, 1 of them refused" in driver.status().history[-1].text
        assert any("the broker refuses 'a': quota exceeded" in record.getMessage() for record in caplog.records)
        for topic in ("a", "b"):
            broker.publish(topic)
        await settled()
        assert got == ["b"]
        driver.force_reconnect(even_if_live=True)
        await again(driver)
        assert driver.status().degraded == ()
        assert first.degraded is None
        broker.publish("a")
        await settled()
    assert got == ["b", "a"]


async def test_a_subscribe_that_waited_out_an_outage_is_a_first_one_and_raises(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    broker.faults.refuse_subscribe("secret", 0x87)
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        await down(driver, broker)
        broker.start()
        with pytest.raises(SubscribeError):
            await driver.subscribe("secret", print)
        assert driver.generation == 2
        assert driver.status().degraded == ()


async def test_a_filter_that_the_broker_ruled_out_is_refused_at_the_call(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    broker = MemoryBroker(nursery, wildcard_available=False, shared_available=False)
    async with MQTTDriver(config_for(broker)) as driver:
        with pytest.raises(ServerLimitError, match="wildcard subscriptions not supported"):
            await driver.subscribe("a/#", print)
        with pytest.raises(ServerLimitError, match="shared subscriptions not supported"):
            await driver.subscribe("$share/g/a", print)
        await driver.subscribe("a", print)
        assert Kind.SUBSCRIBE in [packet.kind for _, packet in broker.received]
    assert not broker.violations


async def test_a_subscription_that_the_next_broker_rules_out_is_degraded(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for topic_filter in ("a/#", "b", "+/c"):
            await driver.subscribe(topic_filter, print)
        broker.options.wildcard_available = False
        broker.forget()
        driver.force_reconnect(even_if_live=True)
        await again(driver)
        words = "wildcard subscriptions not supported (0xa2)"
        assert driver.status().degraded == (("a/#", words), ("+/c", words))
        assert list(broker.subscriptions(str(driver.client_id))) == ["b"]
        asked = [packet for _, packet in broker.received if isinstance(packet, Subscribe)]
        assert [[request.topic_filter for request in packet.requests] for packet in asked] == [["b"]]
    assert not broker.violations


async def test_subscribing_and_unsubscribing_while_the_link_is_down_takes_effect_with_the_next(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("old", print)
        await driver.subscribe("kept", print)
        await trio.sleep(100)
        await down(driver, broker)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.unsubscribe, "old")
            nursery.start_soon(driver.subscribe, "new", print)
            await trio.sleep(100)
            broker.start()
        assert sorted(broker.subscriptions(str(driver.client_id))) == ["kept", "new"]
        assert Kind.UNSUBSCRIBE not in [packet.kind for _, packet in broker.received]


@pytest.mark.parametrize("live", [True, False])
async def test_a_subscribe_that_somebody_else_ends_does_not_wait_for_ever(
    broker: MemoryBroker, live: bool, autojump_clock: MockClock
) -> None:
    ended: list[str] = []

    async def subscribe(driver: MQTTDriver) -> None:
        with pytest.raises(DriverClosedError, match="'in' was ended"):
            await driver.subscribe("in", print)
        ended.append("in")

    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        if live:
            broker.faults.hold(Kind.SUBACK)
        else:
            await down(driver, broker)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(subscribe, driver)
                await settled()
                nursery.start_soon(driver.unsubscribe, "in")
                await settled()
                broker.faults.clear()
        assert ended == ["in"]
        broker.start()
        await again(driver)
        assert not broker.subscriptions(str(driver.client_id))


async def test_an_unsubscribe_that_is_refused_raises_and_is_done_locally(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver, trio.open_nursery() as refusing:
        got: list[bytes] = []
        await driver.subscribe("in", lambda message: got.append(message.payload))
        broker.faults.drop(Kind.UNSUBACK, times=1)
        refusing.start_soon(answer, broker, str(driver.client_id))
        with pytest.raises(UnsubscribeError, match=r"refused to unsubscribe 'in': not authorized"):
            await driver.unsubscribe("in")
        with pytest.raises(ValueError, match="nothing is subscribed with 'in'"):
            await driver.unsubscribe("in")


async def answer(broker: MemoryBroker, client_id: str) -> None:
    """Refuse the next UNSUBSCRIBE."""
    packet = await broker.wait_for(
        lambda: next((packet for _, packet in broker.received if packet.kind is Kind.UNSUBSCRIBE), None), "UNSUBSCRIBE"
    )
    assert isinstance(packet, Unsubscribe)
    broker.send(client_id, Unsuback(packet_id=packet.packet_id, reason_codes=(0x87,)))


# -- ping -------------------------------------------------------------------------------------------------------------


async def test_ping_returns_the_round_trip(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        with broker.faults.hold(Kind.PINGRESP) as hold, trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                async def answer_late() -> None:
                    await trio.sleep(2)
                    hold.release()

                nursery.start_soon(answer_late)
                assert await driver.ping() == 2
        assert driver.status().round_trip == 2


async def test_ping_without_a_link_raises(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await trio.sleep(100)
        await down(driver, broker)
        with pytest.raises(NotConnectedError, match="ping: the link is down"):
            await driver.ping()


@pytest.mark.parametrize("reset", [False, True])
async def test_a_ping_whose_link_is_lost_raises_why(
    broker: MemoryBroker, reset: bool, autojump_clock: MockClock
) -> None:
    broker.faults.cut(Kind.PINGREQ, before=True, reset=reset)
    async with MQTTDriver(config_for(broker)) as driver:
        with pytest.raises(ConnectionLostError, match="reset" if reset else "closed the connection"):
            await driver.ping()


async def test_a_ping_that_is_not_answered_raises_when_the_link_is_given_up(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        broker.silence()
        with pytest.raises(ConnectionLostError, match="no answer to PINGREQ within ping_timeout=10 s"):
            await driver.ping()
        assert trio.current_time() == 10
