"""One local subscription: its queue, and the iterator or the handler at the end of it.

The queue is filled by the reader of the connection, which never waits (``_put`` is synchronous), and emptied by one
task. It belongs to the driver, not to a connection, so it lives across reconnects.

A message is *done*, and then acknowledged, when its handler has returned, or when the iterator is asked for the next
one: not when it is handed out, since whoever got it may still fail. `Acknowledge` has the other choices.

A message that comes alone, to a handler that has nothing to do, spares the turn of the handler's task: the reader
calls the handler (``_handle_now``), since a plain function holds up everybody for as long, whoever calls it. What the
task is for is left to it: an awaitable that comes back, an exception, and whatever comes meanwhile. Hazard: the reader
is not to be held up by more than that one call, so this is never done for one of several messages.
"""

# A message and the subscription that has it belong together.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextvars
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio

from ._errors import DriverClosedError, PayloadError
from ._history import Counters
from ._queue import MessageQueue
from ._registration import Registration, Standing
from ._status import SubscriptionStatistics
from ._types import Acknowledge, Acknowledger, Message, ReasonCode

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

Handler = Callable[[Message[T]], Awaitable[object] | object]
DeadLetterHandler = Callable[[Message[Any], PayloadError], Awaitable[object] | object]

_TURN = 256
_SECONDS = 0.001
"""After so many messages, or so long, others have their turn: a visit to the scheduler costs more than handing a
message over, so it is not made for each."""

logger = logging.getLogger("trio_mqtt_driver")


