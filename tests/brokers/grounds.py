"""What the tests with real brokers share: a broker with a protocol version, and a way to wait for failed attempts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import attrs
import pytest
import trio

from trio_mqtt_driver import Attempt, BackoffConfig, DriverConfig, Endpoint
from trio_mqtt_driver.testing import (
    BrokerNotInstalledError,
    BrokerProcess,
    Ejabberd,
    EmbeddedBroker,
    Iotcore,
    Mosquitto,
)

Protocol = Literal["5", "3.1.1"]

QUICK_BACKOFF = BackoffConfig(
    start=0.05, factor=1.5, maximum=0.5, min_interval=0.05, stable_after=0.2, pause_after=1000, pause=1
)
QUICK: dict[str, Any] = {
    "keep_alive": 1,
    "ping_timeout": 1.5,
    "connect_timeout": 2,
    "probe_timeout": 2,
    "ack_timeout": 2,
    "subscribe_timeout": 3,
    "backoff": QUICK_BACKOFF,
}
"""Options with which an outage takes a second or two."""

GROUNDS: dict[str, tuple[Callable[..., BrokerProcess], Protocol]] = {
    "mosquitto-5": (Mosquitto, "5"),
    "mosquitto-3.1.1": (Mosquitto, "3.1.1"),
    "nats-3.1.1": (EmbeddedBroker, "3.1.1"),
    "ejabberd-5": (Ejabberd, "5"),
    "iotcore-5": (Iotcore, "5"),
}


def every_ground_but(*names: str) -> pytest.MarkDecorator:
    """For a test that takes ``ground`` or ``idle_ground``: not on these, for a reason that stands beside it."""
    return pytest.mark.parametrize("idle_ground", [name for name in GROUNDS if name not in names], indirect=True)


@attrs.frozen
class Ground:
    """A broker that runs, and the protocol version to talk to it."""

    broker: BrokerProcess
    protocol: Protocol

    def config(self, port: int | None = None, **options: Any) -> DriverConfig:
        """The config of a driver that connects to the broker, or to a proxy before it at ``port``."""
        defaults: dict[str, Any] = {
            "endpoint": Endpoint(host=self.broker.host, port=port or self.broker.port),
            "client_id": "driver",
            "protocol": self.protocol,
            **QUICK,
        }
        if self.broker.credentials is not None:
            defaults["username"], defaults["password"] = self.broker.credentials
        return DriverConfig(**{**defaults, **options})


def require(broker: BrokerProcess) -> BrokerProcess:
    """Skip the test where the broker is not installed; where ``CI`` is set, fail: there nothing may go untested."""
    try:
        broker._find()
    except BrokerNotInstalledError as exc:
        if os.environ.get("CI"):
            pytest.fail(str(exc))
        pytest.skip(str(exc))
    return broker


class Attempts:
    """An ``options_factory`` that tells what the attempts before it failed with."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._changed = trio.Event()

    async def __call__(self, attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        if attempt.last_error is not None:
            self.errors.append(attempt.last_error)
        self._changed.set()
        return attempt.config

    async def wait_error(self, words: str) -> str:
        """Return when an attempt begins after an error with these words: what was the matter."""
        seen = 0
        while True:
            for error in self.errors[seen:]:
                if words in error:
                    return error
            seen = len(self.errors)
            self._changed = trio.Event()
            await self._changed.wait()
