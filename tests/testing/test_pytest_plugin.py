"""The pytest plugin, each fixture in both modes of pytest-trio, and what it must not do."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from tests.brokers.grounds import require
from tests.testing.pytest_runs import TRIO_MODE, failed, passed, run
from trio_mqtt_driver.testing import Ejabberd, EmbeddedBroker, Iotcore, Mosquitto

pytest_plugins = "pytester"

MARKED = "[pytest]\n"
HEAD = """
import pytest, trio
from trio_mqtt_driver import MQTTDriver, State
from trio_mqtt_driver.testing import (
    DriverProbe, EmbeddedBroker, FaultProxy, Iotcore, MemoryBroker, Mosquitto, Ejabberd, Published
)
"""
both_modes = pytest.mark.parametrize("ini", [TRIO_MODE, MARKED], ids=["trio_mode", "marked"])

# -- in memory --


@both_modes
def test_a_driver_with_a_broker_in_memory(pytester: pytest.Pytester, ini: str) -> None:
    test = """
@pytest.mark.trio
async def test(memory_broker, mqtt_driver, driver_probe):
    assert isinstance(memory_broker, MemoryBroker)
    assert isinstance(driver_probe, DriverProbe)
    assert driver_probe.driver is mqtt_driver
    assert mqtt_driver.state is State.LIVE
    assert memory_broker.clients == [mqtt_driver.client_id]
    await mqtt_driver.publish("a/b", "c", qos=1)
    assert (await memory_broker.wait_for_publish("a/#")).payload == b"c"
    assert "PUBLISH 'a/b'" in driver_probe.report()
"""
    passed(run(pytester, HEAD + test, ini=ini))


@both_modes
def test_an_hour_in_virtual_time(pytester: pytest.Pytester, ini: str) -> None:
    test = """
@pytest.mark.trio
async def test(autojump_memory_broker, autojump_mqtt_driver, driver_probe):
    received = []
    await autojump_mqtt_driver.subscribe("down", received.append)
    autojump_memory_broker.stop()
    await driver_probe.wait_lost()
    await trio.sleep(3600)
    autojump_memory_broker.start()
    assert await driver_probe.wait_live(timeout=60) == 2
    assert await autojump_memory_broker.wait_for_subscription("down") == autojump_mqtt_driver.client_id
    assert 3600 < trio.current_time() % 1e6
"""
    passed(run(pytester, HEAD + test, ini=ini))


@pytest.mark.parametrize("fixture", ["autojump_memory_broker", "autojump_mqtt_driver"])
def test_each_autojump_fixture_is_enough(pytester: pytest.Pytester, fixture: str) -> None:
    test = f"""
@pytest.fixture
async def application({fixture}):
    await trio.sleep(10_000)

async def test(application, driver_probe, memory_broker):
    await trio.sleep(10_000)
    assert driver_probe.driver.state is State.LIVE
    assert memory_broker.clients == [driver_probe.driver.client_id]
"""
    passed(run(pytester, HEAD + test))


def test_classes_and_parameters(pytester: pytest.Pytester) -> None:
    test = """
class TestIt:
    @pytest.mark.parametrize("seconds", [10, 100_000])
    async def test(self, seconds, autojump_mqtt_driver):
        started = trio.current_time()
        await trio.sleep(seconds)
        assert started + seconds <= trio.current_time() < started + seconds + 1
"""
    passed(run(pytester, HEAD + test), 2)


def test_the_clock_that_the_test_has_asked_for_is_used(pytester: pytest.Pytester) -> None:
    test = """
async def test(autojump_clock, autojump_mqtt_driver):
    autojump_clock.jump(5)
    assert trio.current_time() == autojump_clock.current_time()
    await trio.sleep(100_000)
"""
    passed(run(pytester, HEAD + test))


def test_a_clock_that_does_not_jump_is_a_contradiction(pytester: pytest.Pytester) -> None:
    result = run(pytester, "async def test(mock_clock, autojump_mqtt_driver): pass")
    failed(result, "the test asks for an autojump fixture, and for a clock that does not jump")


RUNNERS = {
    "trio_mode": (TRIO_MODE + "trio_run = qtrio\n", ""),
    "marked": (MARKED + "trio_run = qtrio\n", "@pytest.mark.trio"),
    "by the mark": (TRIO_MODE, "@pytest.mark.trio(run=run)"),
}


@pytest.mark.parametrize("ini, mark", RUNNERS.values(), ids=RUNNERS)
def test_another_runner_is_kept(pytester: pytest.Pytester, ini: str, mark: str) -> None:
    pytester.syspathinsert()
    runner = """
