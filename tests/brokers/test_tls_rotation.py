"""Authorities and certificates that change under a running driver, with real brokers: it heals without a restart."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.brokers.certificates import MUTUAL_BROKERS, YESTERDAY, Authority, make, secure
from tests.brokers.desk import HOST, open_desk
from tests.brokers.grounds import Attempts
from trio_mqtt_driver import Attempt, DriverConfig, Endpoint, MQTTDriver, State, Subscription, TLSConfig, TLSError
from trio_mqtt_driver.testing import BrokerProcess, FaultProxy, TLSFiles

pytestmark = pytest.mark.broker

both = pytest.mark.parametrize("name", MUTUAL_BROKERS)
"""The one broker with MQTT 5, the other with 3.1.1; they come from different TLS libraries."""

NOT_TRUSTED = "TLS handshake with {}: certificate verify failed: "
AT_ONCE = "; next attempt at once"


def told(driver: MQTTDriver) -> list[str]:
    """What was said of each link that was lost and each attempt that failed, in order."""
    return [event.text for event in driver.status().history if event.error is not None]


def counted(driver: MQTTDriver) -> dict[str, int]:
    counters = driver.status().counters
    return {name: counters[name] for name in ("attempts", "failures", "connections", "losses")}


async def works(driver: MQTTDriver, messages: Subscription[Any], *, generation: int) -> None:
    """The link of that number acknowledges a message, and the subscription from before the outage gets it."""
    payload = f"in generation {generation}".encode()
    result = await driver.publish("a", payload, qos=1)
    assert not result.reason_code.is_failure
    assert (result.generation, driver.generation) == (generation, generation)
    # nats-server sends a message again that has not been acknowledged within a second: those are passed over.
    while (await messages.receive()).payload != payload:
        pass


async def restart_with(broker: BrokerProcess, files: TLSFiles) -> None:
    broker.tls = files
    await broker.start()


# -- the authority ----------------------------------------------------------------------------------------------------


@both
async def test_an_authority_rotated_while_the_link_is_down(
    name: str, authority: Authority, foreign: Authority
) -> None:
    with trio.fail_after(60):
        async with make(name, authority.server()) as broker, open_desk() as desk:
            config = secure(name, broker.port, TLSConfig(), options_factory=desk.options, factory_timeout=30)
            async with MQTTDriver(config, start="background") as driver:
                await (await desk.asked()).answer(authority.pem)
                async with driver.subscription("a", qos=1) as messages:
                    await works(driver, messages, generation=1)
                    await broker.kill()
                    question = await desk.asked()
                    await restart_with(broker, foreign.server())
                    await question.answer(authority.pem)  # the desk is as late as it can be
                    await (await desk.asked()).answer(foreign.pem)
                    await works(driver, messages, generation=2)
            lost, failed = told(driver)
            assert lost.startswith("connection lost: ConnectionLostError: ")
            assert failed.startswith(f"attempt failed: TLSError: {NOT_TRUSTED.format(config.endpoint)}")
            assert failed.endswith(AT_ONCE)
            assert (driver.status().last_error or "").startswith("TLSError: ")
            assert counted(driver) == {"attempts": 3, "failures": 1, "connections": 2, "losses": 1}


@both
async def test_an_authority_rotated_twice_in_one_outage(name: str, authority: Authority, foreign: Authority) -> None:
    third = Authority(foreign.directory.parent)
    with trio.fail_after(60):
        async with make(name, authority.server()) as broker, open_desk() as desk:
            config = secure(name, broker.port, TLSConfig(), options_factory=desk.options, factory_timeout=30)
            async with MQTTDriver(config, start="background") as driver:
                await (await desk.asked()).answer(authority.pem)
                async with driver.subscription("a", qos=1) as messages:
                    await works(driver, messages, generation=1)
                    await broker.kill()
                    question = await desk.asked()
                    await restart_with(broker, foreign.server())
                    await question.answer(authority.pem)
                    question = await desk.asked()
                    await broker.stop()
                    await restart_with(broker, third.server())
                    await question.answer(foreign.pem)  # it was right when the attempt began
                    await (await desk.asked()).answer(third.pem)
                    await works(driver, messages, generation=2)
            _, first, second = told(driver)
            for failed in (first, second):
                assert failed.startswith(f"attempt failed: TLSError: {NOT_TRUSTED.format(config.endpoint)}")
            assert first.endswith(AT_ONCE)
            assert "; next attempt in " in second  # nothing was cured by trying at once
            assert counted(driver) == {"attempts": 4, "failures": 2, "connections": 2, "losses": 1}


async def test_an_authority_rotated_while_the_link_is_up(
    authority: Authority, foreign: Authority, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """With mosquitto alone, which takes up new files while it keeps its links, and tells when it has."""
    trusted = tmp_path / "trusted.pem"
    trusted.write_text(authority.pem)
    files, new = authority.server(), foreign.server()
    with trio.fail_after(60):
        async with make("mosquitto", files) as broker:
            proxy = FaultProxy(nursery, broker.port)
            config = secure("mosquitto", proxy.port, TLSConfig(ca_file=trusted))
            async with MQTTDriver(config) as driver, driver.subscription("a", qos=1) as messages:
                await works(driver, messages, generation=1)
                files.cert.write_bytes(new.cert.read_bytes())
                files.key.write_bytes(new.key.read_bytes())
                trusted.write_text(foreign.pem)
                os.kill(broker.pid, signal.SIGHUP)
                # mosquitto looks for a signal once per turn of its loop, after the packets that have arrived: when
                # it has answered this one, it has read the files before it accepts another connection.
                await works(driver, messages, generation=1)
                assert told(driver) == []
                proxy.reset()
                await works(driver, messages, generation=2)
            assert counted(driver) == {"attempts": 2, "failures": 0, "connections": 2, "losses": 1}


@both
async def test_a_device_comes_back_elsewhere_and_its_desk_fails_three_times(
    name: str, authority: Authority, foreign: Authority
) -> None:
    with trio.fail_after(60):
        async with make(name, authority.server()) as old, make(name, foreign.server()) as new, open_desk() as desk:
            ports = [old.port]

            async def options(attempt: Attempt) -> DriverConfig:
                config = await desk.options(attempt)
                return config.evolve(endpoint=Endpoint(scheme="mqtts", host=HOST, port=ports[-1]))

            config = secure(name, old.port, TLSConfig(), options_factory=options, factory_timeout=2)
            async with MQTTDriver(config, start="background") as driver:
                await (await desk.asked()).answer(authority.pem)
                async with driver.subscription("a", qos=1) as messages:
                    await works(driver, messages, generation=1)
                    ports.append(new.port)
                    await old.kill()
                    await (await desk.asked()).refuse()
                    await (await desk.asked()).wait_given_up()
                    await (await desk.asked()).hang_up()
                    await (await desk.asked()).answer(authority.pem)
                    await (await desk.asked()).answer(foreign.pem)
                    await works(driver, messages, generation=2)
                    assert driver.status().endpoint == f"mqtts://{HOST}:{new.port}"
            factory = "attempt failed: OptionsError: options_factory "
            failed = told(driver)[1:]
            assert [text.partition("; next attempt ")[0] for text in failed[:3]] == [
                f"{factory}failed: ValueError(\"the desk said 'HTTP/1.0 502 Bad Gateway'\")",
                f"{factory}took longer than factory_timeout=2 s",
                f"{factory}failed: ValueError(\"the desk said ''\")",
            ]
            assert all("; next attempt in " in text for text in failed[:3])
            assert failed[3].startswith("attempt failed: TLSError: ")
            assert failed[3].endswith(AT_ONCE)
            assert counted(driver) == {"attempts": 6, "failures": 4, "connections": 2, "losses": 1}


# -- certificates -----------------------------------------------------------------------------------------------------


@both
async def test_a_client_certificate_that_is_revoked_with_its_authority_and_renewed_in_place(
    name: str, authority: Authority, foreign: Authority, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_text(authority.pem + foreign.pem)
    chain, key = authority.files("client", "client@example.org")
    attempts = Attempts()
    with trio.fail_after(60):
        async with make(name, authority.server(mutual=True)) as broker:
            tls = TLSConfig(ca_file=trusted, cert_file=chain, key_file=key)
            config = secure(name, broker.port, tls, options_factory=attempts)
            async with MQTTDriver(config) as driver, driver.subscription("a", qos=1) as messages:
                await works(driver, messages, generation=1)
                await broker.kill()
                await restart_with(broker, foreign.server(mutual=True))
                assert "ALERT" in await attempts.wait_error("TLSError: reading from the broker: ")
                new_chain, new_key = foreign.files("client", "client@example.org")
                chain.write_bytes(new_chain.read_bytes())
                # Whoever replaces files does it one by one.
                await attempts.wait_error("TLSError: TLS material: KEY_VALUES_MISMATCH")
                key.write_bytes(new_key.read_bytes())
                await works(driver, messages, generation=2)
            assert any(text.endswith(AT_ONCE) for text in told(driver))
            counters = driver.status().counters
            assert counters["attempts"] == counters["failures"] + 2
            assert counters["losses"] == 1


@both
async def test_a_client_certificate_that_has_expired_and_is_renewed_by_the_factory(
    name: str, authority: Authority
) -> None:
    async def renew(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        if attempt.number == 1:
            chain, key = authority.files("client", "client@example.org", end=YESTERDAY)
        else:
            chain, key = authority.files("client", "client@example.org")
        assert attempt.config.tls is not None
        return attempt.config.evolve(tls=attrs.evolve(attempt.config.tls, cert_file=chain, key_file=key))

    with trio.fail_after(60):
        async with make(name, authority.server(mutual=True)) as broker:
            config = secure(name, broker.port, TLSConfig(ca_file=authority.file), options_factory=renew)
            async with MQTTDriver(config) as driver, driver.subscription("a", qos=1) as messages:
                await works(driver, messages, generation=1)
            (failed,) = told(driver)
            assert failed.startswith("attempt failed: TLSError: reading from the broker: ")
            assert "EXPIRED" in failed
            assert failed.endswith(AT_ONCE)
            assert counted(driver) == {"attempts": 2, "failures": 1, "connections": 1, "losses": 0}


@both
async def test_a_server_certificate_that_has_expired_and_is_renewed(name: str, authority: Authority) -> None:
    attempts = Attempts()
    with trio.fail_after(60):
        async with make(name, authority.server(end=YESTERDAY)) as broker:
            config = secure(name, broker.port, TLSConfig(ca_file=authority.file), options_factory=attempts)
            async with MQTTDriver(config, start="background") as driver:
                assert "certificate has expired" in await attempts.wait_error("TLSError: TLS handshake with ")
                await broker.stop()
                await restart_with(broker, authority.server())
                async with driver.subscription("a", qos=1) as messages:
                    await works(driver, messages, generation=1)
            assert told(driver)[0].endswith(AT_ONCE)


# -- a wrong host name ------------------------------------------------------------------------------------------------

MISMATCH = f"certificate verify failed: IP address mismatch, certificate is not valid for {HOST!r}"


@both
async def test_a_wrong_host_name_is_retried_and_heals_with_the_right_certificate(
    name: str, authority: Authority
) -> None:
    attempts = Attempts()
    with trio.fail_after(60):
        async with make(name, authority.server("broker.example")) as broker:
            config = secure(name, broker.port, TLSConfig(ca_file=authority.file), options_factory=attempts)
            async with MQTTDriver(config, start="background") as driver:
                error = await attempts.wait_error("TLSError: ")
                assert MISMATCH in error
                assert "set server_hostname to a name that the certificate has" in error
                await broker.stop()
                await restart_with(broker, authority.server())
                async with driver.subscription("a", qos=1) as messages:
                    await works(driver, messages, generation=1)
            assert told(driver)[0].endswith(AT_ONCE)


@both
async def test_a_wrong_host_name_stops_the_driver_if_it_is_told_so(name: str, authority: Authority) -> None:
    tls = TLSConfig(ca_file=authority.file, wrong_host="stop")
    with trio.fail_after(60):
        async with make(name, authority.server("broker.example")) as broker:
            driver = MQTTDriver(secure(name, broker.port, tls))
            with pytest.raises(TLSError, match=MISMATCH) as caught:
                async with driver:
                    raise AssertionError("entered")
            assert caught.value.terminal
            assert driver.state is State.CLOSED
            assert counted(driver)["attempts"] == 1
            named = attrs.evolve(tls, server_hostname="broker.example")
            async with MQTTDriver(secure(name, broker.port, named)) as driver:
                assert driver.generation == 1


@both
async def test_a_certificate_for_another_host_that_comes_later_stops_the_driver_then(
    name: str, authority: Authority, foreign: Authority
) -> None:
    attempts = Attempts()
    trusted = foreign.directory / "trusted.pem"
    trusted.write_text(authority.pem)
    tls = TLSConfig(ca_file=trusted, wrong_host="stop")
    with trio.fail_after(60):
        async with make(name, authority.server()) as broker:
            driver = MQTTDriver(secure(name, broker.port, tls, options_factory=attempts))
            with pytest.raises(TLSError, match=MISMATCH):  # noqa: PT012  # the body is what is under test
                async with driver:
                    await broker.kill()
                    # Any other fault of TLS is retried.
                    await restart_with(broker, foreign.server())
                    await attempts.wait_error("TLSError: ")
                    await broker.stop()
                    await restart_with(broker, authority.server("broker.example"))
                    await trio.sleep_forever()
            assert told(driver)[-1].startswith("stopped for good: TLS handshake with ")
