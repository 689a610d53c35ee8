"""The broker's half of the publishing on one connection: from the reader to the inbox, and back as acknowledgements.

Messages keep this as their source, since it is what acknowledges them. Nothing here waits, but for room.

PUBACKs are not written one by one. A message that is processed is noted, and when the writer comes to send it collects
all that were noted since: no other task can have run in between that needed them, and in a row they cost a fraction.
Hazard: whatever else is acknowledged must come behind them, so each way to do that begins with ``collect``.
"""

# A message keeps for its connection what a table here would cost time to look up.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ._config import DriverConfig
from ._history import Counters
from ._incoming import IncomingWindow
from ._session import Session
from ._types import Message
from ._writer import Writer

_PACKET_IDS = 65535
_TOLERATED = 10
"""How often a broker may send our Receive Maximum before reading pauses. mosquitto 2.0.11 keeps to it until messages
wait in its own queue, and then sends them all. To end the connection over it, as MQTT would have it, loses them; to
pause at once lets a handler wait for ever that waits for an answer of the broker."""


class Receiver:
    """Takes the messages of one connection, and acknowledges them. ``expect_by`` has the timer look at a time."""

    def __init__(
        self,
        config: DriverConfig,
        session: Session,
        writer: Writer,
        counters: Counters,
        *,
        version: int,
        expect_by: Callable[[float], None],
        warn_once: Callable[[str], None],
    ) -> None:
        self._session = session
        self._writer = writer
        self._counters = counters
        self._version = version
        self._expect_by = expect_by
        self._warn_once = warn_once
        self._window = IncomingWindow(
            config.receive_maximum,
            session.exchanges,
            most=min(config.receive_maximum * (_TOLERATED if version == 5 else 1), _PACKET_IDS),
            maximum_bytes=config.receive_bytes,
            patience=config.ack_patience,
        )
        self._room: trio.Event | None = None
        """Set when there may be some; None while nobody waits for it."""
        self._retired = False
        self._overran = False
        self.ended = False
        """Whether nothing can be acknowledged on the connection any more."""
        self.note: Callable[[Message[Any]], object] = self._window.processed.append
        self.intercept: tuple[str, Callable[[Message[Any]], None]] | None = None
        """While the broker is being tested: a topic of our own, and who gets its messages instead of the inbox."""

    def __len__(self) -> int:
        """Messages that are not acknowledged yet."""
        return len(self._window)

    # -- in -----------------------------------------------------------------------------------------------------------

    def take_row(self, messages: list[Message[Any]], count: int, size: int) -> bool:
        """Take messages of QoS 0 and ``count`` of QoS 1, with so many bytes of payload in all; False if each must be
        looked at by itself."""
        if self.intercept is not None:
            return False
        if count:
            if count < len(messages):
                messages = [message for message in messages if message.qos]
                size = sum(len(message.payload) for message in messages)
            self._window.publish_row(messages, size)
            if self._window.overrun:
                self._overrun()
        return True

    def take(self, message: Message[Any]) -> bool:
        """Take a message; False if it is not for the application."""
        if message.qos == 1:
            self._window.publish_1(message)
        elif message.qos:
            self.collect()
            new, answer = self._window.publish(message)
            if answer:
                self._writer.answer(answer)
            if not new:
                if not answer:
                    self._wait_turn(message)
                return False
        if message.qos and self._window.overrun:
            self._overrun()
        if self.intercept is not None and message.topic == self.intercept[0]:
            self.intercept[1](message)
            message._done()
            self.collect()  # before what comes of it: UNSUBSCRIBE
            return False
        return True

    def _overrun(self) -> None:
        """There are more than our Receive Maximum, which only a 5 broker knows."""
        if self._version == 5 and not self._overran:
            self._overran = True
            self._warn_once(
                f"the broker sends more than our Receive Maximum of {self._window.maximum} [MQTT-3.3.4-9]; "
                f"reading pauses when {self._window.most} wait to be processed"
            )

    def forget(self, messages: list[Message[Any]]) -> None:
        """New messages will never be acknowledged."""
        self.collect()
        self._answer(self._window.forget(messages))

    def release(self, packet_id: int) -> None:
        """Take a PUBREL."""
        self._answer(self._window.release(packet_id, self._version))

    @property
    def full(self) -> bool:
        """Whether more is unacknowledged than should be."""
        return self._window.full

    async def wait_room(self) -> None:
        """Return when it is not ``full``, or no message is taken any more. Not counting what waits for PUBREL: that
        could not be read meanwhile."""
        self.collect()
        try:
            while self._window.full and not self._retired:
                self._room = trio.Event()
                await self._room.wait()
        finally:
            self._room = None

    def retire(self) -> None:
        """What comes from now on is dropped, so nothing has to wait for room: least of all the answers behind it."""
        self._retired = True
        if self._room is not None:
            self._room.set()

    # -- out ----------------------------------------------------------------------------------------------------------

    def acknowledge(self, message: Message[Any]) -> bool:
        """A message of this connection was processed by everybody. A no-op, counted, when the connection is over: but
        that of QoS 2 belongs to the session, which may go on."""
        if message.qos == 1 and not self.ended and not message._code:
            self.note(message)
            self.noted()
            return True
        message._open = 1  # not yet: what goes before it sends all in the line that is done with
        self.collect()
        message._open = 0
        if message._code and self._version != 5:
            message._code = 0
            self._warn_once(
                "the broker speaks 3.1.1: a refusal of a message needs MQTT 5, "
                "and is an acknowledgement like any other"
            )
        if not self.ended:
            packets = self._window.acknowledge(message)
            if packets:
                self._answer(packets)
            else:
                self._wait_turn(message)
            return True
        if self.keeps(message):
            self._session.processed(message)
            return True
        self._counters.stale_acknowledgements += 1
        return False

    def noted(self) -> None:
        """Have the writer send what was noted.

        It may be stuck in a write: a broker that waits until we read need not read itself. So if reading waits for
        these, they are taken out of the window here.
        """
        if self._writer.idle:
            self._writer.rouse()
        elif self._room is not None:
            self.collect()

    def collect(self) -> None:
        """Acknowledge what was only noted so far."""
        if self._window.processed:
            self._answer(self._window.collect(trio.current_time()))
            self._expect_by(self._window.look_at)

    def _wait_turn(self, message: Message[Any]) -> None:
        self._window.wait(message, trio.current_time())
        self._expect_by(self._window.look_at)

    def _answer(self, packets: bytes) -> None:
        if packets:
            self._writer.answer(packets)
        if self._room is not None:
            self._room.set()

    @property
    def look_at(self) -> float:
        """When to call ``overtake_late``."""
        return self._window.look_at

    def overtake_late(self, now: float) -> None:
        """Have those overtaken that hold up the acknowledgements of others for too long."""
        self.collect()
        self._answer(self._window.overtake_late(now))

    @property
    def overtakes(self) -> bool:
        return self._window.overtakes

    def overtake(self, message: Message[Any]) -> None:
        """A message that has just come queues behind one that holds up others: it is to hold up none."""
        self.collect()
        self._answer(self._window.overtake(message))

    def keeps(self, message: Message[Any]) -> bool:
        """Whether a message that it brought can still be acknowledged, some day."""
        return not self.ended or (message.qos == 2 and self._window.keeps(message))

    def close(self) -> None:
        """Nothing can be acknowledged any more."""
        self.ended = True
        self.note = self.acknowledge

    def end(self) -> None:
        """The connection is over."""
        self._window.end()
