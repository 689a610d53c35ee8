"""The stable-ID mode: which session a connection goes on with."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.stable import Log, connections, filters, reconnect, stable_config, starts
from tests.testing.peers import join, subscribe
from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver
from trio_mqtt_driver.testing import Connack, Disconnect, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=["5", "3.1.1"])
def config(request: pytest.FixtureRequest, broker: MemoryBroker) -> DriverConfig:
    return stable_config(broker, request.param)


@pytest.mark.parametrize(
    "protocol, expected",
    [("5", [(True, 0), (False, 500), (False, 500), (False, 500)]), ("3.1.1", [(True, 0)] + 3 * [(False, 0)])],
)
async def test_the_first_connection_begins_clean_and_the_others_ask_for_its_session(
    autojump_clock: MockClock, broker: MemoryBroker, protocol: str, expected: list[tuple[bool, int]]
) -> None:
    """A connection of its own makes the broker forget an older one."""
    async with MQTTDriver(stable_config(broker, protocol, session_expiry=500)) as driver:
        await reconnect(driver, broker)
        await reconnect(driver, broker)
        assert driver.client_id == "driver"
    found = [(one.clean_start, one.properties.get("session_expiry", 0)) for one in broker.connects]
    assert found == expected
    assert {one.client_id for one in broker.connects} == {"driver"}
    assert not broker.violations


async def test_what_an_older_process_left_at_the_broker_is_wiped(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """A process that has just begun knows nothing of the messages that are open in it [MQTT-3.2.2-4]."""
    older = await join(broker, "driver", clean_start=False, properties={"session_expiry": 0xFFFFFFFF})
    await subscribe(older, "old", qos=2)
    await older.stream.aclose()
    await settled()
    broker.publish("old", b"1", qos=2)
    log = Log()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("#", log, qos=2)
        assert list(broker.subscriptions("driver")) == ["#"]
        await settled()
        assert not log.payloads


@pytest.mark.parametrize("number", [1, 2])
async def test_a_session_that_is_present_before_there_was_one_is_a_protocol_error(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig, number: int
) -> None:
    broker.faults.replace(Kind.CONNACK, Connack(session_present=True), first=number, times=1)
    async with MQTTDriver(config) as driver:
        assert "ProtocolError: protocol error: Session Present" in str(driver.status().last_error)
        assert driver.status().counters["failures"] == 1
        await driver.subscribe("a", Log())
    # All of it from the beginning: what the broker has there is not ours.
    clean = [True, False]
    assert starts(broker) == [*clean[:number], *clean]


async def test_the_session_is_kept_over_a_reconnect_and_a_pause_of_our_own(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    log = Log()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", log, qos=1)
        driver.force_reconnect("a test", even_if_live=True)
        await driver.wait_live()
        assert driver.generation == 2
        driver.pause("a test")
        await trio.sleep(10)
        broker.publish("a", b"1", qos=1)
        driver.resume()
        await driver.wait_live()
        await settled()
        assert driver.generation == 3
        assert log.payloads == [b"1"]
        assert not filters(connections(broker)[-1])
        assert Disconnect() in connections(broker)[-2]  # it says nothing of the session


async def test_leaving_ends_the_session_where_the_version_can_say_so(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log(), qos=1)
    goodbye = connections(broker)[-1][-1]
    assert isinstance(goodbye, Disconnect)
    assert goodbye.properties == ({"session_expiry": 0} if config.protocol == "5" else {})
    assert ("driver" in broker.sessions) is (config.protocol == "3.1.1")


async def test_another_client_id_is_another_session_and_so_is_the_first_one_again(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log(), qos=1)
        for client_id in ("other", "driver"):
            broker.forget()
            driver.apply_settings(config.evolve(client_id=client_id))
            await driver.wait_live()
            assert starts(broker, client_id)[0] is True
            assert driver.client_id == client_id
            assert list(broker.subscriptions(client_id)) == ["a"]
    assert not broker.violations


async def test_another_version_is_another_session(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    config = stable_config(broker, "5")
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log(), qos=1)
        for protocol in ("3.1.1", "5"):
            broker.forget()
            driver.apply_settings(config.evolve(protocol=protocol))
            await driver.wait_live()
            assert starts(broker)[0] is True
            assert filters(connections(broker)[-1]) == ["a"]


async def test_going_over_to_fresh_ids_and_back(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log(), qos=1)
        driver.apply_settings(config.evolve(stable_id=False))
        await driver.wait_live()
        assert driver.client_id != "driver"
        assert broker.connects[-1].clean_start
        assert list(broker.subscriptions(driver.client_id or "")) == ["a"]
        broker.forget()
        driver.apply_settings(config)
        await driver.wait_live()
        assert starts(broker)[0] is True
        assert filters(connections(broker)[-1]) == ["a"]


class Two:
    """Two brokers, reached as the hosts "one" and "two"."""

    def __init__(self, one: MemoryBroker, two: MemoryBroker) -> None:
        self.brokers = {"one": one, "two": two}

    async def open(self, endpoint: Endpoint) -> trio.abc.Stream:
        return await self.brokers[endpoint.host].connect_stream()


async def test_another_broker_has_a_session_of_its_own_and_so_has_the_first_one_again(
    autojump_clock: MockClock, nursery: trio.Nursery, broker: MemoryBroker, config: DriverConfig
) -> None:
    two = MemoryBroker(nursery)
    places = [Endpoint(host=host, port=1883) for host in ("one", "two")]
    config = config.evolve(open_stream=Two(broker, two).open, endpoint=places[0])
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log(), qos=1)
        for place, there in ((places[1], two), (places[0], broker)):
            there.forget()
            driver.apply_settings(config.evolve(endpoint=place))
            await driver.wait_live()
            assert starts(there)[0] is True
            assert filters(connections(there)[-1]) == ["a"]


async def test_a_session_outlives_attempts_at_a_broker_that_cannot_be_had(
    autojump_clock: MockClock, nursery: trio.Nursery, broker: MemoryBroker, config: DriverConfig
) -> None:
    two = MemoryBroker(nursery)
    two.down = True
    places = [Endpoint(host=host, port=1883) for host in ("one", "two")]
    config = config.evolve(open_stream=Two(broker, two).open, endpoint=places[0], fallbacks=(places[1],))
    log = Log()
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", log, qos=1)
        broker.stop()
        await trio.sleep(30)
        assert any("two:1883" in event.text for event in driver.status().history)
        two_refuses = two.faults.refuse_connect(0x88)
        two.down = False
        await trio.sleep(30)
        assert two_refuses.seen
        broker.publish("a", b"1", qos=1)
        broker.start()
        await driver.wait_live()
        await settled()
        assert log.payloads == [b"1"]
        assert not filters(connections(broker)[-1])


async def test_an_old_broker_that_just_closes_on_mqtt_5_keeps_its_session(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """Otherwise each reconnect would ask with MQTT 5 first, which is another session."""

    broker.options.versions = (4,)
    broker.faults.cut(Kind.CONNACK, before=True)
    async with MQTTDriver(stable_config(broker, "auto")) as driver:
        await driver.subscribe("a", Log(), qos=1)
        for _ in range(3):
            await reconnect(driver, broker)
            assert not filters(connections(broker)[-1])
    assert [(one.version, one.clean_start) for one in broker.connects] == [(5, True), (4, True)] + 4 * [(4, False)]


async def test_an_attempt_with_another_version_that_fails_unheard_has_taken_the_place_of_the_session(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    config = stable_config(broker, "5")
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log())
        with broker.faults.cut(Kind.CONNACK, before=True, first=2) as rule:
            driver.apply_settings(config.evolve(protocol="3.1.1"))
            await broker.wait_for(lambda: rule.seen == 2)
            driver.apply_settings(config)
            await driver.wait_live()
        assert list(broker.subscriptions("driver")) == ["a"]


async def test_an_attempt_under_another_name_that_fails_unheard_leaves_no_trace(
    autojump_clock: MockClock, broker: MemoryBroker, config: DriverConfig
) -> None:
    """Its session is present in the next attempt, and has none of the subscriptions that the old name has."""
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", Log())
        broker.faults.cut(Kind.CONNACK, before=True, first=2)
        driver.apply_settings(config.evolve(client_id="other"))
        await driver.wait_live()
        assert driver.status().counters["failures"] == 1
        assert list(broker.subscriptions("other")) == ["a"]


async def test_a_session_in_doubt_is_not_taken_up_after_its_expiry(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """The CONNACK that would have told of its end was lost; the session that is present now is empty."""
    async with MQTTDriver(stable_config(broker, "5", session_expiry=60)) as driver:
        await driver.subscribe("a", Log())
        broker.stop()
        await trio.sleep(100)
        broker.faults.cut(Kind.CONNACK, before=True)
        broker.start()
        await driver.wait_live()
        assert starts(broker) == [True, False, False, True, False]
        assert filters(connections(broker)[-1]) == ["a"]


async def test_the_expiry_that_the_broker_granted_counts(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, session_expiry_maximum=10)
    async with MQTTDriver(stable_config(broker, "5", session_expiry=1000)):
        broker.stop()
        await trio.sleep(20)
        broker.faults.cut(Kind.CONNACK, before=True)
        broker.start()
        await broker.wait_for(lambda: len(broker.connects) == 4)
        assert starts(broker) == [True, False, False, True]


async def test_other_settings_do_not_cost_the_session_of_a_broker_that_speaks_3_1_1_only(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """To ask it with MQTT 5 again would."""
    broker = MemoryBroker(nursery, versions=(4,))
    got: list[bytes] = []
    async with MQTTDriver(stable_config(broker, "auto")) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload), qos=1)
        held = broker.faults.hold(Kind.PUBREC)
        receipt = driver.publish_nowait("out", b"once", qos=2)
        await settled()
        broker.down = True
        broker.disconnect()
        held.remove()
        broker.publish("in", b"kept", qos=1)
        await trio.sleep(1)
        driver.apply_settings(driver.config.evolve(keep_alive=31))
        broker.down = False
        await driver.wait_live()
        await receipt.wait()
        assert driver.config.keep_alive == 31
        await trio.sleep(5)
    assert [message.payload for message in broker.published if message.topic == "out"] == [b"once"]
    assert got == [b"kept"]
