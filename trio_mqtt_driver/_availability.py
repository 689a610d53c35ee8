"""Telling others whether this client is there: birth, will and farewell on one topic.

With fresh client IDs there is a race: the broker may find out late that the old connection is dead, and publish its
will when the new one has said "online" long since. So the topic is watched, and whoever says "offline" while the link
is live is answered with "online".

Each connection goes by its own config, which is where its will comes from. What changes with ``apply_settings`` or an
``options_factory`` therefore changes with the next connection: the farewell is still said where the birth was.
"""

from __future__ import annotations

import logging
from typing import Any

import trio

from ._arguments import make_subscription
from ._config import Availability, DriverConfig
from ._connection import Connection
from ._dispatch import Dispatcher
from ._errors import PublishRefusedError, ServerLimitError
from ._history import Counters
from ._limits import publish_error
from ._outgoing import Outgoing
from ._subscription import Subscription
from ._topics import check_topic
from ._types import Message

logger = logging.getLogger("trio_mqtt_driver")

_PACE = 1.0
"""Seconds between two answers. Whoever answers us with "offline" each time (two drivers on one topic, with the words
of one the other way round) gets no more than that."""


class Presence:
    """Says "online" and "offline" for one driver, where it is told to."""

    def __init__(self, dispatcher: Dispatcher, counters: Counters) -> None:
        self._dispatcher = dispatcher
        self._counters = counters
        self._availability: Availability | None = None
        """What is watched now."""
        self._subscription: Subscription[Any] | None = None
        self._denied = trio.Event()
        """Set when somebody said that we are offline."""
        self._said: Outgoing | None = None
        """The birth on the present connection."""

    def prepare(self, config: DriverConfig) -> None:
        """Watch the topic of ``config`` from the next replay on, and no other."""
        availability = config.availability
        if availability == self._availability and (availability is None or self._subscription is not None):
            return
        if self._subscription is not None:
            self._dispatcher.close(self._subscription)
        self._availability, self._subscription = availability, None
        if availability is None:
            return
        try:
            # The default options: a subscription of the application's to the same topic must have the same.
            subscription, options = make_subscription(
                availability.topic,
                self._hear,
                bytes,
                {"qos": availability.qos},
                config,
                self._dispatcher,
                self._counters,
            )
            self._dispatcher.want(subscription, options)
        except ValueError as exc:
            logger.warning("%s: a late will cannot be answered: %s", config.client_id, exc)
        else:
            self._subscription = subscription

    def _hear(self, message: Message[Any]) -> None:
        # What was retained is older than our subscription, and so than the birth that follows it [MQTT-3.3.1-8].
        availability = self._availability
        if availability is not None and message.payload == availability.offline and not message.retain:
            self._denied.set()

    def birth(self, connection: Connection) -> None:
        """The subscriptions are there: before anything else is published, say "online"."""
        self._denied = trio.Event()
        availability = connection.config.availability
        self._said = None if availability is None else _say(connection, availability, availability.online)

    @trio.lowlevel.enable_ki_protection
    async def insist(self, connection: Connection) -> None:
        """Say "online" again whenever somebody says otherwise; for as long as the connection is live."""
        availability, said = connection.config.availability, self._said
        if availability is None or said is None:
            return
        await _warn_if_refused(connection, said)
        while True:
            await self._denied.wait()
            self._denied = trio.Event()
            logger.info(
                "%s: %r said that we are offline: perhaps the will of a connection that died; saying otherwise",
                connection.config.client_id,
                availability.topic,
            )
            _say(connection, availability, availability.online)
            await trio.sleep(_PACE)

    async def farewell(self, connection: Connection) -> None:
        """The connection is given up on purpose: say "offline"; returns when the broker has it.

        The caller sets the deadline. If it passes, DISCONNECT must not be sent: then the will says it.
        """
        availability = connection.config.availability
        if availability is not None:
            await _warn_if_refused(connection, _say(connection, availability, availability.offline))


def _say(connection: Connection, availability: Availability, payload: bytes) -> Outgoing:
    # Past the outbox, which may be full; a window that is full leaves QoS 0.
    outgoing = Outgoing(
        availability.topic,
        check_topic(availability.topic),
        payload,
        availability.qos if connection.sender.has_place else 0,
        availability.retain,
        b"\0",
        trio.current_time(),
    )
    error = publish_error(connection.limits, outgoing)
    if error is None:
        connection.sender.send(outgoing)
    else:
        outgoing.settle(error)
    return outgoing


async def _warn_if_refused(connection: Connection, outgoing: Outgoing) -> None:
    try:
        await outgoing.wait()
    except (PublishRefusedError, ServerLimitError) as exc:
        logger.warning("%s: %r is not told %r: %s", connection.config.client_id, outgoing.topic, outgoing.payload, exc)
