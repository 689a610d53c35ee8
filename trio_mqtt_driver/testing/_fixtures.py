"""What the pytest fixtures do."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import pytest
import trio
from trio.testing import MockClock

from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver

from ._broker_process import BrokerProcess
from ._brokers import Ejabberd, EmbeddedBroker, Mosquitto
from ._driver_probe import DriverProbe
from ._fault_proxy import FaultProxy
from ._iotcore import Iotcore
from ._leaks import LeakCheck, LeakError
from ._memory_broker import MemoryBroker

Run = Callable[..., Any]
"""`trio.run`, or what is called like it."""
Target = MemoryBroker | BrokerProcess | FaultProxy

_BROKERS: dict[str, Callable[[], BrokerProcess]] = {
    "embedded": EmbeddedBroker,
    "mosquitto": Mosquitto,
    "ejabberd": Ejabberd,
    "iotcore": Iotcore,
}


async def running_broker(name: str) -> AsyncGenerator[BrokerProcess, None]:
    """The fixture ``mqtt_broker``."""
    async with _BROKERS[name]() as broker:
        yield broker


async def live_driver(
    target: Target, broker: BrokerProcess | None, options: Mapping[str, Any]
) -> AsyncGenerator[MQTTDriver, None]:
    """The fixture ``mqtt_driver``; ``broker`` is the one behind a proxy, if it is known."""
    config = driver_config(target, broker, options)
    # In the background first: if it does not get there, the failure tells why.
    async with MQTTDriver(config, start="background", rng=random.Random(0)) as driver:
        await DriverProbe(driver, target if isinstance(target, MemoryBroker) else None).wait_live()
        yield driver


def driver_config(target: Target, broker: BrokerProcess | None, options: Mapping[str, Any]) -> DriverConfig:
    defaults: dict[str, Any] = {"client_id": "driver"}
    if isinstance(target, MemoryBroker):
        defaults["endpoint"] = Endpoint(host="memory", port=1883)
        defaults["open_stream"] = _opener(target)
    else:
        scheme = "mqtt" if broker is None or broker.tls is None else "mqtts"
        defaults["endpoint"] = Endpoint(scheme=scheme, host=target.host, port=target.port)
    if broker is not None and broker.credentials is not None:
        defaults["username"], defaults["password"] = broker.credentials
    if broker is not None and 5 not in broker.versions:
        defaults["protocol"] = "3.1.1"  # It would find that out by itself, but with one more connection.
    return DriverConfig(**{**defaults, **options})


def _opener(broker: MemoryBroker) -> Callable[[Endpoint], Awaitable[trio.abc.Stream]]:
    return lambda _endpoint: broker.connect_stream()


def run_test(
    run: Run,
    autojump: bool,
    leak_check: bool,
    test: Callable[[], Awaitable[None]],
    *,
    clock: trio.abc.Clock | None = None,
    instruments: Sequence[trio.abc.Instrument] = (),
) -> None:
    """Run a test as pytest-trio does, on an autojump clock and with a leak check if it asks for them."""
    __tracebackhide__ = True
    if autojump:
        if clock is None:
            clock = MockClock(autojump_threshold=0)
        elif not isinstance(clock, MockClock) or clock.autojump_threshold == math.inf:
            _fail("the test asks for an autojump fixture, and for a clock that does not jump")
    try:
        run(leak_checked(test) if leak_check else test, clock=clock, instruments=instruments)
    except LeakError as exc:
        _fail(f"the test has {exc}")


def _fail(message: str) -> NoReturn:
    # Not hidden from tracebacks: pytest has a complaint of its own where all of it is. It does not show this either.
    raise pytest.fail.Exception(message, pytrace=False) from None


def leak_checked(function: Callable[..., Awaitable[None]]) -> Any:
    """``function`` with a `LeakCheck` around it."""

    @functools.wraps(function)
    async def checked(*args: Any, **kwargs: Any) -> None:
        with LeakCheck():
            await function(*args, **kwargs)

    return checked
