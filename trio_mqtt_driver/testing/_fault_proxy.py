"""A TCP proxy on loopback that breaks the network between a client and a real broker."""

from __future__ import annotations

import random
import socket
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager

import trio

from ._faults import Direction
from ._lane import CHUNK
from ._ports import HOST, free_port
from ._proxied import Connection, ConnectionReport
from ._shaping import Fault, Shaping, check_count, check_number

_BACKLOG = 128
_REPORTS = 100


class FaultProxy:
    """Passes TCP connections on to ``host``:``port`` until told otherwise.

    ::

        proxy = FaultProxy(nursery, broker.port)
        config = DriverConfig.from_url(proxy.url)
        with proxy.blackhole():
            ...                         # connections stay open, nothing arrives
        with proxy.delay(0.3, jitter=0.2), proxy.bandwidth(2000):
            ...                         # a bad mobile network
        proxy.reset()

    It listens on a free port of 127.0.0.1 from the start; its tasks live in ``nursery`` until that is cancelled, and
    then all its sockets are closed. A connection that the broker refuses is accepted here and reset.

    Faults that last are context managers; those of a moment are methods. All may be combined, also with others of
    their kind: a direction is open again when its last black hole has ended, delays add up, and the lowest bandwidth
    counts. ``direction`` is ``Direction.IN`` for what clients send, ``Direction.OUT`` for what the broker sends, and
    None for both. For each direction of a connection, up to 1 MiB is held back; a client that sends more has to wait.
    An EOF or a reset of the client or the broker keeps its place behind the data that it follows.

    ``rng`` gives the jitter; ``random.Random(1)`` makes it repeat. A bad argument is a ValueError.
    """

    def __init__(
        self, nursery: trio.Nursery, port: int, host: str = HOST, *, rng: random.Random | None = None
    ) -> None:
        check_count("port", port, 1, 65535)
        self.host: str = HOST
        self.port: int = free_port()
        self.accepted: int = 0
        """Connections so far."""
        rng = random.Random() if rng is None else rng
        self._nursery = nursery
        self._target = (host, port)
        self._shapings = {direction: Shaping(rng) for direction in Direction}
        self._buffer = memoryview(bytearray(CHUNK))
        self._connections: dict[int, Connection] = {}
        self._reports: deque[ConnectionReport] = deque(maxlen=_REPORTS)
        self._passed_before = dict.fromkeys(Direction, 0)
        self._hanging = 0
        self._refusing = 0
        self._changed = trio.Event()
        self._over = False
        self._listener: trio.SocketListener | None = self._listen()
        try:
            nursery.start_soon(self._run)
        except BaseException:
            self._listener.socket.close()
            raise

    # -- what passed --

    @property
    def url(self) -> str:
        """Where clients find it, for ``DriverConfig.from_url()``."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def open(self) -> int:
        """Connections that are open now, hanging ones included."""
        return len(self._connections)

    @property
    def passed(self) -> dict[Direction, int]:
        """Bytes that were passed on, in each direction."""
        return {
            direction: self._passed_before[direction]
            + sum(connection.report.passed[direction] for connection in self._connections.values())
            for direction in Direction
        }

    @property
    def held(self) -> dict[Direction, int]:
        """Bytes that are held back now, in each direction; what waits in the kernel's buffers is not counted."""
        return {
            direction: sum(connection.report.held[direction] for connection in self._connections.values())
            for direction in Direction
        }

    @property
    def connections(self) -> tuple[ConnectionReport, ...]:
        """Reports on the last 100 connections that ended, in the order of their ends, then on those that are open."""
        return (*self._reports, *(connection.report for connection in self._connections.values()))

    # -- faults that last --

    @contextmanager
    def blackhole(self, direction: Direction | None = None) -> Generator[None, None, None]:
        """Inside the block nothing passes in this direction, or in both; nothing is closed, and nothing is lost.

        New connections are accepted and get no answer. At the end of the block all that was held up goes on, as on
        a network that comes back.
        """
        with self._during(Fault(hole=True), direction):
            yield

    @contextmanager
    def delay(
        self, seconds: float, *, jitter: float = 0.0, direction: Direction | None = None
    ) -> Generator[None, None, None]:
        """Inside the block all data and EOFs are late by ``seconds``, and by up to ``jitter`` more, evenly spread.

        Order is kept. What is on its way already does not delay what follows: it is a long line, not a slow one. At
        the end of the block, if no other delay is in force, all that is on its way arrives at once.
        """
        check_number("seconds", seconds, 0)
        check_number("jitter", jitter, 0)
        with self._during(Fault(delay=seconds, jitter=jitter), direction):
            yield

    @contextmanager
    def bandwidth(self, bytes_per_second: float, *, direction: Direction | None = None) -> Generator[None, None, None]:
        """Inside the block so much passes per second in each direction, of all connections together; at least 1."""
        check_number("bytes_per_second", bytes_per_second, 1)
        with self._during(Fault(bandwidth=bytes_per_second), direction):
            yield

    @contextmanager
    def byte_by_byte(self, direction: Direction | None = None) -> Generator[None, None, None]:
        """Inside the block every byte is sent on its own."""
        with self._during(Fault(trickle=True), direction):
            yield

    @contextmanager
    def refuse(self) -> Generator[None, None, None]:
        """Inside the block new connections are refused; those that are open stay.

        At its end, OSError if another program has taken the port meanwhile.
        """
        self._refusing += 1
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None
        try:
            yield
        finally:
            self._refusing -= 1
            if not self._refusing and not self._over:
                self._listener = self._listen()
                self._change()

    @contextmanager
    def hang(self) -> Generator[None, None, None]:
        """Inside the block new connections are accepted and get no answer; at its end they go through."""
        self._hanging += 1
        try:
            yield
        finally:
            self._hanging -= 1
            self._change()

    @contextmanager
    def flap(self, schedule: Iterable[tuple[float, float]]) -> Generator[None, None, None]:
        """Inside the block the network goes up and down: for (seconds up, seconds down), again and again.

        It begins up. When it goes down, all connections are reset; while it is down, new ones are refused. After the
        last pair, and at the end of the block, it is up. For ever: ``itertools.repeat((20, 5))``; at random:
        ``((rng.uniform(5, 60), rng.expovariate(1 / 10)) for _ in itertools.count())``. ``math.inf`` is a time, too.
        A pair that is none, or that takes no time at all, raises ValueError in the proxy's nursery when its turn
        comes.
        """
        with ExitStack() as down:
            scope = trio.CancelScope()
            self._nursery.start_soon(self._flap, iter(schedule), scope, down)
            try:
                yield
            finally:
                scope.cancel(reason="the flapping is over")

    # -- faults of a moment --

    def reset(self) -> None:
        """End all connections with a TCP reset, on both sides."""
        for connection in list(self._connections.values()):
            connection.reset()

    def fin(self, direction: Direction = Direction.OUT) -> None:
        """Send EOF in one direction, on all connections that have reached the broker; the other direction goes on.

        With ``Direction.OUT`` the clients get it. What comes in this direction afterwards, and what is held back, is
        lost.
        """
        for shaped in _directions(direction, both=False):
            for connection in list(self._connections.values()):
                connection.fin(shaped)

    def cut_after(self, count: int, direction: Direction = Direction.OUT, *, reset: bool = True) -> None:
        """Pass ``count`` more bytes in this direction, then end the connection that they were on.

        By a reset, or by EOF in both directions. Bytes of all connections count.
        """
        check_count("count", count, 1)
        for shaped in _directions(direction, both=False):
            self._shapings[shaped].cut_after(count, reset=reset)

    def corrupt(self, after: int = 0, direction: Direction = Direction.OUT, *, mask: int = 0xFF) -> None:
        """Pass ``after`` more bytes in this direction, and change the one that follows: its bits in ``mask`` flip."""
        check_count("after", after, 0)
        check_count("mask", mask, 1, 255)
        for shaped in _directions(direction, both=False):
            self._shapings[shaped].corrupt(after, mask)

    # -- the proxy --

    @contextmanager
    def _during(self, fault: Fault, direction: Direction | None) -> Generator[None, None, None]:
        with ExitStack() as faults:
            for shaped in _directions(direction):
                faults.enter_context(self._shapings[shaped].during(fault))
            yield

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _listen(self) -> trio.SocketListener:
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, self.port))
            sock.listen(_BACKLOG)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise

    async def _run(self) -> None:
        try:
            async with trio.open_nursery() as connections:
                while True:
                    await trio.lowlevel.checkpoint()
                    listener = self._listener
                    if listener is None:
                        await self._changed.wait()
                        continue
                    try:
                        client = await listener.accept()
                    except trio.ClosedResourceError:
                        continue  # by refuse()
                    connections.start_soon(self._serve, client)
        finally:
            self._over = True
            if self._listener is not None:
                self._listener.socket.close()

    async def _serve(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        number = self.accepted
        connection = self._connections[number] = Connection(number, client)
        try:
            with connection.scope:
                while self._hanging:
                    await self._changed.wait()
                await connection.serve(self._target, self._shapings, self._buffer)
        finally:
            connection.close()
            del self._connections[number]
            report = connection.report
            self._reports.append(report)
            for direction, count in report.passed.items():
                self._passed_before[direction] += count

    async def _flap(self, schedule: Iterable[tuple[float, float]], scope: trio.CancelScope, down: ExitStack) -> None:
        with scope:
            await trio.lowlevel.checkpoint()
            for up, away in schedule:
                check_number("seconds up", up, 0, endless=True)
                check_number("seconds down", away, 0, endless=True)
                if not up + away:
                    raise ValueError("seconds up and seconds down must not both be 0")
                await trio.sleep(up)
                if scope.cancel_called:
                    return  # The block ended at the same moment, and the network stays up.
                down.enter_context(self.refuse())
                self.reset()
                await trio.sleep(away)
                down.close()


def _directions(direction: Direction | None, *, both: bool = True) -> list[Direction]:
    if direction is None and both:
        return list(Direction)
    if not isinstance(direction, Direction):
        allowed = "Direction.IN, Direction.OUT or None" if both else "Direction.IN or Direction.OUT"
        raise ValueError(f"direction must be {allowed}, not {direction!r}")
    return [direction]
