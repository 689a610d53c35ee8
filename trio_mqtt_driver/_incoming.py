"""The broker's QoS 1 and 2 exchanges that are open on a connection, and the order of their acknowledgements. No I/O.

PUBACKs must go out in the order of their PUBLISHes, and PUBRECs as well [MQTT-4.6.0-2, -3], whatever subscriptions the
messages are for and however long their handlers take; some brokers want one order over both. To keep to that without
end would let one handler that sleeps hold back the acknowledgements of everybody, until the broker's window is full
and nothing comes any more. So there is an order with a limit: an acknowledgement that is due waits for its turn for
``patience`` seconds; then those before it that are not processed are *overtaken*: they lose their place, and are
acknowledged whenever they are done.
"""

# A message keeps for its connection what a table here would cost time to look up.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import islice, zip_longest
from typing import Any

from ._errors import ProtocolError
from ._exchanges import Exchanges
from ._packets import PUBACK, PUBCOMP, PUBREC, encode_ack, encode_pubacks
from ._types import Message, ReasonCode

_PASSED_BYTES = 1024 * 1024


class _Line:
    """Messages of QoS 1 and 2 in the order in which they came. The first one is not processed; what was overtaken is
    passed over, and let go of before it is more than half of the line, or a mebibyte of payload."""

    def __init__(self) -> None:
        self.messages: deque[Message[Any]] = deque()
        self.due: dict[Message[Any], float] = {}
        """Processed, and waiting for their turn since when."""
        self.passed = 0
        """How many of ``messages`` are passed over."""
        self._passed_bytes = 0

    def pass_over(self, message: Message[Any]) -> None:
        message._overtaken = True
        self.passed += 1
        self._passed_bytes += len(message.payload)

    def pass_over_before(self, message: Message[Any]) -> None:
        """Everything before ``message`` that is not processed loses its place."""
        for one in self.messages:
            if one is message:
                return
            if one._open and not one._overtaken:
                self.pass_over(one)

    def take_due(self) -> list[Message[Any]]:
        """Those from the first one on whose turn has come."""
        found: list[Message[Any]] = []
        while self.messages:
            message = self.messages[0]
            if message._overtaken:
                self.passed -= 1
                self._passed_bytes -= len(message.payload)
            elif message._open:
                break
            else:
                self.due.pop(message, None)
                found.append(message)
            self.messages.popleft()
        if 2 * self.passed > len(self.messages) or self._passed_bytes > _PASSED_BYTES:
            self.messages = deque(one for one in self.messages if not one._overtaken)
            self.passed = self._passed_bytes = 0
        return found


