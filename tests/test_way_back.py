"""From a fallback back to what is preferred: by test connections beside the live link, and not before they pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.several import Several, at, leave_a, place, told
from trio_mqtt_driver import Attempt, Availability, DriverConfig, FailoverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Connect, Direction, Disconnect, Kind, MemoryBroker, Packet, Publish

settled = trio.testing.wait_all_tasks_blocked
HOUR = 3600


@pytest.fixture
def several(nursery: trio.Nursery) -> Several:
    return Several(nursery)


def connections_to(broker: MemoryBroker) -> list[list[Packet]]:
    """What came on each connection, in order."""
    by_client: dict[str, list[Packet]] = {}
    for client_id, packet in broker.received:
        by_client.setdefault(client_id, []).append(packet)
    return list(by_client.values())


# -- what a test is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["publish", "ping", "echo"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("stable_id", [False, True])
async def test_a_test_is_a_connection_of_its_own_as_far_as_the_test_publish(
    several: Several, stable_id: bool, protocol: str, probe: str, autojump_clock: MockClock
) -> None:
    a = several["a"]
    config = several.config(
        availability=Availability(topic="here"), stable_id=stable_id, protocol=protocol, probe=probe
    )
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", lambda _: None)
        await leave_a(several, driver)
        before = driver.client_id
        await trio.sleep(100)
        assert (place(driver), driver.generation, driver.client_id) == ("b", 2, before)
        tests = connections_to(a)
        assert len(tests) == 3
        for first, *middle, last in tests:
            assert isinstance(first, Connect)
            assert first.clean_start
            assert first.will is None
            assert not first.properties.get("session_expiry_interval")
            assert first.client_id.startswith("driver_reconnect_")
            assert isinstance(last, Disconnect)
            assert last.reason_code == 0
            kinds = {
                "publish": [Kind.PUBLISH],
                "ping": [Kind.PINGREQ],
                "echo": [Kind.SUBSCRIBE, Kind.PUBLISH, Kind.PUBACK, Kind.UNSUBSCRIBE],
            }
            assert [packet.kind for packet in middle] == kinds[probe]
            assert {packet.topic for packet in middle if isinstance(packet, Publish)} <= {
                f"trio_mqtt_driver/probe/{first.client_id}"
            }
        names = [connect.client_id for connect in a.connects]
        assert len({*names, before}) == 4
        assert several.open == ["b"]
        assert not a.clients
        assert driver.status().endpoints[0].tests_passed == 3
        assert driver.status().counters["attempts"] == 3  # tests are none
    several.check()


async def test_the_broker_that_is_tested_has_until_disconnect_timeout_to_close(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config()) as driver:
        await leave_a(several, driver)
        several["a"].faults.drop(Kind.DISCONNECT, direction=Direction.IN)
        await trio.sleep(31.9)
        assert several.open == ["b", "a"]
        await trio.sleep(0.2)
        assert several.open == ["b"]
        assert driver.status().endpoints[0].tests_passed == 1
        several["a"].drop()
    assert not several.open


# -- when the driver goes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check_every, return_after, expected", [(30, 119, 150), (30, 1, 60), (10, 45, 60), (100, 99, 200)]
)
async def test_back_when_the_primary_has_passed_every_test_for_long_enough(
    several: Several, check_every: float, return_after: float, expected: float, autojump_clock: MockClock
) -> None:
    edges: list[bool] = []
    config = several.config(failover=FailoverConfig(check_every=check_every, return_after=return_after))
    async with MQTTDriver(config) as driver:
        await leave_a(several, driver)
        driver.register_connection_callback(edges.append)
        await trio.sleep(expected - 0.1)
        assert (place(driver), edges) == ("b", [])
        await trio.sleep(0.2)
        assert (place(driver), driver.state, edges) == ("a", State.LIVE, [False, True])
        assert several.open == ["a"]
        several["b"].forget()
        await trio.sleep(1000)
        assert several.open == ["a"]
        assert not several["b"].connects  # where it should be it tests nobody
    several.check()


async def test_nothing_is_lost_on_the_way_back(several: Several, autojump_clock: MockClock) -> None:
    got: list[bytes] = []
    async with MQTTDriver(several.config()) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload), qos=1)
        await leave_a(several, driver)
        number = 0
        while place(driver) != "a":
            number += 1
            await driver.publish("out", str(number), qos=1)
            await trio.sleep(0.1)
        several["a"].publish("in", b"from a", qos=1)
        await settled()
        assert got == [b"from a"]
        arrived = {one.payload for name in "ab" for one in several[name].published if one.topic == "out"}
        assert arrived == {b"%d" % one for one in range(1, number + 1)}
        farewell = [packet for _, packet in several["b"].received if isinstance(packet, Disconnect)]
        assert [packet.reason_code for packet in farewell] == [0]
        assert driver.status().counters["losses"] == 1  # the first one; to go back is none
    several.check()


def accepts_only(broker: MemoryBroker) -> None:
    broker.faults.drop(Kind.PUBLISH, direction=Direction.IN)


def never_answers(broker: MemoryBroker) -> None:
    broker.faults.drop(Kind.CONNECT)


def drops_after_connack(broker: MemoryBroker) -> None:
    broker.faults.cut(Kind.CONNACK, times=None)


def resets_after_publish(broker: MemoryBroker) -> None:
    broker.faults.cut(Kind.PUBLISH, times=None, direction=Direction.IN, reset=True, before=True)


def refuses_the_test(broker: MemoryBroker) -> None:
    broker.options.acl = lambda _: False


def refuses_us(broker: MemoryBroker) -> None:
    broker.options.users = {"nobody": "x"}


def is_down(broker: MemoryBroker) -> None:
    broker.stop()


def sends_nonsense(broker: MemoryBroker) -> None:
    broker.faults.replace(Kind.CONNACK, b"\x00nonsense")


BROKEN: list[Callable[[MemoryBroker], object]] = [
    accepts_only,
    never_answers,
    drops_after_connack,
    resets_after_publish,
    refuses_the_test,
    refuses_us,
    is_down,
    sends_nonsense,
]


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda one: one.__name__)
async def test_never_to_a_broker_that_does_not_take_a_message(
    several: Several, breaks: Callable[[MemoryBroker], object], autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config(username="me", password="secret")) as driver:
        await leave_a(several, driver)
        breaks(several["a"])
        await trio.sleep(HOUR)
        assert (place(driver), driver.generation) == ("b", 2)
        a = driver.status().endpoints[0]
        assert a.tests_passed == 0
        assert a.failures > 50
        assert len(several.dialled) <= 2 * HOUR / 30
        several["a"].drop()
    assert not several.open


async def test_a_primary_that_fails_now_and_then_is_not_gone_back_to(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config()) as driver:
        await leave_a(several, driver)
        for _ in range(30):
            await trio.sleep(110)
            several["a"].stop()
            await trio.sleep(35)
            several["a"].start()
        assert (place(driver), driver.generation) == ("b", 2)


async def test_a_primary_that_passes_its_tests_and_fails_all_the_same_is_gone_back_to_ever_more_seldom(
    several: Several, autojump_clock: MockClock
) -> None:
    """It takes connections, but not this client's subscriptions."""
    a = several["a"]
    config = several.config(history_events=10_000, failover=FailoverConfig(return_after=31))
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", lambda _: None)
        await leave_a(several, driver)
        a.faults.cut(Kind.SUBSCRIBE, times=None, before=True)
        await trio.sleep(4 * HOUR)
        returns = [event.at for event in driver.status().history if "is back and preferred" in event.text]
    gaps = [later - earlier for later, earlier in zip(returns[1:], returns, strict=False)]
    assert gaps[:5] == sorted(gaps[:5])
    assert gaps[0] < 200
    assert len(gaps) > 10
    assert all(gap > 32 * 31 for gap in gaps[4:])


