"""Our half of the publishing on one connection: from the outbox through the window to the writer, and back to whoever
waits. Nothing here waits."""

from __future__ import annotations

import logging
import math

import trio

from ._aliases import ROOM, TopicAliases
from ._config import DriverConfig
from ._errors import (
    AckTimeoutError,
    ConnectionLostError,
    KeepAliveError,
    MQTTDriverError,
    ProtocolError,
    PublishRefusedError,
    ServerDisconnectedError,
    SuspendedError,
)
from ._express import ExpressLane
from ._history import Counters
from ._limits import packet_size, publish_error, takes_all
from ._outbox import Outbox
from ._outgoing import Outgoing, Plain
from ._packets import PUBCOMP, PUBREL, PubAcks, encode_ack, encode_publish, packet_name
from ._properties import extend_block
from ._session import Session
from ._types import NO_LIMITS, ReasonCode, ServerLimits
from ._writer import Writer

logger = logging.getLogger("trio_mqtt_driver")

_WINDOW_3_1_1 = 20
"""3.1.1 has no Receive Maximum; brokers commonly keep 20 and some drop what exceeds it."""

_ROUNDING = 0.001
"""Seconds by which times that were computed from a wall clock may be off."""

_CODES = {int(code): code for code in ReasonCode}

_ABOUT_THE_LINK = frozenset(
    {
        ReasonCode.SERVER_BUSY,
        ReasonCode.SERVER_SHUTTING_DOWN,
        ReasonCode.KEEP_ALIVE_TIMEOUT,
        ReasonCode.SESSION_TAKEN_OVER,
        ReasonCode.USE_ANOTHER_SERVER,
        ReasonCode.SERVER_MOVED,
        ReasonCode.CONNECTION_RATE_EXCEEDED,
        ReasonCode.MAXIMUM_CONNECT_TIME,
    }
)
"""Reasons for a DISCONNECT that have nothing to do with what was sent."""


