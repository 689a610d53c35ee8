"""How the tests of the driver reach a broker in memory."""

from __future__ import annotations

from typing import Any

from trio_mqtt_driver import DriverConfig, Endpoint
from trio_mqtt_driver.testing import Kind, MemoryBroker


def memory_config(broker: MemoryBroker, **options: Any) -> DriverConfig:
    """The config of a driver that connects to ``broker``; ``options`` are fields of ``DriverConfig`` and win."""
    defaults: dict[str, Any] = {
        "endpoint": Endpoint(host="memory", port=1883),
        "client_id": "driver",
        "open_stream": lambda _endpoint: broker.connect_stream(),  # pyright: ignore[reportUnknownLambdaType]
    }
    return DriverConfig(**{**defaults, **options})


def pings(broker: MemoryBroker) -> int:
    """How many PINGREQs have come to it."""
    return sum(packet.kind is Kind.PINGREQ for _, packet in broker.received)