class IncomingWindow:
    """The broker's QoS 1 and 2 publishes on one connection that we have not acknowledged yet.

    ``exchanges`` are the session's. A session that goes on repeats what the broker thinks we have not got.
    """

    def __init__(
        self,
        maximum: int,
        exchanges: Exchanges | None = None,
        *,
        most: int | None = None,
        maximum_bytes: float = math.inf,
        patience: float = math.inf,
    ) -> None:
        self.maximum = maximum
        self.most = maximum if most is None else most
        """How many may be unanswered before it is ``full``."""
        self._maximum_bytes = maximum_bytes
        self._patience = patience
        self._exchanges = Exchanges() if exchanges is None else exchanges
        self._exchanges.connect()
        self._qos1 = 0
        self._qos2: set[int] = set()
        self._owed: dict[int, Message[Any]] = {}
        """Those of QoS 2 for which PUBREC is to be sent; the others of ``_qos2`` wait for the broker's PUBREL."""
        self._bytes = 0
        self._line = _Line()
        self.processed: list[Message[Any]] = []
        """Messages of QoS 1 that are processed and whose PUBACK has not been asked for: ``collect`` has them all at
        once. It must come before anything else that acknowledges, since they are not in the line of what is due."""
        self.overtakes = False
        """Whether any message has been overtaken yet."""

    def __len__(self) -> int:
        return self._qos1 + len(self._qos2) - len(self.processed)

    @property
    def unanswered(self) -> int:
        """Those for which PUBACK or PUBREC is to be sent."""
        return self._qos1 + len(self._owed) - len(self.processed)

    @property
    def full(self) -> bool:
        """Whether these are too many, or too many bytes of payload."""
        return self._qos1 + len(self._owed) > self.most or self._bytes > self._maximum_bytes

    @property
    def look_at(self) -> float:
        """When the first acknowledgement has waited for its turn long enough; infinite if none waits."""
        return self._patience + next(iter(self._line.due.values()), math.inf)

    def publish_1(self, message: Message[Any]) -> None:
        """Take a QoS 1 PUBLISH."""
        self._qos1 += 1
        self._bytes += len(message.payload)
        self._line.messages.append(message)

    def publish_row(self, messages: list[Message[Any]], size: int) -> None:
        """Take PUBLISHes of QoS 1, with so many bytes of payload."""
        self._line.messages.extend(messages)
        self._qos1 += len(messages)
        self._bytes += size

    def collect(self, now: float) -> bytes:
        """Acknowledge what was put into ``processed``: what is to be sent now, in order.

        Most often it is their turn, one after the other; what has to wait for it waits from ``now`` on.
        """
        processed = self.processed[:]
        self.processed.clear()
        line = self._line
        waiting = line.messages
        count = len(processed)
        if line.due or line.passed:
            count = 0
        elif processed != list(islice(waiting, count)):  # one may have been overtaken, long ago
            count = next(
                number for number, (one, first) in enumerate(zip_longest(processed, waiting)) if one is not first
            )
        done = processed if count == len(processed) else processed[:count]
        if count == len(waiting) and count == self._qos1 and not self._owed:  # as nearly always: nothing is left
            self._bytes = 0
            waiting.clear()
        else:
            self._bytes -= sum([len(message.payload) for message in done])
            for _ in range(count):
                waiting.popleft()
        self._qos1 -= count
        answers = encode_pubacks([message.packet_id for message in done])
        if count == len(processed):
            return answers
        for message in processed[count:]:
            if message._overtaken:
                answers += self._answer(message)
            else:
                line.due[message] = now
        return answers + self._answers()

    @property
    def overrun(self) -> bool:
        """Whether the broker has sent more than ``maximum``."""
        return self._qos1 + len(self._qos2) > self.maximum

    def publish(self, message: Message[Any]) -> tuple[bool, bytes]:
        """Take a QoS 1 or 2 PUBLISH: whether it is new, and what to answer at once."""
        if message.qos == 1:
            self.publish_1(message)
            return True, b""
        packet_id = message.packet_id
        if packet_id in self._owed:
            return False, b""
        here = packet_id in self._qos2
        known = self._exchanges.find(message, here=here)
        if known is not None and here:
            return False, encode_ack(PUBREC, packet_id)  # again [MQTT-4.3.3-10]
        self._qos2.add(packet_id)
        if known is not None:
            if known.message is not None:
                message = known.message  # that an older connection has brought
            else:
                message._open = 0
                message._code = known.code
        self._owed[packet_id] = message
        self._bytes += len(message.payload)
        if not message._overtaken:
            self._line.messages.append(message)
        return known is None, self._answers()

    def keeps(self, message: Message[Any]) -> bool:
        """Whether the session still knows a QoS 2 message that this connection brought."""
        known = self._exchanges.open.get(message.packet_id)
        return known is not None and known.message is message

    def acknowledge(self, message: Message[Any]) -> bytes:
        """The message was processed: the acknowledgements to send now, in order. If it is not its turn there is none,
        and ``wait`` must follow."""
        if message.qos == 2:
            # The present connection may not have brought it yet: then there is nothing to send.
            received = self._exchanges.open[message.packet_id]
            received.message, received.code = None, message._code
            if message.packet_id not in self._owed:
                return b""
        if message._overtaken:
            return self._answer(message)
        line = self._line
        if line.messages[0] is not message:
            return b""
        line.messages.popleft()
        if message.qos == 1:  # as _answer
            self._qos1 -= 1
            self._bytes -= len(message.payload)
            answer = encode_ack(PUBACK, message.packet_id, message._code)
        else:
            answer = self._answer(message)
        # Only if it waits: most often the next one is being processed.
        return answer + self._answers() if line.due or line.passed else answer

    def wait(self, message: Message[Any], now: float) -> None:
        """A message that is processed waits for its turn from ``now`` on, if it has a place in the line at all."""
        if message.qos == 1 or self._owed.get(message.packet_id) is message:
            self._line.due[message] = now

    def overtake(self, message: Message[Any]) -> bytes:
        """Give up a message's place: it queues behind one that was overtaken. Returns what is to be sent now."""
        if not message._overtaken:
            self._line.pass_over(message)
        return self._answers()

    def overtake_late(self, now: float) -> bytes:
        """Have those overtaken that hold up others for too long. Returns what is to be sent now."""
        answers = b""
        line = self._line
        while line.due:
            message, since = next(iter(line.due.items()))
            if since + self._patience > now:
                break
            del line.due[message]
            line.pass_over_before(message)
            self.overtakes = True
            answers += self._answers()
        return answers

    def forget(self, messages: Iterable[Message[Any]]) -> bytes:
        """New messages will never be acknowledged: keep nothing of them. Returns what is to be sent now."""
        answers = b""
        for message in messages:
            if not message.qos:
                continue
            if message.qos == 1:
                self._qos1 -= 1
            else:
                self._qos2.discard(message.packet_id)
                del self._owed[message.packet_id]
                del self._exchanges.open[message.packet_id]
            self._bytes -= len(message.payload)
            answers += self.overtake(message)
        return answers

    def end(self) -> None:
        """The connection is over, and its messages may be kept for long: they must not keep each other."""
        self._line = _Line()
        self.processed.clear()
        self._owed.clear()

    def _answers(self) -> bytes:
        assert not self.processed
        return b"".join([self._answer(message) for message in self._line.take_due()])

    def _answer(self, message: Message[Any]) -> bytes:
        self._bytes -= len(message.payload)
        packet_id = message.packet_id
        if message.qos == 1:
            self._qos1 -= 1
            return encode_ack(PUBACK, packet_id, message._code)
        del self._owed[packet_id]
        if message._code:  # A refusal ends the exchange: no PUBREL comes [MQTT-4.3.3].
            self._qos2.discard(packet_id)
            self._exchanges.refuse(packet_id, message._code)
        return encode_ack(PUBREC, packet_id, message._code)

    def release(self, packet_id: int, version: int) -> bytes:
        """Take a PUBREL: the PUBCOMP to send."""
        known = self._exchanges.open.get(packet_id)
        if known is not None and (known.message is not None or packet_id in self._owed):
            raise ProtocolError(f"protocol error: PUBREL for packet identifier {packet_id} before its PUBREC")
        if known is None:
            code = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if version == 5 else ReasonCode.SUCCESS
            return encode_ack(PUBCOMP, packet_id, code)
        self._exchanges.release(packet_id)
        self._qos2.discard(packet_id)
        return encode_ack(PUBCOMP, packet_id)
