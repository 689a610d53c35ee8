"""One network connection as the memory broker has it: bytes in, packets out, and the faults in between.

A reader task decodes and hands packets over synchronously, so that a packet takes effect whole; a writer task sends
what has gathered. Closing takes effect at once: the handler hears of it before ``close()`` returns.
"""

from __future__ import annotations

import math
from typing import Protocol

import attrs
import trio

from ._faults import Action, Direction, Faults, PacketRule
from ._packets import Connect, Packet, Publish
from ._pipe import PipeStream, reset_stream
from ._properties import WireError
from ._wire import Decoder, encode

_CONNECT_DEADLINE = 30.0
_FLUSH_DEADLINE = 5.0


class Handler(Protocol):
    """What a link needs from the server side of the protocol."""

    def received(self, packet: Packet) -> None:
        """Act on a packet; may raise ``WireError``."""

    def arrived(self, packet: Packet) -> None:
        """A packet came in; no fault has touched it yet."""

    def sent(self, packet: Packet) -> None:
        """A packet is on its way; it passed the faults."""

    def violated(self, error: WireError) -> None:
        """The peer broke the rules, and is about to be closed."""

    def timed_out(self) -> None:
        """Nothing came for 1.5 times the keep alive."""

    def closed(self) -> None:
        """The connection is gone. Called once."""


