"""The way of a message from ``publish()`` to the connection that takes it at once, or to the outbox."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from ._config import DriverConfig
from ._errors import (
    DriverClosedError,
    MessageExpiredError,
    MessageLostError,
    OutboxFileError,
    PublishTimeoutError,
    SupersededError,
)
from ._history import Counters
from ._limits import publish_error
from ._outbox import Outbox, expired_text
from ._outgoing import Outgoing, Receipt, Undelivered, wait_settled
from ._store import Store
from ._supervisor import Supervisor
from ._turns import Turns
from ._types import OfflinePolicy, PublishResult, ReasonCode, State


class Publisher:
    """Hands messages over, and waits for what becomes of them. ``check_open`` raises ``DriverClosedError``."""

    def __init__(
        self, supervisor: Supervisor, outbox: Outbox, counters: Counters, check_open: Callable[[], None]
    ) -> None:
        self._supervisor = supervisor
        self._outbox = outbox
        self._counters = counters
        self.path: str | None = None
        """Of the outbox file."""
        self._check_open = check_open
        self._store: Store | None = None
        self._turns = Turns()

    @asynccontextmanager
    async def stored(self, config: DriverConfig) -> AsyncGenerator[None, None]:
        """Keep the outbox in its file while the block runs, if it has one. Raises ``OutboxFileError``."""
        if config.outbox_path is None:
            yield
            return
        store = await Store.open(config.outbox_path, wall_clock=config.wall_clock, counters=self._counters)
        try:
            self._store = store
            self.path = config.outbox_path
            self._outbox.attach(store)
            yield
        finally:
            await store.aclose()  # noqa: ASYNC102  # it shields and bounds itself

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """What the outbox needs in the background. Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run)
            if self._store is not None:
                nursery.start_soon(self._store.run)

    async def publish(self, outgoing: Outgoing) -> PublishResult:
        """Until the guarantee of its QoS is met, or for ``publish_timeout``. ``MQTTDriver.publish`` says the rest."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        self._check_link(outgoing)
        if not outgoing.qos and self._send_at_once(outgoing):
            if self._turns.over():
                await trio.lowlevel.cancel_shielded_checkpoint()
            return outgoing.result()
        timeout = self._supervisor.config.publish_timeout
        if timeout == math.inf:
            return await self._publish(outgoing)
        with trio.move_on_after(timeout):
            return await self._publish(outgoing)
        self._counters.overdue += 1
        error = PublishTimeoutError(
            f"{outgoing.topic!r} was not acknowledged within publish_timeout={timeout:g} s",
            self._supervisor.diagnosis(),
        )
        outgoing.settle(error)
        raise error

    async def express(
        self, topic: str, payload: object, qos: int, properties: Mapping[str, Any]
    ) -> PublishResult | None:
        """As ``publish``. None, and nothing is done, if it is not for the express lane, or not now."""
        await trio.lowlevel.checkpoint_if_cancelled()
        live = self._supervisor.live
        if live is None:
            return None
        express = live.sender.express
        if qos == 0:
            sent = express.publish_0(topic, payload, properties)
            if sent is None:
                return None
            if sent.turns.over():
                await trio.lowlevel.cancel_shielded_checkpoint()
            return sent.result
        if qos != 1 or not express.waits or self._outbox.crowded:
            return None
        outgoing = express.publish_1(topic, payload, properties)
        return None if outgoing is None else await outgoing.wait()

    async def _publish(self, outgoing: Outgoing) -> PublishResult:
        if outgoing.expiry is None:
            await self._outbox.wait_room(outgoing)
        else:
            with trio.move_on_at(outgoing.expires_at) as scope:
                await self._outbox.wait_room(outgoing)
            if scope.cancelled_caught:
                self._counters.expired += 1
                raise MessageExpiredError(expired_text(outgoing))
        self._check_open()
        self._check_link(outgoing)  # again: it may have waited for room
        if not self._send_at_once(outgoing):
            self._queue(outgoing)
        if outgoing.offline is OfflinePolicy.WAIT:
            return await outgoing.wait()
        await outgoing.settled_or_parked()
        # Who asks for the latest does not mind that there is a newer one by now.
        if not outgoing.done or isinstance(outgoing.error, SupersededError):
            return await self._accepted(outgoing)
        return await outgoing.wait()

    async def _accepted(self, outgoing: Outgoing) -> PublishResult:
        if self._store is not None:
            try:
                await self._store.wait_stored(outgoing)
            except OutboxFileError as exc:
                raise OutboxFileError(
                    f"{outgoing.topic!r} is accepted and will be sent, but is in memory only: {exc}"
                ) from exc
        return PublishResult(
            reason_code=ReasonCode.SUCCESS,
            generation=self._supervisor.generation,
            attempts=outgoing.attempts,
            latency=trio.current_time() - outgoing.accepted_at,
            queued=True,
        )

    def publish_nowait(self, outgoing: Outgoing) -> Receipt:
        """Raises ``OutboxFullError``, ``ServerLimitError``, ``NotConnectedError`` or ``DriverClosedError``."""
        self._check_open()
        self._check_link(outgoing)
        if not self._send_at_once(outgoing):
            self._queue(outgoing)
        outgoing.turns = self._turns
        return outgoing

    def _check_link(self, outgoing: Outgoing) -> None:
        if outgoing.offline is OfflinePolicy.FAIL and self._supervisor.state is not State.LIVE:
            raise outgoing.not_connected("the link is down", self._supervisor.diagnosis())

    # Ctrl-C must not get in between what is counted and what is sent.

    @trio.lowlevel.enable_ki_protection
    def _queue(self, outgoing: Outgoing) -> None:
        live = self._supervisor.live
        self._outbox.accept(outgoing, live=live is not None)
        if live is not None:
            live.sender.refill()
        else:
            outgoing.parked = True

    @trio.lowlevel.enable_ki_protection
    def _send_at_once(self, outgoing: Outgoing) -> bool:
        """Past the outbox, if the link is up and nothing waits there that this must not overtake."""
        supervisor = self._supervisor
        live = supervisor.live
        if live is None:
            if supervisor.state is State.CLOSED:
                raise DriverClosedError("the driver has stopped for good") from supervisor.terminal
            return False
        error = publish_error(live.limits, outgoing)
        if error is not None:
            raise error
        if outgoing.qos:
            if not live.sender.takes_more or not self._outbox.admit(outgoing):
                return False
        elif not live.sender.has_room or self._outbox.waiting_qos0:
            return False
        live.sender.send(outgoing)
        return True

    async def drain(self) -> tuple[Undelivered, ...]:
        """``MQTTDriver.drain`` says what."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        published = self._supervisor.undelivered
        with trio.move_on_after(self._supervisor.config.drain_timeout):
            await wait_settled(published)
        unacknowledged = [outgoing for outgoing in published if outgoing.outcome is None]  # nearly always none
        return tuple(outgoing.undelivered() for outgoing in unacknowledged if outgoing.left_behind)

    def lost(self, outgoing: Outgoing) -> MessageLostError:
        """The driver ended first."""
        text = f"the driver ended before {outgoing.topic!r} was acknowledged; {outgoing.sent_text}"
        if outgoing.row:
            text += "; it is kept in the outbox file"
        return MessageLostError(text)
