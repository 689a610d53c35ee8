"""TLS and mutual TLS with real brokers; certificates that are wrong, and that heal without a restart."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio

from tests.brokers.certificates import MUTUAL_BROKERS, TLS_BROKERS, Authority, make, secure
from tests.brokers.grounds import Attempts
from trio_mqtt_driver import MQTTDriver, State, TLSConfig
from trio_mqtt_driver.testing import FaultProxy

pytestmark = pytest.mark.broker


async def round_trip(driver: MQTTDriver) -> None:
    async with driver.subscription("a", qos=1) as messages:
        await driver.publish("a", bytes(100_000), qos=1)
        assert (await messages.receive()).payload == bytes(100_000)


@pytest.mark.parametrize("name", TLS_BROKERS)
async def test_tls_works_and_survives_a_restart(name: str, authority: Authority) -> None:
    with trio.fail_after(40):
        async with make(name, authority.server()) as broker:
            attempts = Attempts()
            config = secure(name, broker.port, TLSConfig(ca_file=authority.file), options_factory=attempts)
            async with MQTTDriver(config) as driver:
                await round_trip(driver)
                await broker.kill()
                await attempts.wait_error("ConnectionLostError")
                await broker.start()
                await driver.wait_live()
                await round_trip(driver)
                assert driver.generation == 2


@pytest.mark.parametrize("name", TLS_BROKERS)
async def test_a_certificate_of_a_foreign_authority_is_named_and_replacing_the_file_heals(
    name: str, authority: Authority, foreign: Authority, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(foreign.file.read_bytes())
    attempts = Attempts()
    with trio.fail_after(40):
        async with make(name, authority.server()) as broker:
            config = secure(name, broker.port, TLSConfig(ca_file=trusted), options_factory=attempts)
            async with MQTTDriver(config, start="background") as driver:
                assert "certificate verify failed" in await attempts.wait_error("TLSError")
                assert driver.state is not State.LIVE
                assert (driver.status().last_error or "").startswith("TLSError")
                trusted.write_bytes(authority.file.read_bytes())
                await driver.wait_live()
                await round_trip(driver)


@pytest.mark.parametrize("name", TLS_BROKERS)
async def test_an_authority_that_is_rotated_twice_while_the_driver_runs(
    name: str, authority: Authority, foreign: Authority, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.file.read_bytes())
    attempts = Attempts()
    with trio.fail_after(60):
        async with make(name, authority.server()) as broker:
            config = secure(name, broker.port, TLSConfig(ca_file=trusted), options_factory=attempts)
            async with MQTTDriver(config) as driver:
                for generation, new in enumerate((foreign, authority), start=2):
                    attempts.errors.clear()
                    await broker.stop()
                    broker.tls = new.server()
                    await broker.start()
                    await attempts.wait_error("TLSError")
                    trusted.write_bytes(new.file.read_bytes())
                    await driver.wait_live()
                    assert driver.generation == generation
                    await round_trip(driver)


@pytest.mark.parametrize("name", TLS_BROKERS)
async def test_a_wrong_host_name_is_named(name: str, authority: Authority) -> None:
    attempts = Attempts()
    with trio.fail_after(40):
        async with make(name, authority.server("broker.example")) as broker:
            tls = TLSConfig(ca_file=authority.file)
            config = secure(name, broker.port, tls, options_factory=attempts)
            async with MQTTDriver(config, start="background"):
                error = await attempts.wait_error("TLSError")
                assert "certificate verify failed" in error
                assert "127.0.0.1" in error
            named = attrs.evolve(tls, server_hostname="broker.example")
            async with MQTTDriver(secure(name, broker.port, named)) as driver:
                await round_trip(driver)
            unchecked = attrs.evolve(tls, check_hostname=False)
            async with MQTTDriver(secure(name, broker.port, unchecked)) as driver:
                await round_trip(driver)


@pytest.mark.parametrize("name", MUTUAL_BROKERS)
async def test_mutual_tls_wants_a_client_certificate_and_takes_one_that_comes_later(
    name: str, authority: Authority, foreign: Authority
) -> None:
    attempts = Attempts()
    chain, key = foreign.files("client", "client@example.org")
    with trio.fail_after(40):
        async with make(name, authority.server(mutual=True)) as broker:
            without = TLSConfig(ca_file=authority.file)
            async with MQTTDriver(
                secure(name, broker.port, without, options_factory=attempts), start="background"
            ) as driver:
                assert await attempts.wait_error("TLSError")
                attempts.errors.clear()
                wrong = attrs.evolve(without, cert_file=chain, key_file=key)
                driver.apply_settings(secure(name, broker.port, wrong, options_factory=attempts))
                assert await attempts.wait_error("TLSError")
                good, good_key = authority.files("client", "client@example.org")
                right = attrs.evolve(without, cert_file=good, key_file=good_key)
                driver.apply_settings(secure(name, broker.port, right))
                await driver.wait_live()
                await round_trip(driver)


@pytest.mark.parametrize("name", TLS_BROKERS)
async def test_a_tls_link_is_reset_black_holed_and_trickled(
    name: str, authority: Authority, nursery: trio.Nursery
) -> None:
    attempts = Attempts()
    with trio.fail_after(60):
        async with make(name, authority.server()) as broker:
            proxy = FaultProxy(nursery, broker.port)
            config = secure(name, proxy.port, TLSConfig(ca_file=authority.file), options_factory=attempts)
            async with MQTTDriver(config) as driver:
                proxy.reset()
                await attempts.wait_error("Lost")
                await driver.wait_live()
                await round_trip(driver)
                proxy.cut_after(50)  # in the middle of the next TLS record
                await driver.publish("a", bytes(1000), qos=1)
                with proxy.byte_by_byte():
                    proxy.reset()
                    attempts.errors.clear()
                    await attempts.wait_error("Lost")
                    await driver.wait_live()
                    await driver.publish("a", bytes(1000), qos=1)
                with proxy.blackhole():
                    await attempts.wait_error("KeepAliveError")
                await driver.wait_live()
                await round_trip(driver)
