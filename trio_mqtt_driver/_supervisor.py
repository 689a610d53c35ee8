"""The life of the connections: connect, validate, replay, live, gone, back off, and again.

The states and their order are in ``_states.TRANSITIONS``. One attempt is: options
factory, stream, CONNECT, test publish, replay of all subscriptions, live. Any failure of any step ends the child scope
of that connection and is one failed attempt; the next one begins from nothing, with a new client and a new client ID.

Nothing is permanent. What waits (back-off, pause) waits for its time to pass *or* for ``_wake``, which
``force_reconnect`` and ``apply_settings`` set from any task at any time. Both also replace a live link by the very
path that a lost one takes, so there is only one way back. Only ``pause`` waits for somebody: ``_held`` says why.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from ._backoff import Backoff, Delay
from ._client_id import ClientIds
from ._config import Attempt, DriverConfig, Endpoint
from ._connection import Connection
from ._edges import Edges
from ._errors import (
    ConnectionLostError,
    DriverClosedError,
    MQTTDriverError,
    OptionsError,
    ProtocolVersionError,
    RefusedError,
    TLSError,
    TransportError,
)
from ._handshake import handshake
from ._history import History
from ._inbox import Inbox
from ._outbox import Outbox
from ._probe import probe
from ._registry import Registry, Standing
from ._replay import synchronise
from ._states import States
from ._status import Status
from ._transport import open_stream
from ._types import Diagnosis, State

logger = logging.getLogger("trio_mqtt_driver")

_LIVE = frozenset({State.LIVE})
_CLOSED = frozenset({State.CLOSED})


class Supervisor:
    """Keeps one connection alive, one at a time."""

    def __init__(
        self,
        config: DriverConfig,
        *,
        registry: Registry[Any],
        inbox: Inbox,
        outbox: Outbox,
        history: History,
        edges: Edges,
        rng: random.Random,
        on_terminal: Callable[[RefusedError], None],
    ) -> None:
        self.config = config
        self.generation = 0
        self.connection: Connection | None = None
        """The one that is being made or is live."""
        self.terminal: RefusedError | None = None
        self._registry = registry
        self._inbox = inbox
        self._outbox = outbox
        self._history = history
        self._edges = edges
        self._rng = rng
        self._on_terminal = on_terminal
        self._backoff = Backoff(config.backoff, rng)
        self._ids = ClientIds(config.client_id, config.wall_clock, config.client_id_factory)
        self._ids_key = (config.client_id, config.client_id_factory)
        self._only_3_1_1: set[Endpoint] = set()
        self._spoke_5: set[Endpoint] = set()
        self._states = States()
        self._wake = trio.Event()
        self._held: str | None = None
        self._resumed = trio.Event()
        self._end_session = trio.Event()
        self._attempt_scope = trio.CancelScope()
        self._attempts = 0
        self._next_attempt_at = math.inf
        self._live_since = math.inf
        self._closing = False

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._states.current

    def _to(self, state: State, text: str, error: BaseException | None = None) -> None:
        """Change state: recorded and logged once, in plain words."""
        before = self.state
        self._states.to(state)
        text = self._record(state.value, text, error)
        # A link that cannot be had is worth waking somebody for; the steps of a normal life are not.
        level = logging.WARNING if error is not None else logging.INFO
        traceback = error if logger.isEnabledFor(logging.DEBUG) else None
        logger.log(level, "%s: %s", self.config.client_id, text, exc_info=traceback)
        if state is State.LIVE:
            self._live_since = self._states.since
            self._edges.set(True)
        elif before is State.LIVE and state is not State.CLOSING:
            self._edges.set(False)

    def _record(self, kind: str, text: str, error: BaseException | None = None) -> str:
        """Returns the text as it is kept: on one line and shortened, for a part of it may be the broker's."""
        event = self._history.record(
            at=trio.current_time(),
            wall=self.config.wall_clock(),
            kind=kind,
            generation=self.generation,
            text=text,
            error=error,
        )
        return event.text

    async def wait_state(self, wanted: frozenset[State]) -> State:
        """The first of ``wanted`` to come. Raises ``DriverClosedError`` or the terminal refusal if none will."""
        reached = await self._states.wait(wanted)
        if reached is not None:
            return reached
        if self.terminal is not None:
            raise self.terminal
        names = " or ".join(state.value for state in State if state in wanted)
        raise DriverClosedError(f"the driver was left, it will not be {names}")

    async def wait_live(self) -> None:
        """Return when the link is live. Raises ``DriverClosedError`` or the terminal refusal."""
        await self.wait_state(_LIVE)
        while self.state is not State.LIVE:  # It was lost before the scheduler came to us.
            await self.wait_state(_LIVE)

    # -- the life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a connection until ``close`` or a terminal refusal."""
        try:
            while not self._closing:
                if self._held is not None:
                    await self._stay_away(self._held)
                    continue
                error: MQTTDriverError | None = None
                self._end_session = trio.Event()
                self._wake = trio.Event()
                with trio.CancelScope() as self._attempt_scope:
                    error = await self._attempt()
                if self._closing:
                    break
                if isinstance(error, RefusedError) and error.terminal:
                    self.terminal = error
                    self._to(State.CLOSING, f"stopped for good: {error}", error)
                    self._on_terminal(error)
                    break
                await self._back_off(error)
        finally:
            if self.state is not State.CLOSING:
                self._to(State.CLOSING, "closing")
            self._to(State.CLOSED, "closed")

    async def _attempt(self) -> MQTTDriverError | None:
        """One attempt, and the life of the connection that it becomes: why it ended, None if we ended it."""
        self._attempts += 1
        self._history.counters.attempts += 1
        self._to(State.CONNECTING, f"connecting to {self.config.endpoint} (attempt {self._attempts})")
        try:
            config = await self._make_options()
            if config.protocol == "5" or config.authenticator is not None:  # 3.1.1 would go in without it
                return await self._connect(config, 5)
            if config.protocol == "3.1.1" or config.endpoint in self._only_3_1_1:
                return await self._connect(config, 4)
            error = await self._connect(config, 5)
            if self.state is not State.CONNECTING or not self._may_be_3_1_1(error, config.endpoint):
                return error
            if isinstance(error, ProtocolVersionError):
                self._only_3_1_1.add(config.endpoint)
            text = f"{config.endpoint} does not take MQTT 5 ({error}), trying 3.1.1"
            self._record("downgrade", text)
            logger.info("%s: %s", self.config.client_id, text)
            return await self._connect(config, 4)
        except MQTTDriverError as exc:
            return exc

    def _may_be_3_1_1(self, error: MQTTDriverError | None, endpoint: Endpoint) -> bool:
        # Some 3.1.1 brokers just close. A broker that is going down does so, too: only the plain answer is remembered,
        # and one that has spoken MQTT 5 must not end up with 3.1.1 since it came back between the two tries.
        if isinstance(error, ProtocolVersionError):
            return True
        return type(error) is ConnectionLostError and endpoint not in self._spoke_5

    async def _make_options(self) -> DriverConfig:
        config = self.config
        if config.options_factory is None:
            return config
        attempt = Attempt(
            config=config,
            number=self._attempts,
            generation=self.generation + 1,
            last_error=self._history.last_error,
        )
        with trio.move_on_after(config.factory_timeout):
            try:
                made = config.options_factory(attempt)
                if not isinstance(made, Awaitable):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise OptionsError(
                        f"options_factory must be an async function, but it returned a {type(made).__name__}"
                    )
                options = await made
            except OptionsError:
                raise
            except Exception as exc:  # whatever the application's code raises is one failed attempt
                raise OptionsError(f"options_factory failed: {exc!r}") from exc
            if not isinstance(options, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionsError(f"options_factory must return a DriverConfig, not {type(options).__name__}")
            return options
        raise OptionsError(f"options_factory took longer than factory_timeout={config.factory_timeout:g} s")

    async def _connect(self, config: DriverConfig, version: int) -> MQTTDriverError | None:
        deadline = trio.current_time() + config.connect_timeout
        client_id = self._make_client_id(config)
        stream: trio.abc.Stream | None = None
        with trio.move_on_at(deadline):
            stream = await open_stream(config)
        if stream is None:
            raise TransportError(
                f"{config.endpoint} could not be reached within connect_timeout={config.connect_timeout:g} s"
            )
        self.connection = connection = Connection(
            stream,
            config,
            version=version,
            client_id=client_id,
            generation=self.generation + 1,
            inbox=self._inbox,
            outbox=self._outbox,
            counters=self._history.counters,
        )
        try:
            await connection.run(partial(self._session, deadline=deadline))
        finally:
            self.connection = None
        return connection.cause

    def _make_client_id(self, config: DriverConfig) -> str:
        key = (config.client_id, config.client_id_factory)
        if key != self._ids_key:
            # A base may come back after another: the times go on, so that the IDs still do not repeat.
            self._ids = ClientIds(config.client_id, config.wall_clock, config.client_id_factory, previous=self._ids)
            self._ids_key = key
        try:
            return self._ids.make(self.generation + 1)
        except Exception as exc:  # the application's client_id_factory
            raise OptionsError(f"client_id_factory failed: {exc}") from exc

    async def _session(self, connection: Connection, *, deadline: float) -> None:
        """What happens on a connection, in order; runs in its child nursery."""
        config = connection.config
        with trio.move_on_at(deadline) as scope:
            await handshake(connection)
        if scope.cancelled_caught:
            raise TransportError(f"no CONNACK from {config.endpoint} in connect_timeout={config.connect_timeout:g} s")
        version = "5" if connection.version == 5 else "3.1.1"
        if connection.version == 5:
            self._spoke_5.add(config.endpoint)
        self._to(State.VALIDATING, f"connected to {config.endpoint} with MQTT {version} as {connection.client_id!r}")
        # The broker holds our will from here on: whoever gives the connection up now ends this scope only, so that
        # DISCONNECT still goes out.
        with trio.CancelScope() as self._attempt_scope:
            await self._serve(connection)
        with trio.move_on_after(config.disconnect_timeout):
            await connection.disconnect()

    async def _serve(self, connection: Connection) -> None:
        """From CONNACK on, until somebody wants another connection or none."""
        words = await probe(connection)
        self._registry.begin()
        self._to(State.REPLAYING, f"{words}; replaying {len(self._registry)} subscriptions")
        if self.generation:
            self._history.counters.replays += len(self._registry)
        await synchronise(connection, self._registry)
        # The last answer may have come together with a cancellation: a link that is given up must not go live.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._go_live(connection)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_synchronised, connection)
            with trio.move_on_after(connection.config.backoff.stable_after):
                await self._end_session.wait()
            if not self._end_session.is_set():
                self._backoff.stable()
                await self._end_session.wait()
            nursery.cancel_scope.cancel(reason="the driver ends this connection")

    def _go_live(self, connection: Connection) -> None:
        self.generation += 1
        self._attempts = 0
        self._wake = trio.Event()  # what asked for this link is done; it must not shorten a later wait
        self._history.counters.connections += 1
        refused = self._registry.degraded
        for registration in refused:
            logger.warning(
                "%s: the broker refuses %r: %s",
                self.config.client_id,
                registration.topic_filter,
                registration.reason_code,
            )
        degraded = f", {len(refused)} of them refused" if refused else ""
        self._to(
            State.LIVE,
            f"live: generation {self.generation}, {len(self._registry)} subscriptions{degraded}, "
            f"{len(self._outbox)} messages waiting",
        )
        connection.go_live()

    async def _keep_synchronised(self, connection: Connection) -> None:
        while True:
            await self._registry.wait_work()
            try:
                await synchronise(connection, self._registry)
            except MQTTDriverError as exc:
                connection.fail(exc)

    async def _back_off(self, error: MQTTDriverError | None) -> None:
        """Wait before the next attempt, as long as the back-off says or until somebody asks for it now."""
        if self.state in (
            State.BACKING_OFF,
            State.PAUSED,
        ):  # force_reconnect, apply_settings, pause
            return
        if error is None:  # the same, before the link was live
            self._to(State.BACKING_OFF, "attempt abandoned")
            return
        if self.state is State.LIVE:
            self._history.counters.losses += 1
            what = "connection lost"
            delay = self._backoff.lost(trio.current_time(), trio.current_time() - self._live_since)
        else:
            self._history.counters.failures += 1
            what = "attempt failed"
            delay = self._backoff.failed(retry_at_once=isinstance(error, TLSError))
        self._enter_back_off(what, delay, error)
        self._next_attempt_at = trio.current_time() + delay.seconds
        with trio.move_on_at(self._next_attempt_at):
            await self._wake.wait()
        self._next_attempt_at = math.inf

    async def _stay_away(self, reason: str) -> None:
        if self.state is not State.PAUSED:
            self._to(State.PAUSED, f"paused: {reason}")
        await self._resumed.wait()

    def _enter_back_off(self, what: str, delay: Delay, error: MQTTDriverError) -> None:
        said = f"{type(error).__name__}: {error}"
        if delay.paused:
            self._to(
                State.PAUSED,
                f"reconnect paused after {self._backoff.failures} failures without a stable link, last error: {said}, "
                f"next trial in {delay.seconds:.0f} s",
                error,
            )
        else:
            when = f"in {delay.seconds:.1f} s" if delay.seconds else "at once"
            self._to(State.BACKING_OFF, f"{what}: {said}; next attempt {when}", error)

    # -- from outside -------------------------------------------------------------------------------------------------

    def force_reconnect(self, reason: str, *, even_if_live: bool) -> bool:
        """Connect anew at once; False if the link is live and shall stay."""
        self._check_open()
        if self.state is State.LIVE and not even_if_live:
            text = f"reconnect asked for ({reason}), but the link is live: nothing to do"
            self._record("force reconnect", text)
            logger.info("%s: %s", self.config.client_id, text)
            return False
        self._held = None
        self._resumed.set()
        self._backoff.reset()
        self._record("force reconnect", f"reconnecting at once: {reason}")
        if self.state is State.LIVE:
            # The state changes here and not in the supervisor's task, so that wait_live() called next waits.
            self._to(State.BACKING_OFF, f"reconnecting: {reason}")
            self._end_session.set()
        elif even_if_live and self.state not in (State.BACKING_OFF, State.PAUSED):
            self._attempt_scope.cancel(reason=f"reconnecting: {reason}")
        self._wake.set()
        return True

    def pause(self, reason: str) -> None:
        """Give the link up, whatever its state, and make no other until somebody asks for it."""
        self._check_open()
        if self._held is None:
            self._resumed = trio.Event()
        self._held = reason
        if self.state in (State.LIVE, State.BACKING_OFF):
            # As in force_reconnect: wait_live() called next must wait.
            self._to(State.PAUSED, f"paused: {reason}")
        else:
            self._record("pause", f"pausing: {reason}")
            self._attempt_scope.cancel(reason=f"pausing: {reason}")
        self._end_session.set()
        self._wake.set()

    def resume(self) -> bool:
        """End a pause now, ``pause``'s or the circuit breaker's; False if there is none."""
        self._check_open()
        if self._held is None and self.state is not State.PAUSED:
            return False
        return self.force_reconnect("resumed", even_if_live=False)

    def apply_settings(self, config: DriverConfig) -> None:
        """Use other settings from now on; subscriptions and queued messages stay."""
        self._check_open()
        self.config = config
        self._backoff = Backoff(config.backoff, self._rng)
        self._only_3_1_1.clear()
        self._spoke_5.clear()
        if self._held is None:
            self.force_reconnect("settings changed", even_if_live=True)
        else:
            self._record("settings", "settings changed, for when the pause ends")

    def _check_open(self) -> None:
        if self._closing or self.state in (State.CLOSING, State.CLOSED):
            raise DriverClosedError("the driver was left")

    async def close(self, *, drain: bool) -> None:
        """End the connection with DISCONNECT if it is live, at once if not; with ``drain`` after what is still out.

        The caller bounds it, and cancels ``run`` afterwards.
        """
        if drain and self.state is State.LIVE:
            with trio.move_on_after(self.config.drain_timeout):
                await self._outbox.wait_empty()
        self._closing = True
        if self.state is State.LIVE:
            self._end_session.set()
        else:
            self._attempt_scope.cancel(reason="the driver is left")
        self._wake.set()
        self._resumed.set()
        await self._states.wait(_CLOSED)

    def diagnosis(self) -> Diagnosis:
        connection = self.connection
        return Diagnosis(
            state=self.state,
            generation=self.generation,
            since_last_byte=None if connection is None else trio.current_time() - connection.deadlines.heard_at,
            queued=len(self._outbox),
            in_flight=0 if connection is None else connection.in_flight,
            last_error=self._history.last_error,
        )

    def status(self) -> Status:
        now = trio.current_time()
        connection = self.connection
        return Status(
            state=self.state,
            since=0.0 if self.state is State.NEW else now - self._states.since,
            generation=self.generation,
            client_id=None if connection is None else connection.client_id,
            endpoint=str(self.config.endpoint if connection is None else connection.config.endpoint),
            protocol=None if connection is None else "5" if connection.version == 5 else "3.1.1",
            failures=self._backoff.failures,
            next_attempt_in=None if self._next_attempt_at == math.inf else max(0.0, self._next_attempt_at - now),
            last_error=self._history.last_error,
            since_last_byte=None if connection is None else now - connection.deadlines.heard_at,
            round_trip=None if connection is None else connection.round_trip,
            subscriptions=sum(1 for one in self._registry if one.standing is Standing.GRANTED),
            degraded=tuple((one.topic_filter, str(one.reason_code)) for one in self._registry.degraded),
            queued=len(self._outbox),
            in_flight=0 if connection is None else connection.in_flight,
            unacknowledged=0 if connection is None else connection.unacknowledged,
            counters=self._history.counters.as_dict(),
            history=tuple(self._history),
        )
