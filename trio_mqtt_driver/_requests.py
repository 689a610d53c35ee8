"""The SUBSCRIBEs and UNSUBSCRIBEs of one connection, from the packet to its answer [MQTT-3.8.4], [MQTT-3.10.4]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from ._errors import ProtocolError
from ._replies import Reply
from ._subscribing import SubAck, unpack_filter
from ._types import ReasonCode

Codes = tuple[ReasonCode, ...]


@attrs.define
class Request:
    """One that waits for its answer."""

    filters: Sequence[bytes] | Sequence[str]
    """Packed in a SUBSCRIBE, plain in an UNSUBSCRIBE; whoever made it may add others behind its ``number``."""
    number: int
    unsubscribe: bool
    wire_end: int
    """How many bytes of the connection must have left, that it has."""
    reply: Reply[Codes]


class Requests:
    """Those that wait for their answers."""

    def __init__(self, *, version: int, release: Callable[[int], None]) -> None:
        self._version = version
        self._release = release
        self._waiting: dict[int, Request] = {}
        self.answered = 0
        """How many filters the largest had that was answered."""
        self.accused: list[str] = []
        """The Topic Filters over one of which the connection has ended, if it has over a SUBSCRIBE: that was the next
        to be answered."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def unanswered(self) -> int:
        """How many filters the largest has that was not."""
        return max((request.number for request in self._waiting.values()), default=0)

    def add(self, packet_id: int, filters: Sequence[bytes] | Sequence[str], wire_end: int) -> Reply[Codes]:
        """One is sent, and will have left when ``wire_end`` bytes of the connection have."""
        reply = Reply[Codes]()
        self._waiting[packet_id] = Request(filters, len(filters), isinstance(filters[0], str), wire_end, reply)
        return reply

    def take(self, answer: SubAck) -> None:
        """Settle the one that it answers. Raises ``ProtocolError``."""
        request = self._waiting.pop(answer.packet_id, None)
        if request is None or request.unsubscribe != answer.unsubscribe:
            raise ProtocolError(f"protocol error: SUBACK or UNSUBACK for unknown identifier {answer.packet_id}")
        self._release(answer.packet_id)
        codes = answer.reason_codes
        if answer.unsubscribe and self._version != 5:
            codes = (ReasonCode.SUCCESS,) * request.number
        if len(codes) != request.number:
            raise ProtocolError(
                f"protocol error: {len(codes)} reason codes for {request.number} topic filters [MQTT-3.8.4-6]"
            )
        self.answered = max(self.answered, request.number)
        request.reply.set(codes)

    def end(self, error: Exception, flushed: int) -> None:
        """The connection is over, and ``flushed`` is how many bytes have left. What was unanswered stays known."""
        # One whose answer nobody waits for any more is among them, too.
        oldest = next((request for request in self._waiting.values() if not request.reply.settled), None)
        if oldest is not None and oldest.wire_end <= flushed:
            filters = oldest.filters[: oldest.number]
            self.accused = [unpack_filter(packed) for packed in filters if isinstance(packed, bytes)]  # of a SUBSCRIBE
        for packet_id, request in self._waiting.items():
            request.reply.fail(error)
            self._release(packet_id)
