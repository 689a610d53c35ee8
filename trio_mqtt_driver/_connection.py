"""One Network Connection: the child nursery of one generation, and everything that ends with it.

The three loops of trio-paho-mqtt run in the child nursery, rewritten against a ``trio.abc.Stream``:

- the *reader* takes whatever is there, splits it, and hands the messages on as one batch, never waiting for user code;
- the *writer* is the only task that calls ``send_all``. A cancelled ``send_all`` may have sent half a packet, so no
  user task may ever run it: a ``move_on_after`` around a ``publish()`` would break the link for everybody;
- the *timer* sends PINGREQ and finds overdue answers. It sleeps until the next of them; whoever creates an earlier
  deadline moves the deadline of its cancel scope.

A fault is recorded (``fail``) and cancels the nursery; it is not raised. So at most one cause exists, and an exception
that does come out of the nursery is a bug. Nothing here decides what happens next.

When the application does not keep up, reading pauses: TCP pushes back on the broker. Meanwhile the answers that we
wait for lie unread on our side, so no deadline runs; PINGREQ still goes out, because the broker's deadline does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from ._config import DriverConfig
from ._deadlines import Deadlines
from ._errors import (
    ConnectionLostError,
    MQTTDriverError,
    ProtocolError,
    ProtocolVersionError,
    PublishRefusedError,
    RefusedError,
    ServerDisconnectedError,
)
from ._history import Counters
from ._inbox import Inbox
from ._inflight import IncomingWindow, OutgoingWindow, PacketIds
from ._limits import publish_error
from ._outbox import Outbox, Outgoing
from ._packets import PINGREQ_PACKET, PINGRESP, PUBCOMP, PUBREL, Packet, PacketReader, encode_publish, packet_name
from ._paho import AuthPacket, ConnAck, ControlPackets, ServerDisconnect, SubAck, SubscribeRequest
from ._replies import Ping, Reply, Request
from ._transport import lost
from ._types import Message, PublishResult, ReasonCode, ServerLimits, UserProperties
from ._writer import Writer

logger = logging.getLogger("trio_mqtt_driver")

T = TypeVar("T")

_RECEIVE_SIZE = 65536
_MOST_ANSWERS = 1024 * 1024
"""Bytes that a peer may make us write while it reads none of them."""
_WINDOW_3_1_1 = 20
"""3.1.1 has no Receive Maximum; brokers commonly keep 20 and some drop what exceeds it."""


class Connection:
    """A client of its own over a stream of its own. ``run`` once; then it is over."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        config: DriverConfig,
        *,
        version: int,
        client_id: str,
        generation: int,
        inbox: Inbox,
        outbox: Outbox,
        counters: Counters,
    ) -> None:
        self.config = config
        self.version = version
        self.client_id = client_id
        self.generation = generation
        self.limits = ServerLimits()
        self.cause: MQTTDriverError | None = None
        """Why the connection ended; None while it runs, and if its session ended by itself."""
        self.round_trip: float | None = None
        """Seconds between the last PINGREQ and its PINGRESP, or between the test publish and its PUBACK."""
        self._stream = stream
        self._inbox = inbox
        self._outbox = outbox
        self._counters = counters
        self._reader = PacketReader(
            version=version,
            maximum_packet_size=config.maximum_packet_size,
            topic_alias_maximum=config.topic_alias_maximum,
            generation=generation,
        )
        self._ids = PacketIds()
        self._outgoing = OutgoingWindow(self._ids, config.in_flight)
        self._incoming = IncomingWindow(config.receive_maximum)
        self._control: ControlPackets
        self._scope = trio.CancelScope()
        self.ended = False
        """Whether nothing can be sent or acknowledged on it any more."""
        self._warned: set[str] = set()
        self._writer = Writer(stream, counters)
        self.deadlines = Deadlines(config, trio.current_time())
        self._timer = trio.CancelScope()
        self._acknowledged = trio.Event()
        self._handshake: Reply[ConnAck | AuthPacket] | None = None
        self._requests: dict[int, Request] = {}
        self._closing = False
        self._eof = trio.Event()
        self.intercept: tuple[str, Callable[[Message[Any]], None]] | None = None
        """While the broker is being tested: a topic of our own, and who gets its messages instead of the inbox."""
        self.copies: bool | None = None
        """Whether the broker sends a copy per matching filter and cannot mark them; None until that matters."""

    async def run(self, session: Callable[[Connection], Awaitable[None]]) -> None:
        """Run the loops and ``session`` in the child nursery until either ends; afterwards ``cause`` tells why.

        The order matters: the nursery is empty before the stream is closed, and the stream is closed before the
        window goes back to the outbox, so that nothing can still be sent when the next generation begins.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                self._control = ControlPackets(
                    nursery,
                    client_id=self.client_id,
                    version=self.version,
                    next_packet_id=self._ids.allocate,
                    loops=(self._read_loop, self._write_loop, self._timer_loop),
                )
                self._control.start()
                try:
                    await session(self)
                except MQTTDriverError as exc:
                    if isinstance(exc, RefusedError | ProtocolVersionError):
                        # A broker that refuses also closes, and the reader may see that before the session has woken
                        # up with the answer: it is the answer that says why.
                        self.cause = exc
                    self.fail(exc)
                nursery.cancel_scope.cancel(reason="the session of this connection ended")
        finally:
            self.ended = True
            try:
                await trio.aclose_forcefully(self._stream)
            finally:  # it closes the stream even if we are cancelled, but then raises
                self._settle_all()

    def _settle_all(self) -> None:
        error = self.cause or ConnectionLostError("the connection was closed")
        for ping in self.deadlines.pings:
            ping.reply.fail(error)
        for request in self._requests.values():
            request.reply.fail(error)
        self._outbox.put_back(out for out in self._outgoing.take_back() if out.on_settled is not None)

    def fail(self, error: MQTTDriverError) -> None:
        """The first fault is the cause, and ends the connection."""
        if self.cause is None and not self.ended:
            self.cause = error
            self._scope.cancel(reason=f"connection lost: {error}")

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s: the broker speaks 3.1.1: %s", self.config.client_id, text)

    # -- requests: each returns the Reply to wait for ----------------------------------------------------------------

    def connect(self, authentication: tuple[str, bytes | None] | None) -> Reply[ConnAck | AuthPacket]:
        return self._exchange(self._control.connect_packet(self.config, authentication))

    def authenticate(self, method: str, data: bytes | None) -> Reply[ConnAck | AuthPacket]:
        return self._exchange(self._control.auth_packet(method, data))

    def _exchange(self, packet: bytes) -> Reply[ConnAck | AuthPacket]:
        self._handshake = Reply()
        self._writer.write(packet)
        return self._handshake

    def connected(self, limits: ServerLimits) -> None:
        """CONNACK was good: obey what it says."""
        self.limits = limits
        window = limits.receive_maximum if self.version == 5 else _WINDOW_3_1_1
        self._outgoing.size = min(self.config.in_flight, window)
        seconds = self.config.keep_alive if limits.server_keep_alive is None else limits.server_keep_alive
        self.deadlines.keep_alive = seconds or math.inf
        self._expect_by(trio.current_time() + self.deadlines.keep_alive)

    @property
    def marks_copies(self) -> bool:
        """Whether incoming messages say, by Subscription Identifiers, which filters they are for."""
        return self.version == 5 and self.limits.identifiers_available and self.config.subscription_identifiers

    def subscribe(
        self, requests: list[SubscribeRequest], identifier: int | None, user_properties: UserProperties = ()
    ) -> Reply[tuple[ReasonCode, ...]]:
        if not self.limits.identifiers_available:
            identifier = None
        if self.version != 5 and any(request.needs_5 for request in requests):
            self._warn_once("no_local, retain_as_published and retain_handling need MQTT 5 and are left out")
        packet_id, packet = self._control.subscribe_packet(requests, identifier, user_properties)
        return self._request(packet_id, packet, Request(len(requests), unsubscribe=False, reply=Reply()))

    def unsubscribe(self, filters: list[str]) -> Reply[tuple[ReasonCode, ...]]:
        packet_id, packet = self._control.unsubscribe_packet(filters)
        return self._request(packet_id, packet, Request(len(filters), unsubscribe=True, reply=Reply()))

    async def within(self, seconds: float, reply: Reply[T]) -> T:
        """Wait for an answer, not counting the time in which reading pauses. Raises ``trio.TooSlowError``."""
        deadline = trio.current_time() + seconds
        while deadline > trio.current_time():
            with trio.move_on_at(deadline):
                return await reply.wait()
            if self.deadlines.listening_since == math.inf:
                deadline += seconds
            else:
                deadline = max(deadline, self.deadlines.listening_since + seconds)
        raise trio.TooSlowError

    def _request(self, packet_id: int, packet: bytes, request: Request) -> Reply[tuple[ReasonCode, ...]]:
        self._requests[packet_id] = request
        self._writer.write(packet)
        return request.reply

    def ping(self) -> Reply[float]:
        """Send PINGREQ; the reply is the round trip in seconds."""
        now = trio.current_time()
        ping = Ping(now, Reply())
        self.deadlines.pings.append(ping)
        self.deadlines.sent_at = now
        self._writer.write(PINGREQ_PACKET)
        self._expect_by(now + self.config.ping_timeout)
        return ping.reply

    async def disconnect(self) -> None:
        """Send DISCONNECT and wait until the broker closes the link; the caller sets the deadline.

        Closing at once could reset the connection with the DISCONNECT unread, and the will would be published.
        """
        self._closing = True
        self._writer.write_last(self._control.disconnect_packet())
        await self._eof.wait()

    # -- publishing ---------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._outgoing)

    @property
    def unacknowledged(self) -> int:
        """Incoming messages that are not acknowledged yet."""
        return len(self._incoming)

    @property
    def has_room(self) -> bool:
        """Whether it takes more."""
        return not self._closing and self.cause is None and self._writer.waiting < self.config.write_buffer

    def send(self, outgoing: Outgoing) -> None:
        """Put one message on the wire, past the outbox; one of QoS 1 or 2 needs room in the window."""
        packet_id = self._outgoing.add(outgoing) if outgoing.qos else 0
        outgoing.attempts += 1
        self._counters.messages_out += 1
        if self.version != 5 and outgoing.properties != b"\0":
            self._warn_once("properties of PUBLISH need MQTT 5 and are left out")
        self._writer.write(
            encode_publish(
                outgoing.raw_topic,
                outgoing.payload,
                qos=outgoing.qos,
                retain=outgoing.retain,
                packet_id=packet_id,
                properties=outgoing.properties if self.version == 5 else None,
            )
        )
        if outgoing.qos:
            self._outgoing.written(outgoing, self._writer.written)
        else:
            self._settle(outgoing, ReasonCode.SUCCESS)

    def go_live(self) -> None:
        """The subscriptions are replayed: from now on what waits in the outbox goes out."""
        self.deadlines.live = True
        self._expect_by(trio.current_time())
        self.refill()

    def refill(self) -> None:
        """Send from the outbox what the window and the write buffer have room for."""
        if not self.deadlines.live:
            return
        while self.has_room:
            outgoing = self._outbox.peek()
            if outgoing is None or (outgoing.qos and self._outgoing.free <= 0):
                return
            self._outbox.take()
            error = publish_error(self.limits, outgoing)
            if error is not None:
                outgoing.settle(error)
            else:
                self.send(outgoing)

    def _settle(self, outgoing: Outgoing, code: ReasonCode) -> None:
        outgoing.settle(
            PublishResult(
                reason_code=code,
                generation=self.generation,
                attempts=outgoing.attempts,
                latency=trio.current_time() - outgoing.accepted_at,
            )
        )

    def acknowledge(self, message: Message[Any]) -> None:
        """A message of this connection was processed by everybody. A no-op, counted, when the connection is over."""
        if self.ended:
            self._counters.stale_acknowledgements += 1
            return
        self._writer.answer(self._incoming.acknowledge(message))
        self._acknowledged.set()

    async def _write_loop(self) -> None:
        try:
            await self._writer.run(self._flushed)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
            if not self._closing:
                self.fail(lost(exc, "writing to the broker"))

    def _flushed(self) -> None:
        now = self.deadlines.sent_at = trio.current_time()
        self._outgoing.flushed(self._writer.flushed, now)
        self._expect_by(now + self.config.ack_timeout)
        self.refill()

    # -- the reader ---------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        while True:  # noqa: ASYNC913  # receive_some is the cancel point, and an error of it ends the loop
            try:
                data = await self._stream.receive_some(_RECEIVE_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                self._gone(lost(exc, "reading from the broker"))
                return
            if not data:
                self._gone(ConnectionLostError("the broker closed the connection"))
                return
            self.deadlines.heard_at = trio.current_time()
            self._counters.bytes_in += len(data)
            messages: list[Message[Any]] = []
            try:
                for packet in self._reader.feed(data):
                    self._take(packet, messages)
            except ProtocolError as exc:
                self.fail(exc)
            self.deadlines.mid_packet = self._reader.mid_packet
            if self._reader.error is not None:
                self.fail(self._reader.error)
            # Even after a fault: what arrived whole before it was accepted.
            if messages:
                self._counters.messages_in += len(messages)
                self._inbox.deliver(messages, copies=bool(self.copies))
            if self._writer.answers > _MOST_ANSWERS:
                self.fail(
                    ConnectionLostError(f"the broker reads nothing: {self._writer.answers} bytes of answers wait")
                )
            self.refill()
            if self._inbox.crowded:
                await self._inbox.give_way()
            # Only for messages of this link: a queue that is full since the last one must not hide the handshake.
            if messages and (self._inbox.full or self._incoming.unprocessed > self._incoming.maximum):
                await self._pause()

    def _gone(self, error: MQTTDriverError) -> None:
        self._eof.set()
        if not self._closing:
            self.fail(error)

    async def _pause(self) -> None:
        self.deadlines.paused = True
        while self._inbox.full:
            await self._inbox.wait_room()
        # Not what waits for PUBREL: that comes from the broker, and could not be read.
        while self._incoming.unprocessed > self._incoming.maximum:
            self._acknowledged = trio.Event()
            await self._acknowledged.wait()
        self.deadlines.resume(trio.current_time())

    def _take(self, packet: Packet, messages: list[Message[Any]]) -> None:
        if isinstance(packet, Message):
            self._take_message(packet, messages)
        elif isinstance(packet, tuple):
            first, packet_id, code, reason = packet
            if first == PUBREL:
                self._writer.answer(self._incoming.release(packet_id, self.version))
                self._acknowledged.set()
            else:
                self._take_ack(first, packet_id, code, reason)
        else:
            self._take_control(packet)

    def _take_message(self, message: Message[Any], messages: list[Message[Any]]) -> None:
        message._source = self  # pyright: ignore[reportPrivateUsage]  # the link between a message and its connection
        if message.qos:
            new, answer = self._incoming.publish(message)
            if answer:
                self._writer.answer(answer)
            if not new:
                return
            if self.version == 5 and len(self._incoming) > self._incoming.maximum:
                raise ProtocolError(
                    f"protocol error: {len(self._incoming)} unacknowledged messages, announced was a "
                    f"Receive Maximum of {self._incoming.maximum} [MQTT-3.3.4-9]"
                )
        if self.intercept is not None and message.topic == self.intercept[0]:
            self.intercept[1](message)
            if message.qos:
                self.acknowledge(message)
            return
        messages.append(message)

    def _take_ack(self, first: int, packet_id: int, code: int, reason: str | None) -> None:
        try:
            reason_code = ReasonCode(code)
        except ValueError:  # looked at first: what is taken out of the window must be settled
            name = packet_name(first)
            raise ProtocolError(f"malformed packet: {name} with unknown reason code 0x{code:02x}") from None
        outgoing, answer = self._outgoing.acknowledge(first, packet_id, code, trio.current_time())
        if answer:
            self._writer.answer(answer)
        if outgoing is None:
            return
        if first == PUBCOMP:
            # PUBREC has accepted the message; whatever the broker says of the rest, it is delivered.
            self._settle(outgoing, ReasonCode.SUCCESS)
        elif reason_code.is_failure:
            words = f": {reason}" if reason else ""
            outgoing.settle(
                PublishRefusedError(f"the broker refused {outgoing.topic!r}: {reason_code}{words}", reason_code)
            )
        else:
            self._settle(outgoing, reason_code)

    def _take_control(self, packet: bytes) -> None:
        if packet[0] == PINGRESP:
            if len(packet) != 2:
                raise ProtocolError("malformed packet: PINGRESP with a body [MQTT-3.13.1]")
            if self.deadlines.pings:
                ping = self.deadlines.pings.popleft()
                self.round_trip = trio.current_time() - ping.sent_at
                ping.reply.set(self.round_trip)
            return
        event = self._control.feed(packet)
        if isinstance(event, SubAck):
            self._take_suback(event)
        elif isinstance(event, ServerDisconnect):
            words = f": {event.reason_string}" if event.reason_string else ""
            self._gone(
                ServerDisconnectedError(f"the broker disconnected us: {event.reason_code}{words}", event.reason_code)
            )
        elif self._handshake is None:
            raise ProtocolError(f"protocol error: unexpected {packet_name(packet[0])} [MQTT-3.2.0-2]")
        else:
            reply, self._handshake = self._handshake, None
            reply.set(event)

    def _take_suback(self, answer: SubAck) -> None:
        request = self._requests.pop(answer.packet_id, None)
        if request is None or request.unsubscribe != answer.unsubscribe:
            raise ProtocolError(f"protocol error: SUBACK or UNSUBACK for unknown identifier {answer.packet_id}")
        self._ids.release(answer.packet_id)
        codes = answer.reason_codes
        if request.unsubscribe and self.version != 5:
            codes = (ReasonCode.SUCCESS,) * request.filters
        if len(codes) != request.filters:
            raise ProtocolError(
                f"protocol error: {len(codes)} reason codes for {request.filters} topic filters [MQTT-3.8.4-6]"
            )
        request.reply.set(codes)

    # -- the timer ----------------------------------------------------------------------------------------------------

    def _expect_by(self, deadline: float) -> None:
        """Something may be due at ``deadline``: have the timer look then, if it would not look earlier."""
        if deadline < self._timer.deadline:
            self._timer.deadline = deadline

    async def _timer_loop(self) -> None:
        while True:
            with trio.CancelScope() as self._timer:
                now = trio.current_time()
                if self.deadlines.ping_due(now):
                    self.ping()
                error = self.deadlines.overdue(now, self._outgoing.oldest_sent_at)
                if error is not None:
                    self.fail(error)
                self._timer.deadline = self.deadlines.look_at(now, self._outgoing.oldest_sent_at)
                await trio.sleep_forever()
