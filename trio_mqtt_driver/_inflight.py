"""Our QoS 1 and 2 exchanges that are open in a session [MQTT-4.3], [MQTT-4.4]. No I/O here.

With fresh client IDs a session is one connection's, and so are the windows. With a stable ID the outgoing window and
the record of received QoS 2 identifiers outlive it: what is open is taken up again on the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ._errors import ProtocolError
from ._outgoing import Outgoing
from ._packets import PUBACK, PUBCOMP, PUBREC, PUBREL, encode_ack, packet_name


class PacketIds:
    """Packet Identifiers of one session: PUBLISH, SUBSCRIBE and UNSUBSCRIBE share them [MQTT-2.2.1]."""

    def __init__(self) -> None:
        self.last = 0
        self.used: set[int] = set()
        """Those of requests, and of exchanges that were given up."""
        self.lines: tuple[dict[int, Outgoing], dict[int, Outgoing]] = {}, {}
        """Of the window: what is open there is in use, too."""

    def next_free(self) -> int:
        """The next one that is not in use. The window keeps far fewer than 65,535 in use at a time."""
        used, (sent, released) = self.used, self.lines
        if len(used) + len(sent) + len(released) >= 65535:
            raise RuntimeError("all 65535 packet identifiers are in use")
        while True:
            packet_id = self.last = self.last % 65535 + 1
            if packet_id not in sent and packet_id not in used and packet_id not in released:
                return packet_id

    def allocate(self) -> int:
        """One for a request, until it is released."""
        packet_id = self.next_free()
        self.used.add(packet_id)
        return packet_id

    def release(self, packet_id: int) -> None:
        self.used.discard(packet_id)

    def clear(self) -> None:
        """Another session begins, and no identifier is in use in it."""
        self.used.clear()


class _Line(dict[int, Outgoing]):
    """Packet Identifier → message, in the order in which acknowledgements are due [MQTT-4.6.0-2]."""

    since = -math.inf
    """When the first in line was sent, or became the first, whichever was later; only if it was sent at all."""

    @property
    def first(self) -> Outgoing | None:
        return next(iter(self.values()), None)

    def take(self, packet_id: int, now: float) -> Outgoing | None:
        if self and next(iter(self)) == packet_id:
            self.since = now
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
        ids.lines = self._sent, self._released
        self._flushed = 0
        """Bytes of this connection that have left."""
        self._unsent: dict[int, None] = {}
        """Identifiers of what an older connection left open, and that was not sent on this one yet."""
        self._count = 0
        self.size = size
        self.alone: Outgoing | None = None
        """A suspect that is on its way, with nothing beside it that could be the reason if the connection ends."""

    def __len__(self) -> int:
        return len(self._sent) + len(self._released)

    @property
    def free(self) -> int:
        """How many more the broker takes: what was not sent on this connection does not count [MQTT-4.9.0-1]."""
        return self.size - len(self) + len(self._unsent)

    @property
    def takes_more(self) -> bool:
        """Whether there is room for another one now, and nothing that it must not overtake."""
        return not self._unsent and self.alone is None and len(self._sent) + len(self._released) < self.size

    def add(self, outgoing: Outgoing) -> int:
        """Open an exchange: the Packet Identifier for its PUBLISH. Set its ``wire_end`` when that is written."""
        packet_id = self._ids.next_free()
        self._sent[packet_id] = outgoing
        self._count += 1
        outgoing.order = self._count
        return packet_id

    def begin_again(self) -> None:
        """Another connection of this session: everything that is open must be sent on it [MQTT-4.4.0-1].

        First PUBREL in the order of the PUBRECs, then PUBLISH in the order of the first sending [MQTT-4.6.0-1, -4].
        """
        self._unsent = dict.fromkeys((*self._released, *self._sent))
        self._flushed = 0
        for outgoing in (*self._released.values(), *self._sent.values()):
            outgoing.wire_end = math.inf

    def messages(self) -> list[Outgoing]:
        """Those that somebody published, in the order of sending."""
        everything = list(self._sent.values())
        if self._released:  # which are in the order of their PUBRECs
            everything = sorted([*self._released.values(), *everything], key=lambda outgoing: outgoing.order)
        return [outgoing for outgoing in everything if outgoing.on_settled is not None]

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def may_take_up(self) -> bool:
        """Whether the next exchange to take up has room: PUBREL needs none [MQTT-4.9.0-3]."""
        return self.free > 0 or next(iter(self._unsent)) in self._released

    @property
    def suspect(self) -> tuple[int, Outgoing] | None:
        """The PUBLISH that the broker would have answered next, if it has been sent on this connection."""
        first = next(iter(self._sent.items()), None)
        return first if first is not None and first[1].wire_end <= self._flushed else None

    @property
    def on_the_wire(self) -> int:
        """How many were sent on this connection and are not acknowledged."""
        return len(self) - len(self._unsent)

    @property
    def next_unsent(self) -> Outgoing:
        """What ``take_unsent`` takes."""
        packet_id = next(iter(self._unsent))
        return self._released.get(packet_id) or self._sent[packet_id]

    def suspect_all(self) -> None:
        """Any of those that were sent on this connection may be why it has ended."""
        for outgoing in self._sent.values():
            if outgoing.wire_end <= self._flushed:
                outgoing.suspected = True

    def take_unsent(self) -> tuple[int, Outgoing, bool]:
        """The next exchange to take up: its identifier, its message, and whether it goes on with PUBREL instead of
        PUBLISH."""
        packet_id = next(iter(self._unsent))
        del self._unsent[packet_id]
        released = packet_id in self._released
        return packet_id, (self._released if released else self._sent)[packet_id], released

    def drop(self, packet_id: int) -> None:
        """Give an exchange up. Of QoS 2 the broker may keep the identifier: it must not be used for another message,
        which would be taken for this one."""
        outgoing = self._sent.pop(packet_id)
        self._unsent.pop(packet_id, None)
        if outgoing.qos == 2:
            self._ids.used.add(packet_id)

    def drop_own(self) -> None:
        """The connection ended: forget its test publish and the like, which nobody waits for."""
        for packet_id in [packet_id for packet_id, outgoing in self._sent.items() if outgoing.on_settled is None]:
            self.drop(packet_id)

    def flushed(self, total: int, now: float) -> None:
        """``total`` bytes of this connection have left: acknowledgements of what they hold are due from ``now``."""
        for line in (self._sent, self._released):
            first = line.first
            if first is not None and self._flushed < first.wire_end <= total:
                line.since = now
        self._flushed = total

    @property
    def oldest_sent_at(self) -> float:
        """Since when the first in line waits; infinite if none does.

        That is since it was sent, or since the one before it was acknowledged: a broker that is slow but goes on
        acknowledging in order is not late.
        """
        return min(self._waiting_since(self._sent), self._waiting_since(self._released))

    def _waiting_since(self, line: _Line) -> float:
        first = line.first
        return math.inf if first is None or first.wire_end > self._flushed else line.since

    def take_pubacks(self, packet_ids: Iterable[int], now: float, taken: list[Outgoing]) -> None:
        """Take PUBACKs that say success, and append to ``taken`` the messages whose exchanges they end.

        As ``acknowledge``, for many at a time. Raises ``ProtocolError``, which leaves alone what came before it.
        """
        sent = self._sent
        first = sent.first
        for packet_id in packet_ids:
            outgoing = sent.get(packet_id)
            if outgoing is None or outgoing.qos != 1:
                self.acknowledge(PUBACK, packet_id, 0, now)  # of nothing, or a fault
                continue
            del sent[packet_id]
            taken.append(outgoing)
            if self._unsent:
                self._unsent.pop(packet_id, None)
        if sent.first is not first:
            sent.since = now

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
                if not self._released:
                    self._released.since = now
                self._released[packet_id] = outgoing
                self._unsent.pop(packet_id, None)
            return None, encode_ack(PUBREL, packet_id)
        self._sent.take(packet_id, now)
        return self._end(packet_id, outgoing), b""

    def _end(self, packet_id: int, outgoing: Outgoing | None) -> Outgoing | None:
        if outgoing is not None:
            self._unsent.pop(packet_id, None)
        return outgoing

    def take_back(self) -> list[Outgoing]:
        """Everything that was not acknowledged, in the order of sending. Leaves the window empty."""
        messages = sorted(
            [*self._released.values(), *self._sent.values()],
            key=lambda outgoing: outgoing.order,
        )
        for outgoing in messages:
            outgoing.wire_end = math.inf
        self._sent.clear()
        self._released.clear()
        self._flushed = 0
        self._unsent.clear()
        return messages
