"""The way out of one connection: what waits to be sent, and the task that sends it.

A packet on a link that was quiet is written at once, without that task (``hurry``): its turns are half of the way to
the broker. Only then: in a flood the task sends many packets with one call. Before the link is live there is no flood,
and each packet is the next step to it. What a read brings about, such as the publishes that acknowledgements made room
for, is written in one piece when the read is done with (``hold``, ``let_go``); so is a replay. The acknowledgements of
what has been processed since are the task's always.
Hazards: the task must be idle, or packets would overtake each other; Ctrl-C must not get in between the bytes that
have left and the record of it; and by the time that a write returns its packet may have left, and what that made room
for: whatever must be known of a packet then is noted before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from ._direct import DirectSocket
from ._history import Counters

_SEND_SIZE = 65536
"""Written in pieces of this size, so that progress on a slow link is seen between them."""
_LEAST_SEND_SIZE = 4096
"""The first ones are of this size, and those after one that took long: each must be through in a ping timeout."""
_SLOW = 1.0
"""Seconds that are long for a piece."""
_QUIET = 0.001
"""Seconds without a packet after which the next one is written at once."""
_LAST_WORDS = 0.1
"""Seconds for the reader to find out why nothing can be written any more."""


class Together:
    """What is written in its block is sent in one piece. Nothing may be awaited there."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._held = False

    def __enter__(self) -> None:
        self._held = self._writer.hold()

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._writer.let_go()


class Writer:
    """Gathers packets and sends them in batches."""

    def __init__(self, stream: trio.abc.Stream, counters: Counters, on_flushed: Callable[[], None]) -> None:
        self._stream = stream
        self._counters = counters
        self._on_flushed = on_flushed
        self.together = Together(self)
        self._direct = DirectSocket.of(stream)
        self._now = trio.lowlevel.current_clock().current_time
        self._roused_at = -math.inf
        self._quiet = 0.0
        self._size = _LEAST_SEND_SIZE
        self.buffer: list[bytes] = []
        self._wake = trio.Event()
        self.idle = True
        """Whether the task that sends has not begun yet, or waits for somebody to ``rouse`` it. Not while it is held:
        who looks at this first, as all must, leaves to ``let_go`` what is written then."""
        self._answers = 0
        self._ended = False
        self._emptied = trio.Event()
        self.written = 0
        """Bytes taken so far."""
        self.flushed = 0
        """Bytes sent so far."""

    def go_live(self) -> None:
        """From now on there may be floods."""
        self._quiet = _QUIET

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
            self.hurry()

    def answer(self, packet: bytes) -> None:
        """Take a packet that the peer made us write: so many it can make, but not without bound."""
        if self._ended:
            return
        size = len(packet)
        self._answers += size
        self.buffer.append(packet)
        self.written += size
        if self.idle:
            self.rouse()

    def write_last(self, packet: bytes) -> None:
        """Take DISCONNECT."""
        self.write(packet)
        self._ended = True

    def rouse(self) -> None:
        """There is something for the task that sends, which is idle."""
        self.idle = False
        self._roused_at = self._now()
        self._wake.set()

    @trio.lowlevel.enable_ki_protection
    def hurry(self) -> None:
        """The same, but if it is the first packet for a while, or a step on the way to a live link, and not a large
        one, it is written here and now."""
        if self._now() - self._roused_at < self._quiet:
            self.rouse()
        else:
            self._write_now()

    def hold(self) -> bool:
        """Have what is written from now on wait for ``let_go``. False, and nothing is done, if the task is at work:
        it will send that anyway."""
        was_idle, self.idle = self.idle, False
        return was_idle

    @trio.lowlevel.enable_ki_protection
    def let_go(self) -> None:
        """Send what was written since ``hold``."""
        self.idle = True
        if self.buffer:
            self._write_now()

    def _write_now(self) -> None:
        if self._direct is None or self.written - self.flushed > _SEND_SIZE:
            self.rouse()
            return
        self._roused_at = self._now()  # first: what follows may have more sent
        data = b"".join(self.buffer)
        sent = self._direct.write(data)
        if sent < len(data):
            self.buffer[:] = [data[sent:]]
            self.rouse()
        else:
            self.buffer.clear()
            self._answers = 0
        if sent:
            # What that makes room for is not written in here: it would make room again, one call within the other.
            held = self.hold()
            self._count(sent)
            if held:
                self.idle = True
                if self.buffer:
                    self.rouse()

    def _count(self, sent: int) -> None:
        self.flushed += sent
        if self.flushed == self.written:
            self._emptied.set()
        self._counters.bytes_out += sent
        self._on_flushed()

    async def wait_empty(self) -> None:
        """Return when all that was taken is sent, or the connection is over."""
        if self._ended or not self.waiting:
            await trio.lowlevel.checkpoint()
            return
        self._emptied = trio.Event()
        await self._emptied.wait()

    def close(self) -> None:
        """The connection is over."""
        self._ended = True
        self._emptied.set()

    async def run(self, collect: Callable[[], None]) -> None:
        """Send until cancelled, which may leave half a packet sent. Raises what the stream raises.

        ``collect`` is called before each batch, for what is written only then. Who has some calls ``rouse``.
        """
        while True:  # noqa: ASYNC913  # it waits for data, or sends some: there are no empty packets
            collect()
            if not self.buffer:
                self._wake = trio.Event()
                self.idle = True
                await self._wake.wait()
                if not self.buffer:  # acknowledgements: whoever the messages were for has a turn before
                    await trio.lowlevel.checkpoint()
                continue
            data = memoryview(b"".join(self.buffer))
            self.buffer.clear()
            answers = self._answers
            while data:
                piece, data = data[: self._size], data[self._size :]
                began = self._now()
                await self._send(piece)
                self._count(len(piece))
                self._size = min(2 * self._size, _SEND_SIZE) if self._now() - began < _SLOW else _LEAST_SEND_SIZE
            self._answers -= answers

    async def _send(self, piece: memoryview) -> None:
        try:
            await self._stream.send_all(piece)
        except (trio.BrokenResourceError, OSError):
            # A broker that closes has said why just before, by a TLS alert or DISCONNECT. That has arrived, but the
            # reader may not have come to it: if it has something to tell, it cancels this task.
            await trio.sleep(_LAST_WORDS)  # noqa: ASYNC120  # then the reader's error is the one to keep
            raise
