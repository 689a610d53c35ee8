"""Several brokers in memory, each at an address of its own, and everything that is dialled there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import trio
import trio.testing

from tests.dialing import TracedStream
from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver
from trio_mqtt_driver.testing import Connect, MemoryBroker


def at(name: str, scheme: str = "mqtt") -> Endpoint:
    return Endpoint(scheme=scheme, host=name, port=1883)


@attrs.frozen
class Dialled:
    name: str
    at: float


class _Stream(TracedStream):
    def __init__(
        self, stream: trio.abc.Stream, on_close: Callable[[], object], on_closed: Callable[[], object]
    ) -> None:
        super().__init__(stream, on_close)
        self._on_closed = on_closed

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            self._on_closed()


class Several:
    """Brokers with names of one letter; an address without a broker refuses connections."""

    def __init__(self, nursery: trio.Nursery, names: str = "ab") -> None:
        self.brokers = {name: MemoryBroker(nursery) for name in names}
        self.swallowed: set[str] = set()
        """Where new connections get no answer at all."""
        self.dialled: list[Dialled] = []
        self.open: list[str] = []
        """Names of brokers, one for each stream that is open."""
        self.on_closed: Callable[[str], object] = lambda _: None
        """Told the name when a stream was closed; nobody else runs before whoever closed it goes on."""

    def __getitem__(self, name: str) -> MemoryBroker:
        return self.brokers[name]

    async def open_stream(self, endpoint: Endpoint) -> trio.abc.Stream:
        name = endpoint.host or endpoint.path
        self.dialled.append(Dialled(name, trio.current_time()))
        if name in self.swallowed:
            await trio.sleep_forever()
        if name not in self.brokers:
            await trio.lowlevel.checkpoint()
            raise ConnectionRefusedError(f"nobody listens at {name}")
        stream = await self.brokers[name].connect_stream()
        self.open.append(name)
        return _Stream(stream, lambda: self.open.remove(name), lambda: self.on_closed(name))

    def config(self, **options: Any) -> DriverConfig:
        """Of a driver whose primary is the first broker, with the others as fallbacks; ``options`` win."""
        first, *others = map(at, self.brokers)
        defaults: dict[str, Any] = {
            "endpoint": first,
            "fallbacks": others,
            "client_id": "driver",
            "open_stream": self.open_stream,
        }
        return DriverConfig(**{**defaults, **options})

    @property
    def order(self) -> str:
        """Where connections were tried, one letter each."""
        return "".join(one.name for one in self.dialled)

    def connects(self, name: str) -> list[Connect]:
        return list(self.brokers[name].connects)

    def check(self) -> None:
        """Nothing is left open, nothing was done that MQTT forbids."""
        assert not self.open
        for broker in self.brokers.values():
            assert not broker.violations


def place(driver: MQTTDriver) -> str:
    """The name of the broker that the driver is at."""
    return driver.status().endpoint.removeprefix("mqtt://").removesuffix(":1883")


def told(driver: MQTTDriver, kind: str) -> list[str]:
    """The texts of the events of a kind."""
    return [event.text for event in driver.status().history if event.kind == kind]


async def leave_a(several: Several, driver: MQTTDriver) -> None:
    """Take a driver to broker ``b``, just now; ``a`` is there again."""
    await driver.wait_live()
    several["a"].stop()
    await trio.testing.wait_all_tasks_blocked()
    await driver.wait_live()
    assert place(driver) == "b"
    several["a"].start()
    several["a"].forget()
    several.dialled.clear()
