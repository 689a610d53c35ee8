"""One Network Connection: the child nursery of one generation, and everything that ends with it.

The three loops of trio-paho-mqtt run in the child nursery, rewritten against a ``trio.abc.Stream``:

- the *reader* takes whatever is there, splits it, and hands the messages on as one batch, never waiting for user code
  (it may call a handler, see ``_subscription``);
- the *writer* is the only task that calls ``send_all``. A cancelled ``send_all`` may have sent half a packet, so no
  user task may ever run it: a ``move_on_after`` around a ``publish()`` would break the link for everybody;
- the *timer* sends PINGREQ and finds overdue answers. It sleeps until the next of them; whoever creates an earlier
  deadline moves the deadline of its cancel scope. Who waits for an answer has no cancel scope of its own.

A fault is recorded (``fail``) and cancels the nursery; it is not raised. So at most one cause exists, and an exception
that does come out of the nursery is a bug. Nothing here decides what happens next.

When the application does not keep up, reading pauses: TCP pushes back on the broker. Meanwhile the answers that we
wait for lie unread on our side, so no deadline runs; PINGREQ still goes out, because the broker's deadline does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import trio

from ._config import DriverConfig
from ._deadlines import CLOCKS_EVERY, Deadlines
from ._direct import DirectSocket, quick_ack_of
from ._errors import (
    ConnectionLostError,
    MQTTDriverError,
    ProtocolError,
    ProtocolVersionError,
    RefusedError,
    ServerDisconnectedError,
)
from ._gathering import Gathering
from ._history import Counters
from ._inbox import Inbox
from ._outbox import Outbox
from ._packets import PINGREQ_PACKET, PINGRESP, PUBREL, Ack, Packet, PacketReader, packet_name
from ._paho import AuthPacket, ConnAck, ControlPackets, ServerDisconnect
from ._receiver import Receiver
from ._replies import Ping, Reply
from ._requests import Codes, Requests
from ._sender import Sender
from ._session import Session
from ._subscribing import SubAck, needs_5
from ._suspects import COPIES, NOBODY
from ._transport import lost
from ._types import NO_LIMITS, Message, ServerLimits, UserProperties
from ._writer import Writer

logger = logging.getLogger("trio_mqtt_driver")

T = TypeVar("T")

_RECEIVE_SIZE = 65536
_SMALL_RECEIVE = 4096
_AT_A_TIME = 192
"""Messages that a read should bring at most. Of many more the garbage collector makes work: it runs when some hundred
objects have come and are not gone yet, and then goes through all that wait."""
_MOST_ANSWERS = 1024 * 1024
"""Bytes that a peer may make us write while it reads none of them."""


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
        session: Session,
        inbox: Inbox,
        outbox: Outbox,
        counters: Counters,
        on_remark: Callable[[str], object],
    ) -> None:
        self.config = config
        self.version = version
        self.client_id = client_id
        self.generation = generation
        self.limits = NO_LIMITS
        self.cause: MQTTDriverError | None = None
        """Why the connection ended; None while it runs, and if its session ended by itself."""
        self.round_trip: float | None = None
        """Seconds between the last PINGREQ and its PINGRESP, or between the test publish and its PUBACK."""
        self._stream = stream
        self._inbox = inbox
        self._outbox = outbox
        self._counters = counters
        self._on_remark = on_remark
        self.session = session
        self.resumed = False
        """Whether the broker took up the session of an older connection."""
        self.in_doubt = False
        """Whether that may be another one, which an unanswered CONNECT began: then it has no subscriptions."""
        self._control: ControlPackets
        self._scope: trio.CancelScope
        self.ended = False
        """Whether nothing can be sent or acknowledged on it any more."""
        self._warned: set[str] = set()
        self._writer = writer = Writer(stream, counters, self._flushed)
        self.together = writer.together
        self.wait_written = writer.wait_empty
        self.receiver = Receiver(
            config, session, writer, counters, version=version, expect_by=self._expect_by, warn_once=self._warn_once
        )
        self._reader = PacketReader(
            version=version,
            maximum_packet_size=config.maximum_packet_size,
            topic_alias_maximum=config.topic_alias_maximum,
            generation=generation,
            source=self.receiver,
        )
        self.sender = Sender(config, session, writer, outbox, counters, version=version, generation=generation)
        self.deadlines = Deadlines(config, trio.current_time(), config.wall_clock())
        self._timer = trio.CancelScope()
        self._handshake: Reply[ConnAck | AuthPacket] | None = None
        self.requests = Requests(version=version, release=session.ids.release)
        self.batch = config.replay_batch
        """How many filters a packet may have."""
        self.suspects = NOBODY
        """Filters over which the endpoint has ended connections; and in ``questions`` what the driver itself asks."""
        self.questions = NOBODY
        self.asks_copies = False
        """Whether it is being found out what the broker does with overlapping filters."""
        self.hint = ""
        """While the connection is being tested, what there is to say if it is lost."""
        self._closing = False
        self._eof = trio.Event()

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
                    clean_start=not (self.session.established or self.session.wiped),
                    next_packet_id=self.session.ids.allocate,
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
            self._writer.close()
            self.receiver.close()
            self.sender.close()
            direct = DirectSocket.of(self._stream)
            try:
                if direct is None:
                    await trio.aclose_forcefully(self._stream)
                else:  # without a turn of the scheduler
                    direct.close()
            finally:  # it closes the stream even if we are cancelled, but then raises
                self._settle_all()

    def _settle_all(self) -> None:
        error = self.cause or ConnectionLostError("the connection was closed")
        for ping in self.deadlines.pings:
            ping.reply.fail(error)
        self.requests.end(error, self._writer.flushed)
        self.session.on_processed = None
        self.receiver.end()
        self.session.outgoing.drop_own()
        self.sender.ended(self.cause)
        if self.version == 5 and not self.session.unanswered:
            granted = self.limits.session_expiry
            self.session.expires_at = trio.current_time() + (
                self.config.session_expiry if granted is None else granted
            )

    def fail(self, error: MQTTDriverError) -> None:
        """The first fault is the cause, and ends the connection."""
        if self.cause is None and not self.ended:
            self.cause = self.deadlines.explain(error, trio.current_time(), self.config.wall_clock())
            self.sender.close()
            self._scope.cancel(reason=f"connection lost: {self.cause}")

    # -- requests: each returns the Reply to wait for ----------------------------------------------------------------

    def connect(self, authentication: tuple[str, bytes | None] | None) -> Reply[ConnAck | AuthPacket]:
        self.session.unanswered += 1
        return self._exchange(self._control.connect_packet(self.config, authentication))

    def authenticate(self, method: str, data: bytes | None) -> Reply[ConnAck | AuthPacket]:
        return self._exchange(self._control.auth_packet(method, data))

    def _exchange(self, packet: bytes) -> Reply[ConnAck | AuthPacket]:
        self._handshake = Reply()
        self._writer.write(packet)
        return self._handshake

    def connected(self, limits: ServerLimits, *, session_present: bool) -> None:
        """CONNACK was good: obey what it says."""
        self.limits = limits
        self.resumed = session_present
        self.in_doubt = self.session.unanswered > 1
        self._outbox.put_back(self.session.begin(present=session_present))
        self.session.on_processed = self.receiver.acknowledge
        self.sender.begin(limits)
        seconds = self.config.keep_alive if limits.server_keep_alive is None else limits.server_keep_alive
        self.deadlines.agree(seconds or math.inf)
        self._expect_by(self.deadlines.look_at(trio.current_time()))

    @property
    def marks_copies(self) -> bool:
        """Whether incoming messages say, by Subscription Identifiers, which filters they are for."""
        return self.version == 5 and self.limits.identifiers_available and self.config.subscription_identifiers

    def subscribe(
        self, filters: list[bytes], identifier: int | None, user_properties: UserProperties = ()
    ) -> Reply[Codes]:
        """Topic Filters with their options, as ``pack_filter`` makes them."""
        if not self.limits.identifiers_available:
            identifier = None
        if self.version != 5 and any(needs_5(packed) for packed in filters):
            self._warn_once(
                "the broker speaks 3.1.1: no_local, retain_as_published and retain_handling need MQTT 5 "
                "and are left out"
            )
        packet_id, packet = self._control.subscribe_packet(filters, identifier, user_properties)
        return self._request(packet_id, packet, filters)

    def _warn_once(self, words: str) -> None:
        if words not in self._warned:
            self._warned.add(words)
            logger.warning("%s: %s", self.config.client_id, words)

    def unsubscribe(self, filters: list[str]) -> Reply[Codes]:
        packet_id, packet = self._control.unsubscribe_packet(filters)
        return self._request(packet_id, packet, filters)

    def _request(self, packet_id: int, packet: bytes, filters: list[bytes] | list[str]) -> Reply[Codes]:
        reply = self.requests.add(packet_id, filters, self._writer.written + len(packet))
        self._writer.write(packet)
        return reply

    @property
    def accused(self) -> list[str]:
        """As ``requests`` say, but ``COPIES`` for what the driver itself has asked."""
        if self.hint:  # it is being tested, for which the driver may subscribe, too
            return []
        return [COPIES] if self.asks_copies else self.requests.accused

    async def within(self, seconds: float, wait: Callable[[], Awaitable[T]], late: Callable[[], object]) -> T:
        """Wait for an answer. If it takes longer, not counting pauses of reading, ``late`` must end the wait."""
        now = trio.current_time()
        answer = self.deadlines.begin(now, seconds, self._writer.written, late)
        self._expect_by(now + seconds)
        try:
            return await wait()
        finally:
            self.deadlines.end(answer)

    def ping(self) -> Reply[float]:
        """Send PINGREQ; the reply is the round trip in seconds."""
        now = trio.current_time()
        ping = Ping(now, Reply(), self._writer.written + len(PINGREQ_PACKET))
        self.deadlines.pings.append(ping)
        self.deadlines.sent_at = now
        self._writer.write(PINGREQ_PACKET)
        self._expect_by(now + self.config.ping_timeout)
        return ping.reply

    async def disconnect(self, *, end_session: bool) -> None:
        """Send DISCONNECT and wait until the broker closes the link; the caller sets the deadline.

        With ``end_session`` an MQTT 5 broker forgets a session that was to last [MQTT-3.14.2.2.2]; 3.1.1 cannot say
        that.
        Closing at once could reset the connection with the DISCONNECT unread, and the will would be published.
        """
        if self.config.ack_patience < math.inf:
            self.receiver.overtake_late(math.inf)  # it is now or never
        self.receiver.collect()
        self._closing = True
        self.sender.close()
        packet = self._control.disconnect_packet(end_session=end_session and self.config.stable_id)
        self._writer.write_last(packet)
        await self._eof.wait()

    # -- messages -----------------------------------------------------------------------------------------------------

    def go_live(self) -> None:
        """The subscriptions are there: from now on publishes go out, and their acknowledgements may be overdue."""
        self.deadlines.live = True
        self._writer.go_live()
        # More is for a replay to try.
        self.batch = max(self.config.replay_batch, min(self.requests.answered, self.batch))
        self._look()
        self.sender.go_live()

    async def _write_loop(self) -> None:
        try:
            await self._writer.run(self.receiver.collect)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
            if not self._closing:
                self.fail(lost(exc, "writing to the broker"))

    def _flushed(self) -> None:
        now = trio.current_time()
        self.deadlines.flushed(now, self._writer.flushed)
        self._expect_by(now + self.config.ack_timeout)
        self.sender.flushed(now)

    # -- the reader ---------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        size = _RECEIVE_SIZE
        direct = DirectSocket.of(self._stream)
        quick_ack = quick_ack_of(self._stream)
        emptied = False
        # Of other streams, such as TLS, a read may bring one message while more are there, and be as quick as that.
        gathering = Gathering(self.config.read_delay) if direct is not None else None
        while True:  # noqa: ASYNC913  # the read is the cancel point, and an error of it ends the loop
            try:
                data = await (direct.read(size) if direct and emptied else self._stream.receive_some(size))
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                self._gone(lost(exc, "reading from the broker", advice=self.hint))
                return
            if not data:
                self._gone(ConnectionLostError(f"the broker closed the connection{self.hint}"))
                return
            now = trio.current_time()
            self._counters.bytes_in += len(data)
            messages: list[Message[Any]] = []
            plain_size: int | None = None
            held = self._writer.hold()
            try:
                plain_size = self._take_packets(self._reader.feed(data), messages)
            except ProtocolError as exc:
                self.fail(exc)
            emptied = len(data) < size
            self.deadlines.heard(now, len(data), self._reader.partial, more=not emptied)
            if self._reader.error is not None:
                self.fail(self._reader.error)
            self.sender.refill()
            if held:  # before the messages, whose handlers may publish: in what they do the writer is as ever
                self._writer.let_go()
            # Even after a fault: what arrived whole before it was accepted.
            size = _RECEIVE_SIZE
            if messages:
                size = min(size, max(_SMALL_RECEIVE, len(data) // len(messages) * _AT_A_TIME))
                self._counters.messages_in += len(messages)
                if self._inbox.retired:
                    self.receiver.forget(messages)
                self._inbox.deliver(messages, copies=bool(self.session.copies), plain_size=plain_size)
            if self._writer.answers > _MOST_ANSWERS:
                self.fail(
                    ConnectionLostError(f"the broker reads nothing: {self._writer.answers} bytes of answers wait")
                )
            if quick_ack is not None:
                quick_ack()
            if self._inbox.crowded:
                await self._inbox.give_way()
            # Only for messages of this link: a queue that is full since the last one must not hide the handshake.
            if messages and not self._inbox.retired:
                if self._inbox.full or self.receiver.full:
                    await self._pause()
                elif (
                    gathering is not None
                    and (delay := gathering.wait_after(now, len(messages), emptied=emptied))
                    and not (self.sender.in_flight or self.requests or self.deadlines.pings)
                ):  # Whoever waits for an answer of the broker need not wait for other people's messages.
                    await trio.sleep(delay)

    def _gone(self, error: MQTTDriverError) -> None:
        self._eof.set()
        if not self._closing:
            self.fail(error)

    async def _pause(self) -> None:
        self.deadlines.paused = True
        while self._inbox.full:
            await self._inbox.wait_room()
        await self.receiver.wait_room()
        now = trio.current_time()
        self.deadlines.resume(now)
        self._look()

    def _take_packets(self, packets: list[Packet], messages: list[Message[Any]]) -> int | None:
        """Act on packets, and append the messages that are for the application. Raises ``ProtocolError``.

        If there is nothing about any of them but properties, returns the bytes of their payloads.
        """
        reader = self._reader
        if reader.plain:
            row = cast("list[Message[Any]]", packets)
            if self.receiver.take_row(row, reader.plain_1, reader.plain_size):
                messages += row
                return reader.plain_size
        for packet in packets:
            if isinstance(packet, Message):
                if self.receiver.take(packet):
                    messages.append(packet)
            elif isinstance(packet, list):
                self.sender.take_pubacks(packet)
            else:
                self._take(packet)
        return None

    def _take(self, packet: Ack | bytes) -> None:
        if isinstance(packet, tuple):
            first, packet_id, code, reason = packet
            if first == PUBREL:
                self.receiver.release(packet_id)
            else:
                self.sender.take_ack(first, packet_id, code, reason)
        else:
            self._take_control(packet)

    def _take_control(self, packet: bytes) -> None:
        if packet[0] == PINGRESP:
            if len(packet) != 2:
                raise ProtocolError("malformed packet: PINGRESP with a body [MQTT-3.13.1]")
            ping = self.deadlines.pong()
            if ping is not None:
                self._expect_by(trio.current_time())
                self.round_trip = trio.current_time() - ping.sent_at
                ping.reply.set(self.round_trip)
            return
        event = self._control.feed(packet)
        if isinstance(event, SubAck):
            self.requests.take(event)
        elif isinstance(event, ServerDisconnect):
            words = f": {event.reason_string}" if event.reason_string else ""
            self._gone(
                ServerDisconnectedError(
                    f"the broker disconnected us: {event.reason_code}{words}",
                    event.reason_code,
                    event.server_reference,
                )
            )
        elif self._handshake is None:
            raise ProtocolError(f"protocol error: unexpected {packet_name(packet[0])} [MQTT-3.2.0-2]")
        else:
            reply, self._handshake = self._handshake, None
            reply.set(event)

    # -- the timer ----------------------------------------------------------------------------------------------------

    def _expect_by(self, deadline: float) -> None:
        """Something may be due at ``deadline``: have the timer look then, if it would not look earlier."""
        if deadline < self._timer.deadline:
            self._timer.deadline = deadline

    async def _timer_loop(self) -> None:
        while True:
            with self._timer:
                for late in self.deadlines.missed(trio.current_time()):
                    late()
                self._look()
                await trio.sleep_forever()
            self._timer = trio.CancelScope()
            await trio.lowlevel.checkpoint()  # whoever has an answer, and has not come to take it, is not late

    def _look(self) -> None:
        """Do what is due on the link itself, and have the timer look again when something may be."""
        now = trio.current_time()
        remark = self.deadlines.observe(now, self.config.wall_clock(), self.sender.oldest_sent_at)
        if remark is not None:
            logger.info("%s: %s", self.config.client_id, remark)
            self._on_remark(remark)
        if self.deadlines.ping_due(now):
            self.ping()
        error = self.deadlines.overdue(now)
        if error is not None:
            self.fail(error)
        if self.receiver.look_at <= now:
            self.receiver.overtake_late(now)
        look_at = min(self.deadlines.look_at(now), self.receiver.look_at)
        self._timer.deadline = min(look_at, now + CLOCKS_EVERY)
