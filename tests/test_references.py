"""MQTT 5 Server References [MQTT-4.13], as the driver follows them. Which are followed is in ``test_redirects.py``."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.several import Several, at, leave_a, place, told
from trio_mqtt_driver import DriverConfig, Endpoint, FailoverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Disconnect, Kind

settled = trio.testing.wait_all_tasks_blocked
ANOTHER = 0x9C
MOVED = 0x9D


@pytest.fixture
def several(nursery: trio.Nursery) -> Several:
    return Several(nursery, "abc")


def alone(several: Several, name: str = "a", **options: object) -> DriverConfig:
    """A driver with one endpoint."""
    return several.config(**{"endpoint": at(name), "fallbacks": (), **options})


def refer(
    several: Several, name: str, reference: str | None, code: int = ANOTHER, *, times: int | None = None
) -> None:
    """Answer CONNECT there with a reference to somewhere else."""
    several[name].options.server_reference = reference
    several[name].faults.refuse_connect(code, times=times)


def refer_live(several: Several, name: str, reference: str, code: int = ANOTHER) -> None:
    """Send who is connected there somewhere else."""
    several[name].options.server_reference = reference
    several[name].disconnect(reason_code=code)


# -- followed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [ANOTHER, MOVED], ids=hex)
@pytest.mark.parametrize("reference", ["b", "b:1883", "[bad b:1883", "a b", "x:y b c"])
async def test_the_answer_to_connect_refers_to_another_server(
    several: Several, reference: str, code: int, autojump_clock: MockClock
) -> None:
    refer(several, "a", reference, code)
    begin = trio.current_time()
    async with MQTTDriver(alone(several)) as driver:
        assert trio.current_time() == begin  # at once
        assert (place(driver), several.order) == ("b", "ab")
        text = "refused the connection: use another server" if code == ANOTHER else "server moved"
        assert any(
            one.startswith("following the broker's reference to mqtt://b:1883: ") and text in one
            for one in told(driver, "backing off")
        )
        status = driver.status()
        assert status.endpoint == "mqtt://b:1883"
        assert status.counters["failures"] == 1
        if code == ANOTHER:
            assert [(one.endpoint, one.refers_to) for one in status.endpoints] == [("mqtt://a:1883", "mqtt://b:1883")]
        else:
            assert [one.endpoint for one in status.endpoints] == ["mqtt://b:1883", "mqtt://a:1883"]
    several.check()


async def test_a_log_line_names_it(
    several: Several, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    refer(several, "a", "b:1883")
    async with MQTTDriver(alone(several)):
        pass
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert line == (
        "driver: following the broker's reference to mqtt://b:1883: "
        "mqtt://a:1883 refused the connection: use another server (0x9c)"
    )


async def test_a_live_link_is_sent_to_another_server_and_comes_back(
    several: Several, autojump_clock: MockClock
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(alone(several)) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload))
        await trio.sleep(60)
        refer_live(several, "a", "b")
        receipt = driver.publish_nowait("out", b"x", qos=1)
        await settled()
        assert (place(driver), driver.state) == ("b", State.LIVE)
        several["b"].publish("in", b"from b")
        await receipt.wait()
        await settled()
        assert got == [b"from b"]
        assert "out" in [one.topic for one in several["b"].published]
        await trio.sleep(1000)
        assert (place(driver), several.order) == ("b", "ab")  # it is not tested whether that can be undone
        several["b"].drop()
        await settled()
        assert (place(driver), several.order) == ("a", "aba")
    several.check()


async def test_a_server_that_moved_is_looked_for_there_from_now_on(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(alone(several)) as driver:
        await trio.sleep(60)
        refer_live(several, "a", "b", MOVED)
        for _ in range(3):
            await trio.sleep(60)
            several["b"].drop()
        await trio.sleep(60)
        assert several.order == "abbbb"
        several["b"].stop()
        await trio.sleep(1)
        await driver.wait_live()
        assert several.order == "abbbb" + "bba"  # the old address is kept
    several.check()


async def test_tls_and_port_are_kept(several: Several, autojump_clock: MockClock) -> None:
    seen: list[Endpoint] = []

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        seen.append(endpoint)
        return await several.open_stream(endpoint)

    refer(several, "a", "b c:1")
    config = alone(several, endpoint=Endpoint(scheme="mqtts", host="a", port=8884), open_stream=open_stream)
    async with MQTTDriver(config):
        assert seen[1] == Endpoint(scheme="mqtts", host="b", port=8884)


# -- not followed, or not for ever ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference", [None, "", " ", "mqtt://b", "b:99999", "b:x", "u:p@b", "x" * 65000, "a", "a:1883"], ids=repr
)
@pytest.mark.parametrize("code", [ANOTHER, MOVED], ids=hex)
async def test_a_reference_to_nowhere_is_a_failed_attempt(
    several: Several, code: int, reference: str | None, autojump_clock: MockClock
) -> None:
    refer(several, "a", reference, code, times=2)
    async with MQTTDriver(alone(several)) as driver:
        assert several.order == "aaa"
        assert len(told(driver, "backing off")) == 2
        assert all(text.startswith("attempt failed: RefusedError: ") for text in told(driver, "backing off"))
        assert all(len(event.text) < 2000 for event in driver.status().history)
    several.check()


async def test_none_is_followed_if_told_so(several: Several, autojump_clock: MockClock) -> None:
    refer(several, "a", "b")
    config = alone(several, failover=FailoverConfig(redirects=0))
    async with MQTTDriver(config, start="background") as driver:
        await trio.sleep(600)
        assert set(several.order) == {"a"}
        assert "use another server (0x9c)" in str(driver.status().last_error)


async def test_a_broker_behind_a_socket_of_this_machine_refers_to_nobody(
    several: Several, autojump_clock: MockClock
) -> None:
    refer(several, "a", "b", times=1)
    async with MQTTDriver(alone(several, endpoint=Endpoint(scheme="unix", path="a"))):
        assert several.order == "aa"


@pytest.mark.parametrize("code", [ANOTHER, MOVED], ids=hex)
@pytest.mark.parametrize("redirects, order", [(1, "ab"), (2, "abc")])
async def test_a_chain_has_an_end(
    several: Several, redirects: int, order: str, code: int, autojump_clock: MockClock
) -> None:
    for name, reference in ("ab", "bc", "ca"):
        refer(several, name, reference, code)
    config = alone(several, failover=FailoverConfig(redirects=redirects))
    async with MQTTDriver(config, start="background"):
        await settled()
        assert several.order == order
        await trio.sleep(3600)
        assert len(several.dialled) <= (3600 / 30 + 8) * (redirects + 1)


@pytest.mark.parametrize("code", [ANOTHER, MOVED], ids=hex)
async def test_two_that_send_us_to_and_fro_are_not_hammered(
    several: Several, code: int, autojump_clock: MockClock
) -> None:
    """Each takes us, and sends us to the other as soon as we are live."""
    async with MQTTDriver(several.config(), start="background") as driver:

        def send_away(live: bool) -> None:
            here = place(driver)
            if live and here in "ab":
                refer_live(several, here, "ba"["ab".index(here)], code)

        driver.register_connection_callback(send_away)
        await trio.sleep(20)
        assert len(several.dialled) <= 2 * (20 / 5 + 1)
        await driver.wait_live()
        assert place(driver) == "c"
        assert len(several.dialled) <= 20


async def test_a_reference_to_a_dead_server_leaves_the_endpoint_that_made_it(
    several: Several, autojump_clock: MockClock
) -> None:
    refer(several, "a", "x")
    async with MQTTDriver(several.config(fallbacks=[at("b")])) as driver:
        assert (place(driver), several.order) == ("b", "axaxb")
        a = driver.status().endpoints[0]
        assert (a.failures, a.endpoint) == (2, "mqtt://a:1883")
        assert "connecting to mqtt://x:1883" in str(a.last_error)
    several.check()


async def test_a_dead_server_that_the_only_endpoint_has_moved_to_does_not_strand_the_driver(
    several: Several, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(alone(several)) as driver:
        await trio.sleep(60)
        refer_live(several, "a", "x", MOVED)
        with trio.fail_after(60):
            await settled()
            await driver.wait_live()
        assert place(driver) == "a"
        await trio.sleep(1000)
        assert [one.endpoint for one in driver.status().endpoints] == ["mqtt://a:1883"]
    several.check()


@pytest.mark.parametrize("code", [ANOTHER, MOVED], ids=hex)
async def test_a_server_that_we_were_sent_to_cannot_end_the_driver(
    several: Several, code: int, autojump_clock: MockClock
) -> None:
    several["b"].options.users = {"nobody": "x"}
    refer(several, "a", "b", code, times=1)
    async with MQTTDriver(alone(several, username="me", password="secret")) as driver:
        assert place(driver) == "a"
    several.check()


# -- tests of a preferred endpoint ------------------------------------------------------------------------------------


async def test_a_test_learns_that_a_server_has_moved(several: Several, autojump_clock: MockClock) -> None:
    async with MQTTDriver(several.config(fallbacks=[at("b")])) as driver:
        await leave_a(several, driver)
        refer(several, "a", "c", MOVED)
        await trio.sleep(400)
        assert place(driver) == "c"
        assert [one.endpoint for one in driver.status().endpoints] == [
            "mqtt://c:1883",
            "mqtt://a:1883",
            "mqtt://b:1883",
        ]
    several.check()


@pytest.mark.parametrize("redirects", [1, 10])
async def test_a_test_that_is_sent_elsewhere_for_once_is_not_passed(
    several: Several, redirects: int, autojump_clock: MockClock
) -> None:
    config = several.config(fallbacks=[at("b")], failover=FailoverConfig(redirects=redirects))
    async with MQTTDriver(config) as driver:
        await leave_a(several, driver)
        refer(several, "a", "c", ANOTHER)
        await trio.sleep(1000)
        assert (place(driver), set(several.order)) == ("b", {"a"})
        assert "use another server" in str(driver.status().endpoints[0].last_error)
        assert len(several.dialled) <= 1000 / 30
    several.check()


async def test_a_server_that_moved_to_a_dead_one_is_not_hammered_with_tests(
    several: Several, autojump_clock: MockClock
) -> None:
    config = several.config(fallbacks=[at("b")], failover=FailoverConfig(redirects=10))
    async with MQTTDriver(config) as driver:
        await leave_a(several, driver)
        refer(several, "a", "x", MOVED)
        await trio.sleep(1000)
        assert place(driver) == "b"
        for name in "ax":
            assert several.order.count(name) <= 1000 / 30
    several.check()


async def test_what_a_test_was_told_does_not_hold_for_other_settings(
    several: Several, autojump_clock: MockClock
) -> None:
    """They may come at the very moment at which it ends."""
    failover = FailoverConfig(fail_after=1, check_every=1)
    config = several.config(fallbacks=[at("b")], failover=failover)
    async with MQTTDriver(config) as driver:
        await leave_a(several, driver)
        refer(several, "a", "c", ANOTHER, times=1)

        def change(name: str) -> None:
            several.on_closed = lambda _: None
            assert name == "a"
            driver.apply_settings(config)

        several.on_closed = change
        await trio.sleep(1.001)
        await driver.wait_live()
        assert several.order == "aa"
    several.check()


async def test_a_reference_beside_another_reason_is_none(several: Several, autojump_clock: MockClock) -> None:
    async with MQTTDriver(alone(several)) as driver:
        await trio.sleep(60)
        packet = Disconnect(reason_code=0x8B, properties={"server_reference": "b"})
        several["a"].send(str(driver.client_id), packet)
        several["a"].drop()
        await settled()
        await driver.wait_live()
        assert several.order == "aa"
        assert Kind.DISCONNECT in {packet.kind for _, packet in several["a"].sent}
