"""Which sessions get a message: the subscription index, shared groups and retained messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import attrs
import trio

from ._filters import has_wildcard, matches, split_share
from ._session import Published, Session, Subscription

Overlapping: TypeAlias = Literal["once", "copies"]

_Members: TypeAlias = dict[Session, Subscription]

_CACHED_TOPICS = 10_000


@attrs.define(eq=False)
class _Group:
    """The members of one ``$share/name/filter``; they take turns."""

    members: dict[Session, Subscription] = attrs.field(factory=dict[Session, Subscription])
    turn: int = 0

    def choose(self) -> tuple[Session, Subscription]:
        candidates = [member for member in self.members.items() if member[0].connected] or list(self.members.items())
        self.turn += 1
        return candidates[self.turn % len(candidates)]


class Router:
    def __init__(self) -> None:
        self.retained: dict[str, Published] = {}
        # Keyed by filter, in two parts, so that thousands of plain topics cost one look-up.
        self._plain: dict[str, _Members] = {}
        self._wild: dict[str, _Members] = {}
        self._groups: dict[tuple[str, str], _Group] = {}
        self._cache: dict[str, list[tuple[Session, list[Subscription]]]] = {}

    def add(self, session: Session, subscription: Subscription) -> None:
        self._cache.clear()
        share, topic_filter = split_share(subscription.topic_filter)
        if share is not None:
            self._groups.setdefault((share, topic_filter), _Group()).members[session] = subscription
        else:
            self._index(topic_filter).setdefault(topic_filter, {})[session] = subscription

    def remove(self, session: Session, topic_filter: str) -> None:
        self._cache.clear()
        share, plain = split_share(topic_filter)
        if share is not None:
            group = self._groups.get((share, plain))
            if group is not None:
                group.members.pop(session, None)
                if not group.members:
                    del self._groups[share, plain]
            return
        index = self._index(plain)
        members = index.get(plain)
        if members is not None:
            members.pop(session, None)
            if not members:
                del index[plain]

    def route(self, message: Published, overlapping: Overlapping) -> int:
        """Hand the message to every session that matches; how many these were."""
        if message.retain:
            self._retain(message)
        if message.expires_at <= trio.current_time():
            return 0
        reached = 0
        for session, found in self._matching(message.topic):
            subscriptions = found
            if message.publisher == session.client_id:
                subscriptions = [subscription for subscription in found if not subscription.no_local]
                if not subscriptions:
                    continue
            reached += 1
            if overlapping == "copies":
                for subscription in subscriptions:
                    _deliver(session, message, [subscription])
            else:
                _deliver(session, message, subscriptions)
        for (_, topic_filter), group in list(self._groups.items()):
            if matches(topic_filter, message.topic):
                reached += 1
                session, subscription = group.choose()
                _deliver(session, message, [subscription])
        return reached

    def send_retained(self, session: Session, subscription: Subscription) -> None:
        """The retained messages of a new subscription, RETAIN set [MQTT-3.3.1-8]."""
        for message in list(self._retained(subscription.topic_filter)):
            if message.expires_at <= trio.current_time():
                del self.retained[message.topic]
                continue
            identifiers = () if subscription.identifier is None else (subscription.identifier,)
            session.deliver(message, min(message.qos, subscription.qos), True, identifiers)

    def _retain(self, message: Published) -> None:
        if message.payload:
            self.retained[message.topic] = message
        else:
            self.retained.pop(message.topic, None)

    def _retained(self, topic_filter: str) -> Iterator[Published]:
        if has_wildcard(topic_filter):
            yield from (message for message in self.retained.values() if matches(topic_filter, message.topic))
        elif topic_filter in self.retained:
            yield self.retained[topic_filter]

    def _index(self, topic_filter: str) -> dict[str, _Members]:
        return self._wild if has_wildcard(topic_filter) else self._plain

    def _matching(self, topic: str) -> list[tuple[Session, list[Subscription]]]:
        found = self._cache.get(topic)
        if found is None:
            by_session: dict[Session, list[Subscription]] = {}
            wild = [members for topic_filter, members in self._wild.items() if matches(topic_filter, topic)]
            for members in (self._plain.get(topic, {}), *wild):
                for session, subscription in members.items():
                    by_session.setdefault(session, []).append(subscription)
            if len(self._cache) >= _CACHED_TOPICS:
                self._cache.clear()
            found = self._cache[topic] = list(by_session.items())
        return found


def _deliver(session: Session, message: Published, subscriptions: list[Subscription]) -> None:
    """One copy, at the highest QoS of the subscriptions, with all of their identifiers [MQTT-3.3.4]."""
    granted = max(subscription.qos for subscription in subscriptions)
    retain = message.retain and any(subscription.retain_as_published for subscription in subscriptions)
    identifiers = tuple(entry.identifier for entry in subscriptions if entry.identifier is not None)
    session.deliver(message, min(message.qos, granted), retain, identifiers)
