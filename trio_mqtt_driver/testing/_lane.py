"""One direction of one connection through a fault proxy."""

from __future__ import annotations

import enum
import math
import socket
from collections import deque
from typing import Protocol

import attrs
import trio

from ._shaping import Shaping

CHUNK = 65536
"""Bytes that are read at once. More is slower: what was read is no longer in the processor's cache when it is sent."""
# What a lane holds back at most. Many small pieces cost more memory than their bytes, so that they are counted, too.
MOST_BYTES = 1024 * 1024
_MOST_PIECES = 4096


class LaneOwner(Protocol):
    """The connection that a lane belongs to; it is told what a lane cannot do alone."""

    def source_was_reset(self, lane: Lane) -> None:
        """All before the reset has passed."""

    def sink_broke(self, lane: Lane) -> None:
        """Nothing passes any more."""

    def cut(self, *, reset: bool) -> None:
        """The byte has passed after which the connection was to be cut."""


class _End(enum.Enum):
    EOF = "eof"
    RESET = "reset"


@attrs.define(eq=False)
class _Piece:
    content: memoryview | _End
    due: float
    """On Trio's clock; it may have to wait for those before it, as TCP keeps the order."""


class Lane:
    """Passes on what comes from ``source`` to ``sink``, in order, as the faults have it.

    While there are none, and if it was given the sockets below the streams, it takes no detour: one buffer, and one
    schedule point per chunk. Else a task reads while another one sends, so that pieces which are late are under way
    at the same time; EOF and resets keep their place behind the data.
    """

    def __init__(
        self,
        source: trio.abc.ReceiveStream,
        sink: trio.abc.HalfCloseableStream,
        shaping: Shaping,
        owner: LaneOwner,
        sockets: tuple[socket.socket, socket.socket] | None = None,
        buffer: memoryview | None = None,
    ) -> None:
        self.passed: int = 0
        """Bytes that were handed to the sink."""
        self.ended: bool = False
        self._source = source
        self._sink = sink
        self._shaping = shaping
        self._owner = owner
        self._sockets = sockets
        # The lanes of a proxy share one: it is empty again before the next schedule point.
        self._buffer = memoryview(bytearray(CHUNK)) if buffer is None else buffer
        self._pieces: deque[_Piece] = deque()
        self._queued = 0
        self._sending = 0
        self._slot: tuple[int, float] | None = None
        self._source_ended = False
        self._filling = False
        self._discarding = False
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def held(self) -> int:
        """Bytes that were read and have not been handed to the sink."""
        return self._queued + self._sending

    @property
    def detoured(self) -> bool:
        """Something is held back, or would be."""
        return bool(self._pieces) or self._sending > 0 or not self._shaping.clear

    async def run(self) -> None:
        """Until EOF has passed, or nothing can pass any more."""
        self._shaping.lots.add(self._lot)
        try:
            while not self.ended:
                if self._sockets is not None and self._is_clear():
                    await self._relay(*self._sockets)
                else:
                    await self._detour()
        except trio.ClosedResourceError:
            self._give_up()
        finally:
            self._shaping.lots.discard(self._lot)

    def discard(self) -> None:
        """From now on nothing passes; what comes is read and forgotten, until EOF."""
        self._discarding = True
        self._pieces = deque(piece for piece in self._pieces if isinstance(piece.content, _End))
        self._queued = 0
        self._lot.unpark_all()

    def append_reset(self) -> None:
        """The source turned out to be broken: to be told behind all that came from it."""
        self._put(_End.RESET)

    def _is_clear(self) -> bool:
        return self._shaping.clear and not self._pieces and not self._discarding

    def _give_up(self) -> None:
        self.ended = True
        self._pieces.clear()
        self._queued = 0

    def _broke(self) -> None:
        """The sink broke; while discarding, that is no news."""
        if not self._discarding:
            self._give_up()
            self._owner.sink_broke(self)

    def _put(self, content: memoryview | _End) -> None:
        self._pieces.append(_Piece(content, self._shaping.due()))
        if isinstance(content, _End):
            self._source_ended = True
        else:
            self._queued += len(content)
        self._lot.unpark_all()

    # -- without faults --

    async def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        if source.fileno() == -1:
            # Reset before this task had its first turn; there is nothing that Trio could wait for.
            raise trio.ClosedResourceError("the connection was ended already")
        buffer = self._buffer
        while True:
            await trio.lowlevel.wait_readable(source)
            if not self._is_clear():
                return
            try:
                count = source.recv_into(buffer)
            except BlockingIOError:
                continue
            except OSError:
                self._put(_End.RESET)
                return
            if not count:
                self._put(_End.EOF)
                return
            try:
                sent = sink.send(buffer[:count])
            except BlockingIOError:
                sent = 0
            except OSError:
                self._broke()
                return
            self.passed += sent
            if sent < count and not await self._relay_rest(sink, memoryview(bytes(buffer[sent:count]))):
                return

    async def _relay_rest(self, sink: socket.socket, rest: memoryview) -> bool:
        """Send what the sink did not take at once; False if a fault came between."""
        self._sending = len(rest)
        try:
            while rest:
                await trio.lowlevel.wait_writable(sink)
                if not self._is_clear():
                    if not self._discarding:
                        self._pieces.appendleft(_Piece(rest, -math.inf))
                        self._queued += len(rest)
                    return False
                try:
                    sent = sink.send(rest)
                except BlockingIOError:
                    continue
                except OSError:
                    self._broke()
                    return False
                self.passed += sent
                rest = rest[sent:]
                self._sending = len(rest)
            return True
        finally:
            self._sending = 0

    # -- with faults --

    async def _detour(self) -> None:
        async with trio.open_nursery() as nursery:
            if not self._source_ended:
                self._filling = True
                nursery.start_soon(self._fill)
            await self._drain()
            nursery.cancel_scope.cancel(reason="nothing passes on this lane any more")

    async def _fill(self) -> None:
        try:
            while not self._source_ended:
                if self._queued >= MOST_BYTES or len(self._pieces) >= _MOST_PIECES:
                    await self._lot.park()
                    continue
                try:
                    data = await self._source.receive_some(CHUNK)
                except trio.BrokenResourceError:
                    self._put(_End.RESET)
                    return
                except trio.ClosedResourceError:
                    self._give_up()  # The connection was ended from this side.
                    return
                if not data:
                    self._put(_End.EOF)
                elif not self._discarding:
                    self._put(memoryview(data))
                if self._sockets is not None and self._shaping.clear and not self._discarding:
                    return  # The faults are over: what is held back goes out, then there is no detour any more.
        finally:
            self._filling = False
            self._lot.unpark_all()

    async def _drain(self) -> None:
        while not self.ended:
            if not self._pieces:
                if not self._filling:
                    return
                await self._lot.park()
                continue
            piece = self._pieces[0]
            until = self._waits_until(piece)
            if until > trio.current_time():
                with trio.move_on_at(until):
                    await self._lot.park()
            elif piece.content is _End.RESET:
                self._give_up()
                self._owner.source_was_reset(self)
            elif piece.content is _End.EOF:
                await self._end()
            else:
                await self._send(piece, piece.content)

    def _waits_until(self, piece: _Piece) -> float:
        """The time before which this piece may not leave, as it looks now."""
        shaping = self._shaping
        if shaping.hole:
            return math.inf
        # After the end of the delay, what was late is so no longer.
        if shaping.late and piece.due > trio.current_time():
            return piece.due
        if shaping.bandwidth == math.inf or isinstance(piece.content, _End):
            self._slot = None
            return -math.inf
        if self._slot is None:
            self._slot = shaping.reserve(1 if shaping.trickle else len(piece.content))
        return self._slot[1]

    async def _send(self, piece: _Piece, content: memoryview) -> None:
        size = min(len(content), CHUNK) if self._slot is None else self._slot[0]
        if self._shaping.trickle:
            size = 1
        self._slot = None
        data, cut = self._shaping.spend(content[:size])
        piece.content = content[size:]
        if not piece.content:
            self._pieces.popleft()
        self._queued -= size
        self._sending = size
        self._lot.unpark_all()
        try:
            await self._sink.send_all(data)
            self.passed += len(data)
            if cut is not None:
                self._owner.cut(reset=cut.reset)
        except trio.BrokenResourceError:
            self._broke()
        except trio.ClosedResourceError:
            self._give_up()
        finally:
            self._sending = 0

    async def _end(self) -> None:
        if self._discarding:
            self._give_up()
            return
        try:
            await self._sink.send_eof()
        except trio.BrokenResourceError:
            self._broke()
        except trio.ClosedResourceError:
            pass  # The connection was ended from this side.
        self._give_up()
