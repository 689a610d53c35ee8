"""The express lane: the publishes that need nothing but the wire, in one pass.

Nearly all are of QoS 0 or 1, not retained, without properties or with the same ones again, on a live link on which
nothing waits before them. What they cost otherwise is not the work but the way: a dozen calls, each of which looks at
something that they do not have. So here is all of it in one function, and its conditions: for what does not meet them,
or only perhaps, it returns None and has done nothing. Then ``Publisher`` has it, which defines what a publish does and
what it refuses; here is nothing that it would do in another way.

Hazard: a message that is counted, or in the window, and is not sent would be there for as long as the connection; so
Ctrl-C waits for the end of the function.

A topic is checked and encoded once per connection: its *head* is what stands between the packet's length and the
payload, or the Packet Identifier.
"""

# In one function is also what the window and the outbox would do.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import trio

from ._config import DriverConfig
from ._history import Counters
from ._inflight import OutgoingWindow
from ._outbox import Outbox
from ._outgoing import OVERHEAD, Plain, Sent
from ._properties import PropertyBlocks, encode_varint
from ._topics import check_topic
from ._turns import Turns
from ._types import OfflinePolicy, ServerLimits
from ._writer import Writer

_CACHED_TOPICS = 4096
_CACHED_LENGTH = 256
_new = Plain.__new__
_TABLED = 1024
_QOS_0 = [b"0" + encode_varint(length) for length in range(_TABLED)]
_QOS_1 = [b"2" + encode_varint(length) for length in range(_TABLED)]
"""The beginning of a packet, by its length."""
_ID, _ID_NO_PROPERTIES = struct.Struct(">H"), struct.Struct(">Hx")
_LONGEST = 16383
"""A packet whose length needs more than two bytes costs more to copy than to call for."""