async def test_never_if_told_so(several: Several, autojump_clock: MockClock) -> None:
    async with MQTTDriver(several.config(failover=FailoverConfig(return_after=math.inf))) as driver:
        await leave_a(several, driver)
        await trio.sleep(2 * HOUR)
        assert several.order == ""
        several["b"].drop()
        await settled()
        await driver.wait_live()
        assert place(driver) == "a"


async def test_from_the_third_to_the_second_and_on_to_the_first(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    several = Several(nursery, "abc")
    async with MQTTDriver(several.config()) as driver:
        for name in "ab":
            several[name].stop()
        await settled()
        await driver.wait_live()
        assert place(driver) == "c"
        several["b"].start()
        await trio.sleep(200)
        assert place(driver) == "b"
        several["a"].start()
        await trio.sleep(200)
        assert place(driver) == "a"
    several.check()


@pytest.mark.parametrize("how", ["says so", "closes"])
async def test_a_primary_of_3_1_1_is_tested_with_it(several: Several, how: str, autojump_clock: MockClock) -> None:
    a = several["a"]
    if how == "says so":
        a.options.versions = (4,)
    else:
        for odd in range(1, 30, 2):
            a.faults.cut(Kind.CONNECT, first=odd, before=True)
    async with MQTTDriver(several.config()) as driver:
        await leave_a(several, driver)
        await trio.sleep(200)
        assert (place(driver), driver.status().protocol) == ("a", "3.1.1")
    several.check()


async def test_a_primary_that_has_spoken_5_and_closes_is_not_tested_with_3_1_1(
    several: Several, autojump_clock: MockClock
) -> None:
    """It would pass, and the attempt that follows would not."""
    async with MQTTDriver(several.config(endpoint=at("c"), fallbacks=[at("b"), at("a")])) as driver:
        assert place(driver) == "b"
        several.brokers["c"] = several["a"]
        several["a"].faults.cut(Kind.PUBLISH, times=None, direction=Direction.IN, before=True)
        await trio.sleep(300)
        assert {connect.version for connect in several.connects("a")} == {5}
        assert driver.status().endpoints[0].tests_passed == 0


# -- options ----------------------------------------------------------------------------------------------------------


async def test_a_factory_that_fails_is_a_test_that_is_not_passed(several: Several, autojump_clock: MockClock) -> None:
    outcome: Callable[[Attempt], DriverConfig] = lambda attempt: attempt.config  # noqa: E731  # it changes below
    asked: list[str] = []

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        asked.append(attempt.config.endpoint.host)
        return outcome(attempt)

    def fail(attempt: Attempt) -> DriverConfig:
        raise OSError("HTTP 502")

    async with MQTTDriver(several.config(options_factory=make)) as driver:
        await leave_a(several, driver)
        asked.clear()
        await trio.sleep(100)
        outcome = fail
        await trio.sleep(100)
        a = driver.status().endpoints[0]
        assert (a.tests_passed, a.last_error) == (0, "OptionsError: options_factory failed: OSError('HTTP 502')")
        outcome = lambda attempt: attempt.config  # noqa: E731  # as above
        await trio.sleep(100)
        assert place(driver) == "b"
        await trio.sleep(100)
        assert place(driver) == "a"
        assert set(asked) == {"a"}
    several.check()


async def test_a_factory_that_hangs_is_a_test_that_is_not_passed(several: Several, autojump_clock: MockClock) -> None:
    async def make(attempt: Attempt) -> DriverConfig:
        if attempt.config.endpoint == at("a") and attempt.generation > 2:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return attempt.config

    async with MQTTDriver(several.config(options_factory=make)) as driver:
        await leave_a(several, driver)
        await trio.sleep(1000)
        assert place(driver) == "b"
        assert "took longer than factory_timeout=10 s" in str(driver.status().endpoints[0].last_error)
    several.check()


async def test_a_factory_that_knows_one_endpoint_only_does_not_make_us_flap(
    several: Several, autojump_clock: MockClock
) -> None:
    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(endpoint=at("b"))

    async with MQTTDriver(several.config(options_factory=make)) as driver:
        await trio.sleep(2 * HOUR)
        assert (place(driver), driver.generation) == ("b", 1)
        assert "answered with mqtt://b:1883 when asked for mqtt://a:1883" in str(
            driver.status().endpoints[0].last_error
        )
    several.check()


# -- what is told -----------------------------------------------------------------------------------------------------


async def test_the_history_tells_when_a_primary_begins_to_pass_and_to_fail(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(several.config()) as driver:
        await leave_a(several, driver)
        several["a"].stop()
        await trio.sleep(600)
        assert told(driver, "failover") == []  # that it fails is why we are here
        several["a"].start()
        await trio.sleep(70)
        several["a"].stop()
        await trio.sleep(600)
        several["a"].start()
        await trio.sleep(200)
        assert place(driver) == "a"
        passes, fails, again = told(driver, "failover")
        assert passes == again == "mqtt://a:1883 begins to pass its tests"
        assert fails.startswith("mqtt://a:1883 begins to fail its tests: TransportError: connecting to mqtt://a:1883")
        reconnecting = told(driver, "backing off")[-1]
        assert reconnecting == "reconnecting: mqtt://a:1883 is back and preferred"


async def test_what_a_broker_sends_to_a_test_goes_nowhere(several: Several, autojump_clock: MockClock) -> None:
    got: list[bytes] = []
    a = several["a"]
    stray = Publish(topic="in", payload=b"stray", qos=1, packet_id=7)
    async with MQTTDriver(several.config()) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload), qos=1)
        await leave_a(several, driver)
        a.faults.follow(Kind.CONNACK, stray)
        await trio.sleep(100)
        assert driver.status().endpoints[0].tests_passed == 3
        assert got == []
        assert driver.status().counters["messages_in"] == 0
    several.check()
