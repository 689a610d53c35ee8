"""The subscriptions that the application wants, and what the broker made of them. Pure: no I/O.

One *registration* is one Topic Filter on the broker; its *members* are the local subscriptions that share it. A
registration is *due* when the broker has not been told of its present form: after ``add``, after an upgrade, and after
every reconnect. Whoever holds the connection works off what is due (``_replay``), so a first SUBSCRIBE, ten thousand
concurrent ones and the replay after a reconnect are one and the same path.

Overlapping filters: a broker may send one copy of a message per matching filter [MQTT-3.3.5-1]. Each copy fans out
here by topic, so each subscription would get all of them. With MQTT 5 the copies carry Subscription Identifiers.
Filters are therefore sorted into classes within which no two can match the same topic; a class is one identifier, and
a copy goes only to the matches of the classes that it names. One identifier per filter would do the same at the price
of one SUBSCRIBE packet per filter, since the identifier belongs to the packet.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Generic, TypeVar

import attrs
import trio

from ._errors import DriverClosedError
from ._subscribing import pack_filter
from ._topics import FilterTrie, split_share
from ._types import ReasonCode, RetainHandling
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
    """Where a registration stands with the broker."""

    DUE = "due"
    SENT = "sent"
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
    revision: int = 0
    renew: bool = False
    """Whether it is sent on each connection, even if the session goes on: somebody needs the retained messages."""
    told: int = 0
    """The session that a SUBSCRIBE for it went to last, as the registry counts them."""
    answered: int = 0
    """The highest revision that a SUBACK was for."""
    generation: int = 0
    """The one that brought it."""
    waiter: trio.Event | None = None
    """For the next change, if somebody waits for it."""
    # For each of thousands a replay needs these; whatever it does not have to look at is not fetched from memory.
    packed: bytes = attrs.field(init=False, repr=False)
    """The filter with its options, as it is in a SUBSCRIBE packet."""
    user_properties: tuple[tuple[str, str], ...] = attrs.field(init=False, repr=False)
    """Those of the options."""

    def __attrs_post_init__(self) -> None:
        self.ask(self.options)

    @property
    def plain_filter(self) -> str:
        return split_share(self.topic_filter)[1]

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

    async def change(self) -> None:
        if self.waiter is None:
            self.waiter = trio.Event()
        await self.waiter.wait()


@attrs.define(eq=False)
class Leaving:
    """A Topic Filter that the broker shall forget."""

    topic_filter: str
    reason_code: ReasonCode | None = None
    done: trio.Event = attrs.Factory(trio.Event)


@attrs.define(eq=False)
class Batch(Generic[M]):
    """What one SUBSCRIBE packet carries."""

    registrations: list[Registration[M]]
    revisions: list[int]
    identifier: int | None
    user_properties: tuple[tuple[str, str], ...]

    def part(self, which: list[bool]) -> Batch[M]:
        """A batch of those for which ``which`` says True."""
        return attrs.evolve(
            self,
            registrations=list(compress(self.registrations, which)),
            revisions=list(compress(self.revisions, which)),
        )


class Registry(Generic[M]):
    """All registrations, and which of them the broker must still be told."""

    def __init__(self, *, identifiers: bool) -> None:
        self._identifiers = identifiers
        self._wanted: dict[str, Registration[M]] = {}
        self._due: dict[str, Registration[M]] = {}
        self._leaving: dict[str, Leaving] = {}
        self._routes: FilterTrie[Registration[M]] = FilterTrie()
        self._classes: list[FilterTrie[Registration[M]]] = []
        self._class_of: dict[Registration[M], FilterTrie[Registration[M]]] = {}
        self._session = 1
        self._work = trio.Event()
        self._closed = False
        self.version = 0
        """Changes whenever routes do."""

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[Registration[M]]:
        return iter(self._wanted.values())

    def match(self, topic: str) -> list[Registration[M]]:
        """The registrations whose filter matches a Topic Name."""
        return self._routes.match(topic)

    @property
    def overlapping(self) -> bool:
        """Whether some topic matches more than one registration."""
        return sum(1 for filters in self._classes if len(filters)) > 1

    @property
    def degraded(self) -> list[Registration[M]]:
        """Those that the broker refuses."""
        refused = Standing.REFUSED
        return [registration for registration in self if registration.standing is refused]

    def add(self, topic_filter: str, options: SubscriptionOptions, member: M) -> tuple[Registration[M], int]:
        """Want a filter. Returns its registration and the revision of it that ``member`` needs.

        A filter that is there already is shared: the higher QoS wins. Raises ``ValueError`` if its other options
        differ, since the broker keeps one set per filter.
        """
        registration = self._wanted.get(topic_filter)
        if registration is None:
            self._check_identifier(topic_filter, options.identifier)
            registration = Registration[M](topic_filter, options, options.identifier)
            number = self._classify(registration)
            if options.identifier is None and self._identifiers and number <= OWN_IDENTIFIERS:
                registration.identifier = number
            self._wanted[topic_filter] = registration
            self._routes.add(registration.plain_filter, registration)
        else:
            same = attrs.evolve(options, qos=registration.options.qos)
            if same != registration.options:
                raise ValueError(
                    f"{topic_filter!r} is subscribed already with {registration.options}; "
                    f"subscriptions of one filter may differ in qos only, not as {options}"
                )
            # Subscribed again even at the same QoS: that is what makes the broker send the newcomer the retained
            # messages. Members that were there before see them again, marked as retained.
            if options.qos > registration.options.qos:
                registration.ask(options)
        registration.members.append(member)
        registration.wishes[member] = options.qos
        registration.revision += 1
        self._make_due(registration)
        self.version += 1
        return registration, registration.revision

    def _check_identifier(self, topic_filter: str, identifier: int | None) -> None:
        """Overlapping filters with one identifier could not be told apart by it."""
        if identifier is None:
            return
        filters: FilterTrie[str] = FilterTrie()
        filters.add(topic_filter, topic_filter)
        for other in self:
            if other.identifier == identifier and filters.overlaps(other.topic_filter):
                raise ValueError(
                    f"identifier is {identifier}, which {other.topic_filter!r} has, and {topic_filter!r} overlaps it; "
                    "allowed are those that no overlapping filter has"
                )

    def remove(self, registration: Registration[M], member: M) -> Leaving | None:
        """Want no longer. The last member takes the filter off the broker: returns what to wait for, if that is so."""
        if member not in registration.members:
            return None
        registration.members.remove(member)
        del registration.wishes[member]
        self.version += 1
        if registration.members:
            if registration.standing is Standing.REFUSED:
                # It was the newcomer's wish that was refused: back to what the others had.
                registration.ask(attrs.evolve(registration.options, qos=max(registration.wishes.values())))
                registration.revision += 1
                self._make_due(registration)
            return None
        registration.wake()  # nobody will answer who still waits
        topic_filter = registration.topic_filter
        del self._wanted[topic_filter]
        self._due.pop(topic_filter, None)
        self._routes.remove(registration.plain_filter, registration)
        filters = self._class_of.pop(registration, None)
        if filters is not None:
            filters.remove(registration.plain_filter, registration)
        if registration.told != self._session:
            return None
        leaving = self._leaving.setdefault(topic_filter, Leaving(topic_filter))
        self._work.set()
        return leaving

    def _classify(self, registration: Registration[M]) -> int:
        """Put it in the first class that it overlaps nothing of; returns the number of the class, from 1."""
        number = 0
        while number < len(self._classes) and self._classes[number].overlaps(registration.plain_filter):
            number += 1
        if number == len(self._classes):
            self._classes.append(FilterTrie())
        self._classes[number].add(registration.plain_filter, registration)
        self._class_of[registration] = self._classes[number]
        return number + 1

    def _make_due(self, registration: Registration[M]) -> None:
        registration.standing = Standing.DUE
        self._due[registration.topic_filter] = registration
        self._work.set()

    # -- for whoever holds the connection ---------------------------------------------------------------------------

    def begin(self) -> None:
        """A new session: the broker knows nothing, so what was to be forgotten is."""
        for topic_filter in list(self._leaving):
            self.left(topic_filter, ReasonCode.SUCCESS)
        self._session += 1
        due = Standing.DUE  # here and below: a member of an Enum takes long to look up
        for registration in self._wanted.values():
            registration.standing = due
        self._due.update(self._wanted)
        if self._due:
            self._work.set()

    def resume(self, *, everything: bool) -> None:
        """The session of before: what it has not answered, and what it refused, is asked for again.

        With ``everything`` all the others are, too: it may be another session.
        """
        for registration in self:
            if everything or registration.renew or registration.standing in (Standing.SENT, Standing.REFUSED):
                self._make_due(registration)

    @property
    def due(self) -> int:
        """How many filters the broker must be told."""
        return len(self._due)

    async def wait_work(self) -> None:
        """Return when something is due."""
        while not self._due and not self._leaving:
            self._work = trio.Event()
            await self._work.wait()

    @property
    def leaving(self) -> list[str]:
        """The filters to UNSUBSCRIBE: before what is due, so that one that came back is subscribed last."""
        return list(self._leaving)

    def left(self, topic_filter: str, code: ReasonCode) -> None:
        """The broker has forgotten a filter, or refused to."""
        leaving = self._leaving.pop(topic_filter)
        leaving.reason_code = code
        leaving.done.set()

    def take_due(self, *, size: int, max_bytes: int | None) -> list[Batch[M]]:
        """What is due, as SUBSCRIBE packets of at most ``size`` filters and ``max_bytes``."""
        due = list(self._due.values())
        if self._leaving:
            # One that left and came back stays due until its UNSUBSCRIBE is answered, which would undo its SUBSCRIBE.
            due = [registration for registration in due if registration.topic_filter not in self._leaving]
            for registration in due:
                del self._due[registration.topic_filter]
        else:
            self._due.clear()
        groups: dict[tuple[int | None, tuple[tuple[str, str], ...]], list[Registration[M]]] = {}
        group: list[Registration[M]] = []
        identifier: int | None = -1  # nobody's
        user_properties: tuple[tuple[str, str], ...] = ()
        session, sent = self._session, Standing.SENT
        for registration in due:
            registration.standing = sent
            registration.told = session
            if registration.identifier != identifier or registration.user_properties is not user_properties:
                identifier, user_properties = registration.identifier, registration.user_properties
                group = groups.setdefault((identifier, user_properties), [])
            group.append(registration)
        batches: list[Batch[M]] = []
        for (identifier, user_properties), registrations in groups.items():
            overhead = 16 + sum(8 + len(name.encode()) + len(value.encode()) for name, value in user_properties)
            room = math.inf if max_bytes is None else max_bytes - overhead
            for some in _split(registrations, size, room):
                revisions = [registration.revision for registration in some]
                batches.append(Batch(some, revisions, identifier, user_properties))
        return batches

    def answer(self, batch: Batch[M], codes: Iterable[ReasonCode], generation: int) -> None:
        """The broker answered for the filters of a batch as they were at its revisions."""
        sent, granted, refused = Standing.SENT, Standing.GRANTED, Standing.REFUSED
        for registration, revision, code in zip(batch.registrations, batch.revisions, codes, strict=True):
            registration.reason_code = code
            if registration.answered < revision:
                registration.answered = revision
                registration.generation = generation
            if registration.revision == revision and registration.standing is sent:
                registration.standing = refused if code >= 0x80 else granted
            if registration.waiter is not None:
                registration.wake()

    # -- for whoever subscribes -------------------------------------------------------------------------------------

    async def wait_answer(self, registration: Registration[M], revision: int) -> ReasonCode:
        """Return what the broker said to this revision, however many connections that takes.

        Raises ``DriverClosedError``.
        """
        while registration.answered < revision:
            self._check_open()
            if not registration.members:
                raise DriverClosedError(f"the subscription of {registration.topic_filter!r} was ended meanwhile")
            await registration.change()
        assert registration.reason_code is not None
        return registration.reason_code

    async def wait_left(self, leaving: Leaving) -> ReasonCode:
        """Return what the broker said to UNSUBSCRIBE; a session that ended has forgotten.

        Raises ``DriverClosedError``.
        """
        if not self._closed:
            await leaving.done.wait()
        if leaving.reason_code is None:
            self._check_open()
        assert leaving.reason_code is not None
        return leaving.reason_code

    def _check_open(self) -> None:
        if self._closed:
            raise DriverClosedError("the driver was left before the broker answered")

    def close(self) -> None:
        """No connection will come any more: wake everybody who waits for an answer."""
        self._closed = True
        for registration in self:
            registration.wake()
        for leaving in self._leaving.values():
            leaving.done.set()


def _split(registrations: list[Registration[M]], size: int, room: float) -> Iterator[list[Registration[M]]]:
    """In lists of at most ``size``, whose filters take ``room`` bytes at most; one that takes more is alone."""
    for start in range(0, len(registrations), size):
        some = registrations[start : start + size]
        if room < math.inf and len(some) > 1 and sum(len(one.packed) for one in some) > room:
            yield from _split(some, (len(some) + 1) // 2, room)
        else:
            yield some
