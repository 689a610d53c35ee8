"""A certificate for another host: tried again, or the end of the driver, as ``TLSConfig(wrong_host=...)`` says."""

from __future__ import annotations

import copy
import pickle
import ssl
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import (
    Attempt,
    ConnectError,
    DriverConfig,
    Endpoint,
    MessageLostError,
    MQTTDriver,
    State,
    TLSConfig,
    TLSError,
)
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

STOP = TLSConfig(wrong_host="stop")
EXPIRED, HOST_MISMATCH, IP_MISMATCH = 10, 62, 64


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def config_for(broker: MemoryBroker, dialer: Dialer, **options: Any) -> DriverConfig:
    endpoint = Endpoint(scheme="mqtts", host="memory", port=8883)
    return memory_config(broker, **{"endpoint": endpoint, "open_stream": dialer, "tls": STOP, **options})


def handshake_error(code: int, message: str) -> Exception:
    """What a Trio stream raises for a certificate that OpenSSL does not accept."""
    cause = ssl.SSLCertVerificationError(1, f"certificate verify failed: {message}")
    cause.verify_code, cause.verify_message = code, message
    error = trio.BrokenResourceError()
    error.__cause__ = cause
    return error


def wrong_host(code: int = HOST_MISMATCH) -> Exception:
    return handshake_error(code, "Hostname mismatch, certificate is not valid for 'memory'.")


WORDS = (
    "connecting to mqtts://memory:8883: certificate verify failed: Hostname mismatch, certificate is not valid for "
    "'memory'; set server_hostname to a name that the certificate has "
)


@pytest.mark.parametrize("tls", [None, TLSConfig(), TLSConfig(wrong_host="retry")])
async def test_by_default_it_is_tried_again_as_any_other_tls_failure(
    broker: MemoryBroker, dialer: Dialer, tls: TLSConfig | None, autojump_clock: MockClock
) -> None:
    dialer.errors = [wrong_host(), wrong_host(), wrong_host()]
    async with MQTTDriver(config_for(broker, dialer, tls=tls)) as driver:
        failed = [event for event in driver.status().history if event.error is not None]
        assert len(failed) == 3
        for event in failed:
            assert str(event.error).startswith(f'TLSError: {WORDS}(wrong_host="stop" would end the driver)')
        assert failed[0].text.endswith("; next attempt at once")
        assert driver.generation == 1


@pytest.mark.parametrize("code", [HOST_MISMATCH, IP_MISMATCH])
async def test_it_ends_the_driver_at_the_start_if_told_so(
    broker: MemoryBroker, dialer: Dialer, code: int, autojump_clock: MockClock
) -> None:
    dialer.errors = [wrong_host(code)]
    driver = MQTTDriver(config_for(broker, dialer))
    with pytest.raises(TLSError) as caught:
        async with driver:
            raise AssertionError("entered")
    assert caught.value.terminal
    assert str(caught.value) == f'{WORDS}(wrong_host="retry" would try again)'
    assert isinstance(caught.value.__cause__, trio.BrokenResourceError)
    assert driver.state is State.CLOSED
    assert len(dialer.attempts) == 1
    assert str(driver.status().last_error).startswith(f"TLSError: {caught.value}")
    assert any(event.text == f"stopped for good: {caught.value}" for event in driver.status().history)


async def test_it_ends_a_driver_that_was_live_and_everybody_who_waits_is_told(
    broker: MemoryBroker, dialer: Dialer, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    told: list[Exception] = []
    driver = MQTTDriver(config_for(broker, dialer))

    async def wait_live() -> None:
        try:
            await driver.wait_live()
        except ConnectError as exc:
            told.append(exc)

    async def publish() -> None:
        try:
            await driver.publish("a", qos=1)
        except MessageLostError as exc:
            told.append(exc)

    with trio.fail_after(200), pytest.raises(TLSError) as caught:  # noqa: PT012  # the body is what is under test
        async with driver:
            await trio.sleep(100)
            broker.down = True
            broker.drop()
            await settled()
            nursery.start_soon(wait_live)
            nursery.start_soon(publish)
            await settled()
            dialer.errors = [wrong_host()]
            await trio.sleep_forever()
    await settled()
    assert caught.value.terminal
    assert {type(exc) for exc in told} == {TLSError, MessageLostError}
    assert caught.value in told


@pytest.mark.parametrize(
    "error",
    [
        handshake_error(EXPIRED, "certificate has expired"),
        ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
        ssl.SSLCertVerificationError("made without OpenSSL"),
    ],
)
async def test_no_other_tls_failure_ends_the_driver(
    broker: MemoryBroker, dialer: Dialer, error: Exception, autojump_clock: MockClock
) -> None:
    dialer.errors = [error]
    async with MQTTDriver(config_for(broker, dialer)) as driver:
        assert str(driver.status().last_error).startswith("TLSError: ")
        assert driver.generation == 1


async def test_the_options_of_the_attempt_decide(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    async def make(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        return attempt.config.evolve(tls=STOP if attempt.number == 3 else TLSConfig())

    dialer.errors = [wrong_host() for _ in range(5)]
    with pytest.raises(TLSError):
        async with MQTTDriver(config_for(broker, dialer, tls=None, options_factory=make)):
            raise AssertionError("entered")
    assert len(dialer.attempts) == 3


@pytest.mark.parametrize("terminal", [False, True])
def test_the_error_survives_copy_and_pickle(terminal: bool) -> None:
    error = TLSError("wrong name", terminal=terminal)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert isinstance(twin, TLSError)
        assert (str(twin), twin.terminal) == ("wrong name", terminal)
    assert not TLSError("wrong name").terminal
