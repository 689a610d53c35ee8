"""TLS and mutual TLS with real brokers; certificates that are wrong, and that heal without a restart."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trustme

from tests.brokers.grounds import QUICK, Attempts, Protocol, require
from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver, State, TLSConfig
from trio_mqtt_driver.testing import BrokerProcess, Ejabberd, EmbeddedBroker, FaultProxy, Iotcore, Mosquitto, TLSFiles

pytestmark = pytest.mark.broker

TLS_BROKERS: dict[str, tuple[Callable[..., BrokerProcess], Protocol]] = {
    "mosquitto": (Mosquitto, "5"),
    "nats": (EmbeddedBroker, "3.1.1"),
    "ejabberd": (Ejabberd, "5"),
    "iotcore": (Iotcore, "5"),
}
MUTUAL_BROKERS = ("mosquitto", "nats")
"""ejabberd and iotcore take any client certificate, or none."""

# trustme's own end of validity, in the year 3000, is too late for ejabberd.
NOT_AFTER = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=20)


@attrs.frozen
class Authority:
    """A certificate authority with its files in a directory."""

    directory: Path
    ca: trustme.CA = attrs.field(factory=trustme.CA)

    @property
    def file(self) -> Path:
        path = self.directory / "ca.pem"
        if not path.exists():
            self.ca.cert_pem.write_to_path(path)
        return path

    def files(self, name: str, *identities: str) -> tuple[Path, Path]:
        """A new certificate for ``identities`` and its key."""
        leaf = self.ca.issue_cert(*identities, common_name=name, not_after=NOT_AFTER)
        chain, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        chain.unlink(missing_ok=True)
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(chain, append=True)
        leaf.private_key_pem.write_to_path(key)
        return chain, key

    def server(self, *identities: str, mutual: bool = False) -> TLSFiles:
        chain, key = self.files("server", *(identities or ("127.0.0.1",)))
        return TLSFiles(cert=chain, key=key, ca=self.file, require_client_cert=mutual)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"))


def make(name: str, files: TLSFiles) -> BrokerProcess:
    return require(TLS_BROKERS[name][0](tls=files))


def secure(name: str, port: int, tls: TLSConfig, **options: Any) -> DriverConfig:
    defaults: dict[str, Any] = {
        "endpoint": Endpoint(scheme="mqtts", host="127.0.0.1", port=port),
        "protocol": TLS_BROKERS[name][1],
        "client_id": "driver",
        "tls": tls,
        **QUICK,
    }
    if name == "ejabberd":
        defaults |= {"username": "anybody", "password": "anything"}
    return DriverConfig(**{**defaults, **options})


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
