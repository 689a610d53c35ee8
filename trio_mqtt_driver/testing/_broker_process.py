"""A real broker as a child process: start, kill, restart on the same port, suspend, and its log when it fails."""

from __future__ import annotations

import abc
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import attrs
import trio

from ._packets import Connect, Disconnect
from ._ports import HOST, free_port
from ._properties import WireError
from ._raw_client import RawClient

if TYPE_CHECKING:
    from typing_extensions import Self


_START_DEADLINE = 30.0
_STOP_DEADLINE = 10.0
_FIRST_ATTEMPTS = 5
_ASK_AGAIN = 0.05
_PROBE_DEADLINE = 2.0
_STOP_CHECKS = 10_000
_IN_USE = ("address already in use", "address in use", "eaddrinuse")


class BrokerNotInstalledError(Exception):
    """The broker's program is not on this machine; the message says what to install."""


class BrokerFailedError(Exception):
    """The broker did not start, or ended by itself; the message has the end of its log."""


@attrs.frozen(kw_only=True)
class TLSFiles:
    """PEM files for a broker's TLS listener."""

    cert: Path = attrs.field(converter=Path)
    """The server's certificate chain."""
    key: Path = attrs.field(converter=Path)
    ca: Path = attrs.field(converter=Path)
    """Whose client certificates are accepted."""
    require_client_cert: bool = False
    """Mutual TLS. Readiness is then tried with the server's own certificate, which must allow client use."""


