"""The way out of one connection: what waits to be sent, and the only task that sends it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ._history import Counters

_SEND_SIZE = 65536
"""Written in pieces of this size, so that progress on a slow link is seen between them."""
_LAST_WORDS = 0.1
"""Seconds for the reader to find out why nothing can be written any more."""


class Writer:
    """Gathers packets and sends them in batches."""

    def __init__(self, stream: trio.abc.Stream, counters: Counters) -> None:
        self._stream = stream
        self._counters = counters
        self.buffer: list[bytes] = []
        self.wake = trio.Event()
        self.idle = False
        """Whether the task that sends waits for ``wake``."""
        self._answers = 0
        self._ended = False
        self.written = 0
        """Bytes taken so far."""
        self.flushed = 0
        """Bytes sent so far."""

    @property
    def waiting(self) -> int:
        """Bytes that are taken and not sent."""
        return self.written - self.flushed

    @property
    def answers(self) -> int:
        """Bytes of answers that are taken and not sent."""
        return self._answers

    def write(self, packet: bytes) -> None:
        """Take a packet; nothing follows the last one [MQTT-3.14.4-2]."""
        if self._ended:
            return
        self.buffer.append(packet)
        self.written += len(packet)
        if self.idle:
            self.wake.set()

    def answer(self, packet: bytes) -> None:
        """Take a packet that the peer made us write: so many it can make, but not without bound."""
        if self._ended:
            return
        size = len(packet)
        self._answers += size
        self.buffer.append(packet)
        self.written += size
        if self.idle:
            self.wake.set()

    def write_last(self, packet: bytes) -> None:
        """Take DISCONNECT."""
        self.write(packet)
        self._ended = True

    async def run(self, collect: Callable[[], None], on_flushed: Callable[[], None]) -> None:
        """Send until cancelled, which may leave half a packet sent. Raises what the stream raises.

        ``collect`` is called before each batch, for what is written only then. Who has some sets ``wake``.
        """
        while True:  # noqa: ASYNC913  # it waits for data, or sends some: there are no empty packets
            collect()
            if not self.buffer:
                self.wake = trio.Event()
                self.idle = True
                await self.wake.wait()
                self.idle = False
                continue
            data = memoryview(b"".join(self.buffer))
            self.buffer.clear()
            answers = self._answers
            for start in range(0, len(data), _SEND_SIZE):
                piece = data[start : start + _SEND_SIZE]
                await self._send(piece)
                self.flushed += len(piece)
                self._counters.bytes_out += len(piece)
                on_flushed()
            self._answers -= answers

    async def _send(self, piece: memoryview) -> None:
        try:
            await self._stream.send_all(piece)
        except (trio.BrokenResourceError, OSError):
            # A broker that closes has said why just before, by a TLS alert or DISCONNECT. That has arrived, but the
            # reader may not have come to it: if it has something to tell, it cancels this task.
            await trio.sleep(_LAST_WORDS)  # noqa: ASYNC120  # then the reader's error is the one to keep
            raise
