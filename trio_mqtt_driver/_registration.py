"""What is subscribed: one Topic Filter with all that is known of it, and several of them in one SUBSCRIBE packet."""

from __future__ import annotations

import enum
from itertools import compress
from typing import Generic, TypeVar

import attrs
import trio

from ._subscribing import pack_filter
from ._topics import split_share
from ._types import ReasonCode, RetainHandling, UserProperties
from ._validators import between, freeze, instance, one_of, pairs

OWN_IDENTIFIERS = 1023
"""Subscription Identifiers up to this one are the driver's; the application's are above."""

M = TypeVar("M")


@attrs.frozen(kw_only=True)
class SubscriptionOptions:
    """How to subscribe [MQTT-3.8.3.1]; all but ``qos`` are MQTT 5's and without effect on 3.1.1.

    ``identifier`` (1024 to 268,435,455) comes back in ``message.properties.subscription_identifiers``.
    """

    qos: int = attrs.field(default=0, validator=one_of(0, 1, 2))
    no_local: bool = attrs.field(default=False, validator=instance(bool))
    retain_as_published: bool = attrs.field(default=False, validator=instance(bool))
    retain_handling: RetainHandling = attrs.field(default=RetainHandling.SEND, validator=one_of(0, 1, 2))
    identifier: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(between(OWN_IDENTIFIERS + 1, 268_435_455))
    )
    user_properties: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=freeze, validator=pairs)


class Standing(enum.Enum):
    """Where a registration stands with the broker. While it is replayed by a plan, that is where it stood before."""

    DUE = "due"
    """The broker must be told, or has not answered yet."""
    GRANTED = "granted"
    REFUSED = "refused"


@attrs.define(eq=False)
class Registration(Generic[M]):
    """One Topic Filter that the broker shall know."""

    topic_filter: str
    options: SubscriptionOptions
    identifier: int | None
    """The Subscription Identifier: the application's, or that of the registration's class."""
    members: list[M] = attrs.field(factory=list[M])
    wishes: dict[M, int] = attrs.field(factory=dict[M, int])
    """The QoS that each member asked for."""
    standing: Standing = Standing.DUE
    reason_code: ReasonCode | None = None
    """What the last SUBACK said; None before the first."""
    words: str = ""
    """What there is to say of that if no SUBACK said it."""
    revision: int = 0
    renew: bool = False
    """Whether it is sent on each connection, even if the session goes on: somebody needs the retained messages."""
    told: int = 0
    """The session that a SUBSCRIBE for it, other than by a plan, went to last, as the registry counts them."""
    granted_in: int = 0
    """The session in which the broker last granted it, other than by a plan."""
    untold: int = 0
    """The session in which it was refused in the broker's place, if the broker does not have it there."""
    answered: int = 0
    """The highest revision that a SUBACK was for."""
    generation: int = 0
    """The one that brought it."""
    waiter: trio.Event | None = None
    """For the next change, if somebody waits for it."""
    # For each of thousands a replay needs these; whatever it does not have to look at is not fetched from memory.
    packed: bytes = attrs.field(init=False, repr=False)
    """The filter with its options, as it is in a SUBSCRIBE packet."""
    user_properties: UserProperties = attrs.field(init=False, repr=False)
    """Those of the options."""

    def __attrs_post_init__(self) -> None:
        self.ask(self.options)

    @property
    def plain_filter(self) -> str:
        return split_share(self.topic_filter)[1]

    @property
    def refusal(self) -> str:
        """Why it is refused, if it is."""
        return f"{self.reason_code}: {self.words}" if self.words else str(self.reason_code)

    @property
    def granted_qos(self) -> int:
        """The highest QoS that its messages can have, as far as we know; -1 if none come, since it is refused."""
        if self.reason_code is None:
            return 2
        return -1 if self.reason_code.is_failure else int(self.reason_code)

    def ask(self, options: SubscriptionOptions) -> None:
        """Have it asked for with these options."""
        self.options = options
        self.user_properties = options.user_properties
        self.packed = pack_filter(
            self.topic_filter,
            options.qos,
            no_local=options.no_local,
            retain_as_published=options.retain_as_published,
            retain_handling=options.retain_handling,
        )

    def wake(self) -> None:
        """Somebody may wait for a change."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.set()

    @trio.lowlevel.enable_ki_protection
    async def change(self) -> None:
        if self.waiter is None:
            self.waiter = trio.Event()
        await self.waiter.wait()


@attrs.define(eq=False)
class Leaving:
    """A Topic Filter that the broker shall forget."""

    topic_filter: str
    asked: int = 0
    """On how many connections."""
    reason_code: ReasonCode | None = None
    done: trio.Event = attrs.Factory(trio.Event)


@attrs.frozen
class Terms:
    """What SUBSCRIBE packets keep to on a connection."""

    size: int
    """The most filters in one."""
    max_bytes: int | None = None
    shared: bool = True
    """Whether the broker takes shared subscriptions."""
    wildcards: bool = True
    """Whether it takes filters with wildcards."""
    apart: frozenset[str] = frozenset()
    """Filters that have a packet of their own, behind all others."""


@attrs.define(eq=False)
class Batch(Generic[M]):
    """What one SUBSCRIBE packet carries."""

    registrations: list[Registration[M]]
    revisions: list[int]
    filters: list[bytes]
    """Packed, as they were at these revisions."""
    identifier: int | None
    user_properties: UserProperties
    length: int = attrs.field(init=False)
    """The most bytes that the packet can have."""
    codes: tuple[ReasonCode, ...] | None = attrs.field(default=None, init=False)
    """What the broker granted to all of them at these revisions, and is expected to grant again; None if it has not,
    or if another answer has to be taken in."""

    def __attrs_post_init__(self) -> None:
        self.length = overhead(self.user_properties) + sum(map(len, self.filters))

    def part(self, which: list[bool]) -> Batch[M]:
        """A batch of those for which ``which`` says True."""
        return Batch(
            list(compress(self.registrations, which)),
            list(compress(self.revisions, which)),
            list(compress(self.filters, which)),
            self.identifier,
            self.user_properties,
        )


def overhead(user_properties: UserProperties) -> int:
    """The most bytes of a SUBSCRIBE packet without its filters."""
    return 16 + sum(8 + len(name.encode()) + len(value.encode()) for name, value in user_properties)
