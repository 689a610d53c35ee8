"""One connection through a fault proxy."""

from __future__ import annotations

import enum
import socket
from collections.abc import Mapping

import attrs
import trio

from ._faults import Direction
from ._lane import Lane
from ._pipe import reset_stream
from ._shaping import Shaping

# After an end by EOF, this long the proxy goes on reading what comes: a socket that is closed with unread data in it
# sends a reset instead.
_GRACE = 5.0


class ConnectionEnd(enum.Enum):
    """How a connection through the proxy ended."""

    EOF = "both sides sent EOF"
    RESET_BY_CLIENT = "reset by the client"
    RESET_BY_BROKER = "reset by the broker"
    RESET_BY_PROXY = "reset by the proxy"
    CUT = "cut by the proxy"
    REFUSED = "refused by the broker"
    CANCELLED = "the proxy's nursery was cancelled"


@attrs.frozen(kw_only=True)
class ConnectionReport:
    """What passed on one connection, so far or in all."""

    number: int
    """Counted from 1, in the order in which the proxy accepted them."""
    opened: float
    """On Trio's clock."""
    closed: float | None
    """On Trio's clock; None while it is open."""
    end: ConnectionEnd | None
    """None while it is open."""
    passed: Mapping[Direction, int]
    """Bytes that were passed on."""
    held: Mapping[Direction, int]
    """Bytes that were read and not passed on yet."""


class Connection:
    """A client's connection and the one to the broker that belongs to it."""

    def __init__(self, number: int, client: trio.SocketStream) -> None:
        self.scope = trio.CancelScope()
        self._number = number
        self._opened = trio.current_time()
        self._closed: float | None = None
        self._end: ConnectionEnd | None = None
        # The plain sockets are those below the streams: both go the same way at the end.
        self._plain: dict[Direction, socket.socket] = {}
        self._streams: dict[Direction, trio.SocketStream] = {}
        self._adopt(Direction.IN, client)
        self._lanes: dict[Direction, Lane] = {}

    @property
    def report(self) -> ConnectionReport:
        return ConnectionReport(
            number=self._number,
            opened=self._opened,
            closed=self._closed,
            end=self._end,
            passed=self._count("passed"),
            held=self._count("held"),
        )

    async def serve(self, target: tuple[str, int], shapings: Mapping[Direction, Shaping], buffer: memoryview) -> None:
        try:
            broker = await trio.open_tcp_stream(*target)
        except OSError:
            self._break_off(ConnectionEnd.REFUSED)
            return
        self._adopt(Direction.OUT, broker)
        self._lanes = {
            direction: Lane(
                self._streams[direction],
                self._streams[_other(direction)],
                shapings[direction],
                self,
                (self._plain[direction], self._plain[_other(direction)]),
                buffer,
            )
            for direction in Direction
        }
        async with trio.open_nursery() as nursery:
            for lane in self._lanes.values():
                nursery.start_soon(lane.run)
        self._decide(ConnectionEnd.EOF)

    def close(self) -> None:
        """Close both sockets at once."""
        self._decide(ConnectionEnd.CANCELLED)
        self._closed = trio.current_time()
        for stream in self._streams.values():
            stream.socket.close()

    # -- faults of a moment --

    def reset(self) -> None:
        self._break_off(ConnectionEnd.RESET_BY_PROXY)

    def fin(self, direction: Direction) -> None:
        """Send EOF in this direction, unless it was sent before; what the proxy holds back there is lost."""
        lane = self._lanes.get(direction)
        if lane is not None and not lane.ended:
            lane.discard()
            try:
                self._plain[_other(direction)].shutdown(socket.SHUT_WR)
            except OSError:
                # It broke just now, and the lanes do not know it yet.
                self._break_off(_RESET_BY[_other(direction)])

    # -- what the lanes tell --

    def source_was_reset(self, lane: Lane) -> None:
        self._break_off(_RESET_BY[self._direction(lane)])

    def sink_broke(self, lane: Lane) -> None:
        # The sink of one lane is the source of the other one: a reset waits there behind the data.
        direction = _other(self._direction(lane))
        reverse = self._lanes[direction]
        if reverse.detoured and not reverse.ended:
            reverse.append_reset()
        else:
            self._break_off(_RESET_BY[direction])

    def cut(self, *, reset: bool) -> None:
        if reset:
            self._break_off(ConnectionEnd.CUT)
            return
        self._decide(ConnectionEnd.CUT)
        for direction in Direction:
            self.fin(direction)
        self.scope.deadline = trio.current_time() + _GRACE

    def _break_off(self, end: ConnectionEnd) -> None:
        self._decide(end)
        for stream in self._streams.values():
            reset_stream(stream)
        self.scope.cancel(reason=end.value)

    def _decide(self, end: ConnectionEnd) -> None:
        # The first reason counts: the others follow from it.
        if self._end is None:
            self._end = end

    def _adopt(self, side: Direction, stream: trio.SocketStream) -> None:
        plain = socket.socket(fileno=stream.socket.detach())
        self._plain[side] = plain
        self._streams[side] = trio.SocketStream(trio.socket.from_stdlib_socket(plain))

    def _direction(self, lane: Lane) -> Direction:
        return Direction.IN if lane is self._lanes[Direction.IN] else Direction.OUT

    def _count(self, what: str) -> dict[Direction, int]:
        return {direction: getattr(self._lanes.get(direction), what, 0) for direction in Direction}


_RESET_BY = {Direction.IN: ConnectionEnd.RESET_BY_CLIENT, Direction.OUT: ConnectionEnd.RESET_BY_BROKER}


def _other(direction: Direction) -> Direction:
    return Direction.OUT if direction is Direction.IN else Direction.IN
