"""Several endpoints, each with options, a version of MQTT, refusals and a session of its own."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.several import Several, at, leave_a, place, told
from trio_mqtt_driver import (
    Attempt,
    BackoffConfig,
    DriverConfig,
    Endpoint,
    FailoverConfig,
    MQTTDriver,
    ReasonCode,
    RefusedError,
    TLSConfig,
)
from trio_mqtt_driver.testing import Kind

settled = trio.testing.wait_all_tasks_blocked
STAY = FailoverConfig(return_after=float("inf"))
"""No test connections."""


@pytest.fixture
def several(nursery: trio.Nursery) -> Several:
    return Several(nursery)


# -- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_fallback_with_other_credentials_does_not_end_the_driver(
    several: Several, autojump_clock: MockClock
) -> None:
    several["b"].options.users = {"nobody": "x"}
    config = several.config(username="me", password="secret")
    async with MQTTDriver(config) as driver:
        await trio.sleep(60)
        several["a"].stop()
        await trio.sleep(3600)
        assert "refused the connection: bad user name or password" in str(driver.status().endpoints[1].last_error)
        several["a"].start()
        with trio.fail_after(60):
            await driver.wait_live()
        assert place(driver) == "a"
    several.check()


async def test_a_primary_that_refuses_for_good_ends_the_driver(several: Several, autojump_clock: MockClock) -> None:
    several["a"].options.users = {"nobody": "x"}
    with pytest.raises(RefusedError, match="mqtt://a:1883 refused the connection: bad user name"):
        async with MQTTDriver(several.config(username="me", password="secret")):
            pass
    assert several.order == "a"
    several.check()


async def test_unless_that_refusal_is_to_be_retried(several: Several, autojump_clock: MockClock) -> None:
    several["a"].options.users = {"nobody": "x"}
    config = several.config(username="me", password="secret", retry_refusals={ReasonCode.BAD_USER_NAME_OR_PASSWORD})
    async with MQTTDriver(config) as driver:
        assert place(driver) == "b"
        await trio.sleep(1000)
        assert (place(driver), driver.generation) == ("b", 1)  # no test of it passes
    several.check()


# -- options made for each endpoint -----------------------------------------------------------------------------------

PASSWORDS = {"a": "secret of a", "b": "secret of b"}


async def test_a_factory_gives_each_endpoint_its_credentials(several: Several, autojump_clock: MockClock) -> None:
    for name, password in PASSWORDS.items():
        several[name].options.users = {"me": password}

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(username="me", password=PASSWORDS[attempt.config.endpoint.host])

    async with MQTTDriver(several.config(options_factory=make)) as driver:
        await leave_a(several, driver)
        await trio.sleep(300)
        assert (place(driver), driver.generation) == ("a", 3)
    several.check()


@pytest.mark.parametrize("broken", ["a", "b"])
async def test_a_factory_that_has_nothing_for_one_endpoint_leaves_the_other(
    several: Several, broken: str, autojump_clock: MockClock
) -> None:
    """It may fetch what it needs from the very machine that is down, or know only one of them."""

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        if attempt.config.endpoint == at(broken):
            raise LookupError("nothing is known of that one")
        return attempt.config

    async with MQTTDriver(several.config(options_factory=make), start="background") as driver:
        for _ in range(3):
            with trio.fail_after(60):
                await driver.wait_live()
            await trio.sleep(100)
            for broker in several.brokers.values():
                broker.stop()
            await trio.sleep(3600)
            for broker in several.brokers.values():
                broker.start()
        assert broken not in several.order
        failed = next(one for one in driver.status().endpoints if one.endpoint == str(at(broken)))
        assert "options_factory failed: LookupError" in str(failed.last_error) or not failed.failures
    several.check()


async def test_a_factory_that_fails_for_all_does_not_strand_the_driver(
    several: Several, autojump_clock: MockClock
) -> None:
    fails = True

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        if fails:
            raise OSError("HTTP 502")
        return attempt.config

    async with MQTTDriver(several.config(options_factory=make), start="background") as driver:
        await trio.sleep(3600)
        fails = False
        with trio.fail_after(60):
            await driver.wait_live()
        await trio.sleep(300)
        assert place(driver) == "a"
    several.check()


# -- versions, schemes ------------------------------------------------------------------------------------------------


async def test_each_endpoint_is_asked_with_the_version_that_it_speaks(
    several: Several, autojump_clock: MockClock
) -> None:
    several["b"].options.versions = (4,)
    async with MQTTDriver(several.config(failover=STAY)) as driver:
        spoken = [driver.status().protocol]
        for _ in range(2):
            for gone, left in ("ab", "ba"):
                await trio.sleep(60)
                several[left].start()
                several[gone].stop()
                await settled()
                await driver.wait_live()
                assert place(driver) == left
                spoken.append(driver.status().protocol)
        assert spoken == ["5", "3.1.1", "5", "3.1.1", "5"]
    assert [connect.version for connect in several.connects("b")] == [5, 4, 4]  # it is remembered
    several.check()


@pytest.mark.parametrize("fallback", [at("b"), Endpoint(scheme="unix", path="b")], ids=str)
async def test_a_fallback_without_tls_gets_no_tls_options(
    several: Several, fallback: Endpoint, autojump_clock: MockClock
) -> None:
    seen: list[tuple[str, bool]] = []

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        seen.append((attempt.config.endpoint.scheme, attempt.config.tls is not None))
        return attempt.config.evolve(keep_alive=10)

    config = several.config(
        endpoint=at("a", "mqtts"), fallbacks=[fallback], tls=TLSConfig(wrong_host="stop"), options_factory=make
    )
    async with MQTTDriver(config) as driver:
        await trio.sleep(60)
        several["a"].stop()
        await settled()
        await driver.wait_live()
        assert driver.status().endpoint == str(fallback)
        several["a"].start()
        await trio.sleep(300)
        assert driver.status().endpoint == "mqtts://a:1883"
    assert set(seen) == {("mqtts", True), (fallback.scheme, False)}
    several.check()


async def test_a_fallback_with_tls_of_a_plain_primary(several: Several, autojump_clock: MockClock) -> None:
    seen: list[tuple[str, bool]] = []

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        seen.append((attempt.config.endpoint.scheme, attempt.config.tls is not None))
        return attempt.config

    several["a"].stop()
    config = several.config(fallbacks=[at("b", "mqtts")], tls=TLSConfig(), options_factory=make, failover=STAY)
    async with MQTTDriver(config) as driver:
        assert driver.status().endpoint == "mqtts://b:1883"
    assert seen[-1] == ("mqtts", True)


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_with_a_stable_id_each_broker_has_a_session_of_its_own(
    several: Several, protocol: str, autojump_clock: MockClock
) -> None:
    """The one of the broker that we come back to is old, and is begun anew; what was open in it is sent anew."""
    a, b = several["a"], several["b"]
    config = several.config(stable_id=True, protocol=protocol)
    got: list[bytes] = []
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", lambda message: got.append(message.payload), qos=2)
        await trio.sleep(60)
        with a.faults.hold(Kind.PUBCOMP):
            receipt = driver.publish_nowait("out", b"exactly once, were there one broker", qos=2)
            await settled()
            a.stop()
        await receipt.wait()
        assert place(driver) == "b"
        assert driver.status().in_flight == driver.status().queued == 0
        a.start()
        a.publish("in", b"for a session that is over", qos=1)
        await trio.sleep(300)
        assert place(driver) == "a"
        a.publish("in", b"new", qos=2)
        await settled()
        assert got == [b"new"]
        # The link to A is lost, and found again: the session there goes on.
        await trio.sleep(60)
        a.drop()
        await settled()
        await driver.wait_live()
        resumed = [text for text in told(driver, "validating") if "session present" in text]
        assert len(resumed) == 1
    for broker in (a, b):
        assert [one.payload for one in broker.published if one.topic == "out"] == [
            b"exactly once, were there one broker"
        ]
    mine = [connect.clean_start for connect in a.connects if connect.client_id == "driver"]
    assert mine == [True, False, True, False, False]
    several.check()


async def test_a_lost_link_within_a_session_does_not_end_it_while_the_fallback_cannot_be_had(
    several: Several, autojump_clock: MockClock
) -> None:
    a = several["a"]
    backoff = BackoffConfig(pause_after=1000, maximum=5)
    async with MQTTDriver(several.config(stable_id=True, protocol="5", backoff=backoff)) as driver:
        await driver.subscribe("in", lambda _: None, qos=1)
        await trio.sleep(60)
        with a.faults.hold(Kind.PUBREC):
            receipt = driver.publish_nowait("out", b"once", qos=2)
            await settled()
            a.stop()
        several.swallowed.add("b")
        await trio.sleep(120)
        assert "b" in several.order
        a.start()
        await receipt.wait()
        assert place(driver) == "a"
    assert len([one for one in a.published if one.topic == "out"]) == 1
    several.check()
