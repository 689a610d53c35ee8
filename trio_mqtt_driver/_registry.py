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

import math
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import attrs
import trio

from ._errors import DriverClosedError
from ._plan import Plan
from ._registration import (
    OWN_IDENTIFIERS,
    Batch,
    Leaving,
    Registration,
    Standing,
    SubscriptionOptions,
    Terms,
    overhead,
)
from ._topics import FilterTrie
from ._types import ReasonCode, UserProperties

M = TypeVar("M")

NOTHING: Mapping[str, str] = {}


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
        self._plan: Plan[M] = Plan()
        self._replaying = False
        """Whether all that is in the plan is due; then nothing is in flight."""
        self._replayed = 0
        """The session that the plan went to last."""
        self._in_flight: set[Batch[M]] = set()
        """Taken, and not answered."""
        self._expecting = False
        """Whether some of those may be the plan's."""
        self._work = trio.Event()
        self._closed = False
        self.version = 0
        """Changes whenever routes do."""

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[Registration[M]]:
        return iter(self._wanted.values())

    def __contains__(self, topic_filter: object) -> bool:
        return topic_filter in self._wanted

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
        if self._plan.count == len(self._wanted):
            return []
        refused = Standing.REFUSED
        return [registration for registration in self if registration.standing is refused]

    @property
    def granted(self) -> int:
        """How many filters the broker has granted, on this connection or, between two, on the last one."""
        granted = Standing.GRANTED
        again = self._plan.count if self._replaying else 0
        again += sum(len(batch.registrations) for batch in self._in_flight if batch.codes is not None)
        return sum(1 for registration in self if registration.standing is granted) - again

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
            highest = max(registration.wishes.values())
            lower = highest < registration.options.qos
            if registration.standing is Standing.REFUSED or (registration.standing is Standing.DUE and lower):
                # It was the newcomer's wish that was refused, or not answered: back to what the others had.
                registration.ask(attrs.evolve(registration.options, qos=highest))
                registration.revision += 1
                self._make_due(registration)
            return None
        registration.wake()  # nobody will answer who still waits
        if registration.answered:
            self._forget_plan()
        topic_filter = registration.topic_filter
        del self._wanted[topic_filter]
        self._due.pop(topic_filter, None)
        self._routes.remove(registration.plain_filter, registration)
        filters = self._class_of.pop(registration, None)
        if filters is not None:
            filters.remove(registration.plain_filter, registration)
        if not self._told(registration):
            return None
        leaving = self._leaving.setdefault(topic_filter, Leaving(topic_filter))
        self._work.set()
        return leaving

    def _told(self, registration: Registration[M]) -> bool:
        """Whether the broker may have it in this session."""
        if registration.untold == self._session:
            return False
        # Each that had been answered was in the plan that this session was told, if it was (``_replayed``).
        return registration.told == self._session or (bool(registration.answered) and self._replayed == self._session)

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
        if registration.answered:
            self._forget_plan()
        registration.standing = Standing.DUE
        self._due[registration.topic_filter] = registration
        self._work.set()

    # -- for whoever holds the connection ---------------------------------------------------------------------------

    def begin(self) -> None:
        """A new session: the broker knows nothing, so what was to be forgotten is."""
        for topic_filter in list(self._leaving):
            self.left(topic_filter, ReasonCode.SUCCESS)
        self._session += 1
        self._in_flight.clear()
        self._replay()

    def resume(self, *, everything: bool) -> None:
        """The session of before: what it has not answered, and what it refused, is asked for again.

        With ``everything`` all the others are, too: it may be another session.
        """
        unanswered = {registration for batch in self._in_flight for registration in batch.registrations}
        self._in_flight.clear()
        for registration in unanswered:
            if registration.granted_in != self._session:  # nor was it by a plan
                registration.granted_in = 0
        if everything:
            self._replay()
            return
        for registration in self:
            if registration.renew or registration in unanswered or registration.standing is Standing.REFUSED:
                self._make_due(registration)

    def _replay(self) -> None:
        """Everything that is wanted is due."""
        self._replaying = self._plan.count == len(self._wanted)
        if not self._replaying:
            self._plan.forget()
            self._all_due()
        if self.due:
            self._work.set()

    def _all_due(self) -> None:
        due = Standing.DUE  # here and below: a member of an Enum takes long to look up
        for registration in self._wanted.values():
            registration.standing = due
        self._due.update(self._wanted)

    def _forget_plan(self) -> None:
        if self._replaying:
            self._replaying = False
            self._all_due()
        self._plan.forget()
        if not self._expecting:
            return
        self._expecting = False
        for batch in self._in_flight:
            if batch.codes is not None:
                batch.codes = None
                for registration in batch.registrations:
                    registration.standing = Standing.DUE

    @property
    def due(self) -> int:
        """How many filters the broker must be told."""
        return len(self._due) + (self._plan.count if self._replaying else 0)

    async def wait_work(self) -> None:
        """Return when something is due."""
        while not self.due and not self._leaving:
            self._work = trio.Event()
            await self._work.wait()

    @property
    def leaving(self) -> list[str]:
        """The filters to UNSUBSCRIBE: before what is due, so that one that came back is subscribed last."""
        return list(self._leaving)

    def take_leaving(self, limit: float) -> tuple[list[str], list[str]]:
        """The same, and those that are given up: the broker has not answered on ``limit`` connections."""
        given_up = [name for name, leaving in self._leaving.items() if leaving.asked >= limit]
        for topic_filter in given_up:
            self.left(topic_filter, ReasonCode.UNSPECIFIED_ERROR)
        for leaving in self._leaving.values():
            leaving.asked += 1
        return self.leaving, given_up

    def left(self, topic_filter: str, code: ReasonCode) -> None:
        """The broker has forgotten a filter, or refused to."""
        leaving = self._leaving.pop(topic_filter)
        leaving.reason_code = code
        leaving.done.set()

    def take_due(self, terms: Terms, left_out: Mapping[str, str] = NOTHING, generation: int = 0) -> list[Batch[M]]:
        """What is due, as SUBSCRIBE packets on these terms.

        Those that are ``left_out``, which the terms keep apart, are refused in the broker's place, with these words.
        """
        if terms != self._plan.terms:
            self._forget_plan()
            self._plan.terms = terms
        if left_out:
            if self._replaying and any(topic_filter in self._wanted for topic_filter in left_out):
                self._forget_plan()
            for topic_filter, words in left_out.items():
                self._leave_out(topic_filter, words, generation)
        batches: list[Batch[M]] = []
        if self._replaying:
            self._replaying = False
            self._replayed = self._session
            self._expecting = True
            batches = self._plan.take()
        due = self._take_due()
        last: list[Registration[M]] = []
        if terms.apart:
            last = [registration for registration in due if registration.topic_filter in terms.apart]
            due = [registration for registration in due if registration.topic_filter not in terms.apart]
        for (identifier, user_properties), registrations in _grouped(due).items():
            room = math.inf if terms.max_bytes is None else terms.max_bytes - overhead(user_properties)
            for some in _split(registrations, terms.size, room):
                revisions = [registration.revision for registration in some]
                filters = [registration.packed for registration in some]
                batches.append(Batch(some, revisions, filters, identifier, user_properties))
        for one in last:
            batches.append(_alone(one))
        self._in_flight.update(batches)
        return batches

    def _leave_out(self, topic_filter: str, words: str, generation: int) -> None:
        registration = self._due.pop(topic_filter, None)
        if registration is None:
            return
        # Granted earlier in a session that goes on, it may still be there; others were granted by a plan.
        granted_in = registration.granted_in
        if granted_in != self._session and not (granted_in and self._replayed == self._session):
            registration.granted_in = 0
            registration.untold = self._session
        self.answer(_alone(registration), (ReasonCode.UNSPECIFIED_ERROR,), generation)
        registration.words = words

    def _take_due(self) -> list[Registration[M]]:
        due = list(self._due.values())
        if self._leaving:
            # One that left and came back stays due until its UNSUBSCRIBE is answered, which would undo its SUBSCRIBE.
            due = [registration for registration in due if registration.topic_filter not in self._leaving]
            for registration in due:
                del self._due[registration.topic_filter]
        else:
            self._due.clear()
        session = self._session
        for registration in due:
            registration.told = session
            registration.untold = 0
        return due

    def answer(self, batch: Batch[M], codes: tuple[ReasonCode, ...], generation: int) -> None:
        """The broker answered for the filters of a batch as they were at its revisions."""
        self._in_flight.discard(batch)
        if batch.codes != codes:
            granted = self._take_answer(batch, codes, generation)
            batch.codes = codes if granted else None
        if batch.codes is not None:
            self._plan.add(batch)

    def _take_answer(self, batch: Batch[M], codes: tuple[ReasonCode, ...], generation: int) -> bool:
        """Returns whether all are granted as they are wanted now."""
        as_wanted = True
        granted, refused, session = Standing.GRANTED, Standing.REFUSED, self._session
        for registration, revision, code in zip(batch.registrations, batch.revisions, codes, strict=True):
            registration.reason_code = code
            if registration.words:
                registration.words = ""
            if registration.answered < revision:
                registration.answered = revision
                registration.generation = generation
            if registration.revision != revision or not registration.members:
                as_wanted = False
            elif code >= 0x80:
                registration.standing = refused
                as_wanted = False
            else:
                registration.standing = granted
                registration.granted_in = session
            if registration.waiter is not None:
                registration.wake()
        return as_wanted

    def refuse(self, batch: Batch[M], codes: list[ReasonCode | None], generation: int) -> Batch[M]:
        """The broker has ruled filters of a batch out beforehand, those with a code: returns the others."""
        self._in_flight.discard(batch)
        refused = batch.part([code is not None for code in codes])
        self.answer(refused, tuple([code for code in codes if code is not None]), generation)
        others = batch.part([code is None for code in codes])
        if others.registrations:
            self._in_flight.add(others)
        return others

    def ask_again(self, topic_filter: str) -> None:
        """The broker must be told of this one once more."""
        self._make_due(self._wanted[topic_filter])

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

    @trio.lowlevel.enable_ki_protection
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


def _alone(one: Registration[M]) -> Batch[M]:
    return Batch([one], [one.revision], [one.packed], one.identifier, one.user_properties)


def _grouped(due: list[Registration[M]]) -> dict[tuple[int | None, UserProperties], list[Registration[M]]]:
    """Registrations by what a SUBSCRIBE packet has once."""
    groups: dict[tuple[int | None, UserProperties], list[Registration[M]]] = {}
    group: list[Registration[M]] = []
    identifier: int | None = -1  # nobody's
    user_properties: UserProperties = ()
    for registration in due:
        if registration.identifier != identifier or registration.user_properties is not user_properties:
            identifier, user_properties = registration.identifier, registration.user_properties
            group = groups.setdefault((identifier, user_properties), [])
        group.append(registration)
    return groups


def _split(registrations: list[Registration[M]], size: int, room: float) -> Iterator[list[Registration[M]]]:
    """In lists of at most ``size``, whose filters take ``room`` bytes at most; one that takes more is alone."""
    for start in range(0, len(registrations), size):
        some = registrations[start : start + size]
        if room < math.inf and len(some) > 1 and sum(len(one.packed) for one in some) > room:
            yield from _split(some, (len(some) + 1) // 2, room)
        else:
            yield some
