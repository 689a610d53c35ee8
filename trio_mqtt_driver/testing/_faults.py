r"""What a memory broker does wrong on request.

Everything that a connection sends or receives is shown to the rules here first. A rule is made by one of the methods
of :class:`Faults`, is active at once, and ends with :meth:`Rule.remove` or its ``with`` block::

    with broker.faults.hold(Kind.PUBACK):           # acknowledgements wait here, and go out at the end of the block
        ...
    broker.faults.cut(Kind.CONNACK, reset=True)     # the next connection is reset after its CONNACK
    broker.faults.refuse_connect(0x87, times=3)     # not authorised, three times
    broker.faults.replace(Kind.SUBACK, b"\x00nonsense", times=1)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import attrs
import trio

from ._filters import matches, require_filter
from ._packets import Packet
from ._properties import Kind

if TYPE_CHECKING:
    from typing_extensions import Self


class Direction(enum.Enum):
    IN = "from the client"
    OUT = "from the broker"


class Action(enum.Enum):
    """What becomes of a packet that a rule applies to."""

    PASS = "pass"
    DROP = "drop"
    HOLD = "hold"
    EOF_BEFORE = "close instead"
    EOF_AFTER = "close after it"
    RESET_BEFORE = "reset instead"
    RESET_AFTER = "reset after it"
    REPLACE = "send something else instead"
    FOLLOW = "send something else right behind it"


_ONE_WAY = {
    Kind.CONNECT: Direction.IN,
    Kind.SUBSCRIBE: Direction.IN,
    Kind.UNSUBSCRIBE: Direction.IN,
    Kind.PINGREQ: Direction.IN,
    Kind.CONNACK: Direction.OUT,
    Kind.SUBACK: Direction.OUT,
    Kind.UNSUBACK: Direction.OUT,
    Kind.PINGRESP: Direction.OUT,
}


@attrs.define(eq=False, kw_only=True)
class Rule:
    """An active fault; also a context manager that removes it at the end."""

    kind: Kind
    client_id: str | None
    first: int
    """The rule starts with this packet of its kind, counted from 1 since the rule was made."""
    times: int | None
    """For how many packets it holds; None for all that follow."""
    seen: int = 0
    """Packets of its kind that came by so far."""
    _faults: Faults = attrs.field(alias="faults")
    _held: list[Callable[[], None]] = attrs.field(factory=list[Callable[[], None]])

    @property
    def held(self) -> int:
        """How many packets are being held back."""
        return len(self._held)

    def release(self) -> None:
        """Let the packets go that were held so far, in order, those whose connection still lives. The rule stays."""
        held, self._held = self._held, []
        for resume in held:
            resume()

    def remove(self) -> None:
        """End the fault; held packets go out."""
        self._faults.forget(self)
        self.release()

    def hold_back(self, resume: Callable[[], None]) -> None:
        self._held.append(resume)

    def applies(self, client_id: str) -> bool:
        """Count this packet, and tell whether it is one of those meant."""
        if self.client_id not in (None, client_id):
            return False
        self.seen += 1
        past = self.seen - self.first
        return past >= 0 and (self.times is None or past < self.times)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


@attrs.define(eq=False, kw_only=True)
class PacketRule(Rule):
    direction: Direction
    action: Action
    other: Packet | bytes = b""
    """What is sent instead of the packet, or behind it."""


@attrs.define(eq=False, kw_only=True)
class _Refusal(Rule):
    topic_filter: str | None
    reason_code: int


class Faults:
    """The faults of one broker. ``client_id=None`` means every client."""

    def __init__(self) -> None:
        self.byte_by_byte = False
        """Deliver every byte to the clients on its own."""
        self._packets: list[PacketRule] = []
        self._refusals: list[_Refusal] = []
        self._resumed: trio.Event | None = None

    @property
    def reading(self) -> bool:
        return self._resumed is None

    @contextmanager
    def stop_reading(self) -> Generator[None, None, None]:
        """Inside the block the broker reads nothing: new connections hang, bytes pile up; then it goes on."""
        if self._resumed is not None:
            raise RuntimeError("the broker has already stopped reading")
        self._resumed = trio.Event()
        try:
            yield
        finally:
            self._resumed.set()
            self._resumed = None

    async def wait_reading(self) -> None:
        """Wait while :meth:`stop_reading` is in force."""
        await trio.lowlevel.checkpoint()
        while self._resumed is not None:
            await self._resumed.wait()

    def drop(
        self,
        kind: Kind,
        *,
        first: int = 1,
        times: int | None = None,
        direction: Direction | None = None,
        client_id: str | None = None,
    ) -> Rule:
        """Lose packets of ``kind``. Where a kind goes both ways, ``direction`` is from the broker unless given."""
        return self._packet_rule(Action.DROP, kind, first, times, direction, client_id)

    def hold(
        self,
        kind: Kind,
        *,
        first: int = 1,
        times: int | None = None,
        direction: Direction | None = None,
        client_id: str | None = None,
    ) -> Rule:
        """Keep packets of ``kind`` back until :meth:`Rule.release` or the end of the rule."""
        return self._packet_rule(Action.HOLD, kind, first, times, direction, client_id)

    def cut(
        self,
        kind: Kind,
        *,
        first: int = 1,
        times: int | None = 1,
        direction: Direction | None = None,
        client_id: str | None = None,
        reset: bool = False,
        before: bool = False,
    ) -> Rule:
        """End the connection after the ``first``-th packet of ``kind``: by EOF, or by a reset.

        "After" means that the packet was sent, or that a received one took effect and was answered. With
        ``before=True`` the packet itself is lost with the connection.
        """
        if reset:
            action = Action.RESET_BEFORE if before else Action.RESET_AFTER
        else:
            action = Action.EOF_BEFORE if before else Action.EOF_AFTER
        return self._packet_rule(action, kind, first, times, direction, client_id)

    def replace(
        self,
        kind: Kind,
        other: Packet | bytes,
        *,
        first: int = 1,
        times: int | None = None,
        client_id: str | None = None,
    ) -> Rule:
        """Send ``other``, a packet of your making or bytes as they are, in place of packets of ``kind``."""
        return self._packet_rule(Action.REPLACE, kind, first, times, Direction.OUT, client_id, other)

    def follow(
        self,
        kind: Kind,
        other: Packet | bytes,
        *,
        first: int = 1,
        times: int | None = None,
        client_id: str | None = None,
    ) -> Rule:
        """Send ``other`` right behind the broker's packets of ``kind``, so that both arrive at once."""
        return self._packet_rule(Action.FOLLOW, kind, first, times, Direction.OUT, client_id, other)

    def refuse_connect(
        self, reason_code: int, *, first: int = 1, times: int | None = None, client_id: str | None = None
    ) -> Rule:
        """Answer CONNECT with this MQTT 5 reason code; a 3.1.1 client gets the return code nearest to it."""
        return self._refusal(Kind.CONNECT, None, reason_code, first, times, client_id)

    def refuse_subscribe(
        self,
        topic_filter: str,
        reason_code: int = 0x87,
        *,
        first: int = 1,
        times: int | None = None,
        client_id: str | None = None,
    ) -> Rule:
        """Answer a SUBSCRIBE for exactly this filter with ``reason_code``; 3.1.1 has only 0x80."""
        return self._refusal(Kind.SUBSCRIBE, require_filter(topic_filter), reason_code, first, times, client_id)

    def refuse_publish(
        self,
        topic_filter: str,
        reason_code: int = 0x87,
        *,
        first: int = 1,
        times: int | None = None,
        client_id: str | None = None,
    ) -> Rule:
        """Acknowledge a QoS 1 or 2 PUBLISH to a matching topic with ``reason_code`` and forget it.

        3.1.1 cannot say so: there the message is acknowledged and forgotten.
        """
        return self._refusal(Kind.PUBLISH, require_filter(topic_filter), reason_code, first, times, client_id)

    def clear(self) -> None:
        """End all faults; held packets go out."""
        for rule in [*self._packets, *self._refusals]:
            rule.remove()

    def forget(self, rule: Rule) -> None:
        self._packets = [entry for entry in self._packets if entry is not rule]
        self._refusals = [entry for entry in self._refusals if entry is not rule]

    def judge(self, packet: Packet, direction: Direction, client_id: str) -> tuple[Action, PacketRule | None]:
        """What to do with a packet; every rule of its kind counts it, the first that applies decides."""
        verdict: tuple[Action, PacketRule | None] = Action.PASS, None
        for rule in self._packets:
            meant = rule.kind is packet.kind and rule.direction is direction and rule.applies(client_id)
            if meant and verdict[0] is Action.PASS:
                verdict = rule.action, rule
        return verdict

    @property
    def quiet(self) -> bool:
        """Whether no packet rule is active."""
        return not self._packets

    def connect_refusal(self, client_id: str) -> int | None:
        return self._refused(Kind.CONNECT, None, client_id)

    def subscribe_refusal(self, topic_filter: str, client_id: str) -> int | None:
        return self._refused(Kind.SUBSCRIBE, topic_filter, client_id)

    def publish_refusal(self, topic: str, client_id: str) -> int | None:
        return self._refused(Kind.PUBLISH, topic, client_id)

    def _refused(self, kind: Kind, topic: str | None, client_id: str) -> int | None:
        code = None
        for rule in self._refusals:
            if rule.kind is not kind:
                continue
            if kind is Kind.SUBSCRIBE and rule.topic_filter != topic:
                continue
            if kind is Kind.PUBLISH and not matches(str(rule.topic_filter), str(topic)):
                continue
            if rule.applies(client_id) and code is None:
                code = rule.reason_code
        return code

    def _packet_rule(
        self,
        action: Action,
        kind: Kind,
        first: int,
        times: int | None,
        direction: Direction | None,
        client_id: str | None,
        other: Packet | bytes = b"",
    ) -> Rule:
        _check_counts(first, times)
        only = _ONE_WAY.get(kind)
        if direction is not None and only not in (None, direction):
            raise ValueError(f"direction: {kind.name} never comes {direction.value}")
        rule = PacketRule(
            kind=kind,
            client_id=client_id,
            first=first,
            times=times,
            faults=self,
            direction=direction or only or Direction.OUT,
            action=action,
            other=other,
        )
        self._packets.append(rule)
        return rule

    def _refusal(
        self,
        kind: Kind,
        topic_filter: str | None,
        reason_code: int,
        first: int,
        times: int | None,
        client_id: str | None,
    ) -> Rule:
        _check_counts(first, times)
        if not 0x80 <= reason_code <= 0xFF:
            raise ValueError(f"reason_code must be a refusal, 0x80 … 0xff, not 0x{reason_code:02x}")
        rule = _Refusal(
            kind=kind,
            client_id=client_id,
            first=first,
            times=times,
            faults=self,
            topic_filter=topic_filter,
            reason_code=reason_code,
        )
        self._refusals.append(rule)
        return rule


def _check_counts(first: int, times: int | None) -> None:
    if first < 1:
        raise ValueError(f"first must be at least 1, not {first}")
    if times is not None and times < 1:
        raise ValueError(f"times must be at least 1, or None for all that follow, not {times}")
