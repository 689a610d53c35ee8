"""What an attempt is made with: options made anew for each, refusals that heal and others, the protocol version."""

from __future__ import annotations

import ssl
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import (
    Attempt,
    BackoffConfig,
    DriverConfig,
    Endpoint,
    MQTTDriver,
    ReasonCode,
    RefusedError,
    State,
    Will,
)
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **options)


def failures(driver: MQTTDriver) -> list[str]:
    """The errors of attempts and links, in order."""
    return [str(event.error) for event in driver.status().history if event.error is not None]


# -- options_factory --------------------------------------------------------------------------------------------------


async def test_the_options_are_made_anew_for_each_attempt(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    asked: list[Attempt] = []

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        asked.append(attempt)
        token = f"token-{len(asked)}"
        return attempt.config.evolve(username="me", password=token, will=Will(topic="will", payload=token))

    broker.faults.refuse_connect(0x88, times=1)
    async with MQTTDriver(config_for(broker, options_factory=make)) as driver:
        await trio.sleep(100)
        broker.drop()
        await settled()
        await driver.wait_live()
    assert [connect.password for connect in broker.connects] == [b"token-1", b"token-2", b"token-3"]
    assert [connect.will.payload for connect in broker.connects if connect.will] == [
        b"token-1",
        b"token-2",
        b"token-3",
    ]
    assert [(attempt.number, attempt.generation) for attempt in asked] == [(1, 1), (2, 1), (1, 2)]
    assert asked[0].last_error is None
    assert "server unavailable" in str(asked[1].last_error)
    assert "the broker closed the connection" in str(asked[2].last_error)


async def test_a_factory_may_send_the_driver_to_another_broker(
    nursery: trio.Nursery, broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    second = MemoryBroker(nursery)
    brokers = {"memory": broker, "second": second}

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        return await brokers[endpoint.host].connect_stream()

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(endpoint=Endpoint(host="memory" if attempt.number % 2 else "second", port=1883))

    broker.down = True
    async with MQTTDriver(config_for(broker, options_factory=make, open_stream=open_stream)) as driver:
        assert second.clients == [driver.client_id]
        assert driver.status().endpoint == "mqtt://second:1883"


async def test_a_factory_that_fails_is_a_failed_attempt_for_days_and_then_heals(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    healed = False
    calls: list[float] = []

    async def make(attempt: Attempt) -> DriverConfig:
        calls.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if not healed:
            raise RuntimeError("HTTP 502")
        return attempt.config

    async with MQTTDriver(config_for(broker, options_factory=make), start="background") as driver:
        await trio.sleep(3 * 24 * 3600)
        assert driver.status().last_error == ("OptionsError: options_factory failed: RuntimeError('HTTP 502')")
        assert not broker.connects
        assert len(calls) == pytest.approx(3 * 24 * 3600 / 30, rel=0.01)
        healed = True
        with trio.fail_after(60):
            await driver.wait_live()


@pytest.mark.parametrize(
    "error", [OSError("x"), ValueError("x"), trio.TooSlowError("x"), ssl.SSLError("x"), KeyError()]
)
async def test_whatever_a_factory_raises_is_one_failed_attempt(
    broker: MemoryBroker, error: Exception, autojump_clock: MockClock
) -> None:
    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        if attempt.number == 1:
            raise error
        return attempt.config

    async with MQTTDriver(config_for(broker, options_factory=make)) as driver:
        (text,) = failures(driver)
        assert text.startswith(f"OptionsError: options_factory failed: {error!r}")


async def test_a_factory_that_hangs_is_given_up(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    async def make(attempt: Attempt) -> DriverConfig:
        if attempt.number == 1:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return attempt.config

    async with MQTTDriver(config_for(broker, options_factory=make, factory_timeout=7)) as driver:
        (text,) = failures(driver)
        assert text == "OptionsError: options_factory took longer than factory_timeout=7 s"
        assert 7 < trio.current_time() <= 8


@pytest.mark.parametrize("nonsense", [None, "mqtt://localhost", {"endpoint": 1}])
async def test_a_factory_that_returns_nonsense_is_a_failed_attempt(
    broker: MemoryBroker, nonsense: Any, autojump_clock: MockClock
) -> None:
    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return nonsense if attempt.number == 1 else attempt.config

    async with MQTTDriver(config_for(broker, options_factory=make)) as driver:
        (text,) = failures(driver)
        assert text == f"OptionsError: options_factory must return a DriverConfig, not {type(nonsense).__name__}"


async def test_a_factory_that_is_not_async_is_a_failed_attempt(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    config = config_for(broker)
    async with MQTTDriver(config_for(broker, options_factory=lambda _: config), start="background") as driver:
        await settled()
        assert failures(driver)[0].startswith("OptionsError: options_factory must be an async function")


# -- TLS --------------------------------------------------------------------------------------------------------------


def tls_error() -> Exception:
    """What a Trio stream raises when a handshake fails: the SSLError hides behind another."""
    error = trio.BrokenResourceError()
    error.__cause__ = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
    return error


async def test_a_tls_error_is_named_and_retried_at_once_but_once_only(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    dialer.errors = [tls_error() for _ in range(4)]
    backoff = BackoffConfig(start=10, factor=1, maximum=10)
    async with MQTTDriver(config_for(broker, open_stream=dialer, backoff=backoff)) as driver:
        waits = [round(after - before, 3) for before, after in pairwise(dialer.attempts)]
        assert waits[0] == 0
        assert all(1 <= wait <= 10 for wait in waits[1:])
        assert all(text.startswith("TLSError: ") for text in failures(driver))
        assert "certificate verify failed" in failures(driver)[0]
        assert driver.status().failures == 4


async def test_a_link_lost_to_tls_is_named_so(broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock) -> None:
    async with MQTTDriver(config_for(broker, open_stream=dialer)) as driver:
        await trio.sleep(100)
        dialer.streams[0].broken = tls_error()
        assert (await driver.publish("a", qos=1)).generation == 2
        assert str(driver.status().last_error).startswith("TLSError: writing to the broker: certificate verify failed")


async def test_a_second_rotation_in_the_same_outage_heals_too(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    made: list[int] = []
    rotation = 0
    known = 0

    async def make(attempt: Attempt) -> DriverConfig:
        nonlocal known
        await trio.lowlevel.checkpoint()
        made.append(rotation)
        known = rotation
        return attempt.config

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        nonlocal rotation
        if len(made) == 2:
            rotation = 2  # behind the factory's back, between the download and the handshake
        if known != rotation:
            await trio.lowlevel.checkpoint()
            raise tls_error()
        return await dialer(endpoint)

    config = config_for(broker, options_factory=make, open_stream=open_stream)
    async with MQTTDriver(config) as driver:
        await trio.sleep(100)
        rotation = 1
        broker.drop()
        await settled()
        with trio.fail_after(10):
            await driver.wait_live()
        assert made == [0, 1, 2]
        assert driver.generation == 2


# -- refusals ---------------------------------------------------------------------------------------------------------

TERMINAL = [0x85, 0x86, 0x87, 0x8A, 0x8C]
PASSING = [0x80, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F]


@pytest.mark.parametrize("code", TERMINAL, ids=hex)
async def test_a_refusal_that_cannot_heal_is_raised_at_the_start(
    broker: MemoryBroker, code: int, autojump_clock: MockClock
) -> None:
    broker.faults.refuse_connect(code)
    with pytest.raises(RefusedError) as caught:
        async with MQTTDriver(config_for(broker)):
            raise AssertionError("entered")
    assert caught.value.reason_code == code
    assert caught.value.terminal
    assert str(ReasonCode(code)) in str(caught.value)
    assert "mqtt://memory:1883 refused the connection" in str(caught.value)
    assert len(broker.connects) == 1


@pytest.mark.parametrize("code", PASSING, ids=hex)
async def test_a_refusal_that_may_heal_is_retried(broker: MemoryBroker, code: int, autojump_clock: MockClock) -> None:
    broker.faults.refuse_connect(code, times=3)
    async with MQTTDriver(config_for(broker)) as driver:
        assert len(broker.connects) == 4
        assert all("RefusedError" in text and str(ReasonCode(code)) in text for text in failures(driver))


@pytest.mark.parametrize("code", TERMINAL, ids=hex)
async def test_a_refusal_named_in_retry_refusals_is_retried(
    broker: MemoryBroker, code: int, autojump_clock: MockClock
) -> None:
    broker.faults.refuse_connect(code, times=2)
    async with MQTTDriver(config_for(broker, retry_refusals={ReasonCode(code)})) as driver:
        assert len(broker.connects) == 3
        assert len(failures(driver)) == 2


@pytest.mark.parametrize("code, terminal", [(0x86, True), (0x87, True), (0x85, True), (0x88, False)])
async def test_the_return_codes_of_3_1_1_are_told_apart_too(
    broker: MemoryBroker, code: int, terminal: bool, autojump_clock: MockClock
) -> None:
    broker.faults.refuse_connect(code, times=1)
    config = config_for(broker, protocol="3.1.1")
    if terminal:
        with pytest.raises(RefusedError) as caught:
            async with MQTTDriver(config):
                raise AssertionError("entered")
        assert caught.value.reason_code == code
    else:
        async with MQTTDriver(config) as driver:
            assert len(failures(driver)) == 1


async def test_wrong_credentials_are_said_plainly_and_without_the_password(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    broker.options.users = {"me": "right"}
    with pytest.raises(RefusedError, match="check username and password") as caught:
        async with MQTTDriver(config_for(broker, username="me", password="hunter2")):
            raise AssertionError("entered")
    assert "hunter2" not in str(caught.value)


async def test_credentials_that_are_revoked_later_stop_the_driver(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    driver = MQTTDriver(config_for(broker))
    with pytest.raises(RefusedError) as caught:  # noqa: PT012  # the body is what is under test
        async with driver:
            await trio.sleep(100)
            broker.faults.refuse_connect(0x87)
            broker.drop()
            await trio.sleep_forever()
    assert caught.value.terminal
    assert driver.state is State.CLOSED
    assert trio.current_time() == 100
    stopped = [event for event in driver.status().history if event.text.startswith("stopped for good: ")]
    assert len(stopped) == 1
    assert "not authorized (0x87); check the credentials" in stopped[0].text


# -- version ----------------------------------------------------------------------------------------------------------


def versions(broker: MemoryBroker) -> list[int]:
    return [connect.version for connect in broker.connects]


async def test_auto_downgrades_to_3_1_1_and_remembers_it(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.options.versions = (4,)
    async with MQTTDriver(config_for(broker)) as driver:
        assert driver.status().protocol == "3.1.1"
        assert driver.status().failures == 0
        await trio.sleep(100)
        broker.drop()
        await settled()
        await driver.wait_live()
        assert driver.status().protocol == "3.1.1"
        assert any("does not take MQTT 5" in event.text for event in driver.status().history)
    assert versions(broker) == [5, 4, 4]
    assert len({connect.client_id for connect in broker.connects}) == 3


async def test_a_downgrade_is_remembered_for_its_endpoint_only(
    nursery: trio.Nursery, broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    broker.options.versions = (4,)
    second = MemoryBroker(nursery)
    hosts = ["memory", "second", "memory"]

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        return await (broker if endpoint.host == "memory" else second).connect_stream()

    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(endpoint=Endpoint(host=hosts.pop(0), port=1883))

    async with MQTTDriver(config_for(broker, options_factory=make, open_stream=open_stream)) as driver:
        while hosts:
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
    assert versions(second) == [5]
    assert versions(broker) == [5, 4, 4]


async def test_a_plain_close_is_tried_with_3_1_1_but_not_remembered(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """Some brokers of 3.1.1 just close; but one of MQTT 5 that is going down does so, too."""
    broker.faults.cut(Kind.CONNECT, before=True)
    async with MQTTDriver(config_for(broker)) as driver:
        assert versions(broker) == [5, 4]
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        assert driver.status().protocol == "5"
    assert versions(broker) == [5, 4, 5]


async def test_a_broker_that_has_spoken_mqtt_5_keeps_it_when_it_comes_back_between_two_tries(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    async with MQTTDriver(config_for(broker)) as driver:
        broker.faults.cut(Kind.CONNECT, before=True)
        broker.drop()
        await settled()
        await driver.wait_live()
        assert driver.status().protocol == "5"
        broker.options.versions = (4,)
        broker.drop()
        await settled()
        await driver.wait_live()
        assert driver.status().protocol == "3.1.1"
    assert versions(broker) == [5, 5, 5, 5, 4]


async def test_a_version_that_is_fixed_is_not_changed(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    broker.options.versions = (4,)
    async with MQTTDriver(config_for(broker, protocol="5"), start="background") as driver:
        await trio.sleep(20)
        assert set(versions(broker)) == {5}
        assert "ProtocolVersionError: the broker does not speak MQTT 5" in str(driver.status().last_error)
        broker.options.versions = (5,)
        with trio.fail_after(60):
            await driver.wait_live()


# -- how long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1", "auto"])
async def test_a_broker_that_accepts_and_says_nothing_is_given_up(
    broker: MemoryBroker, protocol: str, autojump_clock: MockClock
) -> None:
    broker.faults.drop(Kind.CONNACK, times=1)
    async with MQTTDriver(config_for(broker, protocol=protocol, connect_timeout=8)) as driver:
        (text,) = failures(driver)
        assert text == "TransportError: no CONNACK from mqtt://memory:1883 in connect_timeout=8 s"
        assert 8 <= trio.current_time() <= 9


async def test_connect_timeout_covers_stream_and_connack_together(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    async def open_slowly(endpoint: Endpoint) -> trio.abc.Stream:
        await trio.sleep(6 if not dialer.attempts else 0)
        return await dialer(endpoint)

    broker.faults.drop(Kind.CONNACK, times=1)
    async with MQTTDriver(config_for(broker, open_stream=open_slowly, connect_timeout=8)) as driver:
        assert [event.at for event in driver.status().history if event.error is not None] == [8]


async def test_a_network_that_swallows_everything_is_given_up(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        if trio.current_time() < 8:
            await trio.sleep_forever()
        return await dialer(endpoint)

    async with MQTTDriver(config_for(broker, open_stream=open_stream, connect_timeout=8)) as driver:
        (text,) = failures(driver)
        assert text == "TransportError: mqtt://memory:1883 could not be reached within connect_timeout=8 s"


async def test_an_infinite_connect_timeout_waits(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    with broker.faults.hold(Kind.CONNACK) as hold:
        async with MQTTDriver(config_for(broker, connect_timeout=float("inf")), start="background") as driver:
            await trio.sleep(20)
            assert driver.state is State.CONNECTING
            hold.release()
            await driver.wait_live()
            assert not failures(driver)