import trio
runs = []
def run(main, *, clock=None, instruments=()):
    runs.append(clock)
    return trio.run(main, clock=clock, instruments=instruments)
"""
    pytester.makepyfile(qtrio=runner)
    test = f"""
from qtrio import run, runs

{mark}
async def test(autojump_mqtt_driver, leak_check):
    await trio.sleep(100_000)
    [clock] = runs
    assert clock.current_time() == trio.current_time()
"""
    passed(run(pytester, HEAD + test, ini=ini))


# -- options --


def test_options_of_the_driver(pytester: pytest.Pytester) -> None:
    conftest = """
import pytest

@pytest.fixture
def mqtt_driver_options():
    return {"client_id": "mine", "keep_alive": 7, "protocol": "3.1.1"}
"""
    test = """
async def test_conftest(memory_broker, mqtt_driver):
    assert mqtt_driver.client_id.startswith("mine_")
    assert [(connect.version, connect.keep_alive) for connect in memory_broker.connects] == [(4, 7)]

class TestModule:
    @pytest.fixture
    async def mqtt_driver_options(self, mqtt_driver_options):
        await trio.sleep(0)
        return {**mqtt_driver_options, "keep_alive": 9}

    async def test(self, memory_broker, mqtt_driver):
        assert memory_broker.connects[0].keep_alive == 9
"""
    passed(run(pytester, HEAD + test, conftest=conftest), 2)


def test_a_broker_of_ones_own(pytester: pytest.Pytester) -> None:
    test = """
@pytest.fixture
def memory_broker(nursery):
    return MemoryBroker(nursery, users={"me": "secret"})

@pytest.fixture
def mqtt_driver_options():
    return {"username": "me", "password": "secret"}

async def test(autojump_mqtt_driver, memory_broker):
    assert memory_broker.connects[0].username == "me"
"""
    passed(run(pytester, HEAD + test))


def test_a_driver_that_does_not_get_there_tells_why(pytester: pytest.Pytester) -> None:
    test = """
@pytest.fixture
def memory_broker(nursery):
    broker = MemoryBroker(nursery)
    broker.stop()
    return broker

async def test(autojump_mqtt_driver):
    raise NotImplementedError
"""
    failed(
        run(pytester, HEAD + test),
        "*AssertionError: the driver was not live within 30 s; it is *broker is down*",
        "*no packet was seen",
    )


def test_a_driver_that_is_refused_tells_why(pytester: pytest.Pytester) -> None:
    test = """
@pytest.fixture
def memory_broker(nursery):
    return MemoryBroker(nursery, users={"me": "secret"})

async def test(autojump_mqtt_driver):
    raise NotImplementedError
"""
    failed(run(pytester, HEAD + test), "*RefusedError: *0x86*")


def test_the_driver_ends_before_its_broker(pytester: pytest.Pytester) -> None:
    test = """
SEEN = []

@pytest.fixture
async def memory_broker(nursery):
    broker = MemoryBroker(nursery)
    yield broker
    SEEN.append(type(broker.received[-1][1]).__name__)
    assert broker.clients == []

async def test(mqtt_driver):
    pass

def test_after():
    assert SEEN == ["Disconnect"]
"""
    passed(run(pytester, HEAD + test), 2)


# -- real brokers --


@pytest.mark.broker
@both_modes
def test_a_real_broker(pytester: pytest.Pytester, ini: str) -> None:
    require(EmbeddedBroker())
    test = """
@pytest.mark.trio
async def test_broker(mqtt_broker, mqtt_driver, leak_check):
    assert isinstance(mqtt_broker, EmbeddedBroker)
    assert str(mqtt_driver.config.endpoint) == mqtt_broker.url
    await mqtt_driver.publish("a/b", "c", qos=1)

@pytest.mark.trio
async def test_proxy(fault_proxy, mqtt_driver, driver_probe, leak_check):
    assert isinstance(fault_proxy, FaultProxy)
    assert mqtt_driver.config.endpoint.port == fault_proxy.port
    assert fault_proxy.accepted == 1
    async with driver_probe.reconnect():
        fault_proxy.reset()
    assert fault_proxy.accepted == 2

@pytest.mark.trio
async def test_without_the_proxy(mqtt_broker, memory_broker, mqtt_driver):
    assert mqtt_driver.config.endpoint.port == mqtt_broker.port
    assert memory_broker.clients == []
