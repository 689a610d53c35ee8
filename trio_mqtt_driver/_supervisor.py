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
from typing import Any, NoReturn

import trio

from ._attempts import Attempts
from ._availability import Presence
from ._backoff import Backoff, Delay
from ._config import Attempt, DriverConfig
from ._connection import Connection
from ._dialer import Dialer
from ._edges import Edges
from ._errors import (
    ConnectError,
    DriverClosedError,
    MQTTDriverError,
    ServerDisconnectedError,
    TLSError,
)
from ._failover import Failover
from ._handshake import handshake_by
from ._history import History
from ._inbox import Inbox
from ._outbox import Outbox
from ._outgoing import Outgoing
from ._probe import probe
from ._registry import Registry
from ._replay import synchronise
from ._states import States
from ._status import Status
from ._types import Diagnosis, State
from ._versions import Versions

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
        before_rebuild: Callable[[Attempt], None],
        presence: Presence,
        rng: random.Random,
        on_terminal: Callable[[ConnectError], None],
    ) -> None:
        self.generation = 0
        self.terminal: ConnectError | None = None
        self.live: Connection | None = None
        """The connection that is live."""
        self._registry = registry
        self._outbox = outbox
        self._history = history
        self._edges = edges
        self._before_rebuild = before_rebuild
        self._presence = presence
        self._rng = rng
        self._on_terminal = on_terminal
        self._backoff = Backoff(config.backoff, rng)
        self._attempts = Attempts(config)
        self._versions = Versions()
        self._failover = Failover(self._attempts, self._versions, partial(self.note, "failover"))
        self._dialer = Dialer(
            self._attempts,
            self._versions,
            inbox=inbox,
            outbox=outbox,
            counters=history.counters,
            on_downgrade=partial(self.note, "downgrade"),
            on_suspect=partial(self.note, "suspect"),
            on_remark=partial(self._record, "clock"),
            rng=rng,
        )
        self._states = States()
        self._wake = trio.Event()
        self._held: str | None = None
        self._resumed = trio.Event()
        self._attempt_scope = trio.CancelScope()
        self._next_attempt_at = math.inf
        self._live_since = math.inf
        self._closing = False

    @property
    def config(self) -> DriverConfig:
        """The settings in force."""
        return self._attempts.config

    @property
    def connection(self) -> Connection | None:
        """The one that is being made or is live."""
        return self._dialer.connection

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._states.current

    def _to(self, state: State, text: str, error: BaseException | None = None) -> None:
        """Change state: recorded and logged once, in plain words."""
        live = self.live
        self._states.to(state)
        self.live = self.connection if state is State.LIVE else None
        text = self._record(state.value, text, error)
        # A link that cannot be had is worth waking somebody for; the steps of a normal life are not.
        level = logging.WARNING if error is not None else logging.INFO
        if logger.isEnabledFor(level):
            traceback = error if logger.isEnabledFor(logging.DEBUG) else None
            logger.log(level, "%s: %s", self.config.client_id, text, exc_info=traceback)
        if state is State.LIVE:
            self._live_since = self._states.since
            self._edges.set(True)
        elif live is not None and state is not State.CLOSING:
            live.sender.stand_back()
            for outgoing in self.undelivered:
                outgoing.link_lost(self.diagnosis)
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

    def note(self, kind: str, text: str, level: int = logging.INFO) -> None:
        """Something that changes no state: recorded and logged."""
        logger.log(level, "%s: %s", self.config.client_id, self._record(kind, text))

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
                self._wake = trio.Event()
                with trio.CancelScope() as self._attempt_scope:
                    error = await self._attempt()
                if self._closing:
                    break
                # What is to help out must not make it worse: only the first endpoint's refusal ends the driver.
                if isinstance(error, ConnectError) and error.terminal and self._failover.for_primary:
                    self.terminal = error
                    self._to(State.CLOSING, f"stopped for good: {error}", error)
                    self._on_terminal(error)
                    break
                await self._back_off(error)
        finally:
            self._dialer.end_session()
            if self.state is not State.CLOSING:
                self._to(State.CLOSING, "closing")
            self._to(State.CLOSED, "closed")

    async def _attempt(self) -> MQTTDriverError | None:
        """One attempt, and the life of the connection that it becomes: why it ended, None if we ended it."""
        self._history.counters.attempts += 1
        attempt = self._attempts.next(self._failover.aim(), self.generation + 1, self._history.last_error)
        self._to(State.CONNECTING, f"connecting to {attempt.config.endpoint} (attempt {attempt.number})")
        if self._history.counters.attempts > 1:
            self._before_rebuild(attempt)
            await trio.lowlevel.checkpoint_if_cancelled()  # a callback may have given the attempt up
        try:
            await self._dialer.dial(attempt, self._live, still_connecting=lambda: self.state is State.CONNECTING)
        except MQTTDriverError as exc:
            return exc
        return None

    async def _live(self, connection: Connection, deadline: float) -> None:
        """What happens on a connection, in order; runs in its child nursery."""
        await handshake_by(connection, deadline)
        config = connection.config
        self._versions.spoke(config, connection.version)
        self._dialer.adopt(connection.session)
        if connection.resumed:
            self._registry.resume(everything=connection.in_doubt)
        else:  # At once: the next attempt may find this session there, without its subscriptions.
            self._registry.begin()
        self._presence.prepare(config)
        version = "5" if connection.version == 5 else "3.1.1"
        resumed = ", session present" if connection.resumed else ""
        self._to(
            State.VALIDATING,
            f"connected to {config.endpoint} with MQTT {version} as {connection.client_id!r}{resumed}",
        )
        # The broker holds our will from here on: whoever gives the connection up now ends this scope only, so that
        # DISCONNECT still goes out.
        with trio.CancelScope() as self._attempt_scope:
            await self._serve(connection)
        with trio.move_on_after(config.disconnect_timeout):
            await self._presence.farewell(connection)
            await connection.disconnect(end_session=self._closing)

    async def _serve(self, connection: Connection) -> None:
        """From CONNACK on, until somebody wants another connection or none."""
        words = await probe(connection)
        due = self._registry.due
        self._to(State.REPLAYING, f"{words}; replaying {due} subscriptions")
        if self.generation:
            self._history.counters.replays += due
        await synchronise(connection, self._registry)
        # Also because the last answer may have come together with a cancellation: a link that is given up must not go
        # live.
        await self._outbox.take_out_qos0()
        self._go_live(connection)
        beside: list[Callable[[], Awaitable[None]]] = []
        if self._failover.compares:
            beside.append(self._look_for_better)
        if connection.config.availability is not None:
            beside.append(partial(self._presence.insist, connection))
        if connection.config.refill_rate < math.inf:
            beside.append(connection.sender.pace)
        if not beside:  # then there is no nursery to be made and torn down
            await self._keep_synchronised(connection)
        async with trio.open_nursery() as nursery:
            for task in beside:
                nursery.start_soon(task)
            await self._keep_synchronised(connection)

    def _go_live(self, connection: Connection) -> None:
        self.generation += 1
        self._attempts.number = 0
        self._wake = trio.Event()  # what asked for this link is done; it must not shorten a later wait
        self._history.counters.connections += 1
        refused = self._registry.degraded
        for registration in refused:
            logger.warning(
                "%s: the broker refuses %r: %s",
                self.config.client_id,
                registration.topic_filter,
                registration.refusal,
            )
        degraded = f", {len(refused)} of them refused" if refused else ""
        self._failover.live(connection.config.endpoint)
        self._presence.birth(connection)  # before callbacks are told, who may publish at once
        self._to(
            State.LIVE,
            f"live: generation {self.generation}, {len(self._registry)} subscriptions{degraded}, "
            f"{len(self._outbox)} messages waiting",
        )
        if self.state is State.LIVE:  # a callback may have given the link up
            connection.go_live()

    async def _keep_synchronised(self, connection: Connection) -> NoReturn:
        """Tell the broker of each change; and forgive the failures when the link has lived for long enough."""
        stable_at = self._live_since + self._backoff.stable_after
        while True:
            if trio.current_time() >= stable_at:
                stable_at = math.inf
                self._backoff.stable()
                self._failover.stable()
            with trio.move_on_at(min(stable_at, connection.suspects.next_try(self._registry))):
                await self._registry.wait_work()
            refused = connection.suspects.to_try(trio.current_time(), self._registry)
            if refused is not None:
                self._registry.ask_again(refused)
            try:
                await synchronise(connection, self._registry)
            except MQTTDriverError as exc:
                connection.fail(exc)

    @trio.lowlevel.enable_ki_protection
    async def _look_for_better(self) -> None:
        endpoint = await self._failover.wait_better(self.generation + 1)
        # At the same moment somebody else may have ended this link already.
        if endpoint is not None and not self._attempt_scope.cancel_called:
            self._replace(f"{endpoint} is back and preferred")

    async def _back_off(self, error: MQTTDriverError | None) -> None:
        """Wait before the next attempt, as long as the back-off says or until somebody asks for it now."""
        if error is None or self.state in (State.BACKING_OFF, State.PAUSED):  # somebody asked for another one, or none
            self._failover.ended(self._dialer.endpoint, None)
            if self.state not in (State.BACKING_OFF, State.PAUSED):
                self._to(State.BACKING_OFF, "attempt abandoned")
            return
        live = self.state is State.LIVE
        if live:
            self._history.counters.losses += 1
            if trio.current_time() - self._live_since >= self._backoff.stable_after:
                self._failover.stable()  # the subscriptions may not have left the time to say so
        else:
            self._history.counters.failures += 1
        if self._failover.refer(self._dialer.endpoint, error):
            self._to(State.BACKING_OFF, f"following the broker's reference to {self._failover.next}: {error}", error)
            return
        fresh = self._failover.ended(self._dialer.endpoint, error)
        now = trio.current_time()
        if live:
            what = "connection lost"
            taken_over = isinstance(error, ServerDisconnectedError) and error.taken_over
            delay = self._backoff.lost(now, now - self._live_since, taken_over=taken_over)
        else:
            what = "attempt failed"
            delay = self._backoff.failed(retry_at_once=isinstance(error, TLSError))
        if fresh:  # A broker that is back must not wait in full for each one that is still down.
            backoff = self.config.backoff
            delay = Delay(min(delay.seconds, max(backoff.start, backoff.min_interval) if live else backoff.start))
        self._enter_back_off(what, delay, error)
        self._next_attempt_at = now + delay.seconds
        if delay.seconds:
            with trio.move_on_at(self._next_attempt_at):
                await self._wake.wait()
        else:
            await trio.lowlevel.checkpoint()
        self._next_attempt_at = math.inf

    async def _stay_away(self, reason: str) -> None:
        if self.state is not State.PAUSED:
            self._to(State.PAUSED, f"paused: {reason}")
        await self._resumed.wait()

    def _enter_back_off(self, what: str, delay: Delay, error: MQTTDriverError) -> None:
        said = f"{type(error).__name__}: {error}"
        if delay.paused:
            twins = f"; is there another client with the ID {self.config.client_id!r}?" if self._may_have_twin else ""
            self._to(
                State.PAUSED,
                f"reconnect paused after {self._backoff.failures} failures without a stable link, last error: {said}, "
                f"next trial in {round(delay.seconds, 1):g} s{twins}",
                error,
            )
        else:
            when = f"in {delay.seconds:.1f} s" if delay.seconds else "at once"
            self._to(State.BACKING_OFF, f"{what}: {said}; next attempt {when}", error)

    @property
    def _may_have_twin(self) -> bool:
        """Two clients with one ID end each other's connections, and most brokers don't say so."""
        return self.config.stable_id and self.state is State.LIVE

    # -- from outside -------------------------------------------------------------------------------------------------

    def force_reconnect(self, reason: str, *, even_if_live: bool) -> bool:
        """Connect anew at once; False if the link is live and shall stay."""
        self._check_open()
        if self.state is State.LIVE and not even_if_live:
            self.note("force reconnect", f"reconnect asked for ({reason}), but the link is live: nothing to do")
            return False
        self._held = None
        self._resumed.set()
        self._backoff.reset()
        self._failover.reset()
        self.note("force reconnect", f"reconnecting at once: {reason}")
        if self.state is State.LIVE:
            self._replace(reason)
        elif even_if_live and self.state not in (State.BACKING_OFF, State.PAUSED):
            self._attempt_scope.cancel(reason=f"reconnecting: {reason}")
        self._wake.set()
        return True

    def _replace(self, reason: str) -> None:
        """Give the live link up for another one.

        The state changes here and not in the supervisor's task, so that wait_live() called next waits.
        """
        self._to(State.BACKING_OFF, f"reconnecting: {reason}")
        self._attempt_scope.cancel(reason=f"reconnecting: {reason}")

    def pause(self, reason: str) -> None:
        """Give the link up, whatever its state, and make no other until somebody asks for it."""
        self._check_open()
        if self._held is None:
            self._resumed = trio.Event()
        self._held = reason
        self._next_attempt_at = math.inf
        if self.state in (State.LIVE, State.BACKING_OFF):
            # As in force_reconnect: wait_live() called next must wait.
            self._to(State.PAUSED, f"paused: {reason}")
        else:
            self._record("pause", f"pausing: {reason}")
        self._attempt_scope.cancel(reason=f"pausing: {reason}")
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
        self._attempts.config = config
        self._backoff = Backoff(config.backoff, self._rng)
        self._dialer.forget()
        self._failover.configure()
        if self._held is None:
            self.force_reconnect("settings changed", even_if_live=True)
        else:
            self._record("settings", "settings changed, for when the pause ends")

    def _check_open(self) -> None:
        trio.current_time()  # raises in another thread, before anything is changed
        if self._closing or self.state in (State.CLOSING, State.CLOSED):
            raise DriverClosedError("the driver was left")

    async def close(self) -> None:
        """End the connection with DISCONNECT. The caller bounds it, and cancels ``run`` afterwards."""
        self._closing = True
        self._attempt_scope.cancel(reason="the driver is left")
        self._wake.set()
        self._resumed.set()
        await self._states.wait(_CLOSED)

    @property
    def undelivered(self) -> list[Outgoing]:
        """What was accepted and is not acknowledged, oldest first."""
        waiting = [*self._dialer.session.outgoing.messages(), *self._outbox.waiting()]
        return [outgoing for outgoing in waiting if not outgoing.done]

    def diagnosis(self) -> Diagnosis:
        connection = self.connection
        return Diagnosis(
            state=self.state,
            generation=self.generation,
            since_last_byte=None if connection is None else trio.current_time() - connection.deadlines.heard_at,
            queued=len(self._outbox),
            in_flight=len(self._dialer.session.outgoing),
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
            endpoint=str(self._failover.next if connection is None else connection.config.endpoint),
            protocol=None if connection is None else "5" if connection.version == 5 else "3.1.1",
            failures=self._backoff.failures,
            next_attempt_in=None if self._next_attempt_at == math.inf else max(0.0, self._next_attempt_at - now),
            last_error=self._history.last_error,
            since_last_byte=None if connection is None else now - connection.deadlines.heard_at,
            round_trip=None if connection is None else connection.round_trip,
            subscriptions=self._registry.granted,
            degraded=tuple((one.topic_filter, one.refusal) for one in self._registry.degraded),
            queued=len(self._outbox),
            in_flight=len(self._dialer.session.outgoing),
            unacknowledged=0 if connection is None else len(connection.receiver),
            counters=self._history.counters.as_dict(),
            endpoints=self._failover.health(),
            history=tuple(self._history),
        )
