"""QoS 1 and 2 exchanges that are open on one connection, in both directions [MQTT-4.3], [MQTT-4.4]. No I/O here."""

from __future__ import annotations

import math
from collections import deque

from ._errors import ProtocolError
from ._outbox import Outgoing
from ._packets import PUBACK, PUBCOMP, PUBREC, PUBREL, encode_ack, packet_name
from ._types import Message, ReasonCode


class PacketIds:
    """Packet Identifiers of one connection: PUBLISH, SUBSCRIBE and UNSUBSCRIBE share them [MQTT-2.2.1]."""

    def __init__(self) -> None:
        self._last = 0
        self._used: set[int] = set()

    def allocate(self) -> int:
        """The next one that is not in use. The window keeps far fewer than 65,535 in use at a time."""
        if len(self._used) >= 65535:
            raise RuntimeError("all 65535 packet identifiers are in use")
        while True:
            self._last = self._last % 65535 + 1
            if self._last not in self._used:
                self._used.add(self._last)
                return self._last

    def release(self, packet_id: int) -> None:
        self._used.discard(packet_id)


class _Line(dict[int, Outgoing]):
    """Packet Identifier → message, in the order in which acknowledgements are due [MQTT-4.6.0-2]."""

    moved_on = -math.inf
    """When the first in line was acknowledged last."""

    @property
    def waiting_since(self) -> float:
        if not self:
            return math.inf
        return max(next(iter(self.values())).sent_at, self.moved_on)

    def take(self, packet_id: int, now: float) -> Outgoing | None:
        if self and next(iter(self)) == packet_id:
            self.moved_on = now
        return self.pop(packet_id, None)


class OutgoingWindow:
    """Our QoS 1 and 2 publishes from PUBLISH to PUBACK or PUBCOMP.

    A QoS 2 message whose PUBREC came waits for PUBCOMP in ``_released``. It is handed back like the others when the
    connection dies: on a new session the broker knows nothing of it, so a PUBREL alone would lose it silently.
    """

    def __init__(self, ids: PacketIds, size: int) -> None:
        self._ids = ids
        self._sent = _Line()
        self._released = _Line()
        self._unflushed: deque[Outgoing] = deque()
        self.size = size

    def __len__(self) -> int:
        return len(self._sent) + len(self._released)

    @property
    def free(self) -> int:
        return self.size - len(self)

    def add(self, outgoing: Outgoing) -> int:
        """Open an exchange: the Packet Identifier for its PUBLISH."""
        packet_id = self._ids.allocate()
        self._sent[packet_id] = outgoing
        return packet_id

    def written(self, outgoing: Outgoing, wire_end: int) -> None:
        """Its PUBLISH is in the write buffer and ends at ``wire_end`` of the bytes of this connection."""
        outgoing.wire_end = wire_end
        outgoing.sent_at = math.inf
        self._unflushed.append(outgoing)

    def flushed(self, total: int, now: float) -> None:
        """``total`` bytes of this connection have left: their acknowledgements are due from ``now``."""
        while self._unflushed and self._unflushed[0].wire_end <= total:
            self._unflushed.popleft().sent_at = now

    @property
    def oldest_sent_at(self) -> float:
        """Since when the first in line waits; infinite if none does.

        That is since it was sent, or since the one before it was acknowledged: a broker that is slow but goes on
        acknowledging in order is not late.
        """
        return min(self._sent.waiting_since, self._released.waiting_since)

    def acknowledge(self, first: int, packet_id: int, code: int, now: float) -> tuple[Outgoing | None, bytes]:
        """Take a PUBACK, PUBREC or PUBCOMP: the outgoing whose exchange it ends, if any, and the answer to send.

        An acknowledgement of nothing is tolerated (brokers repeat them); one of the wrong kind is a ProtocolError.
        """
        if first == PUBCOMP:
            outgoing = self._released.take(packet_id, now)
            if outgoing is None and packet_id in self._sent:
                raise ProtocolError(f"protocol error: PUBCOMP for packet identifier {packet_id} before its PUBREC")
            return self._end(packet_id, outgoing), b""
        outgoing = self._sent.get(packet_id)
        if outgoing is not None and outgoing.qos != (1 if first == PUBACK else 2):
            raise ProtocolError(
                f"protocol error: {packet_name(first)} for packet identifier {packet_id}, "
                f"which was published with QoS {outgoing.qos} [MQTT-4.3]"
            )
        if first == PUBREC and code < 0x80:
            if outgoing is not None:
                self._sent.take(packet_id, now)
                outgoing.sent_at = now
                self._released[packet_id] = outgoing
            return None, encode_ack(PUBREL, packet_id)
        self._sent.take(packet_id, now)
        return self._end(packet_id, outgoing), b""

    def _end(self, packet_id: int, outgoing: Outgoing | None) -> Outgoing | None:
        if outgoing is not None:
            self._ids.release(packet_id)
        return outgoing

    def take_back(self) -> list[Outgoing]:
        """Everything that was not acknowledged, in the order of sending. Leaves the window empty."""
        messages = sorted(
            [*self._released.values(), *self._sent.values()],
            key=lambda outgoing: outgoing.wire_end,
        )
        self._sent.clear()
        self._released.clear()
        self._unflushed.clear()
        return messages


class IncomingWindow:
    """The broker's QoS 1 and 2 publishes that we have not acknowledged yet."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self._qos1 = 0
        self._qos2: dict[int, bool] = {}  # packet identifier -> whether PUBREC is sent
        self.unprocessed = 0
        """Those that the application is not done with; the others wait for the broker's PUBREL."""

    def __len__(self) -> int:
        return self._qos1 + len(self._qos2)

    def publish(self, message: Message[object]) -> tuple[bool, bytes]:
        """Take a QoS 1 or 2 PUBLISH: whether it is new, and what to answer at once if it is not [MQTT-4.3.3-10]."""
        if message.qos == 1:
            self._qos1 += 1
            self.unprocessed += 1
            return True, b""
        recorded = self._qos2.get(message.packet_id)
        if recorded is None:
            self._qos2[message.packet_id] = False
            self.unprocessed += 1
            return True, b""
        return False, encode_ack(PUBREC, message.packet_id) if recorded else b""

    def acknowledge(self, message: Message[object]) -> bytes:
        """The message was processed: the PUBACK or PUBREC to send."""
        self.unprocessed -= 1
        if message.qos == 1:
            self._qos1 -= 1
            return encode_ack(PUBACK, message.packet_id)
        self._qos2[message.packet_id] = True
        return encode_ack(PUBREC, message.packet_id)

    def release(self, packet_id: int, version: int) -> bytes:
        """Take a PUBREL: the PUBCOMP to send."""
        recorded = self._qos2.get(packet_id)
        if recorded is False:
            raise ProtocolError(f"protocol error: PUBREL for packet identifier {packet_id} before its PUBREC")
        if recorded is None:
            code = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if version == 5 else ReasonCode.SUCCESS
            return encode_ack(PUBCOMP, packet_id, code)
        del self._qos2[packet_id]
        return encode_ack(PUBCOMP, packet_id)
