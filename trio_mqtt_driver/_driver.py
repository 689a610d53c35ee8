"""``MQTTDriver``: the face. It holds the others together and does nothing clever."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import trio

from ._arguments import PublishArguments, SubscribeArguments, check_names, make_outgoing, offline_policy
from ._codecs import decoder
from ._config import DriverConfig
from ._dispatch import Dispatcher
from ._edges import ConnectionCallback, Edges
from ._errors import DriverClosedError, MessageLostError, NotConnectedError, PublishTimeoutError, ServerLimitError
from ._history import History
from ._lifespan import Lifespan
from ._limits import publish_error, subscribe_refusal
from ._outbox import Outbox, Outgoing, Receipt
from ._registry import Registry, SubscriptionOptions
from ._status import Status
from ._subscription import Handler, Subscription
from ._supervisor import Supervisor
from ._topics import check_filter, split_share
from ._types import OfflinePolicy, Overflow, PublishResult, State

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

T = TypeVar("T")


class MQTTDriver:
    """Keeps one Trio application talking MQTT through every outage.

    ``async with MQTTDriver("mqtt://localhost") as driver:`` enters when the link is live, and leaves with DISCONNECT.
    With ``start="background"`` it enters at once; then ``await driver.wait_live()``.

    ``config`` is a URL, with the fields of `DriverConfig` as keywords, or a `DriverConfig`. ``rng`` is where jitter
    comes from. A driver may be used once, from the Trio thread only. Leaving waits at most ``drain_timeout`` for
    acknowledgements and ``disconnect_timeout`` for the broker, also when cancelled.

    The body's own exception leaves as itself. A refusal that cannot heal (`RefusedError`) cancels the body and is
    raised; so is a handler's exception with ``on_handler_error="raise"``.
    """

    def __init__(
        self,
        config: DriverConfig | str,
        *,
        start: Literal["live", "background"] = "live",
        rng: random.Random | None = None,
        **options: Any,
    ) -> None:
        if isinstance(config, str):
            config = DriverConfig.from_url(config, **options)
        elif not isinstance(config, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"config must be a DriverConfig or a URL, not {type(config).__name__}")
        elif options:
            raise TypeError(f"{', '.join(options)}: give options to the DriverConfig, or a URL with options")
        if start not in ("live", "background"):
            raise ValueError(f"start is {start!r}, allowed are 'live', 'background'")
        self._start = start
        self._lifespan = Lifespan()
        self._history = History(config.history_events)
        self._outbox = Outbox(max_messages=config.outbox_messages, max_bytes=config.outbox_bytes)
        self._registry: Registry[Subscription[Any]] = Registry(identifiers=config.subscription_identifiers)
        self._dispatcher = Dispatcher(
            self._registry,
            self._history.counters,
            on_handler_error=self._lifespan.fail if config.on_handler_error == "raise" else None,
        )
        self._edges = Edges()
        self._supervisor = Supervisor(
            config,
            registry=self._registry,
            inbox=self._dispatcher,
            outbox=self._outbox,
            history=self._history,
            edges=self._edges,
            rng=rng or random.Random(),
            on_terminal=self._lifespan.fail,
        )
        self._dispatching = trio.Event()
        self._entered = False
        self._left = False
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
            async with self._lifespan.around(self._run, ready=self._ready, stop=self._stop):
                yield
        finally:
            self._left = True
            self._dispatcher.close_all()
            self._settle()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._dispatcher.run)
            self._dispatching.set()
            nursery.start_soon(self._keep_connected)

    async def _keep_connected(self) -> None:
        try:
            await self._supervisor.run()
        except trio.Cancelled:
            raise
        except BaseException as exc:
            # Before the waiters are settled: the body is to see the cancellation, not publishes that are lost.
            self._lifespan.fail_with(exc)
            raise
        finally:
            self._settle()

    def _settle(self) -> None:
        """No connection will come any more: whoever waits for one must know, also while the body still unwinds."""
        self._registry.close()
        self._outbox.close(
            lambda outgoing: MessageLostError(f"the driver ended before {outgoing.topic!r} was acknowledged")
        )

    async def _ready(self) -> None:
        # Not before: whoever enters in the background may subscribe at once.
        await self._dispatching.wait()
        if self._start == "live":
            await self.wait_live()

    async def _stop(self, graceful: bool) -> None:
        config = self.config
        with trio.move_on_after((config.drain_timeout if graceful else 0) + config.disconnect_timeout):
            await self._supervisor.close(drain=graceful)

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
        offline: OfflinePolicy | Literal["wait", "fail"] = OfflinePolicy.WAIT,
        **properties: Unpack[PublishArguments],
    ) -> PublishResult:
        """Publish, and wait until the guarantee of ``qos`` is met: for 0 until it is in the write buffer, for 1 until
        PUBACK, for 2 until PUBCOMP [MQTT-4.3]. Outages are waited out, unless ``offline="fail"``.

        ``payload`` may be bytes-like, str, None (empty), or a dict, list, attrs instance or dataclass, which becomes
        JSON. Blocks while the link is down or the outbox is full.

        Cancelling before the message is accepted has no effect; afterwards it ends the wait and not the delivery.

        Raises ``ValueError`` or ``TypeError`` for bad arguments, ``ServerLimitError``, ``PublishRefusedError``,
        ``PublishTimeoutError``, ``NotConnectedError`` (``offline="fail"`` only) and ``DriverClosedError``.
        """
        outgoing = make_outgoing(topic, payload, qos, retain, properties)
        policy = offline_policy(offline)
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        if policy is OfflinePolicy.FAIL and self.state is not State.LIVE:
            raise NotConnectedError(f"publish to {topic!r}: the link is down ({self._supervisor.diagnosis()})")
        timeout = self.config.publish_timeout
        if timeout == math.inf:
            return await self._publish(outgoing)
        with trio.move_on_after(timeout):
            return await self._publish(outgoing)
        error = PublishTimeoutError(
            f"{topic!r} was not acknowledged within publish_timeout={timeout:g} s", self._supervisor.diagnosis()
        )
        outgoing.settle(error)
        raise error

    async def _publish(self, outgoing: Outgoing) -> PublishResult:
        await self._outbox.wait_room(outgoing.size)
        self._check_open()
        self._submit(outgoing)
        return await outgoing.wait()

    def publish_nowait(
        self,
        topic: str,
        payload: object = b"",
        *,
        qos: int = 0,
        retain: bool = False,
        **properties: Unpack[PublishArguments],
    ) -> Receipt:
        """Hand a message over without waiting, link or no link; the receipt tells what became of it.

        Raises what ``publish()`` raises for bad arguments, ``OutboxFullError`` and ``DriverClosedError``.
        """
        outgoing = make_outgoing(topic, payload, qos, retain, properties)
        self._check_open()
        self._submit(outgoing)
        return Receipt(outgoing)

    def _submit(self, outgoing: Outgoing) -> None:
        if self.state is State.CLOSED:
            raise DriverClosedError("the driver has stopped for good") from self._supervisor.terminal
        connection = self._supervisor.connection if self.state is State.LIVE else None
        if connection is not None:
            error = publish_error(connection.limits, outgoing)
            if error is not None:
                raise error
            if not outgoing.qos and connection.has_room and not self._outbox.holds_qos0:
                connection.send(outgoing)
                return
        self._outbox.accept(outgoing)
        if connection is not None:
            connection.refill()

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
        if not callable(handler):
            raise TypeError(f"handler must be callable, not {type(handler).__name__}")
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
            subscription.finish()

    async def _subscribe(
        self, topic_filter: str, handler: Handler[Any] | None, message_class: Any, options: SubscribeArguments
    ) -> Subscription[Any]:
        check_filter(topic_filter)
        check_names("subscribe", options, SubscribeArguments)
        arguments: dict[str, Any] = dict(options)
        overflow = Overflow(arguments.pop("overflow", Overflow.DROP_OLDEST))
        queue_messages = arguments.pop("queue_messages", None)
        # The config's own rule is the rule here.
        bound = self.config if queue_messages is None else self.config.evolve(queue_messages=queue_messages)
        on_dead_letter = arguments.pop("on_dead_letter", None)
        if on_dead_letter is not None and not callable(on_dead_letter):
            raise TypeError(f"on_dead_letter must be callable, not {type(on_dead_letter).__name__}")
        subscription: Subscription[Any] = Subscription(
            topic_filter,
            decode=decoder(message_class),
            typed=message_class is not bytes and message_class is not None,
            handler=handler,
            on_dead_letter=on_dead_letter,
            overflow=overflow,
            queue_messages=bound.queue_messages,
            counters=self._history.counters,
            changed=self._dispatcher.changed,
            failed=self._dispatcher.failed,
        )
        subscription_options = SubscriptionOptions(**arguments)
        if subscription_options.no_local and split_share(topic_filter)[0] is not None:
            raise ValueError(
                f"no_local is True, which a shared subscription may not be: {topic_filter!r} [MQTT-3.8.3-4]"
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
        """Return when the link is live. Raises ``RefusedError`` or ``DriverClosedError`` if it never will be."""
        self._check_open()
        await self._supervisor.wait_live()

    async def wait_state(self, *states: State) -> State:
        """Wait until the driver is in one of ``states``, and return which; also one that it only passes through.

        Returns at once if it is in one of them now. Raises ``RefusedError`` or ``DriverClosedError`` if the driver
        ends and none of them will come.
        """
        if not states:
            raise TypeError("wait_state needs at least one State")
        for state in states:
            if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"states: must be of {State}, not {state!r}")
        self._check_open()
        return await self._supervisor.wait_state(frozenset(states))

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

        The bounds of outbox, history and subscriptions and ``on_handler_error`` stay as they were at the start.
        Raises ``DriverClosedError``.
        """
        if not isinstance(config, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"config must be a DriverConfig, not {type(config).__name__}; see DriverConfig.from_url()")
        self._check_open()
        self._supervisor.apply_settings(config)

    def register_connection_callback(self, callback: ConnectionCallback) -> Callable[[], None]:
        """Call ``callback(True)`` when the link comes up and ``callback(False)`` when it is lost, edges only.

        Not called at registration. It must not block; its exceptions are logged. Returns a function that ends it,
        which may be called any number of times, also inside a callback.
        """
        return self._edges.register(callback)
