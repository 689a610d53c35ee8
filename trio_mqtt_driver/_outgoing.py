"""A message on its way out, from the call that published it to its outcome, and what callers see of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import attrs
import trio

from ._errors import MessageLostError, NotConnectedError
from ._properties import decode_publish_block
from ._turns import Turns
from ._types import Diagnosis, OfflinePolicy, PublishProperties, PublishResult, ReasonCode

_OVERHEAD = 200
"""Bytes that an accepted message costs besides its topic, payload and properties, roughly."""


@attrs.define(eq=False)
class Outgoing:
    """One message on its way out, from acceptance to its outcome."""

    topic: str
    raw_topic: bytes
    payload: bytes = attrs.field(repr=False)
    qos: int
    retain: bool
    properties: bytes
    """The MQTT 5 property block, without Message Expiry."""
    accepted_at: float
    expiry: int | None = None
    """Message Expiry in seconds, counted from ``accepted_at``."""
    priority: int = 0
    offline: OfflinePolicy = OfflinePolicy.WAIT
    row: int = 0
    """Its number in the outbox file; 0 if it is in none."""
    attempts: int = 0
    sent_at: float = math.inf
    """When its last byte left for the network; not before that can an acknowledgement be overdue."""
    wire_end: int = 0
    order: int = 0
    """Among the messages of QoS 1 and 2 of its session."""
    queued: bool = False
    """Whether it is in the outbox and not on a connection."""
    parked: bool = False
    """Whether the link was lost, so that whoever does not want to wait for the next one need not."""
    blamed: int = 0
    """On how many connections in a row it was the next to be acknowledged when the broker ended them."""
    suspected: bool = False
    """Whether it must be sent alone, since connections have ended over it or one that was sent with it."""
    done: bool = False
    error: Exception | None = None
    on_settled: Callable[[Outgoing], None] | None = None
    _outcome: PublishResult | tuple[ReasonCode, int, float] | None = None
    _event: trio.Event | None = None
    _size: int = 0

    @property
    def expires_at(self) -> float:
        """On Trio's clock; infinite without Message Expiry."""
        return math.inf if self.expiry is None else self.accepted_at + self.expiry

    @property
    def sent_text(self) -> str:
        """For errors: whether it may have arrived."""
        return "it was sent, and may have arrived" if self.attempts else "it was never sent"

    @property
    def left_behind(self) -> bool:
        """Whether it has no outcome, or only that the driver ended first."""
        return not self.done or isinstance(self.error, MessageLostError)

    @property
    def size(self) -> int:
        """Bytes that it counts for in the outbox."""
        if not self._size:
            self._size = len(self.raw_topic) + len(self.payload) + len(self.properties) + _OVERHEAD
        return self._size

    def undelivered(self) -> Undelivered:
        return Undelivered(
            topic=self.topic,
            payload=self.payload,
            qos=self.qos,
            retain=self.retain,
            properties=attrs.evolve(decode_publish_block(self.properties), message_expiry=self.expiry),
            attempts=self.attempts,
        )

    async def settled(self) -> None:
        if self.done:
            await trio.lowlevel.checkpoint()
        while not self.done:
            await self._change()

    async def settled_or_parked(self) -> None:
        if self.done or self.parked:
            await trio.lowlevel.checkpoint()
        while not (self.done or self.parked):
            await self._change()

    async def _change(self) -> None:
        if self._event is None:
            self._event = trio.Event()
        await self._event.wait()

    def _changed(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            event.set()

    def link_lost(self, diagnosis: Callable[[], Diagnosis]) -> None:
        """Whoever does not wait out an outage is told."""
        if self.offline is OfflinePolicy.FAIL:
            self.settle(self.not_connected("the link was lost before the acknowledgement", diagnosis()))
        else:
            self.parked = True
            self._changed()

    def not_connected(self, what: str, diagnosis: Diagnosis) -> NotConnectedError:
        return NotConnectedError(f"publish to {self.topic!r}: {what} ({diagnosis})")

    async def wait(self) -> PublishResult:
        await self.settled()
        return self.result()

    def result(self) -> PublishResult:
        """What came of it; raises if that is an error. Only when it is ``done``."""
        if self.error is not None:
            raise self.error
        outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, tuple):  # most outcomes nobody asks for, and an attrs value costs as much as a packet
            code, generation, at = outcome
            outcome = self._outcome = PublishResult(
                reason_code=code, generation=generation, attempts=self.attempts, latency=at - self.accepted_at
            )
        return outcome

    def acknowledged(self, code: ReasonCode, generation: int, at: float) -> None:
        """The guarantee of its QoS is met."""
        if not self.done:
            self._outcome = (code, generation, at)
            self._settled()

    def settle(self, outcome: PublishResult | Exception) -> None:
        """The first outcome counts."""
        if self.done:
            return
        if isinstance(outcome, Exception):
            self.error = outcome
        else:
            self._outcome = outcome
        self._settled()

    def _settled(self) -> None:
        self.done = True
        self._changed()
        if self.on_settled is not None:
            self.on_settled(self)


@attrs.frozen(kw_only=True)
class Undelivered:
    """A message that was accepted and is not acknowledged.

    With 0 ``attempts`` it has not left; else nobody knows whether it arrived.
    """

    topic: str
    payload: bytes = attrs.field(repr=False)
    qos: int
    retain: bool
    properties: PublishProperties
    attempts: int
    """On how many connections it was sent."""


async def wait_settled(messages: Iterable[Outgoing]) -> None:
    """Return when each of them has an outcome. Checkpoints only if it has to wait."""
    for outgoing in messages:
        if not outgoing.done:
            await outgoing.settled()


class Receipt:
    """What became, or will become, of one ``publish_nowait()``."""

    __slots__ = ("_outgoing", "_turns")

    def __init__(self, outgoing: Outgoing, turns: Turns) -> None:
        self._outgoing = outgoing
        self._turns = turns

    def __repr__(self) -> str:
        outgoing = self._outgoing
        state = "waiting" if not outgoing.done else "failed" if outgoing.error is not None else "acknowledged"
        return f"<Receipt {outgoing.topic!r} qos={outgoing.qos} {state}>"

    @property
    def done(self) -> bool:
        """Whether the outcome is known, so that ``wait()`` does not block."""
        return self._outgoing.done

    async def wait(self) -> PublishResult:
        """Wait for the QoS guarantee to be met, and return how; any number of tasks may wait.

        Cancelling the wait does not cancel the delivery. Raises a `PublishError`: refused, expired, superseded,
        dropped, quarantined, or lost because the driver was left first; ``ServerLimitError``; and, if it was published
        with ``offline="fail"``, ``NotConnectedError``.
        """
        if not self._outgoing.done:
            return await self._outgoing.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._turns.over(trio.current_time()):
            await trio.lowlevel.cancel_shielded_checkpoint()
        return self._outgoing.result()
