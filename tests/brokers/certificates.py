"""TLS for the tests with real brokers: authorities with their files, brokers and drivers that use them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import trustme

from tests.brokers.grounds import QUICK, Protocol, require
from trio_mqtt_driver import DriverConfig, Endpoint, TLSConfig
from trio_mqtt_driver.testing import BrokerProcess, Ejabberd, EmbeddedBroker, Iotcore, Mosquitto, TLSFiles

TLS_BROKERS: dict[str, tuple[Callable[..., BrokerProcess], Protocol]] = {
    "mosquitto": (Mosquitto, "5"),
    "nats": (EmbeddedBroker, "3.1.1"),
    "ejabberd": (Ejabberd, "5"),
    "iotcore": (Iotcore, "5"),
}
MUTUAL_BROKERS = ("mosquitto", "nats")
"""ejabberd and iotcore take any client certificate, or none."""

NOW = datetime.datetime.now(datetime.timezone.utc)
BEGIN = NOW - datetime.timedelta(days=20)
# trustme's own end of validity, in the year 3000, is too late for ejabberd.
END = NOW + datetime.timedelta(days=20)
YESTERDAY = NOW - datetime.timedelta(days=1)


@attrs.frozen
class Authority:
    """A certificate authority with its files in a directory."""

    directory: Path
    ca: trustme.CA = attrs.field(factory=trustme.CA)

    @property
    def pem(self) -> str:
        return self.ca.cert_pem.bytes().decode()

    @property
    def file(self) -> Path:
        path = self.directory / "ca.pem"
        if not path.exists():
            self.ca.cert_pem.write_to_path(path)
        return path

    def files(self, name: str, *identities: str, end: datetime.datetime = END) -> tuple[Path, Path]:
        """A new certificate for ``identities``, valid until ``end``, and its key, in the place of those before."""
        leaf = self.ca.issue_cert(*identities, common_name=name, not_before=BEGIN, not_after=end)
        chain, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(key)
        return chain, key

    def server(self, *identities: str, mutual: bool = False, end: datetime.datetime = END) -> TLSFiles:
        chain, key = self.files("server", *(identities or ("127.0.0.1",)), end=end)
        return TLSFiles(cert=chain, key=key, ca=self.file, require_client_cert=mutual)


def make(name: str, files: TLSFiles) -> BrokerProcess:
    """A broker of that name, not started yet."""
    return require(TLS_BROKERS[name][0](tls=files))


def secure(name: str, port: int, tls: TLSConfig, **options: Any) -> DriverConfig:
    """The config of a driver that connects to such a broker, or to a proxy before it, at ``port``."""
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
