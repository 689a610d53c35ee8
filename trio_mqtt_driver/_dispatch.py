"""From incoming messages to subscriptions, and from handler subscriptions to their handlers.

``deliver`` runs in the reader of a connection: it is synchronous and never waits for user code. Each handler has a
task of its own, in a nursery that belongs to the driver: a reconnect does not interrupt a handler half-way, and one
that sleeps holds up nobody else's messages, acknowledgements or keep-alive. Of messages that come alone a handler that
is a plain function needs no task.
"""

# The application has the subscription in its hands, too: what is only for the dispatcher has private names there.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import trio

from ._cancelled import without_errors
from ._copies import CopyDealer
from ._errors import DriverClosedError, SubscribeError, UnsubscribeError
from ._history import Counters
from ._registration import Leaving, Registration, SubscriptionOptions
from ._registry import Registry
from ._subscription import Subscription
from ._types import Acknowledger, Message, Overflow

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("trio_mqtt_driver")

_CACHED_TOPICS = 10_000
_CACHED_LENGTH = 256
_NO_SOLE: Mapping[str, Subscription[Any]] = {}

Target = tuple[Registration[Subscription[Any]], Subscription[Any]]


class Dispatcher:
    """Routes messages to subscriptions and runs their handlers."""

    def __init__(
        self,
        registry: Registry[Subscription[Any]],
        counters: Counters,
        *,
        on_handler_error: Callable[[Exception], None] | None,
    ) -> None:
        self._registry = registry
        self._counters = counters
        self._on_handler_error = on_handler_error
        self._targets: dict[str, tuple[Target, ...]] = {}
        self._sole: dict[tuple[int, ...], dict[str, Subscription[Any]]] = {}
        """Of the topics that have one target, that; by the Subscription Identifiers that the message has."""
        self._soles = 0
        """How many these are in all."""
        self._targets_version = -1
        self._dealer = CopyDealer()
        self._dealing_for: Acknowledger | None = None
        self._blocking: set[Subscription[Any]] = set()
        self._crowded: set[Subscription[Any]] = set()
        self._room = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._open: set[Subscription[Any]] = set()
        self._handling: set[Subscription[Any]] = set()
        """Those whose handlers have a task."""
        self.retired = False
        """Whether it takes no messages any more."""
        self._idle = trio.Event()

    # -- the connection's end: connection.Inbox -----------------------------------------------------------------------

    def deliver(self, messages: list[Message[Any]], *, copies: bool, plain_size: int | None) -> None:
        """Queue each message with every subscription that it matches.

        With ``copies`` each message comes once for each registration that it matches, unmarked. If none has RETAIN,
        ``plain_size`` may be the number of bytes of all their payloads.
        """
        if self.retired:
            self._counters.dropped += len(messages)
            return
        if self._targets_version != self._registry.version:
            self._forget_targets()
            self._targets_version = self._registry.version
        if plain_size is not None and not copies:
            self._deliver_plain(messages, plain_size)
        else:
            alone = len(messages) == 1
            for message in messages:
                self._deliver(message, self._targets_of(message), copies=copies, alone=alone)

    def _deliver_plain(self, messages: list[Message[Any]], size: int) -> None:
        """Messages that come after one another for one subscription alone are put there together."""
        begin = 0
        owner: Subscription[Any] | None = None
        properties = messages[0]._properties
        sole = self._sole.get(properties.subscription_identifiers, _NO_SOLE)
        for number, message in enumerate(messages):
            if message._properties is not properties:  # pyright: ignore[reportPrivateUsage]
                properties = message._properties  # pyright: ignore[reportPrivateUsage]
                sole = self._sole.get(properties.subscription_identifiers, _NO_SOLE)
            subscription = sole.get(message.topic)
            if subscription is owner and owner is not None:
                continue
            if owner is not None:
                self._put_row(owner, messages[begin:number])
            begin, owner = number, subscription
            if owner is None:
                targets = self._targets_of(message)
                if len(targets) == 1 and message.topic in self._targets:
                    sole = self._note_sole(properties.subscription_identifiers, message.topic, targets[0][1])
                self._deliver(message, targets, copies=False, alone=len(messages) == 1)
        if owner is not None:
            if begin:
                self._put_row(owner, messages[begin:])
            elif len(messages) == 1 and owner._handle_now(messages[0]):
                return
            elif owner._put(messages, size):
                self._crowd(owner)

    def _note_sole(
        self, identifiers: tuple[int, ...], topic: str, subscription: Subscription[Any]
    ) -> Mapping[str, Subscription[Any]]:
        if self._soles >= _CACHED_TOPICS:
            self._sole.clear()
            self._soles = 0
        self._soles += 1
        sole = self._sole.setdefault(identifiers, {})
        sole[topic] = subscription
        return sole

    def _targets_of(self, message: Message[Any]) -> tuple[Target, ...]:
        targets = self._targets.get(message.topic)
        if targets is None:
            targets = self._find_targets(message.topic)
        identifiers = message._properties.subscription_identifiers  # pyright: ignore[reportPrivateUsage]
        if identifiers:
            targets = tuple(one for one in targets if one[0].identifier is None or one[0].identifier in identifiers)
        return targets

    def _deliver(self, message: Message[Any], targets: tuple[Target, ...], *, copies: bool, alone: bool) -> None:
        if copies and len(targets) > 1 and not message.retain:
            targets = self._deal(message, targets)
        if len(targets) == 1:
            self._put(message, *targets[0], alone=alone)
        elif targets:
            message._open = len(targets)  # pyright: ignore[reportPrivateUsage]
            for target in targets:
                self._put(message._for_one_of(), *target)  # pyright: ignore[reportPrivateUsage]
        else:
            self._counters.unrouted += 1
            message._done()  # pyright: ignore[reportPrivateUsage]

    def _put_row(self, subscription: Subscription[Any], row: list[Message[Any]]) -> None:
        if subscription._put(row, sum([len(message.payload) for message in row])):
            self._crowd(subscription)

    def _deal(self, message: Message[Any], targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """The targets that this copy is for. Retained messages are not dealt out: a filter that is subscribed later
        makes the broker send one copy, for that filter alone. Nor are shared ones, whose copy may go elsewhere."""
        if message._source is not self._dealing_for:  # pyright: ignore[reportPrivateUsage]  # another connection
            self._dealing_for = message._source  # pyright: ignore[reportPrivateUsage]
            self._dealer = CopyDealer()
        registrations = {one: one.granted_qos for one, _ in targets if one.topic_filter == one.plain_filter}
        if len(registrations) < 2:
            return targets
        chosen = self._dealer.deal(message, registrations)
        return tuple(target for target in targets if target[0] is chosen or target[0] not in registrations)

    def _put(
        self,
        message: Message[Any],
        registration: Registration[Subscription[Any]],
        subscription: Subscription[Any],
        *,
        alone: bool = False,
    ) -> None:
        if message.retain and not registration.options.retain_as_published:
            message.replayed = 0 < subscription._first_generation < message.generation
        if alone and subscription._handle_now(message):
            return
        if subscription._put([message], len(message.payload)):
            self._crowd(subscription)

    def _crowd(self, subscription: Subscription[Any]) -> None:
        self._crowded.add(subscription)
        if subscription._queue.overflow is Overflow.BLOCK:
            self._blocking.add(subscription)
            subscription._watched = True
            subscription._queue.attend()

    def _find_targets(self, topic: str) -> tuple[Target, ...]:
        targets = tuple(
            (registration, subscription)
            for registration in self._registry.match(topic)
            for subscription in registration.members
        )
        if len(topic) <= _CACHED_LENGTH:
            if len(self._targets) >= _CACHED_TOPICS:
                self._forget_targets()
            self._targets[topic] = targets
        return targets

    def _forget_targets(self) -> None:
        self._targets.clear()
        self._sole.clear()
        self._soles = 0

    @property
    def crowded(self) -> bool:
        """Whether a queue has become too long, so that ``give_way`` is due."""
        return bool(self._crowded)

    async def give_way(self) -> None:
        """Let those catch up who only lack a turn of the scheduler, then apply the overflow policy to the others.

        A read can bring thousands of messages before any consumer runs: without this, the fastest handler would lose
        some. It never waits for user code: who is busy with a message is not waited for.
        """
        while any(one._queue.full and one._ready for one in self._crowded):  # noqa: ASYNC110  # it is turns that are waited for
            await trio.lowlevel.checkpoint()
        while self._crowded:
            self._crowded.pop()._queue.shorten()

    @property
    def full(self) -> bool:
        """Whether a subscription with ``Overflow.BLOCK`` has no room."""
        return bool(self._blocking)

    async def wait_room(self) -> None:
        while self._blocking:
            self._room = trio.Event()
            await self._room.wait()

    def changed(self, subscription: Subscription[Any]) -> None:
        """A subscription's queue has become shorter, or whoever empties it has nothing to do."""
        if self.retired and subscription._idle:
            self._idle.set()
        if self._blocking and subscription in self._blocking and not subscription._queue.full:
            self._blocking.discard(subscription)
            subscription._watched = False
            self._room.set()

    # -- the application's end ----------------------------------------------------------------------------------------

    async def open(self, subscription: Subscription[Any], options: SubscriptionOptions) -> None:
        """Route to a subscription and wait until the broker granted it, however many connections that takes.

        The route is there before the broker hears of the filter. On an error or cancellation the subscription is
        gone again. Raises ``SubscribeError`` or ``DriverClosedError``.
        """
        registration, revision = self.want(subscription, options)
        self._open.add(subscription)
        try:
            code = await self._registry.wait_answer(registration, revision)
            if subscription not in self._open:
                raise DriverClosedError(f"the subscription of {subscription.topic_filter!r} was ended meanwhile")
            if code.is_failure:
                raise SubscribeError(
                    f"the broker refused to subscribe to {subscription.topic_filter!r}: {registration.refusal}",
                    subscription.topic_filter,
                    code,
                )
            subscription._first_generation = registration.generation
        except BaseException:
            self.close(subscription)
            raise

    def want(
        self, subscription: Subscription[Any], options: SubscriptionOptions
    ) -> tuple[Registration[Subscription[Any]], int]:
        """Route to a subscription and have the broker told, without waiting for its answer; ``find`` does not know it.

        Returns its registration, and the revision of it. Raises ``ValueError`` or ``DriverClosedError``.
        """
        nursery = self._nursery
        if nursery is None:
            raise DriverClosedError("the driver is not running")
        registration, revision = self._registry.add(subscription.topic_filter, options, subscription)
        subscription._registration = registration
        if subscription._handler is not None:
            nursery.start_soon(self._handle, subscription)
        return registration, revision

    def close(self, subscription: Subscription[Any]) -> Leaving | None:
        """End a subscription; returns what to wait for if the broker must be told."""
        trio.current_time()  # raises in another thread, before anything is changed
        self._open.discard(subscription)
        leaving = None
        if subscription._registration is not None:
            leaving = self._registry.remove(subscription._registration, subscription)
        subscription._close()
        return leaving

    async def close_and_wait(self, subscriptions: list[Subscription[Any]]) -> None:
        """End subscriptions and wait until the broker forgot them. Raises ``UnsubscribeError``."""
        leaving = [self.close(subscription) for subscription in subscriptions]
        await trio.lowlevel.checkpoint()
        for one in leaving:
            if one is not None:
                code = await self._registry.wait_left(one)
                if code.is_failure:
                    raise UnsubscribeError(
                        f"the broker refused to unsubscribe {one.topic_filter!r}: {code}", one.topic_filter, code
                    )

    def find(self, target: Subscription[Any] | str) -> list[Subscription[Any]]:
        """A subscription that is open, or the handler subscriptions of a topic filter."""
        if isinstance(target, Subscription):
            return [target] if target in self._open else []
        return [one for one in self._open if one.topic_filter == target and one._handler is not None]

    async def retire(self) -> None:
        """Take no more messages, and wait until the handlers are done with those that are here.

        What comes now is dropped unacknowledged: else a busy topic would keep the driver from ever being left. Nothing
        holds up the reader any more, since behind such messages lie the acknowledgements that leaving waits for.
        """
        self.retired = True
        self._blocking.clear()
        self._room.set()
        for subscription in list(self._handling):
            while subscription in self._handling and not subscription._idle:
                self._idle = trio.Event()
                await self._idle.wait()

    @property
    def unprocessed(self) -> int:
        """Messages that a handler or an iterator has, or that wait for one."""
        return sum(one._unprocessed for one in self._open | self._handling)

    def close_all(self) -> None:
        """The driver ends: what was not processed is lost."""
        for subscription in list(self._open):
            self._open.discard(subscription)
            subscription._queue.abandon()  # no connection is left to acknowledge it on
            subscription._close()

    # -- handlers -----------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The message-dispatch task: home of the handlers' tasks. Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:  # inside: while the nursery waits for its tasks it takes no more
                self._nursery = None

    async def _handle(self, subscription: Subscription[Any]) -> None:
        handler = subscription._handler
        assert handler is not None
        self._handling.add(subscription)
        try:
            await subscription._handle(handler)
        except BaseExceptionGroup as exc:
            raise without_errors(exc, f"handler of {subscription.topic_filter!r}") from None
        finally:
            self._handling.discard(subscription)
            subscription._handler_ended()
            self._idle.set()

    def failed(self, subscription: Subscription[Any], message: Message[Any], error: Exception) -> bool:
        """The policy for other people's bugs, in handlers of messages and of dead letters. Cancellation is none.

        Whether the handler shall not go on.
        """
        subscription._note_error()
        if self._on_handler_error is not None:
            self._on_handler_error(error)
            return True
        logger.error("handler of %r failed on %r", subscription.topic_filter, message, exc_info=error)
        return False
