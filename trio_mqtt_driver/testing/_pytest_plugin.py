"""The pytest plugin of trio-mqtt-driver: the fixtures of `trio_mqtt_driver.testing`, for tests run by pytest-trio.

pytest imports this wherever the package is installed, for every test run: so it must work with every pytest there may
be, and without pytest-trio or any other package of the extra ``testing``.

All fixtures are sync functions that get pytest-trio's ``nursery``. That makes pytest-trio run them inside Trio, in a
test that is marked ``trio`` as well as with ``trio_mode``, and keeps the plugins for asyncio and anyio from taking
them for theirs.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import trio

from trio_mqtt_driver import MQTTDriver

from ._broker_process import BrokerProcess
from ._driver_probe import DriverProbe
from ._fault_proxy import FaultProxy
from ._fixtures import leak_checked, live_driver, run_test, running_broker
from ._memory_broker import MemoryBroker

_BROKERS = ("embedded", "mosquitto", "ejabberd", "iotcore")
_AUTOJUMP = {"autojump_memory_broker", "autojump_mqtt_driver"}
_WITH_SOCKETS = {"mqtt_broker", "fault_proxy"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("mqtt", "MQTT (trio-mqtt-driver)").addoption(
        "--mqtt-broker", choices=_BROKERS, help="the real broker of the fixture mqtt_broker (default: embedded)"
    )
    parser.addini("mqtt_broker", "the real broker of the fixture mqtt_broker", default="embedded")
    parser.addini("mqtt_leak_check", "run every Trio test with the fixture leak_check", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    if config.getini("mqtt_broker") not in _BROKERS:
        raise pytest.UsageError(f"mqtt_broker is {config.getini('mqtt_broker')!r}, allowed are {', '.join(_BROKERS)}")


# Last, since pytest-trio marks the async tests here (trio_mode).
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and _is_trio_test(item):
            names = set(item.fixturenames)
            leak_check = "leak_check" in names or bool(config.getini("mqtt_leak_check"))
            if leak_check or names & _AUTOJUMP:
                _prepare(item, autojump=bool(names & _AUTOJUMP), leak_check=leak_check)


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = set(getattr(item, "fixturenames", ()))
    if names & _AUTOJUMP and names & _WITH_SOCKETS:
        real = ", ".join(sorted(names & _WITH_SOCKETS))
        jump = ", ".join(sorted(names & _AUTOJUMP))
        pytest.fail(f"{real} and {jump} in one test: a clock that jumps does not wait for a socket", pytrace=False)
    if names & (_AUTOJUMP | {"leak_check"}) and not _is_trio_test(item):
        asked = ", ".join(sorted(names & (_AUTOJUMP | {"leak_check"})))
        pytest.fail(f"{asked}: only for tests that pytest-trio runs", pytrace=False)


def _is_trio_test(item: pytest.Item) -> bool:
    return item.get_closest_marker("trio") is not None and item.config.pluginmanager.has_plugin("trio")


def _prepare(item: pytest.Function, *, autojump: bool, leak_check: bool) -> None:
    hypothesis: Any = getattr(item.obj, "hypothesis", None)
    if hypothesis is not None:
        # pytest-trio runs its examples by trio.run() whatever the mark says, and without Trio fixtures.
        if leak_check and not getattr(hypothesis.inner_test, "_leak_checked", False):
            # The items of a parametrised test share the function.
            checked = leak_checked(hypothesis.inner_test)
            checked._leak_checked = True
            hypothesis.inner_test = checked
        return
    runs = (mark.kwargs.get("run") for mark in item.iter_markers("trio"))
    run: Any = next((run for run in runs if run is not None), None)
    if run is None:
        plugin: Any = item.config.pluginmanager.get_plugin("trio")
        run = plugin.choose_run(item.config)
    item.add_marker(pytest.mark.trio(run=functools.partial(run_test, run, autojump, leak_check)), append=False)


@pytest.fixture
def _mqtt_nursery(request: pytest.FixtureRequest) -> trio.Nursery:
    """pytest-trio's own, if there is a pytest-trio."""
    if not request.config.pluginmanager.has_plugin("trio"):
        pytest.fail("the fixtures of trio-mqtt-driver need pytest-trio: pip install pytest-trio", pytrace=False)
    nursery: trio.Nursery = request.getfixturevalue("nursery")
    return nursery


@pytest.fixture
def memory_broker(_mqtt_nursery: trio.Nursery) -> MemoryBroker:
    """A `MemoryBroker`: a complete broker without a socket, on Trio's clock."""
    return MemoryBroker(_mqtt_nursery)


@pytest.fixture
def mqtt_broker(request: pytest.FixtureRequest, _mqtt_nursery: trio.Nursery) -> AsyncGenerator[BrokerProcess, None]:
    """A real broker in a process of its own: `EmbeddedBroker`, or what --mqtt-broker or the ini option says."""
    return running_broker(request.config.getoption("--mqtt-broker") or request.config.getini("mqtt_broker"))


@pytest.fixture
def fault_proxy(mqtt_broker: BrokerProcess, _mqtt_nursery: trio.Nursery) -> FaultProxy:
    """A `FaultProxy` before mqtt_broker."""
    return FaultProxy(_mqtt_nursery, mqtt_broker.port)


@pytest.fixture
def mqtt_driver_options() -> dict[str, Any]:
    """Fields of `DriverConfig` for mqtt_driver: to be overridden."""
    return {}


@pytest.fixture
def _mqtt_target(request: pytest.FixtureRequest) -> Any:
    """What mqtt_driver connects to. pytest-trio resolves what this returns, and tears it down after the driver."""
    names = ("fault_proxy", "mqtt_broker")
    return request.getfixturevalue(next((name for name in names if name in request.fixturenames), "memory_broker"))


@pytest.fixture
def _mqtt_broker_behind(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("mqtt_broker") if "mqtt_broker" in request.fixturenames else None


@pytest.fixture
def mqtt_driver(
    _mqtt_target: Any, _mqtt_broker_behind: Any, mqtt_driver_options: dict[str, Any], _mqtt_nursery: trio.Nursery
) -> AsyncGenerator[MQTTDriver, None]:
    """A live `MQTTDriver`, connected to fault_proxy, mqtt_broker or memory_broker: the first that the test has."""
    return live_driver(_mqtt_target, _mqtt_broker_behind, mqtt_driver_options)


@pytest.fixture
def driver_probe(mqtt_driver: MQTTDriver, _mqtt_target: Any) -> DriverProbe:
    """A `DriverProbe` of mqtt_driver: to wait for its states."""
    return DriverProbe(mqtt_driver, _mqtt_target if isinstance(_mqtt_target, MemoryBroker) else None)


@pytest.fixture
def autojump_memory_broker(memory_broker: MemoryBroker) -> MemoryBroker:
    """memory_broker, in virtual time: the test runs on a clock that jumps when nothing is left to do."""
    return memory_broker


@pytest.fixture
def autojump_mqtt_driver(mqtt_driver: MQTTDriver) -> MQTTDriver:
    """mqtt_driver, in virtual time: the test runs on a clock that jumps when nothing is left to do."""
    return mqtt_driver


# For the whole session, because Hypothesis does not like fixtures that are made for each test.
@pytest.fixture(scope="session")
def leak_check() -> None:
    """Fail the test if it leaves tasks, open sockets or threads behind, its Trio fixtures included."""