class Sender:
    """Sends messages on one connection and takes in their acknowledgements."""

    def __init__(
        self,
        config: DriverConfig,
        session: Session,
        writer: Writer,
        outbox: Outbox,
        counters: Counters,
        *,
        version: int,
        generation: int,
    ) -> None:
        self._config = config
        self._window = session.outgoing
        self._writer = writer
        self._outbox = outbox
        self._counters = counters
        self._version = version
        self._generation = generation
        self._limits = NO_LIMITS
        self._aliases = TopicAliases(0)
        self._begun = False
        self._live_since = math.inf
        self._unlimited = False
        """Whether the broker takes whatever MQTT has."""
        self._paced = config.refill_rate < math.inf
        self._paced_until = -math.inf
        self._held_back = trio.Event()
        self._warned = False
        self._refused = False
        self._acknowledged = trio.Event()
        self.closing = False
        """Whether nothing must be sent any more."""
        self.express = ExpressLane(self._window, writer, outbox, counters, version=version)

    def begin(self, limits: ServerLimits) -> None:
        """CONNACK was good: obey what it says, and take up what an older connection of the session left open.

        That cannot wait: brokers count it as in flight, and may have no room for the test publish before it is done.
        """
        self._limits = limits
        self._unlimited = takes_all(limits)
        self._aliases = TopicAliases(min(self._config.topic_aliases, limits.topic_alias_maximum))
        window = limits.receive_maximum if self._version == 5 else _WINDOW_3_1_1
        self._window.size = min(self._config.in_flight, window)
        self._window.alone = None
        self._begun = True
        self.refill()

    @property
    def in_flight(self) -> int:
        return len(self._window)

    @property
    def oldest_sent_at(self) -> float:
        """Since when the first in line waits for its acknowledgement; infinite if none does."""
        return self._window.oldest_sent_at

    @property
    def has_room(self) -> bool:
        """Whether the writer takes more."""
        return not self.closing and self._writer.waiting < self._config.write_buffer

    @property
    def takes_more(self) -> bool:
        """Whether a message of QoS 1 or 2 can be sent now."""
        return self._window.takes_more and self.has_room

    @property
    def has_place(self) -> bool:
        """Whether the window has."""
        return self._window.free > 0

    @property
    def ready(self) -> bool:
        """Whether it has, and holds nothing that is to be sent first."""
        return self._window.free > 0 and not self._window.has_unsent

    async def wait_room(self) -> None:
        """Return when a message of QoS 1 or 2 may be sent."""
        await trio.lowlevel.checkpoint()
        while not self.ready:
            self._acknowledged = trio.Event()
            await self._acknowledged.wait()

    def send(self, outgoing: Outgoing) -> None:
        """Put one message on the wire, past the outbox; one of QoS 1 or 2 needs room in the window."""
        if (
            isinstance(outgoing, Plain)
            and not outgoing.suspected
            and not self._aliases.maximum
            and (self._version == 5 or outgoing.properties == b"\0")
        ):
            self.express.send(outgoing)
            return
        packet_id = self._window.add(outgoing) if outgoing.qos else 0
        self._publish(outgoing, packet_id)
        if not outgoing.qos:
            outgoing.acknowledged(ReasonCode.SUCCESS, self._generation, trio.current_time())

    def _publish(self, outgoing: Outgoing, packet_id: int, *, dup: bool = False) -> None:
        if outgoing.suspected:
            self._window.alone = outgoing
        outgoing.attempts += 1
        self._counters.messages_out += 1
        if self._version != 5 and (outgoing.properties != b"\0" or outgoing.expiry is not None):
            self._warn_once()
        topic, alias = outgoing.raw_topic, None
        if self._aliases.maximum:
            maximum = self._limits.maximum_packet_size
            topic, alias = self._aliases.take(topic, room=maximum is None or packet_size(outgoing) + ROOM <= maximum)
        packet = encode_publish(
            topic,
            outgoing.payload,
            qos=outgoing.qos,
            retain=outgoing.retain,
            dup=dup,
            packet_id=packet_id,
            properties=self._properties(outgoing, alias) if self._version == 5 else None,
        )
        if packet_id:
            outgoing.wire_end = self._writer.written + len(packet)
        self._writer.write(packet)

    def _properties(self, outgoing: Outgoing, alias: int | None) -> bytes:
        if outgoing.expiry is None:
            return extend_block(outgoing.properties, topic_alias=alias) if alias else outgoing.properties
        # What is left of it. Not 0, even if it has passed while a session was taken up: brokers take that for "never".
        left = max(1, math.ceil(outgoing.expires_at - trio.current_time() - _ROUNDING))
        return extend_block(outgoing.properties, message_expiry=left, topic_alias=alias)

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: the broker speaks 3.1.1: properties of PUBLISH need MQTT 5 and are left out",
                self._config.client_id,
            )

    def go_live(self) -> None:
        """The subscriptions are there: from now on what waits in the outbox goes out."""
        self._live_since = trio.current_time()
        self.refill()
        if not self.closing and not self._aliases.maximum:
            self.express.open(self._config, self._limits, self._generation)

    def stand_back(self) -> None:
        """The link is given up: what waits in the outbox, or comes there, is for the next one."""
        self._live_since = math.inf
        self.express.close()

    def close(self) -> None:
        """Nothing must be sent any more."""
        self.closing = True
        self.express.close()

    @trio.lowlevel.enable_ki_protection
    async def pace(self) -> None:
        """Go on with what ``refill_rate`` holds back. Runs until cancelled."""
        while True:
            await self._held_back.wait()
            self._held_back = trio.Event()
            await trio.sleep_until(self._paced_until)
            self.refill()

    def _too_early(self, outgoing: Outgoing) -> bool:
        """Whether ``refill_rate`` holds back a message that has waited for this link."""
        now = trio.current_time()
        if outgoing.accepted_at >= self._live_since and not outgoing.attempts:
            return False
        if now < self._paced_until:
            self._held_back.set()
            return True
        # Timers are late: what they were too late for, up to a tenth of a second, is made up for.
        self._paced_until = max(self._paced_until, now - 0.1) + 1 / self._config.refill_rate
        return False

    def refill(self) -> None:
        """Send what the window and the write buffer have room for: first what an older connection left open."""
        if not self._begun:
            return  # What the window holds has still to be sorted: the session may be another one.
        if not self._paced:
            self.express.refill()
        while self.has_room and not self._waits_for_suspect():
            if self._window.has_unsent:
                if not self._window.may_take_up or not self._admits(self._window.next_unsent):
                    return
                self._take_up()
                continue
            if self._live_since == math.inf:
                return
            outgoing = self._outbox.peek()
            if outgoing is None or (outgoing.qos and self._window.free <= 0) or not self._admits(outgoing):
                return
            if self._paced and self._too_early(outgoing):
                return
            self._outbox.pop(outgoing)
            error = None if self._unlimited else publish_error(self._limits, outgoing)
            if error is not None:
                self._refuse(outgoing, error)
            else:
                self.send(outgoing)

    def _waits_for_suspect(self) -> bool:
        window = self._window
        if window.alone is not None and window.alone.done:
            window.alone = None
        return window.alone is not None

    def _admits(self, outgoing: Outgoing) -> bool:
        """Whether a message may be sent beside what is on its way."""
        return not outgoing.suspected or not self._window.on_the_wire

    def _take_up(self) -> None:
        packet_id, outgoing, released = self._window.take_unsent()
        if released:
            packet = encode_ack(PUBREL, packet_id)
            outgoing.wire_end = self._writer.written + len(packet)
            self._writer.write(packet)
            return
        error = publish_error(self._limits, outgoing)
        if error is None:
            self._publish(outgoing, packet_id, dup=True)
        else:  # The broker has become stricter, and would end every connection over it.
            self._window.drop(packet_id)
            self._refuse(outgoing, error)

    def ended(self, cause: MQTTDriverError | None) -> None:
        """The connection is over: if the broker has ended it, the first message in line may be the reason.

        But not if connections are also lost with nothing on the wire: then it is the network's doing.
        """
        limit = self._config.quarantine_after
        if not limit or not blames_us(cause):
            return
        # Before CONNACK nothing was sent, whatever the window says of an older connection.
        suspect = self._window.suspect if self._begun else None
        if suspect is None and self._begun and self._window.on_the_wire:
            return  # Whether any of it had left nobody knows: that says nothing either way.
        accused = self._outbox.accused
        if accused is not None and (suspect is None or suspect[1] is not accused):
            accused.blamed = 0
            self._outbox.accused = None
        if suspect is None:
            return
        packet_id, outgoing = suspect
        self._outbox.accused = outgoing
        outgoing.blamed += 1
        if outgoing.blamed > 1:
            # It may be an innocent that stands before the guilty one. Each for itself, they can be told apart.
            self._window.suspect_all()
        if outgoing.blamed >= limit:
            self._window.drop(packet_id)
            self._outbox.accused = None
            self._outbox.quarantine(
                outgoing, f"the broker ended {limit} connections in a row over it, lastly: {cause}"
            )

    def _refuse(self, outgoing: Outgoing, error: MQTTDriverError) -> None:
        if not outgoing.done:
            self._counters.refused += 1
            if not self._refused:  # whoever published it may not be there any more
                self._refused = True
                logger.warning(
                    "%s: %s; more of this connection are counted only (refused)", self._config.client_id, error
                )
        outgoing.settle(error)

    def flushed(self, now: float) -> None:
        """The writer has sent something."""
        self._window.flushed(self._writer.flushed, now)
        self.refill()

    def take_pubacks(self, packet_ids: PubAcks) -> None:
        """Take PUBACKs that say success. Raises ``ProtocolError``."""
        now = trio.current_time()
        taken: list[Outgoing] = []
        try:
            self._window.take_pubacks(packet_ids, now, taken)
        finally:
            self._acknowledged.set()
            self._outbox.acknowledged(taken, self._generation, now)

    def take_ack(self, first: int, packet_id: int, code: int, reason: str | None) -> None:
        """Take a PUBACK, PUBREC or PUBCOMP. Raises ``ProtocolError``."""
        reason_code = _CODES.get(code)
        if reason_code is None:  # looked at first: what is taken out of the window must be settled
            name = packet_name(first)
            raise ProtocolError(f"malformed packet: {name} with unknown reason code 0x{code:02x}")
        now = trio.current_time()
        outgoing, answer = self._window.acknowledge(first, packet_id, code, now)
        self._acknowledged.set()
        if answer:
            self._writer.answer(answer)
        if outgoing is None:
            return
        if first == PUBCOMP:
            # PUBREC has accepted the message; whatever the broker says of the rest, it is delivered.
            outgoing.acknowledged(ReasonCode.SUCCESS, self._generation, now)
        elif code >= 0x80:
            words = f": {reason}" if reason else ""
            self._refuse(
                outgoing,
                PublishRefusedError(f"the broker refused {outgoing.topic!r}: {reason_code}{words}", reason_code),
            )
        else:
            outgoing.acknowledged(reason_code, self._generation, now)


def blames_us(cause: MQTTDriverError | None) -> bool:
    """Whether a broker that finds a message unbearable would end the connection in this way."""
    if isinstance(cause, ServerDisconnectedError):
        return cause.reason_code not in _ABOUT_THE_LINK
    return isinstance(cause, ConnectionLostError) and not isinstance(
        cause, AckTimeoutError | KeepAliveError | SuspendedError
    )
