"""How the tests of the driver reach a broker in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from trio_mqtt_driver import DriverConfig, Endpoint
from trio_mqtt_driver.testing import MemoryBroker


def memory_config(broker: MemoryBroker, **options: Any) -> DriverConfig:
    """The config of a driver that connects to ``broker``; ``options`` are fields of ``DriverConfig`` and win."""
    defaults: dict[str, Any] = {
        "endpoint": Endpoint(host="memory", port=1883),
        "client_id": "driver",
        "open_stream": lambda _endpoint: broker.connect_stream(),  # pyright: ignore[reportUnknownLambdaType]
    }
    return DriverConfig(**{**defaults, **options})


def _run_on_mock_clock(
    main: Callable[[], Awaitable[Any]], *, clock: trio.abc.Clock | None, instruments: Sequence[trio.abc.Instrument]
) -> Any:
    clock = clock or trio.testing.MockClock(autojump_threshold=0)
    return trio.run(main, clock=clock, instruments=instruments)


on_mock_clock = pytest.mark.trio(run=_run_on_mock_clock)
"""``pytestmark`` of a module whose tests all run in virtual time. pytest-trio takes a clock from a fixture only if the
test names it as an argument."""