class ExpressLane:
    """The express lane of one connection; it is open while the link is live."""

    def __init__(
        self, window: OutgoingWindow, writer: Writer, outbox: Outbox, counters: Counters, *, version: int
    ) -> None:
        self._window = window
        self._writer = writer
        self._outbox = outbox
        self._counters = counters
        self._block = b"\0" if version == 5 else b""
        self._tail = (_ID_NO_PROPERTIES if version == 5 else _ID).pack
        """What stands between head and payload with QoS 1, if there are no properties."""
        self._fixed = 2 + len(self._block)
        """Its length."""
        self._overhead = OVERHEAD - 3 - len(self._block)
        """What a message counts for, beyond the length of its packet: see ``Outgoing.size``."""
        self._write_buffer = -1
        self._longest = self._longest_1 = 0
        self._policy = OfflinePolicy.WAIT
        self.waits = False
        """Whether a publish simply waits for its acknowledgement."""
        self._heads: dict[str, tuple[bytes, bytes, bytes]] = {}
        self._blocks = PropertyBlocks()
        self._now = trio.lowlevel.current_clock().current_time
        self.turns = Turns()
        self.sent = Sent(0, self.turns)

    def open(self, config: DriverConfig, limits: ServerLimits, generation: int) -> None:
        """From now on messages may be sent."""
        self._policy = config.offline
        self.waits = config.offline is OfflinePolicy.WAIT and config.publish_timeout == math.inf
        self._write_buffer = config.write_buffer
        longest = limits.maximum_packet_size
        # What comes near the limit is for publish_error, which counts the longest header that a packet may get.
        self._longest = _LONGEST if longest is None else min(_LONGEST, longest - 8)
        self._longest_1 = self._longest if limits.maximum_qos else -1
        self.sent = Sent(generation, self.turns)

    def close(self) -> None:
        """Nothing must be sent any more."""
        self._write_buffer = -1

    @trio.lowlevel.enable_ki_protection
    def publish_0(self, topic: str, payload: object, properties: Mapping[str, Any]) -> Sent | None:
        """Send a message of QoS 0. None if it is not for here, or not now. Raises ``ValueError`` or ``TypeError``."""
        writer = self._writer
        if (
            type(payload) is not bytes
            or writer.written - writer.flushed >= self._write_buffer
            or self._outbox.waiting_qos0
        ):
            return None
        try:
            _, head, whole = self._heads[topic]
        except (KeyError, TypeError):
            _, head, whole = self._learn(topic)
        if properties:
            block = self._blocks.find(properties)
            if block is None or not self._block:
                return None
            whole = head + block
        length = len(whole) + len(payload)
        if length > self._longest:
            return None
        start = _QOS_0[length] if length < _TABLED else b"0%c%c" % (length & 127 | 128, length >> 7)
        writer.buffer += start, whole, payload
        writer.written += length + len(start)
        self._counters.messages_out += 1
        if writer.idle:
            writer.hurry()
        return self.sent

    @trio.lowlevel.enable_ki_protection
    def publish_1(self, topic: str, payload: object, properties: Mapping[str, Any]) -> Plain | None:
        """Send a message of QoS 1, or queue it if the window is full; the rest as with ``publish_0``."""
        writer = self._writer
        if type(payload) is not bytes or writer.written - writer.flushed >= self._write_buffer:
            return None
        try:
            raw_topic, head, _ = self._heads[topic]
        except (KeyError, TypeError):
            raw_topic, head, _ = self._learn(topic)
        block = b""
        length = len(head) + self._fixed + len(payload)
        if properties:
            found = self._blocks.find(properties)
            if found is None or not self._block:
                return None
            block = found
            length += len(block) - 1
        if length > self._longest_1:
            return None
        outgoing = _new(Plain)
        outgoing.topic = topic
        outgoing.raw_topic = raw_topic
        outgoing.payload = payload
        outgoing.qos = 1
        outgoing.accepted_at = self._now()
        outgoing.offline = self._policy
        outgoing.turns = self.turns
        outgoing.size = size = length + self._overhead
        outgoing.properties = block or b"\0"
        outgoing.queued = outgoing.done = False
        outgoing.outcome = outgoing.waiter = None
        outgoing.attempts = 1
        window, outbox = self._window, self._outbox
        sent, ids, bytes_after = window._sent, window._ids, outbox.accepted_bytes + size
        if window._unsent or window.alone is not None or len(sent) + len(window._released) >= window.size:
            return self._queue(outgoing)
        if outbox._waiting or outbox.accepted >= outbox._max_messages or bytes_after > outbox._max_bytes:
            return None
        outbox.accepted += 1  # as Outbox.admit
        outbox.accepted_bytes = bytes_after
        outgoing.on_settled = outbox._on_settled
        if outbox._store is not None:
            outbox._store.add(outgoing)
        packet_id = ids.last + 1  # as OutgoingWindow.add
        if packet_id > 65535 or packet_id in sent or ids.used or window._released:
            packet_id = ids.next_free()
        else:
            ids.last = packet_id
        outgoing.order = window._count = window._count + 1
        outgoing.wire_end = end = writer.written + length + (2 if length < 128 else 3)
        sent[packet_id] = outgoing
        start = _QOS_1[length] if length < _TABLED else b"2%c%c" % (length & 127 | 128, length >> 7)  # as send
        writer.buffer += start, head, self._tail(packet_id) if not block else _ID.pack(packet_id) + block, payload
        writer.written = end
        self._counters.messages_out += 1
        if writer.idle:
            writer.hurry()
        return outgoing

    def _queue(self, outgoing: Plain) -> Plain | None:
        outgoing.attempts = outgoing.order = 0
        outgoing.wire_end = math.inf
        if (
            self._policy is OfflinePolicy.LATEST
            or self._window.alone is not None  # it may have been given up, and then nothing comes that refills
            or not self._outbox.enqueue(outgoing)
        ):
            return None
        return outgoing

    @trio.lowlevel.enable_ki_protection
    def refill(self) -> None:
        """Send what waits in the outbox, as far as it is for here and has room: as ``Sender.refill``, for many."""
        writer, window, outbox = self._writer, self._window, self._outbox
        if window._unsent or window.alone is not None or outbox._latest or not outbox._lanes:
            return
        lane = outbox._lanes[0][1]
        sent, released = window._sent, window._released
        # Looked at anew each time: what is sent may be written at once, and then all this may happen in between.
        while (
            lane
            and len(sent) + len(released) < window.size
            and writer.written - writer.flushed < self._write_buffer
            and type(outgoing := lane[0]) is Plain
            and not (outgoing.done or outgoing.suspected or outgoing.size > self._longest_1)
            and (self._block or outgoing.properties == b"\0")
        ):
            del lane[0]  # as Outbox.pop
            outgoing.queued = False
            outbox._waiting -= 1
            self.send(outgoing)

    def send(self, outgoing: Plain) -> None:
        """Send a message that has waited in the outbox, on this link or an older one."""
        topic, payload = outgoing.topic, outgoing.payload
        _, head, _ = self._heads.get(topic) or self._learn(topic)
        tail = _ID.pack(self._window.add(outgoing)) + (outgoing.properties if self._block else b"")
        length = len(head) + len(tail) + len(payload)
        writer = self._writer
        start = _QOS_1[length] if length < _TABLED else b"2%c%c" % (length & 127 | 128, length >> 7)
        writer.buffer += start, head, tail, payload
        writer.written = outgoing.wire_end = writer.written + length + len(start)
        outgoing.attempts += 1
        self._counters.messages_out += 1
        if writer.idle:
            writer.hurry()

    def _learn(self, topic: str) -> tuple[bytes, bytes, bytes]:
        raw_topic = check_topic(topic)
        size = len(raw_topic)
        head = b"%c%c%b" % (size >> 8, size & 255, raw_topic)
        known = raw_topic, head, head + self._block
        if size <= _CACHED_LENGTH:
            if len(self._heads) >= _CACHED_TOPICS:
                self._heads.clear()
            self._heads[topic] = known
        return known
