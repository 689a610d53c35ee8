"""A plain socket without the detours of Trio's stream, for the two calls that the time of a round trip depends on.

``receive_some`` tries to read before it waits. After a read that has emptied the socket nothing is to be had, and
the attempt, an exception and the way back are a tenth of a round trip: so then this waits first. ``send_all`` yields
when it has sent, and can be cancelled half-way: so only one task may run it, and a publish has to wake that first.
``write`` sends what the socket takes at once, and neither waits nor yields.

Hazards: a socket's number is asked for each time, since that of a closed one (then it is -1) may be another file's by
now. And whoever writes must know that ``send_all`` is not running.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import cast

import trio

_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux has it


class DirectSocket:
    """The socket of a stream that is nothing but one, see ``of``."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket

    @classmethod
    def of(cls, stream: trio.abc.Stream) -> DirectSocket | None:
        """None for TLS and the like, and for sockets that are not the system's; and Windows cannot treat a socket as
        a file."""
        if sys.platform == "win32" or not isinstance(stream, trio.SocketStream):
            return None
        try:
            stream.socket.fileno()
        except NotImplementedError:  # as Trio's own fake network says it
            return None
        return cls(stream)

    def write(self, data: bytes) -> int:
        """How many bytes were sent; 0 also if it is broken or closed, which the next ``send_all`` will tell."""
        try:
            return os.write(self._socket.fileno(), data)
        except OSError:
            return 0

    async def read(self, size: int) -> bytes:
        """As ``receive_some``; waits first."""
        while True:
            if self._socket.fileno() < 0:
                await trio.lowlevel.checkpoint()
                raise trio.ClosedResourceError("this socket was already closed")
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return os.read(self._socket.fileno(), size)
            except BlockingIOError:  # it was a false alarm
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(f"socket connection broken: {exc}") from exc

    def close(self) -> None:
        self._socket.close()


def quick_ack_of(stream: trio.abc.Stream) -> Callable[[], None] | None:
    """What has the system acknowledge at once what was read, instead of up to 40 ms later; None if that cannot be had.

    If we send something on a connection, Linux waits with its TCP acknowledgements there, which could go with more.
    Meanwhile a peer with Nagle's algorithm on, as mosquitto has it by default, keeps its next small packet: a PUBACK
    holds up the message behind it. The system forgets soon what it is told here: so it is told after each read.
    """
    if isinstance(stream, trio.SSLStream):
        stream = cast("trio.SSLStream[trio.abc.Stream]", stream).transport_stream
    if _QUICK_ACK is None or not isinstance(stream, trio.SocketStream) or DirectSocket.of(stream) is None:
        return None
    option, sock = _QUICK_ACK, stream.socket
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None

    def acknowledge() -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, 1)
        except OSError:  # it is closed, which the next read tells
            pass

    return acknowledge
