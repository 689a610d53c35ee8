"""The latest message of each topic under a filter, for those who must not take old state for the present one.

What the view holds belongs to one connection. It is dropped when that is lost, and filled by what the next one brings:
retained messages, mostly. So nothing that is read can be older than the link, and a snapshot that was due when the
link was lost is never delivered: it is made when it is handed over, from what is there then.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import trio

from ._arguments import SubscribeArguments
from ._driver import MQTTDriver
from ._errors import DriverClosedError, PayloadError, StaleDataError
from ._history import Event
from ._subscription import Subscription
from ._types import Acknowledger, Message, State

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

T = TypeVar("T")


class StateView(Generic[T]):
    """What the topics under a filter say now, or ``StaleDataError``.

    ::

        view = StateView(driver, "panel/+/zone", Zone, complete=lambda topics: "panel/1/zone" in topics)
        async with view:
            async for topics in view.changes():
                print(topics["panel/1/zone"].value)

    It is a subscription like others: entering waits until the broker has granted it, raises what ``subscribe()``
    raises, and leaving ends it. A message with an empty payload takes its topic out, as in MQTT it clears the retained
    message [MQTT-3.3.1-6]; one that does not fit ``message_class`` changes nothing.

    :param driver: may be entered later than the view is made.
    :param topic_filter: as for ``subscribe()``; so are ``message_class`` and ``options``.
    :param complete: whether these topics are all that the application needs; by default it needs at least one. A
        function of topic → message, asked when something changed.
    :param on_reset: called, without arguments, whenever the view was emptied since its connection is over: before any
        message of the next one. It must not block; an exception counts as one of a handler.
    :param debounce: seconds for which `changes()` collects after a change.
    :param max_topics: more topics than this are ignored, and counted in `ignored`.
    """

    @overload
    def __init__(
        self: StateView[bytes],
        driver: MQTTDriver,
        topic_filter: str,
        *,
        complete: Callable[[Mapping[str, Message[bytes]]], bool] | None = None,
        on_reset: Callable[[], object] | None = None,
        debounce: float = 0.1,
        max_topics: int = 10_000,
        **options: Unpack[SubscribeArguments],
    ) -> None: ...

    @overload
    def __init__(
        self,
        driver: MQTTDriver,
        topic_filter: str,
        message_class: type[T],
        *,
        complete: Callable[[Mapping[str, Message[T]]], bool] | None = None,
        on_reset: Callable[[], object] | None = None,
        debounce: float = 0.1,
        max_topics: int = 10_000,
        **options: Unpack[SubscribeArguments],
    ) -> None: ...

    def __init__(
        self,
        driver: MQTTDriver,
        topic_filter: str,
        message_class: Any = bytes,
        *,
        complete: Callable[[Mapping[str, Message[Any]]], bool] | None = None,
        on_reset: Callable[[], object] | None = None,
        debounce: float = 0.1,
        max_topics: int = 10_000,
        **options: Unpack[SubscribeArguments],
    ) -> None:
        for name, function in (("complete", complete), ("on_reset", on_reset)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, not {type(function).__name__}")
        if not 0 <= debounce < math.inf:
            raise ValueError(f"debounce is {debounce!r}, allowed are seconds >= 0")
        if max_topics < 1:
            raise ValueError(f"max_topics is {max_topics!r}, allowed is an int >= 1")
        self.topic_filter = topic_filter
        self.ignored: int = 0
        """Messages of new topics that came when there were ``max_topics``."""
        self._driver = driver
        self._message_class = message_class
        self._complete: Callable[[Mapping[str, Message[Any]]], bool] = complete or bool
        self._on_reset = on_reset
        self._debounce = debounce
        self._max_topics = max_topics
        self._on_dead_letter = options.get("on_dead_letter")
        self._options: SubscribeArguments = {**options, "on_dead_letter": self._take_misfit}
        self._topics: dict[str, Message[T]] = {}
        self._source: Acknowledger | None = None
        """The connection that the topics are of."""
        self._version = 0
        self._judged = -1, False
        self._changed = trio.Event()
        self._subscription: Subscription[T] | None = None
        self._unlisten: Callable[[], None] = lambda: None
        self._end = _End(self)

    async def __aenter__(self) -> Self:
        if self._subscription is not None:
            raise RuntimeError("this view is in use already")
        history = self._driver._history  # pyright: ignore[reportPrivateUsage]  # within the package
        unregister = self._driver.register_connection_callback(self._on_edge)

        def unlisten() -> None:
            unregister()
            history.remove_listener(self._end)

        self._unlisten = unlisten
        try:
            history.add_listener(self._end)
            self._subscription = await self._driver.subscribe(
                self.topic_filter,
                self._take,
                self._message_class,
                **self._options,
            )
        except BaseException:
            self._unlisten()
            raise
        registration = self._subscription._registration  # pyright: ignore[reportPrivateUsage]
        assert registration is not None
        registration.renew = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        subscription, self._subscription = self._subscription, None
        assert subscription is not None
        self._unlisten()
        try:
            self._driver.unsubscribe_nowait(subscription)
        except DriverClosedError:
            pass  # It ended all subscriptions.
        self._drop()

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def fresh(self) -> bool:
        """Whether the link is live and the topics are complete: whether reading works now."""
        return not self._why_stale()

    def __len__(self) -> int:
        return len(self._topics)

    def get(self, topic: str) -> Message[T]:
        """The latest message of a topic. Raises ``StaleDataError``, and ``KeyError`` if the topic has none."""
        self._check_fresh()
        return self._topics[topic]

    def snapshot(self) -> Mapping[str, Message[T]]:
        """Topic → latest message, as of now; it does not change any more. Raises ``StaleDataError``."""
        self._check_fresh()
        return MappingProxyType(dict(self._topics))

    def changes(self) -> AsyncIterator[Mapping[str, Message[T]]]:
        """An iterator of snapshots: the first when the view is fresh, others ``debounce`` seconds after a change.

        Each consumer has its own. None is missed but those that a later one has overtaken. While the view is stale it
        waits; it ends when the view is left, or the driver has closed.
        """
        return _Changes(self)

    def _why_stale(self) -> str:
        state = self._driver.state
        if self._subscription is None or state is State.NEW:
            return "the driver is not started, or the view is not entered"
        if state is not State.LIVE:
            return f"the link is down ({state.value})"
        if self._judged[0] != self._version:
            self._judged = self._version, bool(self._complete(MappingProxyType(self._topics)))
        return "" if self._judged[1] else f"the link is up, but {len(self._topics)} topics are not all of the data yet"

    def _check_fresh(self) -> None:
        reason = self._why_stale()
        if reason:
            raise StaleDataError(f"{self.topic_filter!r}: {reason}")

    @trio.lowlevel.enable_ki_protection
    async def _next(self, seen: int) -> tuple[int, Mapping[str, Message[T]]] | None:
        """The next snapshot after version ``seen``, and its version; None if there will be none."""
        await trio.lowlevel.checkpoint()
        while self._subscription is not None and self._driver.state is not State.CLOSED:
            if self._version == seen or not self.fresh:
                await self._changed.wait()
                continue
            if seen >= 0:
                await trio.sleep(self._debounce)
            if self.fresh:  # Not if the link was lost meanwhile.
                return self._version, self.snapshot()
        return None

    # -- writing ------------------------------------------------------------------------------------------------------

    def _take(self, message: Message[T]) -> None:
        if not self._is_of_the_present(message):
            return
        if not message.payload:
            self._topics.pop(message.topic, None)
        elif len(self._topics) >= self._max_topics and message.topic not in self._topics:
            self.ignored += 1
            return
        else:
            self._topics[message.topic] = message
        self._note()

    def _take_misfit(self, message: Message[Any], error: PayloadError) -> Any:
        if message.payload:
            return None if self._on_dead_letter is None else self._on_dead_letter(message, error)
        return self._take(message)

    def _is_of_the_present(self, message: Message[T]) -> bool:
        """Whether it came from the connection that is up or being made; the first of that one empties the view."""
        source = message._source  # pyright: ignore[reportPrivateUsage]  # within the package
        if source is not None and source.ended:
            return False
        if source is not self._source:
            self._reset()
            self._source = source
        return True

    def _on_edge(self, up: bool) -> None:
        if up and not (self._source is not None and self._source.ended):
            self._note()
        else:
            # Up: a message of a connection that was being closed on purpose came after the edge down.
            self._reset()

    def _reset(self) -> None:
        had = self._source is not None
        self._drop()
        if had and self._on_reset is not None:
            self._on_reset()

    def _drop(self) -> None:
        self._topics.clear()
        self._source = None
        self._note()

    def _note(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = trio.Event()


class _End:
    """Wakes the consumers of a view when its driver has closed: no edge tells them."""

    def __init__(self, view: StateView[Any]) -> None:
        self._view = view

    def put(self, event: Event) -> None: ...

    def end(self) -> None:
        self._view._note()  # pyright: ignore[reportPrivateUsage]  # the two are one


class _Changes(Generic[T]):
    def __init__(self, view: StateView[T]) -> None:
        self._view = view
        self._seen = -1

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Mapping[str, Message[T]]:
        found = await self._view._next(self._seen)  # pyright: ignore[reportPrivateUsage]  # the two are one
        if found is None:
            raise StopAsyncIteration
        self._seen, snapshot = found
        return snapshot