class Link:
    def __init__(
        self, stream: trio.abc.Stream, handler: Handler, faults: Faults, maximum_packet_size: int, buffer_bytes: int
    ) -> None:
        self.client_id = ""
        self.version = 5
        self.maximum_packet_size: float = math.inf
        """The client's."""
        self.topic_alias_maximum = 0
        """How many Topic Aliases are used towards the client: none unless the broker is told to."""
        self.silent = False
        """Half-open: see :meth:`silence`."""
        self._stream = stream
        self._handler = handler
        self._faults = faults
        self._buffer_bytes = buffer_bytes
        self._decoder = Decoder(server=True, maximum_packet_size=maximum_packet_size)
        self._aliases: dict[str, int] = {}
        self._out = bytearray()
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._over = trio.Event()
        self._reading = trio.CancelScope()
        self._watching = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._heard = 0.0
        self._deaf = False
        self._closed = False
        self._reset_at_end = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    async def run(self) -> None:
        """Serve the connection until it ends."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._write)
                self._heard = trio.current_time()
                nursery.start_soon(self._watch, _CONNECT_DEADLINE, self._watching)
                with self._reading:
                    await self._read()
                if self._deaf:
                    await self._linger()
                self.close()
                # A peer that does not read must not keep a closed connection for ever.
                nursery.cancel_scope.deadline = trio.current_time() + _FLUSH_DEADLINE
        finally:
            self.close()
            await trio.aclose_forcefully(self._stream)

    def close(self, *, reset: bool = False, flush: bool = True) -> None:
        """End the connection, with EOF or a reset; ``flush=False`` loses what is not sent yet."""
        if self._closed:
            return
        self._closed = True
        self._over.set()
        self._reset_at_end = reset
        if not flush:
            self._out.clear()
            # Not left to the writer: it may be blocked on a peer that does not read.
            if reset:
                reset_stream(self._stream)
        self._reading.cancel(reason="the memory broker closed this connection")
        # Or the end of the keep alive would be waited for before the peer gets its EOF.
        self._watching.cancel(reason="the memory broker closed this connection")
        self._wake.set()
        self._drained.set()
        self._handler.closed()

    def silence(self, *, deaf: bool) -> None:
        """Make the connection half-open: the client's bytes are swallowed, and nothing goes out.

        With ``deaf`` neither end hears of the other's end: the broker closes its side when the keep alive is over,
        or when told to.
        """
        self.silent = True
        self._deaf = deaf
        self._out.clear()

    def enforce_keep_alive(self, seconds: float) -> None:
        """From CONNECT on: the deadline for it ends, that of the keep alive begins (0 is none)."""
        self._watching.cancel(reason="CONNECT has come")
        self._watching = trio.CancelScope()
        if seconds and self._nursery is not None:
            self._nursery.start_soon(self._watch, 1.5 * seconds, self._watching)

    # -- out --

    def send(self, packet: Packet) -> bool:
        """Queue a packet; False if it may not be sent: too large for the client, or its buffer is full."""
        data = encode(packet, self.version)
        if isinstance(packet, Publish):
            if len(data) > self.maximum_packet_size:
                return False
            if not packet.qos and len(self._out) > self._buffer_bytes:
                return False
        if self._closed or self.silent:
            return True
        action, rule = self._judge(packet, Direction.OUT)
        if action is Action.PASS:
            self._put(packet, data)
        elif action is Action.HOLD and rule is not None:
            rule.hold_back(lambda: self._put(packet, data))
        elif action in (Action.EOF_AFTER, Action.RESET_AFTER):
            self._put(packet, data)
            self.close(reset=action is Action.RESET_AFTER)
        elif action in (Action.EOF_BEFORE, Action.RESET_BEFORE):
            self.close(reset=action is Action.RESET_BEFORE)
        elif action in (Action.REPLACE, Action.FOLLOW) and rule is not None:
            if action is Action.FOLLOW:
                self._put(packet, data)
            if isinstance(rule.other, bytes):
                self.send_raw(rule.other)
            else:
                self._put(rule.other, encode(rule.other, self.version))
        return True

    def send_raw(self, data: bytes) -> None:
        """Queue bytes as they are, past all faults."""
        if not self._closed and not self.silent:
            self._out += data
            self._wake.set()

    def _put(self, packet: Packet, data: bytes) -> None:
        if not self._closed and not self.silent:
            if self.topic_alias_maximum and isinstance(packet, Publish):
                # Not before: a packet that a fault has swallowed must not be the one that told the alias.
                packet, data = self._aliased(packet, data)
            self._out += data
            self._wake.set()
            self._handler.sent(packet)

    def _aliased(self, packet: Publish, data: bytes) -> tuple[Publish, bytes]:
        """The packet with a Topic Alias, while there are any left: each topic keeps its own [MQTT-3.3.2.3.4]."""
        if "topic_alias" in packet.properties:
            return packet, data
        alias = self._aliases.get(packet.topic)
        new = alias is None
        if alias is None:
            alias = len(self._aliases) + 1
            if alias > self.topic_alias_maximum:
                return packet, data
        aliased = attrs.evolve(
            packet, topic=packet.topic if new else "", properties={**packet.properties, "topic_alias": alias}
        )
        short = encode(aliased, self.version)
        if len(short) > self.maximum_packet_size:
            return packet, data
        self._aliases[packet.topic] = alias
        return aliased, short

    async def _write(self) -> None:
        try:
            while True:
                while not self._out:
                    self._drained.set()
                    if self._closed:
                        if self._reset_at_end:
                            reset_stream(self._stream)
                        return
                    self._wake = trio.Event()
                    await self._wake.wait()
                data, self._out = self._out, bytearray()
                await self._transmit(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close()

    async def _transmit(self, data: bytearray) -> None:
        trickle = self._faults.byte_by_byte
        if isinstance(self._stream, PipeStream):
            self._stream.capacity = 1 if trickle else 65536
        if trickle:
            for index in range(len(data)):
                await self._stream.send_all(data[index : index + 1])
        else:
            await self._stream.send_all(data)

    # -- in --

    async def _read(self) -> None:
        try:
            while not self._closed:
                data = await self._stream.receive_some(65536)
                if not self._faults.reading:
                    await self._faults.wait_reading()
                if not data or self._closed:  # closed in the tick in which the data came
                    return
                if not self.silent:
                    self._heard = trio.current_time()
                    self._decode(bytes(data))
                # A client that sends and does not read: stop reading too, rather than pile up answers.
                while len(self._out) > self._buffer_bytes and not self._closed:
                    self._drained = trio.Event()
                    await self._drained.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def _linger(self) -> None:
        """After the end of one side of a connection that is cut: until the other side has ended too."""
        if not self._closed:
            await self._over.wait()
            return
        try:
            while await self._stream.receive_some(65536):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    def _decode(self, data: bytes) -> None:
        try:
            for packet in self._decoder.packets(data):
                self._take(packet)
                if self._closed:
                    return
        except WireError as error:
            self._handler.violated(error)
            self.close()

    def _take(self, packet: Packet) -> None:
        if isinstance(packet, Connect):
            self.client_id, self.version = packet.client_id, packet.version
        self._handler.arrived(packet)
        action, rule = self._judge(packet, Direction.IN)
        if action is Action.HOLD and rule is not None:
            rule.hold_back(lambda: self._resume(packet))
        elif action in (Action.EOF_BEFORE, Action.RESET_BEFORE):
            self.close(reset=action is Action.RESET_BEFORE)
        elif action is not Action.DROP:
            self._handler.received(packet)
            if action in (Action.EOF_AFTER, Action.RESET_AFTER):
                self.close(reset=action is Action.RESET_AFTER)

    def _resume(self, packet: Packet) -> None:
        if self._closed:
            return
        try:
            self._handler.received(packet)
        except WireError as error:
            self._handler.violated(error)
            self.close()

    def _judge(self, packet: Packet, direction: Direction) -> tuple[Action, PacketRule | None]:
        if self._faults.quiet:
            return Action.PASS, None
        return self._faults.judge(packet, direction, self.client_id)

    async def _watch(self, limit: float, watching: trio.CancelScope) -> None:
        """Close the connection when nothing came for ``limit`` seconds [MQTT-3.1.2-22]."""
        await trio.lowlevel.checkpoint()
        with watching:
            while not self._closed:
                await trio.sleep_until(self._heard + limit)
                if self._closed or (self.silent and not self._deaf):
                    return
                if not self._faults.reading:
                    # What we did not read cannot be held against the client.
                    await self._faults.wait_reading()
                    self._heard = trio.current_time()
                elif trio.current_time() >= self._heard + limit:
                    self._handler.timed_out()
                    self.close()
