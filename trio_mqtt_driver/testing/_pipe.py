"""A network connection in memory: two streams, each the other's far end, that can break the way sockets break."""

from __future__ import annotations

import errno
import math
import socket
import struct

import trio

_CAPACITY = 65536


class _Direction:
    """The bytes that one end has sent and the other has not received yet."""

    __slots__ = ("capacity", "data", "ended", "lot", "receiving", "sending")

    def __init__(self, capacity: float) -> None:
        self.capacity: float = capacity
        self.data: bytearray = bytearray()
        self.ended: bool = False
        self.sending: bool = False
        self.receiving: bool = False
        self.lot: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()


class PipeStream(trio.abc.Stream):
    """One end of :func:`open_pipe`.

    ``send_all`` blocks while ``capacity`` bytes (as a rule 64 KiB) wait to be received; a capacity of 1 hands the
    bytes over one at a time. A cancelled ``send_all`` may have sent a part.
    """

    def __init__(self, outgoing: _Direction, incoming: _Direction) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False
        self._reset = False
        self.peer: PipeStream | None = None

    @property
    def capacity(self) -> float:
        return self._outgoing.capacity

    @capacity.setter
    def capacity(self, value: float) -> None:
        self._outgoing.capacity = value
        self._outgoing.lot.unpark_all()

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was already closed")
        if self._reset:
            raise trio.BrokenResourceError("the connection was reset by the peer") from ConnectionResetError(
                errno.ECONNRESET, "Connection reset by peer"
            )

    def _check_send(self) -> None:
        self._check()
        peer = self.peer
        if peer is None or peer._closed:
            raise trio.BrokenResourceError("the peer has closed the connection") from BrokenPipeError(
                errno.EPIPE, "Broken pipe"
            )

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        direction = self._outgoing
        if direction.sending:
            raise trio.BusyResourceError("another task is already sending data on this stream")
        direction.sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_send()
            with memoryview(data) as view:
                position = 0
                while position < len(view):
                    room = max(0, direction.capacity - len(direction.data))
                    if room:
                        step = len(view) - position if room == math.inf else min(int(room), len(view) - position)
                        direction.data += view[position : position + step]
                        position += step
                        direction.lot.unpark_all()
                    else:
                        await direction.lot.park()
                        self._check_send()
        finally:
            direction.sending = False

    async def wait_send_all_might_not_block(self) -> None:
        direction = self._outgoing
        if direction.sending:
            raise trio.BusyResourceError("another task is already sending data on this stream")
        direction.sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check()
            while len(direction.data) >= direction.capacity and not (self.peer is None or self.peer._closed):
                await direction.lot.park()
                self._check()
        finally:
            direction.sending = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not isinstance(max_bytes, (int, type(None))):
            raise TypeError(f"max_bytes must be an int or None, not a {type(max_bytes).__name__}")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        direction = self._incoming
        if direction.receiving:
            raise trio.BusyResourceError("another task is already receiving data on this stream")
        direction.receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while not (direction.data and not self._closed):
                self._check()
                if direction.ended:
                    break
                await direction.lot.park()
            data = direction.data
            if max_bytes is None or len(data) <= max_bytes:
                chunk = bytes(data)
                data.clear()
            else:
                chunk = bytes(data[:max_bytes])
                del data[:max_bytes]
            direction.lot.unpark_all()
            return chunk
        finally:
            direction.receiving = False

    def close(self) -> None:
        """Close at once: the peer receives what is under way, then EOF, and can no longer send."""
        self._closed = True
        self._outgoing.ended = True
        self._wake()

    def reset(self) -> None:
        """Close abruptly: the peer gets ``BrokenResourceError``, as on Linux after it read what had arrived before."""
        if not self._closed and self.peer is not None:
            self.peer._reset = True
        self.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def _wake(self) -> None:
        self._outgoing.lot.unpark_all()
        self._incoming.lot.unpark_all()


def open_pipe(capacity: float = _CAPACITY) -> tuple[PipeStream, PipeStream]:
    """Both ends of a new connection; ``capacity`` is how many bytes each direction holds."""
    there, back = _Direction(capacity), _Direction(capacity)
    first, second = PipeStream(there, back), PipeStream(back, there)
    first.peer, second.peer = second, first
    return first, second


def reset_stream(stream: trio.abc.Stream) -> None:
    """Reset a pipe or a TCP connection at once; on TCP with SO_LINGER 0, so that the kernel sends RST, not FIN."""
    if isinstance(stream, PipeStream):
        stream.reset()
    elif isinstance(stream, trio.SocketStream):
        # Closed already: there is no connection left to reset.
        if stream.socket.fileno() != -1:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.socket.close()
    else:
        raise TypeError(f"cannot reset a {type(stream).__name__}")