"""
    passed(run(pytester, HEAD + test, ini=ini), 3)


CHOICES = {"embedded": EmbeddedBroker, "mosquitto": Mosquitto, "ejabberd": Ejabberd, "iotcore": Iotcore}


@pytest.mark.broker
@pytest.mark.parametrize("by", ["option", "ini"])
@pytest.mark.parametrize("name", CHOICES)
def test_the_broker_is_chosen(pytester: pytest.Pytester, name: str, by: str) -> None:
    require(CHOICES[name]())
    test = f"""
async def test(fault_proxy, mqtt_broker, mqtt_driver):
    assert type(mqtt_broker) is {CHOICES[name].__name__}
    await mqtt_driver.publish("a/b", "c", qos=1)
    assert fault_proxy.accepted == 1
"""
    other = next(choice for choice in CHOICES if choice != name)
    if by == "option":
        result = run(pytester, HEAD + test, f"--mqtt-broker={name}", ini=TRIO_MODE + f"mqtt_broker = {other}\n")
    else:
        result = run(pytester, HEAD + test, ini=TRIO_MODE + f"mqtt_broker = {name}\n")
    passed(result)


def test_an_unknown_broker_is_an_error_of_usage(pytester: pytest.Pytester) -> None:
    result = run(pytester, "", "--mqtt-broker=mosquito")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--mqtt-broker: invalid choice: 'mosquito' (choose from *embedded*mosquitto*"])


def test_an_unknown_broker_in_the_ini_file(pytester: pytest.Pytester) -> None:
    result = run(pytester, "", ini="[pytest]\nmqtt_broker = mosquito\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: mqtt_broker is 'mosquito', allowed are embedded, mosquitto, ejabberd, iotcore"]
    )


def test_a_broker_that_is_not_installed(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(pytester.path))
    result = run(pytester, "async def test(mqtt_driver, mqtt_broker): pass", "--mqtt-broker=ejabberd")
    failed(result, "*BrokerNotInstalledError: ejabberd was not found: apt-get install ejabberd")


def test_virtual_time_and_sockets_do_not_go_together(pytester: pytest.Pytester) -> None:
    result = run(pytester, "async def test(autojump_mqtt_driver, fault_proxy): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["fault_proxy, mqtt_broker and autojump_mqtt_driver in one test: a clock that jumps does not wait *"]
    )


# -- what it must not do --


@pytest.mark.parametrize("fixture", ["memory_broker", "mqtt_broker", "mqtt_driver", "driver_probe"])
def test_only_trio_tests_can_use_it(pytester: pytest.Pytester, fixture: str) -> None:
    result = run(pytester, f"def test({fixture}): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Trio fixtures can only be used by Trio tests*"])


def test_without_pytest_trio_nothing_is_different(pytester: pytest.Pytester) -> None:
    test = """
def test_fine(leak_check_is_no_business_of_this=None):
    pass

def test_broker(memory_broker):
    pass

def test_leak_check(leak_check):
    pass
"""
    result = run(pytester, test, "-p", "no:trio", ini=MARKED)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(
        ["the fixtures of trio-mqtt-driver need pytest-trio: *", "leak_check: only for tests that pytest-trio runs"]
    )


def test_it_can_be_switched_off(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test(memory_broker): pass", "-p", "no:trio_mqtt_driver", ini=MARKED)
    result.stdout.fnmatch_lines(["*fixture 'memory_broker' not found"])


def test_it_is_silent_and_imports_nothing_of_the_extra(pytester: pytest.Pytester) -> None:
    # In a process of its own.
    pytester.makepyfile("""
import sys

def test():
    assert "trio_mqtt_driver.testing._pytest_plugin" in sys.modules
    assert not {"trustme", "pytest_trio", "iotcore"} & set(sys.modules)
""")
    pytester.makeini(MARKED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:trio", "-p", "no:cacheprovider"]
    blocked = [argument for plugin in sorted(others()) for argument in ("-p", f"no:{plugin}")]
    done = subprocess.run(
        [*command, *blocked, "."], cwd=pytester.path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    # pytest's own two lines and nothing else.
    assert [line.split(" in ")[0].split()[0] for line in done.stdout.splitlines()] == [".", "1"]
    assert done.stderr == ""


def others() -> set[str]:
    """Plugins that are installed here, beside ours: each may import what it likes."""
    return {entry.name for entry in entry_points(group="pytest11")} - {"trio_mqtt_driver"}