class Subscription(Generic[T]):
    """What ``subscribe()`` returns, and the iterator of ``async with driver.subscription(...) as messages``.

    One task at a time may iterate. Iteration ends when the subscription is ended.
    """

    # Not in __init__: with thirty attributes there each instance would have a dict of its own, of a kilobyte.
    _begun: Awaitable[object] | Exception | None = None
    """What came of a call of the reader's that the handler's task has to deal with."""

    def __init__(
        self,
        topic_filter: str,
        *,
        decode: Callable[[bytes], T],
        typed: bool,
        handler: Handler[T] | None,
        on_dead_letter: DeadLetterHandler | None,
        acknowledge: Acknowledge,
        queue: MessageQueue,
        counters: Counters,
        changed: Callable[[Subscription[Any]], None],
        failed: Callable[[Subscription[Any], Message[Any], Exception], bool],
    ) -> None:
        self.topic_filter = topic_filter
        self._queue = queue
        self._on_receipt = acknowledge is Acknowledge.RECEIVED
        self._manual = acknowledge is Acknowledge.MANUAL
        self._registration: Registration[Subscription[Any]] | None = None
        self._handler = handler
        self._context: contextvars.Context | None = None
        """That of the handler's task, if the reader may call the handler: not if it has returned an awaitable once."""
        self._decode = decode
        self._typed = typed
        self._on_dead_letter = on_dead_letter
        self._counters = counters
        self._changed = changed
        self._failed = failed
        self._first_generation = 0
        """The generation that granted it; retained messages that a later one brings are repetitions."""
        self._arrived = trio.Event()
        self._handed_out: Message[T] | None = None
        self._kept: Message[T] | None = None
        """The last one that its reader was left to acknowledge (``Acknowledge.MANUAL``)."""
        self._receiving = False
        self._burying = False
        """Whether a dead-letter handler runs: user code, which nobody waits for."""
        self._closed = False
        self._sleeping = False
        """Whether somebody waits for ``_arrived``."""
        self._watched = False
        """Whether the dispatcher waits for room, and must be told of what is taken out."""
        self._calls = _TURN
        self._until = 0.0
        self._now = trio.current_time
        self._withheld = 0
        """Messages that were taken out of the queue and not delivered."""
        self._dead_letters = self._refused = self._handler_errors = 0

    def __repr__(self) -> str:
        return f"<Subscription {self.topic_filter!r} {self._delivered} delivered, {len(self._queue.messages)} queued>"

    @property
    def _delivered(self) -> int:
        queue = self._queue
        return queue.received - len(queue.messages) - queue.dropped - self._withheld

    @property
    def degraded(self) -> ReasonCode | None:
        """The code with which the broker refused this filter at the last replay; None if all is well."""
        registration = self._registration
        if registration is None or registration.standing is not Standing.REFUSED:
            return None
        return registration.reason_code

    @property
    def granted_qos(self) -> int | None:
        """The QoS that the broker granted; None if it refused or has not answered yet."""
        registration = self._registration
        if registration is None or registration.reason_code is None or registration.reason_code.is_failure:
            return None
        return int(registration.reason_code)

    def statistics(self) -> SubscriptionStatistics:
        """Counters since the subscription was made."""
        queue = self._queue
        return SubscriptionStatistics(
            received=queue.received,
            delivered=self._delivered,
            dropped=queue.dropped,
            superseded=queue.superseded,
            refused=self._refused,
            dead_letters=self._dead_letters,
            handler_errors=self._handler_errors,
            queued=len(queue.messages),
            queued_bytes=queue.size,
        )

    @property
    def _unprocessed(self) -> int:
        """Messages that are queued, or that a handler or an iterator has; not those that it left for later."""
        return len(self._queue.messages) + (self._handed_out is not None or self._burying)

    @property
    def _idle(self) -> bool:
        """Whether nothing is queued and nothing is being processed."""
        return not self._unprocessed

    # -- the filling end ----------------------------------------------------------------------------------------------

    @property
    def _ready(self) -> bool:
        """Whether somebody is asking for the next message, and not busy with the last one."""
        return self._receiving and not self._burying

    def _put(self, messages: list[Message[Any]], size: int) -> bool:
        """Queue messages that one connection brought, with so many bytes of payload, whether there is room or not.

        True if the queue has reached a bound: call ``queue.shorten``.
        """
        source = messages[0]._source
        if source is not None and (source.overtakes or self._on_receipt):
            for message in messages:  # one by one: each looks at the one before it
                if message.qos:
                    self._take_special(message, source)
                self._queue.put([message], len(message.payload))
            too_long = self._queue.full
        else:
            too_long = self._queue.put(messages, size)
        if self._sleeping:
            self._arrived.set()
        return too_long

    @trio.lowlevel.disable_ki_protection
    def _handle_now(self, message: Message[Any]) -> bool:
        """Call the handler with a message that came alone. False, and nothing is done, if that is for its task."""
        context = self._context
        if (
            context is None
            or not self._sleeping
            or self._handed_out is not None
            or self._queue.messages
            or self._closed
        ):
            return False
        assert self._handler is not None
        try:
            message.value = context.run(self._decode, message.payload) if self._typed else message.payload
        except PayloadError:
            return False
        self._queue.received += 1
        if message.qos:
            message._reader = self
        self._handed_out = message
        try:
            outcome = context.run(self._handler, message)
        except Exception as exc:  # noqa: BLE001  # its task has the policy for it
            self._begun = exc
        else:
            if outcome is None or not isinstance(outcome, Awaitable):
                self._finish()
                return True
            self._begun = outcome
            self._context = None
        self._arrived.set()
        return True

    def _take_special(self, message: Message[Any], source: Acknowledger) -> None:
        if source.overtakes and self._holds_up:
            # It would be overtaken, too, but each time others would have waited for it first.
            source.overtake(message._original or message)
        if self._on_receipt:
            message._done()
            message._source = source  # tells whether the connection that brought it is over

    @property
    def _holds_up(self) -> bool:
        busy = self._handed_out or self._kept
        queue = self._queue.messages
        return (busy is not None and busy._holds_up) or (bool(queue) and queue[-1]._holds_up)

    def _close(self) -> None:
        """End iteration and let go of what is queued. It is acknowledged: nobody is left who could process it, and
        unacknowledged it would take up the broker's window for as long as the connection lasts. What was handed out
        is for whoever has it."""
        self._closed = True
        self._arrived.set()
        waiting = self._queue.messages
        while waiting:
            self._withheld += 1
            self._take_out()._done()
        self._changed(self)

    # -- the emptying end ---------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Message[T]:
        """Wait for the next message; asking for it says that the one before is processed.

        Cancelling loses nothing. Raises ``DriverClosedError`` once the subscription is ended, and
        ``trio.BusyResourceError`` if another task is waiting here.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this subscription")
        self._receiving = True
        queue = self._queue.messages
        try:
            try:
                if queue or self._closed:  # else the wait below is one
                    await self._give_way()
            finally:  # also if it is cancelled: it was asked for
                self._finish()
            while True:  # noqa: ASYNC913  # _give_way or the wait is the cancel point
                while not queue:
                    if self._closed:
                        raise DriverClosedError(f"the subscription of {self.topic_filter!r} is ended")
                    self._changed(self)
                    self._arrived = trio.Event()
                    self._sleeping = True
                    await self._arrived.wait()
                    self._sleeping = False
                    self._begin_turn()
                    if self._begun is not None:
                        assert self._handed_out is not None
                        return self._handed_out
                message: Message[T] = self._take_out()
                if self._typed:
                    try:
                        message.value = self._decode(message.payload)
                    except PayloadError as exc:
                        self._withheld += 1
                        await self._misfit(message, exc)
                        await self._give_way()
                        continue
                else:
                    message.value = message.payload  # type: ignore[assignment]  # then T is bytes
                self._handed_out = message
                return message
        finally:
            self._receiving = self._sleeping = False

    async def _handle(self, handler: Handler[T]) -> None:
        """Give each message to the handler, until the subscription is ended, or the handler has failed for good.

        ``receive`` says how; left out of it is, until the turn is over, what nearly all messages do not need.
        """
        # With greenback a plain function can wait, and the reader must not.
        greenback = sys.modules.get("greenback")
        if not (self._on_receipt or self._manual or (greenback is not None and greenback.has_portal())):
            self._context = trio.lowlevel.current_task().context
        queue = self._queue
        waiting = queue.messages
        checkpoint_if_cancelled = trio.lowlevel.checkpoint_if_cancelled
        while True:  # noqa: ASYNC913  # receive is the cancel point
            try:
                message = await self.receive()
            except DriverClosedError:
                return
            calls, until, now = self._calls, self._until, self._now
            noted: Acknowledger | None = None
            try:
                while True:
                    try:
                        outcome = handler(message) if self._begun is None else self._go_on()
                        if outcome is not None and isinstance(outcome, Awaitable):
                            if noted is not None:
                                noted.noted()
                            await outcome
                    except Exception as exc:  # noqa: BLE001  # by policy; cancellation is no Exception and passes
                        if self._failed(self, message, exc):
                            return
                    if not waiting or calls >= _TURN or self._typed or now() >= until:
                        break
                    calls += 1
                    # As finish.
                    if not message.qos:
                        message._source = None
                    elif self._manual:
                        self._kept = message
                    elif (
                        message.qos == 1
                        and message._open
                        and message._original is None
                        and (source := message._source) is not None
                    ):
                        message._open = 0  # as _done
                        message._source = message._reader = None
                        source.note(message)
                        noted = source
                    else:
                        message._done()
                    self._handed_out = None
                    await checkpoint_if_cancelled()
                    message = waiting.popleft()  # as _take_out
                    if queue.attended:
                        self._took(message)
                    if message.qos:
                        message._reader = self
                    message.value = message.payload  # type: ignore[assignment]  # then T is bytes
                    self._handed_out = message
            finally:
                if noted is not None:
                    noted.noted()
            self._calls = calls

    def _go_on(self) -> Awaitable[object]:
        """With what ``_handle_now`` has begun."""
        begun, self._begun = self._begun, None
        assert begun is not None
        if isinstance(begun, Exception):
            raise begun
        return begun

    def _handler_ended(self) -> None:
        """The handler's task is over; it may have been cancelled before it came to what ``_handle_now`` had begun."""
        begun = self._begun
        if isinstance(begun, Exception):
            assert self._handed_out is not None
            self._failed(self, self._handed_out, begun)
        elif isinstance(begun, Coroutine):
            begun.close()

    def _take_out(self) -> Message[Any]:
        """Take the first message out of the queue."""
        message = self._queue.messages.popleft()
        if self._queue.attended:
            self._took(message)
        if message.qos:
            message._reader = self
        return message

    def _took(self, message: Message[Any]) -> None:
        self._queue.took(message)
        if self._watched:
            self._changed(self)

    def _finish(self) -> None:
        """The message that was handed out last is processed."""
        message = self._handed_out
        if message is None:
            return
        self._handed_out = None
        if not message.qos:
            message._source = None
        elif self._manual:
            self._kept = message
        elif (
            message.qos == 1
            and message._open
            and message._original is None
            and (source := message._source) is not None
        ):
            message._open = 0  # as _done, for nearly all
            message._source = message._reader = None
            source.note(message)
            source.noted()
        else:
            message._done()

    def _note_refused(self) -> None:
        """Count a message that was refused."""
        self._refused += 1
        self._counters.refused_messages += 1

    def _note_error(self) -> None:
        """Count an exception of the handler."""
        self._handler_errors += 1
        self._counters.handler_errors += 1

    async def _give_way(self) -> None:
        """A cancel point for every message, and now and then a schedule point."""
        if self._queue.messages and self._calls < _TURN and self._now() < self._until:
            self._calls += 1
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
            self._begin_turn()

    def _begin_turn(self) -> None:
        self._now = trio.lowlevel.current_clock().current_time
        self._calls = 0
        self._until = self._now() + _SECONDS

    async def _misfit(self, message: Message[Any], error: PayloadError) -> None:
        """A payload that is not of our message class: another subscription's of this filter, or a dead letter."""
        try:
            members = self._registration.members if self._registration is not None else []
            if any(other is not self and other._accepts(message.payload) for other in members):
                return
            self._dead_letters += 1
            self._counters.dead_letters += 1
            if self._on_dead_letter is None:
                logger.warning("dead letter on %r: %s", message.topic, error)
                return
            self._burying = True
            outcome = self._on_dead_letter(message, error)
            if isinstance(outcome, Awaitable):
                await outcome
        except Exception as exc:  # noqa: BLE001  # by policy: one bad payload must not end the subscription
            self._failed(self, message, exc)
        finally:
            self._burying = False
            message._done()

    def _accepts(self, payload: bytes) -> bool:
        """Whether a payload fits this subscription's message class; one that takes raw bytes claims nothing."""
        if not self._typed:
            return False
        try:
            self._decode(payload)
        except PayloadError:
            return False
        return True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message[T]:
        if (
            self._queue.messages
            and self._calls < _TURN
            and not self._typed
            and not self._receiving
            and self._now() < self._until
        ):
            # As receive(), without what nearly all messages of a busy topic do not need.
            self._calls += 1
            done = self._handed_out
            if done is not None:
                if done.qos:
                    self._finish()
                else:
                    self._handed_out = done._source = None
            await trio.lowlevel.checkpoint_if_cancelled()
            message: Message[Any] = self._queue.messages.popleft()  # as _take_out
            if self._queue.attended:
                self._took(message)
            if message.qos:
                message._reader = self
            message.value = message.payload  # then T is bytes
            self._handed_out = message
            return message
        try:
            return await self.receive()
        except DriverClosedError:
            raise StopAsyncIteration from None
