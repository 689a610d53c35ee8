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

OVERHEAD = 200
"""Bytes that an accepted message costs besides its topic, payload and properties, roughly."""


class Receipt:
    """What became, or will become, of one ``publish_nowait()``."""

    __slots__ = ()

    done: bool
    """Whether the outcome is known, so that ``wait()`` does not block."""

    async def wait(self) -> PublishResult:
        """Wait for the QoS guarantee to be met, and return how; any number of tasks may wait.

        Cancelling the wait does not cancel the delivery. Raises a `PublishError`: refused, expired, superseded,
        dropped, quarantined, or lost because the driver was left first; ``ServerLimitError``; and, if it was published
        with ``offline="fail"``, ``NotConnectedError``.
        """
        raise NotImplementedError


class Sent(Receipt):
    """For all that one connection took at once with QoS 0: there is no more to tell, of any of them."""

    __slots__ = ("result", "turns")

    done = True

    def __init__(self, generation: int, turns: Turns) -> None:
        self.turns = turns
        self.result = PublishResult(reason_code=ReasonCode.SUCCESS, generation=generation, attempts=1, latency=0.0)

    def __repr__(self) -> str:
        return "<Receipt qos=0 sent>"

    async def wait(self) -> PublishResult:
        await self.turns.wait()
        return self.result


class _Usual(Receipt):
    """What stays as it is for most messages, which is kept here and not in each of them: one is made per publish."""

    retain = False
    expiry: int | None = None
    """Message Expiry in seconds, counted from ``accepted_at``."""
    priority = 0
    row = 0
    """Its number in the outbox file; 0 if it is in none."""
    parked = False
    """Whether the link was lost, so that whoever does not want to wait for the next one need not."""
    blamed = 0
    """On how many connections in a row it was the next to be acknowledged when the broker ended them."""
    suspected = False
    """Whether it must be sent alone, since connections have ended over it or one that was sent with it."""
    error: Exception | None = None


class Outgoing(_Usual):
    """One message on its way out, from acceptance to its outcome."""

    # What each one has is in slots: instances whose attributes come after many others were made, as those of an
    # outcome do, get a dict of their own, which costs more than all the rest of settling a message.
    __slots__ = (
        "accepted_at",
        "attempts",
        "done",
        "offline",
        "on_settled",
        "order",
        "outcome",
        "payload",
        "properties",
        "qos",
        "queued",
        "raw_topic",
        "size",
        "topic",
        "turns",
        "waiter",
        "wire_end",
    )

    properties: bytes
    """The MQTT 5 property block, without Message Expiry."""
    queued: bool
    """Whether it is in the outbox and not on a connection."""
    attempts: int
    """On how many connections it was sent."""
    wire_end: float
    """Where its last packet ends among the bytes of the present connection; infinite if it is in none of them."""
    order: int
    """Among the messages of QoS 1 and 2 of its session."""
    outcome: PublishResult | tuple[ReasonCode, int, float] | None
    """What there is if it is ``done`` without ``error``; see ``result``."""
    on_settled: Callable[[Outgoing], None] | None
    turns: Turns | None
    """Of the publisher."""
    waiter: trio.Event | None
    """Set at the next change, if somebody waits for one."""
    size: int
    """Bytes that it counts for in the outbox."""

    def __init__(
        self,
        topic: str,
        raw_topic: bytes,
        payload: bytes,
        qos: int,
        retain: bool,
        properties: bytes,
        accepted_at: float,
        expiry: int | None = None,
        priority: int = 0,
        offline: OfflinePolicy = OfflinePolicy.WAIT,
        row: int = 0,
        attempts: int = 0,
    ) -> None:
        self.topic = topic
        self.raw_topic = raw_topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.properties = properties
        self.accepted_at = accepted_at
        self.expiry = expiry
        self.priority = priority
        self.offline = offline
        self.row = row
        self.attempts = attempts
        self.size = len(raw_topic) + len(payload) + len(properties) + OVERHEAD
        self.wire_end = math.inf
        self.order = 0
        self.queued = self.done = False
        self.outcome = self.on_settled = self.turns = self.waiter = None

    def __repr__(self) -> str:
        state = "waiting" if not self.done else "failed" if self.error is not None else "acknowledged"
        return f"<Receipt {self.topic!r} qos={self.qos} {state}>"

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

    @trio.lowlevel.enable_ki_protection
    async def _change(self) -> None:
        if self.waiter is None:
            self.waiter = trio.Event()
        await self.waiter.wait()

    def _changed(self) -> None:
        event, self.waiter = self.waiter, None
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

    @trio.lowlevel.enable_ki_protection
    async def wait(self) -> PublishResult:
        if not self.done:
            while not self.done:  # as settled()
                if self.waiter is None:
                    self.waiter = trio.Event()
                await self.waiter.wait()
        elif self.turns is None or self.turns.over():
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        return self.result()

    def result(self) -> PublishResult:
        """What came of it; raises if that is an error. Only when it is ``done``."""
        outcome = self.outcome
        if outcome is None:
            assert self.error is not None
            raise self.error
        if isinstance(outcome, PublishResult):
            return outcome
        # Most outcomes nobody asks for, and an attrs value costs as much as a packet. Nor is it kept: what a thousand
        # receipts hold is what the garbage collector goes through, again and again.
        code, generation, at = outcome
        return PublishResult(code, generation, self.attempts, at - self.accepted_at)

    def acknowledged(self, code: ReasonCode, generation: int, at: float) -> None:
        """The guarantee of its QoS is met."""
        if not self.done:
            self.outcome = (code, generation, at)
            self._settled()

    def settle(self, outcome: PublishResult | Exception) -> None:
        """The first outcome counts."""
        if self.done:
            return
        if isinstance(outcome, Exception):
            self.error = outcome
        else:
            self.outcome = outcome
        self._settled()

    def _settled(self) -> None:
        self.done = True
        self._changed()
        if self.on_settled is not None:
            self.on_settled(self)


class Plain(Outgoing):
    """One of QoS 1 that has a topic, a payload and perhaps properties, and is else as usual.

    ``ExpressLane`` makes it without ``__init__``: that call would cost as much as the packet.
    """

    __slots__ = ()


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