class BrokerProcess(abc.ABC):
    """A real MQTT broker on a free port of 127.0.0.1, as an async context manager.

    ::

        async with EmbeddedBroker() as broker:
            ...                         # broker.url is ready for clients
            await broker.kill()
            await broker.start()        # the same port, the same sessions on disk

    The process dies with this one. Entering and :meth:`start` return when a CONNECT has been answered; if that takes
    more than 30 s, or the program ends: :class:`BrokerFailedError` with its log. Cancelling them ends the process.
    """

    name: str

    def __init__(self, *, tls: TLSFiles | None = None, users: Mapping[str, str] | None = None) -> None:
        self.tls = tls
        self.users: dict[str, str] | None = dict(users) if users is not None else None
        self.host = HOST
        self._port = 0
        self._directory: Path | None = None
        self._guardian: trio.Process | None = None
        self._pid = 0

    # -- for the subclasses --

    @abc.abstractmethod
    def _find(self) -> list[str]:
        """The program; raises ``BrokerNotInstalledError``."""

    @abc.abstractmethod
    def _arguments(self, directory: Path, port: int) -> list[str]:
        """Write the configuration into ``directory``; the arguments that make the program use it."""

    def _environment(self, directory: Path) -> dict[str, str]:
        """Environment variables, beside those of this process."""
        return {"HOME": str(directory)}

    def _probe(self) -> Connect:
        """The CONNECT that tells whether the broker is ready."""
        user, password = next(iter(self.users.items())) if self.users else (None, None)
        return Connect(
            client_id="readiness",
            version=4,
            username=user,
            password=password.encode() if password is not None else None,
        )

    # -- what a test uses --

    @property
    def port(self) -> int:
        if not self._port:
            raise RuntimeError(f"{self.name} has not been started yet")
        return self._port

    @property
    def url(self) -> str:
        return f"{'mqtt' if self.tls is None else 'mqtts'}://{self.host}:{self.port}"

    @property
    def directory(self) -> Path:
        """Where its configuration, data and log are, until the context ends."""
        if self._directory is None:
            raise RuntimeError(f"{self.name} is used outside its `async with`")
        return self._directory

    @property
    def running(self) -> bool:
        return self._guardian is not None and self._guardian.poll() is None

    @property
    def pid(self) -> int:
        """Process identifier of the broker itself."""
        if not self.running:
            raise RuntimeError(f"{self.name} is not running")
        return self._pid

    async def __aenter__(self) -> Self:
        self._find()  # Before anything is made: a broker that is not installed leaves nothing behind.
        self._directory = Path(tempfile.mkdtemp(prefix="tmd-"))
        try:
            await self.start()
        except BaseException:
            self._remove_directory()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with trio.move_on_after(_STOP_DEADLINE, shield=True):
                await self._end()
        finally:
            self._remove_directory()

    async def start(self) -> None:
        """Start the broker, on the port that it had, and wait until it answers a CONNECT."""
        if self.running:
            raise RuntimeError(f"{self.name} is already running")
        if self._guardian is not None:
            await self._gone()  # It ended by itself.
        fixed = self._port
        for _ in range(1 if fixed else _FIRST_ATTEMPTS):
            self._port = fixed or free_port()
            if await self._attempt():
                return
        taken, self._port = self._port, fixed
        raise BrokerFailedError(f"{self.name}: port {taken} is taken\n{self.log()}")

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._signal(signal.SIGKILL)
        await self._gone()

    async def stop(self) -> None:
        """Ask the broker to end (SIGTERM) and wait; SIGKILL after 10 s."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with trio.move_on_after(_STOP_DEADLINE):
            await self._gone()
            return
        await self.kill()

    async def restart(self) -> None:
        """:meth:`stop`, then :meth:`start`."""
        await self.stop()
        await self.start()

    def suspend(self) -> None:
        """SIGSTOP: the kernel still accepts connections and bytes, but nothing is answered."""
        self._signal(signal.SIGSTOP)
        _await_stop(self._pid)

    def resume(self) -> None:
        """SIGCONT: go on after :meth:`suspend`."""
        self._signal(signal.SIGCONT)

    def log(self) -> str:
        """The end of what the broker has written, over all of its starts."""
        path = self.directory / "broker.log"
        return path.read_text(errors="replace")[-8000:] if path.exists() else "(no log)"

    # -- the process --

    async def _attempt(self) -> bool:
        """Start on the port that was chosen; False if somebody else has taken it."""
        ready = False
        try:
            mark = self._log_size()
            await self._launch()
            ready = await self._wait_ready(mark)
        finally:
            if not ready:
                with trio.move_on_after(_STOP_DEADLINE, shield=True):
                    await self._end()
        return ready

    async def _launch(self) -> None:
        directory = self.directory
        command = [*self._find(), *self._arguments(directory, self._port)]
        guardian = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_guardian.py")), *command]
        with self._open_log() as log:
            self._guardian = await trio.lowlevel.open_process(
                guardian,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=directory,
                env={**os.environ, **self._environment(directory)},
                # Ctrl-C in a terminal is for the test run; it then ends the broker in an orderly way.
                start_new_session=True,
            )
        assert self._guardian.stdout is not None
        first = bytearray()
        while not first.endswith(b"\n"):
            data = await self._guardian.stdout.receive_some()
            if not data:
                raise BrokerFailedError(f"{self.name} could not be started\n{self.log()}")
            first += data
        self._pid = int(first)

    async def _wait_ready(self, mark: int) -> bool:
        """Until a CONNECT is answered: an open port alone says little, least of all whose it is."""
        await trio.lowlevel.checkpoint()
        reason = "no answer"
        with trio.move_on_after(_START_DEADLINE):
            # Another process cannot tell us by an Event that it is ready: this is the one place that has to ask again.
            while self.running and not self._port_taken(mark):
                answer = await self._try_connect()
                if answer is None and self.running and not self._port_taken(mark):
                    return True
                reason = answer or reason
                await trio.sleep(_ASK_AGAIN)
            if self._port_taken(mark):
                return False
            raise BrokerFailedError(f"{self.name} ended while it started\n{self.log()}")
        raise BrokerFailedError(f"{self.name} was not ready after {_START_DEADLINE} s: {reason}\n{self.log()}")

    async def _try_connect(self) -> str | None:
        """Why the broker is not ready; None if it is."""
        await trio.lowlevel.checkpoint()
        stream: trio.abc.Stream | None = None
        try:
            with trio.fail_after(_PROBE_DEADLINE):
                stream = await trio.open_tcp_stream(self.host, self._port)
                if self.tls is not None:
                    stream = trio.SSLStream(stream, self._probe_context(self.tls), server_hostname=self.host)
                client = RawClient(stream, version=4)
                answer = await client.connect(self._probe())
                await client.send(Disconnect())
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, WireError, AssertionError) as exc:
            return repr(exc)
        finally:
            if stream is not None:
                with trio.move_on_after(_PROBE_DEADLINE, shield=True):
                    await trio.aclose_forcefully(stream)
        return f"CONNECT was refused with code {answer.reason_code}" if answer.reason_code else None

    def _probe_context(self, tls: TLSFiles) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Whether the certificate is any good is what the test is about, not the readiness of the broker.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if tls.require_client_cert:
            context.load_cert_chain(tls.cert, tls.key)
        return context

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def _gone(self) -> None:
        guardian = self._guardian
        assert guardian is not None
        assert guardian.stdin is not None
        assert guardian.stdout is not None
        await guardian.wait()
        self._guardian = None
        await guardian.stdin.aclose()
        await guardian.stdout.aclose()

    async def _end(self) -> None:
        """End the process, whatever state it is in."""
        await trio.lowlevel.checkpoint()
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            # The guardian kills the broker when this closes.
            await self._guardian.stdin.aclose()
            await self._gone()

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    def _open_log(self) -> IO[bytes]:
        return (self.directory / "broker.log").open("ab")

    def _log_size(self) -> int:
        path = self.directory / "broker.log"
        return path.stat().st_size if path.exists() else 0

    def _port_taken(self, mark: int) -> bool:
        """Whether the log says so; without this, a foreign broker on our port would pass for ours."""
        with (self.directory / "broker.log").open("rb") as log:
            log.seek(mark)
            text = log.read().decode(errors="replace").lower()
        return any(words in text for words in _IN_USE)


def _await_stop(pid: int) -> None:
    """Until every thread has stopped: kill() returns before that, and those that still run may answer a client.

    Takes microseconds as a rule, so that it need not be async. Without /proc we take it on trust.
    """
    threads = Path(f"/proc/{pid}/task")
    for _ in range(_STOP_CHECKS):
        try:
            # The state follows the program's name, which is in parentheses and may contain any character.
            states = {(entry / "stat").read_text().rpartition(")")[2].split()[0] for entry in threads.iterdir()}
        except OSError:
            return  # No /proc, or the process is gone.
        if states <= {"T"}:
            return
        os.sched_yield()
