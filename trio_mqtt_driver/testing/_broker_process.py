"""A real broker as a child process: start, kill, restart on the same port, suspend, and its log when it fails."""

from __future__ import annotations

import abc
import errno
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, ClassVar
from urllib.parse import quote

import attrs
import trio

from ._broker_errors import BrokerFailedError
from ._filters import require_filter
from ._packets import Connect, Disconnect
from ._ports import HOST, free_port
from ._properties import WireError
from ._raw_client import RawClient
from ._watch import Watch, watching

if TYPE_CHECKING:
    from typing_extensions import Self


_START_DEADLINE = 30.0
_STOP_DEADLINE = 10.0
_FIRST_ATTEMPTS = 5
_ASK_AGAIN = 0.05
_PROBE_DEADLINE = 2.0
_STOP_CHECKS = 10_000
_IN_USE = ("address already in use", "address in use", "eaddrinuse")


def _absolute(path: str | os.PathLike[str]) -> Path:
    # The broker does not run in the directory of the tests.
    return Path(path).absolute()


@attrs.frozen(kw_only=True)
class TLSFiles:
    """PEM files for a broker's TLS listener. Relative paths are those of now."""

    cert: Path = attrs.field(converter=_absolute)
    """The server's certificate chain."""
    key: Path = attrs.field(converter=_absolute)
    ca: Path = attrs.field(converter=_absolute)
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

    Brokers differ: what one can do is told by :attr:`versions`, :attr:`keeps_sessions`, :attr:`shares` and
    :attr:`checks_client_certs` of its class, so that a set of tests can run over all of them.

    :param tls: the listener speaks TLS with these files; None is plain TCP.
    :param users: user name → password of those who are let in; None lets everybody in. The names must not be empty,
        nor contain a colon or a control character.
    """

    name: ClassVar[str]
    """Of the program."""
    versions: ClassVar[tuple[int, ...]] = (4, 5)
    """The protocol versions that it speaks, as CONNECT has them: 4 is MQTT 3.1.1."""
    keeps_sessions: ClassVar[bool] = True
    """Sessions, what is queued for them, and retained messages outlive :meth:`stop` and :meth:`kill`."""
    shares: ClassVar[bool] = False
    """It has ``$share`` subscriptions."""
    checks_client_certs: ClassVar[bool] = True
    """It can do mutual TLS; without this, ``require_client_cert`` is refused."""
    _retain_options: ClassVar[bool] = True
    """It heeds Retain Handling and Retain As Published, if it speaks MQTT 5."""

    def __init__(self, *, tls: TLSFiles | None = None, users: Mapping[str, str] | None = None) -> None:
        if tls is not None and tls.require_client_cert and not self.checks_client_certs:
            raise ValueError(f"tls: {self.name} takes any client certificate, or none; require_client_cert is no use")
        if users is not None:
            _check_users(users)
        self.tls = tls
        """May be changed; the next start sees it, as with :attr:`users`."""
        self.users: dict[str, str] | None = dict(users) if users is not None else None
        self.host = HOST
        self._port = 0
        self._directory: Path | None = None
        self._guardian: trio.Process | None = None
        self._pid = 0
        self._watches = 0

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

    def _connect_packet(self, client_id: str) -> Connect:
        """A CONNECT that is accepted."""
        user, password = self.credentials or (None, None)
        return Connect(
            client_id=client_id,
            version=max(self.versions),
            # So long that nobody has to ping; 0, which means never, is not accepted by each of them.
            keep_alive=65535,
            username=user,
            password=password.encode() if password is not None else None,
        )

    # -- what a test uses --

    @property
    def credentials(self) -> tuple[str, str] | None:
        """A user name and password that are accepted; None if it asks for none."""
        return next(iter(self.users.items())) if self.users else None

    @property
    def port(self) -> int:
        if not self._port:
            raise RuntimeError(f"{self.name} has not been started yet")
        return self._port

    @property
    def url(self) -> str:
        """What a client connects to, with the credentials if there are any."""
        user = ":".join(quote(text, safe="") for text in self.credentials or ())
        return f"{'mqtt' if self.tls is None else 'mqtts'}://{user and user + '@'}{self.host}:{self.port}"

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
        if self._directory is not None:
            raise RuntimeError(f"{self.name} has been entered already")
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
        if self._directory is None:
            raise RuntimeError(f"{self.name} is used outside its `async with`")
        for path in (self.tls.cert, self.tls.key, self.tls.ca) if self.tls is not None else ():
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, "a file of TLSFiles is not there", str(path))
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

    @asynccontextmanager
    async def watch(self, topic_filter: str = "#", *, history: int = 10_000) -> AsyncGenerator[Watch, None]:
        """See what arrives at the broker, with a client of its own that subscribes to ``topic_filter``::

            async with broker.watch("app/#") as seen:
                ...
                message = await seen.wait_for_publish("app/state")

        It is subscribed when the body begins, and remembers the last ``history`` messages. What was retained before is
        not among them. ``qos`` and ``retain`` are the publisher's, as far as the broker tells: ``retain`` is always
        False with 3.1.1 and iotcore, ``qos`` is always 2 with iotcore.

        Leave it before you stop the broker: when the broker ends the connection, the body is cancelled, and
        :class:`BrokerFailedError` says how, with the log. :meth:`suspend` is no end.
        """
        require_filter(topic_filter)
        if not self.running:
            raise RuntimeError(f"{self.name} is not running")
        self._watches += 1
        # Neither a space nor a dot, which nats-server refuses.
        connect = self._connect_packet(f"watch-{self._watches}")

        def explain(how: str) -> str:
            return f"{self.name} did not go on with the watch of {topic_filter!r}: {how}\n{self.log()}"

        streams: list[trio.abc.Stream] = []
        try:
            with trio.fail_after(_START_DEADLINE):
                client = await self._dial(streams)
            options = connect.version == 5 and self._retain_options
            async with watching(client, connect, topic_filter, history, explain, options=options) as watch:
                yield watch
        finally:
            with trio.move_on_after(_PROBE_DEADLINE, shield=True):
                await _close(streams)

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
        streams: list[trio.abc.Stream] = []
        try:
            with trio.fail_after(_PROBE_DEADLINE):
                client = await self._dial(streams)
                answer = await client.connect(self._connect_packet("readiness"))
                await client.send(Disconnect())
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, WireError, AssertionError) as exc:
            return repr(exc)
        finally:
            with trio.move_on_after(_PROBE_DEADLINE, shield=True):
                await _close(streams)
        return f"CONNECT was refused with code {answer.reason_code}" if answer.reason_code else None

    async def _dial(self, streams: list[trio.abc.Stream]) -> RawClient:
        """A client, not connected yet, on a stream that is put into ``streams``, to be closed by the caller."""
        stream: trio.abc.Stream = await trio.open_tcp_stream(self.host, self.port)
        streams.append(stream)
        if self.tls is not None:
            stream = trio.SSLStream(stream, self._probe_context(self.tls), server_hostname=self.host)
        return RawClient(stream, version=max(self.versions))

    def _probe_context(self, tls: TLSFiles) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Whether the certificate is any good is what the test is about, not the readiness of the broker.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if tls.require_client_cert:
            context.load_cert_chain(tls.cert, tls.key)
        return context

    def _signal(self, number: signal.Signals) -> None:
        if self._guardian is None:
            raise RuntimeError(f"{self.name} is not running")
        # If the broker has ended by itself, the guardian may not have: this must not depend on who is faster.
        if self._guardian.poll() is None:
            try:
                os.kill(self._pid, number)
            except ProcessLookupError:
                return

    async def _gone(self) -> None:
        guardian = self._guardian
        assert guardian is not None
        assert guardian.stdin is not None
        assert guardian.stdout is not None
        await guardian.wait()
        self._guardian = None
        with trio.CancelScope(shield=True):  # Closing a pipe is a checkpoint, and never waits.
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


async def _close(streams: list[trio.abc.Stream]) -> None:
    await trio.lowlevel.checkpoint()
    for stream in streams:
        await trio.aclose_forcefully(stream)


def _check_users(users: Mapping[str, str]) -> None:
    if not users:
        raise ValueError("users: must name at least one user; None lets everybody in")
    for user in users:
        if not user or ":" in user or not user.isprintable():
            raise ValueError(f"users: {user!r} must not be empty, nor contain ':' or control characters")


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
