"""The stable-ID mode: what was published and not acknowledged when the link was lost."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.stable import acknowledged, connections, exchanges, filters, stable_config
from trio_mqtt_driver import (
    DriverConfig,
    MessageLostError,
    MQTTDriver,
    PublishTimeoutError,
    ServerLimitError,
    State,
)
from trio_mqtt_driver._outgoing import Receipt
from trio_mqtt_driver.testing import Direction, Disconnect, Kind, MemoryBroker, Publish

settled = trio.testing.wait_all_tasks_blocked

PROBE = "trio_mqtt_driver/probe/driver"


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=["5", "3.1.1"])
def config(request: pytest.FixtureRequest, broker: MemoryBroker) -> DriverConfig:
    return stable_config(broker, request.param)


def taken(broker: MemoryBroker) -> list[tuple[str, bytes]]:
    """The messages that the broker took, but for test publishes."""
    return [(one.topic, one.payload) for one in broker.published if one.topic != PROBE]


async def open_exchanges(driver: MQTTDriver, broker: MemoryBroker, *levels: int) -> list[Receipt]:
    """Publish one message with each QoS, to the topics "0", "1", …; none is acknowledged before the broker stops.

    A level of 3 is QoS 2 as far as PUBREC: PUBREL is lost.
    """
    receipts: list[Receipt] = []
    rules = [broker.faults.drop(kind, direction=Direction.OUT) for kind in (Kind.PUBACK, Kind.PUBCOMP)]
    for number, level in enumerate(levels):
        lost = (Kind.PUBREL, Direction.IN) if level == 3 else (Kind.PUBREC, Direction.OUT)
        with broker.faults.drop(lost[0], direction=lost[1]):
            receipts.append(driver.publish_nowait(str(number), b"x", qos=min(level, 2)))
            await settled()
    broker.stop()
    for rule in rules:
        rule.remove()
    await driver.wait_state(State.BACKING_OFF)
    return receipts


async def test_what_is_open_is_sent_again_with_its_identifiers_in_order_before_anything_else(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("sub", lambda _: None)
        receipts = await open_exchanges(driver, broker, 1, 2, 3, 2, 3, 1)
        assert driver.status().in_flight == 6
        receipts.append(driver.publish_nowait("new", b"x", qos=1))
        broker.start()
        await driver.wait_live()
        results = [await receipt.wait() for receipt in receipts]
    found = exchanges(connections(broker)[-1])
    opened = {name: one for name, one, dup in exchanges(connections(broker)[-2]) if len(name) == 1 and not dup}
    assert found[:7] == [
        ("PUBREL", opened["2"], False),
        ("PUBREL", opened["4"], False),
        ("0", opened["0"], True),
        ("1", opened["1"], True),
        ("3", opened["3"], True),
        ("5", opened["5"], True),
        (PROBE, found[6][1], False),
    ]
    assert [name for name, _, _ in found[7:] if name != "PUBREL"] == ["new"]
    assert found[6][1] not in opened.values()
    assert not filters(connections(broker)[-1])
    assert [result.attempts for result in results] == [2, 2, 1, 2, 1, 2, 1]
    assert [result.generation for result in results] == [2] * 7
    # QoS 1 twice; QoS 2 once, whether or not its PUBREC had come.
    assert sorted(name for name, _ in taken(broker)) == ["0", "0", "1", "2", "3", "4", "5", "5", "new"]
    assert not broker.violations


async def test_what_is_open_in_a_session_that_is_lost_is_published_anew_in_order(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """That of QoS 2 whose PUBREC had come, too: a PUBREL means nothing to the new session, and would lose it."""
    async with MQTTDriver(config) as driver:
        receipts = await open_exchanges(driver, broker, 1, 3, 2, 3)
        receipts.append(driver.publish_nowait("new", b"x", qos=1))
        broker.restart(keep_sessions=False)
        await driver.wait_live()
        results = [await receipt.wait() for receipt in receipts]
    found = [one for one in exchanges(connections(broker)[-1]) if one[0] != "PUBREL"]
    assert [name for name, _, _ in found] == [PROBE, "0", "1", "2", "3", "new"]
    assert not any(dup for _, _, dup in found)
    assert [result.attempts for result in results] == [2, 2, 2, 2, 1]
    assert not broker.violations


async def test_the_test_publish_waits_for_room_and_what_is_open_makes_it(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """mosquitto counts what is open in the session, and refuses a test publish beyond its Receive Maximum."""
    broker = MemoryBroker(nursery, receive_maximum=3)
    async with MQTTDriver(stable_config(broker, "5")) as driver:
        receipts = await open_exchanges(driver, broker, 2, 3, 2)
        held = broker.faults.hold(Kind.PUBCOMP, direction=Direction.OUT)
        broker.start()
        await driver.wait_state(State.VALIDATING)
        await settled()
        found = exchanges(connections(broker)[-1])
        assert [name for name, _, _ in found] == ["PUBREL", "0", "2", "PUBREL", "PUBREL"]
        held.release()
        await driver.wait_state(State.LIVE)
        held.remove()
        for receipt in receipts:
            await receipt.wait()
        assert [name for name, _, _ in exchanges(connections(broker)[-1])[5:]] == [PROBE]
    assert not broker.violations


async def test_a_broker_that_lets_nothing_through_fails_the_test(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, receive_maximum=2)
    async with MQTTDriver(stable_config(broker, "5")) as driver:
        receipts = await open_exchanges(driver, broker, 2, 2)
        with broker.faults.drop(Kind.PUBREC):
            broker.start()
            await driver.wait_state(State.VALIDATING)
            assert await driver.wait_state(State.BACKING_OFF, State.LIVE) is State.BACKING_OFF
            assert "ProbeError" in str(driver.status().last_error)
        for receipt in receipts:
            await receipt.wait()
    assert len(taken(broker)) == 2
    assert not broker.violations


async def test_what_is_open_is_paced_if_the_broker_takes_less_than_before(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(stable_config(broker, "5")) as driver:
        receipts = await open_exchanges(driver, broker, *[1, 2, 3, 2, 1] * 4)
        broker.options.receive_maximum = 2
        broker.start()
        for receipt in receipts:
            await receipt.wait()
        again = [(name, dup) for name, _, dup in exchanges(connections(broker)[-1]) if name not in ("PUBREL", PROBE)]
        assert again == [(str(number), True) for number in range(20) if number % 5 != 2]
    assert not broker.violations


async def test_with_3_1_1_no_more_than_20_are_open(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(stable_config(broker, "3.1.1")) as driver:
        with broker.faults.drop(Kind.PUBREC):
            receipts = [driver.publish_nowait(str(number), b"x", qos=2) for number in range(30)]
            await settled()
            broker.stop()
        assert driver.status().in_flight == 20
        broker.start()
        for receipt in receipts:
            await receipt.wait()
    assert [name for name, _ in taken(broker)] == [str(number) for number in range(30)]
    assert not broker.violations


@pytest.mark.parametrize("qos", [1, 2])
async def test_what_the_broker_no_longer_takes_is_reported_and_holds_nothing_up(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int
) -> None:
    async with MQTTDriver(stable_config(broker, "5")) as driver:
        with broker.faults.drop(Kind.PUBACK), broker.faults.drop(Kind.PUBREC):
            large = driver.publish_nowait("large", b"x" * 1000, qos=qos)
            small = driver.publish_nowait("small", b"x", qos=qos)
            await settled()
            broker.stop()
        (used,) = [one for name, one, _ in exchanges(connections(broker)[-1]) if name == "large"]
        broker.options.maximum_packet_size = 500
        broker.start()
        with pytest.raises(ServerLimitError, match="Maximum Packet Size is 500"):
            await large.wait()
        assert (await small.wait()).attempts == 2
        # The broker may have it, and would take another message with its identifier for it.
        for number in range(3):
            await driver.publish(str(number), b"", qos=2)
        assert qos == 1 or used not in [one for _, one, _ in exchanges(connections(broker)[-1])]
        assert driver.status().in_flight == 0
        # Another session knows nothing of it.
        broker.restart(keep_sessions=False)
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        found = [driver.publish_nowait("more", b"", qos=2) for _ in range(20)]
        for receipt in found:
            await receipt.wait()
        await settled()
    assert not broker.violations


async def test_a_maximum_qos_that_has_come_down_is_reported(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(stable_config(broker, "5")) as driver:
        once, twice = await open_exchanges(driver, broker, 1, 2)
        broker.options.maximum_qos = 1
        broker.start()
        with pytest.raises(ServerLimitError, match="Maximum QoS is 1"):
            await twice.wait()
        await once.wait()
    assert not broker.violations


async def test_the_test_publish_is_never_sent_again(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        for _ in range(3):
            with broker.faults.drop(Kind.PUBACK):
                broker.drop("driver")
                await driver.wait_state(State.VALIDATING)
                await settled()
                broker.drop("driver")
                await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
        probes = [packet for _, packet in broker.received if isinstance(packet, Publish)]
        assert len(probes) == 7
        assert {packet.topic for packet in probes} == {PROBE}
        assert not any(packet.dup for packet in probes)
        assert driver.status().in_flight == 0
    assert not broker.violations


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_publish_that_was_given_up_is_finished_all_the_same(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, qos: int
) -> None:
    """The broker counts it as in flight, and waits for the rest [MQTT-4.4.0-1]."""
    async with MQTTDriver(config.evolve(publish_timeout=1, ack_timeout=5)) as driver:
        with broker.faults.drop(Kind.PUBACK), broker.faults.drop(Kind.PUBREC):
            with pytest.raises(PublishTimeoutError):
                await driver.publish("a", b"1", qos=qos)
            broker.drop("driver")
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        await settled()
        assert next(dup for name, _, dup in exchanges(connections(broker)[-1]) if name == "a")
        assert driver.status().in_flight == 0
        assert driver.status().queued == 0
    assert len(taken(broker)) == (2 if qos == 1 else 1)
    assert not broker.violations


async def test_a_publish_that_was_given_up_is_not_published_anew_when_the_session_is_lost(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config.evolve(publish_timeout=1, ack_timeout=5)) as driver:
        with broker.faults.drop(Kind.PUBREC), pytest.raises(PublishTimeoutError):
            await driver.publish("a", b"1", qos=2)
        broker.restart(keep_sessions=False)
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        await settled()
        assert [name for name, _, _ in exchanges(connections(broker)[-1])] == [PROBE]
    assert len(taken(broker)) == 1


async def test_a_pubrel_that_is_not_answered_is_noticed_and_sent_again(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        receipts = await open_exchanges(driver, broker, 3, 3)
        with broker.faults.drop(Kind.PUBCOMP, times=2):
            broker.start()
            results = [await receipt.wait() for receipt in receipts]
        assert "AckTimeoutError" in str(driver.status().last_error)
        assert [result.generation for result in results] == [3, 3]
    assert len(taken(broker)) == 2
    assert not broker.violations


@pytest.mark.parametrize("before", [True, False])
async def test_a_link_that_is_lost_in_the_handshake_again_makes_no_second_message(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, before: bool
) -> None:
    async with MQTTDriver(config) as driver:
        receipts = await open_exchanges(driver, broker, 3, 2, 3, 2)
        broker.faults.cut(Kind.CONNACK, before=before, times=3)
        broker.start()
        for receipt in receipts:
            await receipt.wait()
        assert driver.status().counters["failures"] == 3
    assert sorted(name for name, _ in taken(broker)) == ["0", "1", "2", "3"]
    assert not broker.violations


async def test_leaving_reports_what_is_open_as_lost_and_nothing_hangs(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    config = config.evolve(drain_timeout=3, ack_timeout=100)
    async with MQTTDriver(config) as driver:
        await driver.publish("a", b"", qos=1)
        broker.faults.drop(Kind.PUBREC)
        receipt = driver.publish_nowait("b", b"", qos=2)
        await settled()
        begin = trio.current_time()
    assert trio.current_time() - begin < 10
    with pytest.raises(MessageLostError):
        await receipt.wait()
    assert any(isinstance(packet, Disconnect) for packet in connections(broker)[-1])


async def test_leaving_while_the_link_is_down_reports_what_is_open_as_lost(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        receipts = await open_exchanges(driver, broker, 1, 2, 3)
    for receipt in receipts:
        with pytest.raises(MessageLostError):
            await receipt.wait()


async def test_a_broker_under_another_name_gets_what_is_open_anew(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        receipts = await open_exchanges(driver, broker, 1, 2, 3)
        broker.start()
        driver.apply_settings(config.evolve(client_id="other"))
        for receipt in receipts:
            await receipt.wait()
    found = [one for one in exchanges(connections(broker, "other")[-1]) if one[0] != "PUBREL"]
    assert [(name, dup) for name, _, dup in found[1:]] == [("0", False), ("1", False), ("2", False)]
    assert not broker.violations


async def test_the_echo_of_the_test_publish_leaves_nothing_in_the_session(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """A link that is lost in the middle leaves the subscription of the test behind, and the next test takes it off."""
    async with MQTTDriver(config.evolve(probe="echo")) as driver:
        for kind in (Kind.SUBACK, Kind.PUBACK, Kind.UNSUBSCRIBE, Kind.UNSUBACK):
            broker.faults.cut(kind, before=True)
            broker.drop("driver")
            await driver.wait_state(State.BACKING_OFF)
            await driver.wait_live()
            assert not broker.subscriptions("driver")
        await settled()
        assert driver.status().unacknowledged == 0
        assert len(acknowledged(connections(broker)[-1], Kind.PUBACK)) >= 1
    assert not broker.violations
