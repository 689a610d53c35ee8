"""Telling others whether this client is there: birth, will and farewell on one topic.

With fresh client IDs there is a race: the broker may find out late that the old connection is dead, and publish its
will when the new one has said "online" long since. So the topic is watched, and whoever says "offline" while the link
is live is answered with "online".
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ._config import Availability
from ._connection import Connection
from ._errors import DriverClosedError, SubscribeError
from ._outbox import Outgoing
from ._topics import check_topic
from ._types import Message

logger = logging.getLogger("trio_mqtt_driver")


class Presence:
    """Says "online" and "offline" for one driver."""

    def __init__(self, availability: Availability) -> None:
        self._availability = availability
        self._connection: Connection | None = None
        """Where "online" was said, until "offline" is."""

    def birth(self, connection: Connection) -> None:
        """The link is live."""
        self._connection = connection
        self._say(connection, self._availability.online)

    async def farewell(self, connection: Connection) -> None:
        """The link is given up on purpose; returns when the broker has it. The caller sets the deadline."""
        self._connection = None
        outgoing = self._say(connection, self._availability.offline)
        await outgoing.wait()

    async def watch(self, subscribe: Callable[[str, Callable[[Message[Any]], None]], Awaitable[object]]) -> None:
        """Subscribe to the topic; returns when that is granted, or the driver has ended."""
        topic = self._availability.topic
        try:
            await subscribe(topic, self._take)
        except SubscribeError as exc:
            logger.warning("a late will on %r cannot be answered: %s", topic, exc)
        except DriverClosedError:
            pass

    def _take(self, message: Message[Any]) -> None:
        connection = self._connection
        if message.payload == self._availability.offline and connection is not None and not connection.ended:
            logger.info("%r said offline, which we are not: it is the will of a connection that died", message.topic)
            self._say(connection, self._availability.online)

    def _say(self, connection: Connection, payload: bytes) -> Outgoing:
        availability = self._availability
        limits = connection.limits
        # Past the outbox, which may be full; a window that is full leaves QoS 0.
        qos = min(availability.qos, limits.maximum_qos) if connection.sender.has_place else 0
        outgoing = Outgoing(
            availability.topic,
            check_topic(availability.topic),
            payload,
            qos,
            availability.retain and limits.retain_available,
            b"\0",
            trio.current_time(),
        )
        connection.sender.send(outgoing)
        return outgoing
