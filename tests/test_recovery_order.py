"""A reconnect, step by step: a fresh client with a fresh ID, tested by a publish, before anything else goes out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import DriverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Connect, Direction, Kind, MemoryBroker, Publish, Subscribe

settled = trio.testing.wait_all_tasks_blocked

PROBES = "trio_mqtt_driver/probe/#"
EPOCH = 1_700_000_000


def wall_clock() -> float:
    return EPOCH + trio.current_time()


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **{"wall_clock": wall_clock, **options})


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def kinds(broker: MemoryBroker, client_id: str) -> list[Kind]:
    """What one client sent."""
    return [packet.kind for sender, packet in broker.received if sender == client_id]


def client_ids(broker: MemoryBroker) -> list[str]:
    return [connect.client_id for connect in broker.connects]


async def reconnected(driver: MQTTDriver, generation: int) -> None:
    """Return when ``generation`` is live."""
    await settled()
    with trio.fail_after(60):
        await driver.wait_live()
    assert driver.generation == generation


async def test_each_connection_has_an_id_of_its_own(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker, client_id="kitchen")) as driver:
        assert driver.client_id == f"kitchen_{EPOCH}000"
        for generation in range(2, 6):
            await trio.sleep(100)
            broker.drop()
            await reconnected(driver, generation)
            assert driver.client_id == f"kitchen_reconnect_{EPOCH + 100 * (generation - 1)}000"
        assert client_ids(broker)[-1] == driver.client_id
    assert len(set(client_ids(broker))) == 5
    assert all(connect.clean_start for connect in broker.connects)
    assert not broker.violations


async def test_an_attempt_that_failed_has_used_up_its_id(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.faults.refuse_connect(0x88, times=2)
    async with MQTTDriver(config_for(broker)) as driver:
        first = client_ids(broker)
        assert len(set(first)) == 3
        assert all(one.startswith("driver_17") for one in first)
        broker.faults.refuse_connect(0x88, times=2)
        await trio.sleep(100)
        broker.drop()
        await reconnected(driver, 2)
    assert len(set(client_ids(broker))) == 6
    assert all(one.startswith("driver_reconnect_17") for one in client_ids(broker)[3:])


async def test_a_wall_clock_that_goes_backwards_repeats_no_id(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    wall = 5000.0
    async with MQTTDriver(config_for(broker, wall_clock=lambda: wall)) as driver:
        for generation, now in enumerate((5000.0, 4000.0, 4000.0, 5000.002, 6000.0), start=2):
            wall = now
            await trio.sleep(100)
            broker.drop()
            await reconnected(driver, generation)
    assert client_ids(broker) == [
        "driver_5000000",
        "driver_reconnect_5000001",
        "driver_reconnect_5000002",
        "driver_reconnect_5000003",
        "driver_reconnect_5000004",
        "driver_reconnect_6000000",
    ]


async def test_changing_the_base_there_and_back_repeats_no_id(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    config = config_for(broker, client_id="a", wall_clock=lambda: 1.0)
    async with MQTTDriver(config) as driver:
        for generation, base in enumerate("babab", start=2):
            driver.apply_settings(config.evolve(client_id=base))
            await reconnected(driver, generation)
    assert len(set(client_ids(broker))) == 6


async def test_the_client_id_can_come_from_a_function(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    asked: list[tuple[str, int, float]] = []

    def make(base: str, generation: int, now: float) -> str:
        asked.append((base, generation, now))
        return f"{generation}-{base}"

    async with MQTTDriver(config_for(broker, client_id_factory=make)) as driver:
        await trio.sleep(100)
        broker.drop()
        await reconnected(driver, 2)
    assert client_ids(broker) == ["1-driver", "2-driver"]
    assert asked == [("driver", 1, EPOCH), ("driver", 2, EPOCH + 100)]


async def test_an_id_that_a_function_returns_twice_is_a_failed_attempt(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    ids = iter(["x", "x", "y"])
    config = config_for(broker, client_id_factory=lambda *_: next(ids))
    async with MQTTDriver(config) as driver:
        await trio.sleep(100)
        broker.drop()
        await reconnected(driver, 2)
        assert "client_id_factory failed" in str(driver.status().last_error)
    assert client_ids(broker) == ["x", "y"]


async def test_nothing_of_the_old_client_is_used_again(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        old = driver._supervisor.connection
        await trio.sleep(100)
        broker.drop()
        await reconnected(driver, 2)
        new = driver._supervisor.connection
        assert old is not None
        assert new is not None
        assert new is not old
        assert new._control is not old._control
        assert new._control._client is not old._control._client
        assert new._reader is not old._reader
        assert new.session is not old.session


async def test_the_old_stream_is_closed_before_the_new_one_is_opened(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
        await trio.sleep(100)
        broker.silence()
        await trio.sleep(60)
        await reconnected(driver, 2)
        driver.force_reconnect(even_if_live=True)
        await reconnected(driver, 3)
        assert dialer.order == [("open", 1), ("close", 1), ("open", 2), ("close", 2), ("open", 3)]
    assert dialer.order[-1] == ("close", 3)


async def test_the_child_scope_is_empty_before_the_old_stream_is_closed(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    """Otherwise a task of the old connection could write to, or fail on, a stream that is gone."""
    async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
        await trio.sleep(100)
        connection = driver._supervisor.connection
        assert connection is not None
        nursery = connection._control._nursery
        assert len(nursery.child_tasks) == 3
        left: list[int] = []
        dialer.streams[0]._on_close = lambda: left.append(len(nursery.child_tasks))
        broker.drop(reset=True)
        await reconnected(driver, 2)
        assert left == [0]


async def test_the_order_on_the_wire_is_connect_probe_subscriptions_outbox(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        await driver.subscribe("a", lambda _: None, qos=1)
        await driver.subscribe("b", lambda _: None)
        await trio.sleep(100)
        broker.stop()
        await settled()
        receipts = [driver.publish_nowait("out", str(number), qos=qos) for number, qos in enumerate((1, 0, 2))]
        broker.start()
        await reconnected(driver, 2)
        for receipt in receipts:
            with trio.fail_after(5):
                await receipt.wait()
        packets = [packet for sender, packet in broker.received if sender == driver.client_id]
    assert [packet.kind for packet in packets][:6] == [
        Kind.CONNECT,
        Kind.PUBLISH,
        Kind.SUBSCRIBE,
        Kind.PUBLISH,
        Kind.PUBLISH,
        Kind.PUBLISH,
    ]
    probe, subscribe, *out = packets[1:6]
    assert isinstance(probe, Publish)
    assert probe.topic.startswith("trio_mqtt_driver/probe/driver_reconnect_")
    assert (probe.qos, probe.retain) == (1, False)
    assert isinstance(subscribe, Subscribe)
    assert [(one.topic_filter, one.qos) for one in subscribe.requests] == [("a", 1), ("b", 0)]
    assert [packet.payload for packet in out if isinstance(packet, Publish)] == [b"0", b"1", b"2"]
    assert not broker.violations


@pytest.mark.parametrize("version", [4, 5])
async def test_no_step_begins_before_the_one_before_is_answered(
    broker: MemoryBroker, version: int, autojump_clock: MockClock
) -> None:
    broker.options.versions = (version,)
    async with MQTTDriver(config_for(broker, protocol="5" if version == 5 else "3.1.1")) as driver:
        await driver.subscribe("a", lambda _: None)
        await trio.sleep(100)
        broker.stop()
        await settled()
        receipt = driver.publish_nowait("out", qos=1)
        broker.start()
        holds = [broker.faults.hold(kind) for kind in (Kind.CONNACK, Kind.PUBACK, Kind.SUBACK)]
        sent = [Kind.CONNECT]
        states = (State.CONNECTING, State.VALIDATING, State.REPLAYING)
        for hold, state, following in zip(holds, states, (Kind.PUBLISH, Kind.SUBSCRIBE, Kind.PUBLISH), strict=True):
            await broker.wait_for(partial(getattr, hold, "held"), "held packet")
            await settled()
            assert driver.state is state
            assert kinds(broker, broker.connects[-1].client_id) == sent
            with pytest.raises(trio.TooSlowError), trio.fail_after(1):
                await driver.wait_live()
            assert kinds(broker, broker.connects[-1].client_id) == sent
            hold.remove()
            sent.append(following)
        with trio.fail_after(1):
            await receipt.wait()
        assert driver.state is State.LIVE
        assert kinds(broker, str(driver.client_id)) == sent


async def test_a_new_subscription_waits_its_turn_while_the_link_is_validated(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    with broker.faults.hold(Kind.PUBACK) as hold:
        async with MQTTDriver(config_for(broker), start="background") as driver, trio.open_nursery() as nursery:
            nursery.start_soon(driver.subscribe, "a", print)
            await broker.wait_for(lambda: hold.held, "test publish")
            await settled()
            assert Kind.SUBSCRIBE not in kinds(broker, broker.clients[0])
            hold.release()
            await broker.wait_for_subscription("a")


# -- the test publish -------------------------------------------------------------------------------------------------


def unanswered(broker: MemoryBroker) -> str:
    broker.faults.drop(Kind.PUBACK, times=1)
    return "was not acknowledged within probe_timeout=5 s"


def refused(broker: MemoryBroker) -> str:
    broker.faults.refuse_publish(PROBES, times=1)
    return "test publish was refused: the broker refused"


def lost(broker: MemoryBroker) -> str:
    broker.faults.cut(Kind.PUBLISH, direction=Direction.IN, before=True)
    return "the broker closed the connection"


def reset(broker: MemoryBroker) -> str:
    broker.faults.cut(Kind.PUBLISH, direction=Direction.IN, before=True, reset=True)
    return "reset by peer"


@pytest.mark.parametrize("fault", [unanswered, refused, lost, reset])
async def test_a_test_publish_that_fails_is_a_failed_attempt(
    broker: MemoryBroker, dialer: Dialer, fault: Any, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
        await driver.subscribe("a", lambda _: None)
        await trio.sleep(100)
        broker.stop()
        await settled()
        receipt = driver.publish_nowait("out", qos=1)
        words = fault(broker)
        broker.start()
        await reconnected(driver, 2)
        await receipt.wait()
        status = driver.status()
    failed, good = client_ids(broker)[-2:]
    assert failed != good
    assert kinds(broker, failed)[:2] == [Kind.CONNECT, Kind.PUBLISH]
    assert not {Kind.SUBSCRIBE} & set(kinds(broker, failed))
    assert len(kinds(broker, failed)) == 2
    assert words in str(status.last_error)
    attempts = [event for event in status.history if event.text.startswith("attempt failed")]
    assert words in attempts[-1].text
    assert status.counters["connections"] == 2
    assert ("close", 2) in dialer.order[:4]


async def test_a_refused_test_publish_is_reported_as_not_authorised_with_advice(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    broker.faults.refuse_publish(PROBES, times=1)
    async with MQTTDriver(config_for(broker)) as driver:
        error = str(driver.status().last_error)
    assert error.startswith("ProbeError: the test publish was refused")
    assert "not authorized (0x87)" in error
    assert "probe='ping'" in error


async def test_the_probe_has_its_own_deadline_and_not_that_of_publishes(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    broker.faults.drop(Kind.PUBACK, times=1)
    async with MQTTDriver(config_for(broker, probe_timeout=20, ack_timeout=1)) as driver:
        failed = next(event for event in driver.status().history if event.error is not None)
    assert "ProbeError" in str(failed.error)
    assert failed.at == 20


async def test_the_probe_topic_can_be_chosen(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    config = config_for(broker, probe_topic="health/{base}/{client_id}", client_id="a/b+c")
    async with MQTTDriver(config):
        pass
    assert [message.topic for message in broker.published] == [f"health/a_b_c/a_b_c_{EPOCH}000"]


async def test_the_echo_probe_waits_for_its_own_message_and_leaves_no_subscription(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker, probe="echo")) as driver:
        assert kinds(broker, str(driver.client_id)) == [
            Kind.CONNECT,
            Kind.SUBSCRIBE,
            Kind.PUBLISH,
            Kind.PUBACK,
            Kind.UNSUBSCRIBE,
        ]
        assert broker.subscriptions(str(driver.client_id)) == {}
        assert driver.status().counters["unrouted"] == 0


async def test_an_echo_that_does_not_come_is_a_failed_attempt(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.faults.drop(Kind.PUBLISH, times=1)
    async with MQTTDriver(config_for(broker, probe="echo")) as driver:
        status = driver.status()
    assert "ProbeError" in str(status.last_error)
    assert "within probe_timeout=5 s" in str(status.last_error)
    assert len(broker.connects) == 2


async def test_an_echo_subscription_that_is_refused_is_a_failed_attempt_with_advice(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    topic = f"trio_mqtt_driver/probe/driver_{EPOCH}000"
    broker.faults.refuse_subscribe(topic, times=1)
    async with MQTTDriver(config_for(broker, probe="echo")) as driver:
        error = str(driver.status().last_error)
    assert f"refused to subscribe to the probe topic {topic!r}: not authorized" in error
    assert "probe='ping'" in error


async def test_the_ping_probe_publishes_nothing(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker, probe="ping")) as driver:
        assert kinds(broker, str(driver.client_id)) == [Kind.CONNECT, Kind.PINGREQ]
    assert not broker.published


@pytest.mark.parametrize("ping_timeout", [10, 5, 1])
async def test_a_ping_probe_without_an_answer_is_a_failed_attempt(
    broker: MemoryBroker, ping_timeout: float, autojump_clock: MockClock
) -> None:
    broker.faults.drop(Kind.PINGRESP, times=1)
    async with MQTTDriver(config_for(broker, probe="ping", ping_timeout=ping_timeout)) as driver:
        error = str(driver.status().last_error)
    assert error == "ProbeError: PINGREQ was not answered within probe_timeout=5 s"


@pytest.mark.parametrize("probe", ["publish", "echo"])
async def test_a_broker_without_qos_1_is_probed_by_ping(
    nursery: trio.Nursery, probe: str, autojump_clock: MockClock
) -> None:
    broker = MemoryBroker(nursery, maximum_qos=0)
    async with MQTTDriver(config_for(broker, probe=probe)) as driver:
        assert kinds(broker, str(driver.client_id)) == [Kind.CONNECT, Kind.PINGREQ]
    assert not broker.violations


async def test_the_connect_packet_is_the_first_of_each_connection(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        for generation in (2, 3):
            driver.publish_nowait("a", qos=1)
            driver.force_reconnect(even_if_live=True)
            driver.publish_nowait("a", qos=1)
            await reconnected(driver, generation)
    for client_id in client_ids(broker):
        first = next(packet for sender, packet in broker.received if sender == client_id)
        assert isinstance(first, Connect)
    assert not broker.violations
