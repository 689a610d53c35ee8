"""``MQTTDriver``: the face. It holds the others together and does nothing clever."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import trio

from ._arguments import (
    PublishArguments,
    SubscribeArguments,
    check_handler,
    check_states,
    make_config,
    make_outgoing,
    make_subscription,
)
from ._availability import Presence
from ._callbacks import Callbacks
from ._cancelled import only_cancelled
from ._config import Attempt, DriverArguments, DriverConfig
from ._dispatch import Dispatcher
from ._edges import Edges
from ._errors import DriverClosedError, NotConnectedError, ServerLimitError
from ._events import EventStream
from ._history import History
from ._lifespan import Lifespan
from ._limits import subscribe_refusal
from ._outbox import Outbox
from ._outgoing import Receipt, Undelivered, wait_settled
from ._publisher import Publisher
from ._registry import Registry
from ._status import Status
from ._subscription import Handler, Subscription
from ._supervisor import Supervisor
from ._types import OfflinePolicy, PublishResult, State
from ._validators import offline_policy

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

T = TypeVar("T")

Offline = OfflinePolicy | Literal["wait", "queue", "latest", "fail"] | None


class MQTTDriver:
    """Keeps one Trio application talking MQTT through every outage.

    ``async with MQTTDriver("mqtt://localhost") as driver:`` enters when the link is live, and leaves with DISCONNECT.
    With ``start="background"`` it enters at once; then ``await driver.wait_live()``.

    ``config`` is a URL, with the fields of `DriverConfig` as keywords, or a `DriverConfig`. ``rng`` is where jitter
    comes from. A driver may be used once, from the Trio thread only.

    Leaving a live link takes at most ``drain_timeout``, in which handlers finish the messages that are here and what
    was published is acknowledged, and ``disconnect_timeout``, also when cancelled. `undelivered` tells what is left.

    The body's own exception leaves as itself. A terminal `ConnectError` (bad credentials, say) cancels the body and is
    raised; so is a handler's exception with ``on_handler_error="raise"``.
    """

    def __init__(
        self,
        config: DriverConfig | str,
        *,
        start: Literal["live", "background"] = "live",
        rng: random.Random | None = None,
        **options: Unpack[DriverArguments],
    ) -> None:
        config = make_config(config, options)
        if start not in ("live", "background"):
            raise ValueError(f"start is {start!r}, allowed are 'live', 'background'")
        self._start = start
        self._lifespan = Lifespan()
        self._history = History(config.history_events)
        self._outbox = Outbox(
            max_messages=config.outbox_messages,
            max_bytes=config.outbox_bytes,
            when_full=config.outbox_full,
            counters=self._history.counters,
        )
        self._registry: Registry[Subscription[Any]] = Registry(identifiers=config.subscription_identifiers)
        self._dispatcher = Dispatcher(
            self._registry,
            self._history.counters,
            on_handler_error=self._lifespan.fail if config.on_handler_error == "raise" else None,
        )
        self._edges = Edges()
        self._rebuilds: Callbacks[Attempt] = Callbacks("rebuild", "Attempt")
        self._presence = Presence(self._dispatcher, self._history.counters)
        self._supervisor = Supervisor(
            config,
            registry=self._registry,
            inbox=self._dispatcher,
            outbox=self._outbox,
            history=self._history,
            edges=self._edges,
            before_rebuild=self._rebuilds.call,
            presence=self._presence,
            rng=rng or random.Random(),
            on_terminal=self._lifespan.fail,
        )
        self._publisher = Publisher(self._supervisor, self._outbox, self._history.counters, self._check_open)
        self._dispatching = trio.Event()
        self._entered = False
        self._left = False
        self._undelivered: tuple[Undelivered, ...] = ()
        self._context = self._live()

    def __repr__(self) -> str:
        return f"<MQTTDriver {self.config.client_id!r} {self.config.endpoint} {self.state.value}>"

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a driver can be entered once only; make a new MQTTDriver")
        self._entered = True
        await self._context.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._context.__aexit__(kind, value, traceback)  # noqa: ASYNC102  # Lifespan shields and bounds

    @asynccontextmanager
    async def _live(self) -> AsyncGenerator[None, None]:
        try:
            async with (
                self._publisher.stored(self.config),
                self._lifespan.around(self._run, ready=self._ready, stop=self._stop),
            ):
                yield
        finally:
            self._left = True
            self._dispatcher.close_all()
            self._settle()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._dispatcher.run)
            self._presence.prepare(self.config)
            self._dispatching.set()
            nursery.start_soon(self._publisher.run)
            nursery.start_soon(self._keep_connected)

    @trio.lowlevel.enable_ki_protection
    async def _keep_connected(self) -> None:
        try:
            await self._supervisor.run()
        except BaseException as exc:
            # Before the waiters are settled: the body is to see the cancellation, not publishes that are lost.
            if not only_cancelled(exc):
                self._lifespan.fail_with(exc)
            raise
        finally:
            self._settle()

    def _settle(self) -> None:
        """No connection will come any more: whoever waits for one must know, also while the body still unwinds."""
        self._undelivered += tuple(outgoing.undelivered() for outgoing in self._supervisor.undelivered)
        self._history.end()
        self._registry.close()
        self._outbox.close(self._publisher.lost)

    async def _ready(self) -> None:
        # Not before: whoever enters in the background may subscribe at once.
        await self._dispatching.wait()
        if self._start == "live":
            await self.wait_live()

    async def _stop(self, graceful: bool) -> None:
        config = self.config
        if graceful and (live := self._supervisor.live) is not None:
            live.receiver.retire()
            with trio.move_on_after(config.drain_timeout):
                await self._dispatcher.retire()
                await wait_settled(self._supervisor.undelivered)
                await live.wait_written()  # QoS 0; DISCONNECT has little time, and would come behind it
        out, here = len(self.undelivered), self._dispatcher.unprocessed
        if out or here:
            kept = f" (kept in {self._publisher.path})" if out and self._publisher.path else ""
            text = f"left behind: {out} published and not acknowledged{kept}, {here} received and not processed"
            self._supervisor.note("left behind", text, logging.WARNING)
        with trio.move_on_after(config.disconnect_timeout):
            await self._supervisor.close()

    def _check_open(self) -> None:
        if not self._entered:
            raise DriverClosedError("the driver is not entered yet: use 'async with'")
        if self._left:
            raise DriverClosedError("the driver was left; make a new MQTTDriver")

    # -- publishing ---------------------------------------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        payload: object = b"",
        *,
        qos: int = 0,
        retain: bool = False,
        priority: int = 0,
        offline: Offline = None,
        **properties: Unpack[PublishArguments],
    ) -> PublishResult:
        """Publish, and wait until the guarantee of ``qos`` is met: for 0 until it is in the write buffer, for 1 until
        PUBACK, for 2 until PUBCOMP [MQTT-4.3].

        ``payload`` may be bytes-like, str, None (empty), or a dict, list, attrs instance or dataclass, which becomes
        JSON. ``offline`` (an `OfflinePolicy` or its name; default: that of the config) says what an outage means:
        wait it out, leave the message in the outbox and return, or fail. Of what waits in the outbox the highest
        ``priority`` (-10 to 10) goes first. ``message_expiry`` (seconds) counts from this call: what has not left by
        then is given up, and the broker is told what is left of it (MQTT 5).

        Blocks while the outbox is full, too. With QoS 0 on a live link it does not: it is a cancel point then, and
        lets others run every 256th time or millisecond. Cancelling before the message is accepted has no effect;
        afterwards it ends the wait and not the delivery.

        Raises ``ValueError`` or ``TypeError`` for bad arguments, ``ServerLimitError``, `PublishError` (refused,
        expired, overdue, dropped, …: see there), ``OutboxFileError``, ``NotConnectedError`` (``offline="fail"``
        only) and ``DriverClosedError``.
        """
        if retain is False and priority == 0 and offline is None and qos is not True and qos is not False:
            result = await self._publisher.express(topic, payload, qos, properties)
            if result is not None:
                return result
        policy = self.config.offline if offline is None else offline_policy(offline)
        return await self._publisher.publish(make_outgoing(topic, payload, qos, retain, priority, policy, properties))

    def publish_nowait(
        self,
        topic: str,
        payload: object = b"",
        *,
        qos: int = 0,
        retain: bool = False,
        priority: int = 0,
        offline: Offline = None,
        **properties: Unpack[PublishArguments],
    ) -> Receipt:
        """Hand a message over without waiting, link or no link; the receipt tells what became of it.

        ``offline="wait"`` and ``"queue"`` are the same here. Raises what ``publish()`` raises for bad arguments,
        ``OutboxFullError``, ``ServerLimitError``, ``NotConnectedError`` (``offline="fail"``) and
        ``DriverClosedError``.
        """
        if retain is False and priority == 0 and offline is None and qos is not True and qos is not False:
            live = self._supervisor.live
            receipt: Receipt | None = None
            if live is not None and qos == 1:
                receipt = live.sender.express.publish_1(topic, payload, properties)
            elif live is not None and qos == 0:
                receipt = live.sender.express.publish_0(topic, payload, properties)
            if receipt is not None:
                return receipt
        policy = self.config.offline if offline is None else offline_policy(offline)
        return self._publisher.publish_nowait(make_outgoing(topic, payload, qos, retain, priority, policy, properties))

    async def drain(self) -> tuple[Undelivered, ...]:
        """Wait until all that was published so far is acknowledged, for ``drain_timeout`` at most; return what of it
        is not, oldest first.

        An outage is waited out, within that time. The driver goes on as before. Leaving it drains by itself.
        Cancelling ends the wait and nothing else. Raises ``DriverClosedError``, but not if the driver ends meanwhile.
        """
        return await self._publisher.drain()

    @property
    def undelivered(self) -> tuple[Undelivered, ...]:
        """What was published and is not acknowledged, oldest first; once the driver has ended, what it left so."""
        return self._undelivered or tuple(outgoing.undelivered() for outgoing in self._supervisor.undelivered)

    # -- subscribing --------------------------------------------------------------------------------------------------

    @overload
    async def subscribe(
        self, topic_filter: str, handler: Handler[bytes], **options: Unpack[SubscribeArguments]
    ) -> Subscription[bytes]: ...

    @overload
    async def subscribe(
        self, topic_filter: str, handler: Handler[T], message_class: type[T], **options: Unpack[SubscribeArguments]
    ) -> Subscription[T]: ...

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler[Any],
        message_class: Any = bytes,
        **options: Unpack[SubscribeArguments],
    ) -> Subscription[Any]:
        """Call ``handler(message)`` (sync or async) for each message, ``message.value`` being a ``message_class``.

        ``message_class`` is ``bytes``, ``str``, or what is structured from JSON: ``dict``, ``list``, an attrs class,
        a dataclass. With several message classes on one filter a message goes to those it fits.

        Returns when the broker has granted the subscription, however many connections that takes; handlers of one
        subscription run one after the other. It is replayed after each reconnect until it is unsubscribed. If
        cancelled, nothing is subscribed.

        Raises ``ValueError`` or ``TypeError`` for bad arguments, ``SubscribeError``, ``ServerLimitError`` and
        ``DriverClosedError``.
        """
        check_handler(handler)
        return await self._subscribe(topic_filter, handler, message_class, options)

    @overload
    def subscription(
        self, topic_filter: str, **options: Unpack[SubscribeArguments]
    ) -> AbstractAsyncContextManager[Subscription[bytes]]: ...

    @overload
    def subscription(
        self, topic_filter: str, message_class: type[T], **options: Unpack[SubscribeArguments]
    ) -> AbstractAsyncContextManager[Subscription[T]]: ...

    @asynccontextmanager
    async def subscription(
        self, topic_filter: str, message_class: Any = bytes, **options: Unpack[SubscribeArguments]
    ) -> AsyncGenerator[Subscription[Any], None]:
        """``async with driver.subscription("a/#") as messages:`` then ``async for message in messages:``.

        Enters when the broker has granted the subscription, and lives across reconnects. A message is acknowledged
        when the next one is asked for, or the block is left. Arguments and errors are those of ``subscribe()``.
        """
        subscription = await self._subscribe(topic_filter, None, message_class, options)
        try:
            yield subscription
        finally:
            self._dispatcher.close(subscription)
            subscription._finish()  # pyright: ignore[reportPrivateUsage]

    async def _subscribe(
        self, topic_filter: str, handler: Handler[Any] | None, message_class: Any, options: SubscribeArguments
    ) -> Subscription[Any]:
        subscription, subscription_options = make_subscription(
            topic_filter, handler, message_class, options, self.config, self._dispatcher, self._history.counters
        )
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        connection = self._supervisor.connection if self.state is State.LIVE else None
        if connection is not None:
            refusal = subscribe_refusal(connection.limits, topic_filter, subscription_options.user_properties)
            if refusal is not None:
                raise ServerLimitError(f"the broker announced that it refuses {topic_filter!r}: {refusal}")
        await self._dispatcher.open(subscription, subscription_options)
        return subscription

    async def unsubscribe(self, target: Subscription[Any] | str) -> None:
        """End a subscription, or all handler subscriptions of a topic filter.

        The handler is not called again. The broker is told when nobody is left who wants the filter; returns when it
        has answered. Cancelling ends the wait only.

        Raises ``ValueError`` if nothing is subscribed so, ``UnsubscribeError`` and ``DriverClosedError``.
        """
        await self._dispatcher.close_and_wait(self._find(target))

    def unsubscribe_nowait(self, target: Subscription[Any] | str) -> None:
        """The same without waiting for the broker's answer. Raises ``ValueError`` and ``DriverClosedError``."""
        for subscription in self._find(target):
            self._dispatcher.close(subscription)

    def _find(self, target: Subscription[Any] | str) -> list[Subscription[Any]]:
        self._check_open()
        subscriptions = self._dispatcher.find(target)
        if not subscriptions:
            raise ValueError(f"nothing is subscribed with {target!r}")
        return subscriptions

    # -- the link -----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> DriverConfig:
        """The settings in force."""
        return self._supervisor.config

    @property
    def state(self) -> State:
        """Where the driver is in the life of its connections."""
        return self._supervisor.state

    @property
    def generation(self) -> int:
        """How many links have been live so far; 0 before the first."""
        return self._supervisor.generation

    @property
    def client_id(self) -> str | None:
        """The client ID of the present connection; None without one."""
        connection = self._supervisor.connection
        return None if connection is None else connection.client_id

    def status(self) -> Status:
        """A snapshot of state, errors, counters and history; see `Status`."""
        return self._supervisor.status()

    async def wait_live(self) -> None:
        """Return when the link is live. If it never will be: ``DriverClosedError``, or what stopped the driver."""
        self._check_open()
        await self._supervisor.wait_live()

    async def wait_state(self, *states: State) -> State:
        """Wait until the driver is in one of ``states``, and return which; also one that it only passes through.

        Returns at once if it is in one of them now. Raises ``DriverClosedError``, or what stopped the
        driver (a terminal ``ConnectError``), if none of them will come.
        """
        wanted = check_states(states)
        if self.state not in wanted:
            self._check_open()
        return await self._supervisor.wait_state(wanted)

    async def ping(self) -> float:
        """Send PINGREQ and return the round trip in seconds.

        Raises ``NotConnectedError`` without a live link, or the reason for which the link was lost meanwhile.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        connection = self._supervisor.connection
        if self.state is not State.LIVE or connection is None:
            raise NotConnectedError(f"ping: the link is down ({self._supervisor.diagnosis()})")
        return await connection.ping().wait()

    def force_reconnect(self, reason: str = "asked for", *, even_if_live: bool = False) -> bool:
        """Connect anew now: forget failures, back-off and pause. Returns at once; ``wait_live()`` waits.

        A live link is left alone, and False returned, unless ``even_if_live``. Raises ``DriverClosedError``.
        """
        self._check_open()
        return self._supervisor.force_reconnect(reason, even_if_live=even_if_live)

    def pause(self, reason: str = "asked for") -> None:
        """Give the link up, with DISCONNECT, and stay ``PAUSED`` until ``resume()`` or ``force_reconnect()``.

        Returns at once. Subscriptions stay, and publishes wait, as in an outage. Raises ``DriverClosedError``.
        """
        self._check_open()
        self._supervisor.pause(reason)

    def resume(self) -> bool:
        """Connect at once if the driver is paused, by ``pause()`` or after too many failures; else return False.

        Returns at once; ``wait_live()`` waits. Raises ``DriverClosedError``.
        """
        self._check_open()
        return self._supervisor.resume()

    def apply_settings(self, config: DriverConfig) -> None:
        """Reconnect at once with other settings; subscriptions and queued messages stay.

        After ``pause()`` they hold when the pause ends, and do not end it.

        The outbox (its bounds, ``outbox_full``, ``outbox_path``), the bounds of history and subscriptions and
        ``on_handler_error`` stay as they were at the start.
        Raises ``DriverClosedError``.
        """
        if not isinstance(config, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"config must be a DriverConfig, not {type(config).__name__}; see DriverConfig.from_url()")
        self._check_open()
        self._supervisor.apply_settings(config)

    def events(self, buffer: int = 100) -> EventStream:
        """``with driver.events() as events:`` then ``async for event in events:``, each `Event` from this call on.

        It may be called before the driver is entered, to see everything. ``buffer`` is how many events may wait for
        this consumer: when it is full the oldest is dropped, and counted in ``events.missed``. Iteration ends when
        the driver has closed, so whoever shall see that end runs in a nursery around the driver.

        Raises ``ValueError`` for a bad ``buffer`` and ``DriverClosedError``.
        """
        return EventStream(self._history, buffer)

    def register_connection_callback(self, callback: Callable[[bool], object]) -> Callable[[], None]:
        """Call ``callback(True)`` when the link comes up and ``callback(False)`` when it is lost, edges only.

        Not called at registration. It must not block; its exceptions are logged. Returns a function that ends it,
        which may be called any number of times, also inside a callback.
        """
        return self._edges.register(callback)

    def register_rebuild_callback(self, callback: Callable[[Attempt], object]) -> Callable[[], None]:
        """Call ``callback(attempt)`` before each attempt but the first, to drop what came from the old session.

        The old connection is gone by then, and nothing of the new one is there: no options, no client, no stream.
        An attempt that fails has a call too; ``attempt.number`` is 1 for the first after a loss. For the rest it is as
        with `register_connection_callback`. ``apply_settings()`` in it gives the attempt up for another, which has a
        call of its own: what each attempt needs anew is for ``options_factory``.
        """
        return self._rebuilds.register(callback)
