"""A session: what both sides must remember of the messages between them [MQTT-4.1].

With fresh client IDs each connection has one of its own, and both end together. With a stable ID it outlives its
connections: as long as the broker answers CONNECT with Session Present, what is open in it is taken up again with the
same Packet Identifiers, which is what keeps QoS 2 exactly once across a reconnect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs

from ._config import Endpoint
from ._exchanges import Exchanges
from ._inflight import OutgoingWindow, PacketIds
from ._outgoing import Outgoing
from ._types import Message


@attrs.frozen
class SessionKey:
    """Whose session it is: another broker or client ID is another session, and another version of MQTT is as well."""

    client_id: str
    endpoint: Endpoint
    version: int

    def same_name(self, other: SessionKey) -> bool:
        """Whether a broker keeps only one of the two."""
        return self.client_id == other.client_id and self.endpoint == other.endpoint


class Session:
    """Our half of a session. Without a ``key`` it ends with its connection."""

    def __init__(self, key: SessionKey | None = None) -> None:
        self.key = key
        self.established = False
        """Whether the broker has, as far as we know, its half of it."""
        self.wiped = False
        """Whether the broker was made to forget an older session of this name."""
        self.unanswered = 0
        """CONNECTs since the last good CONNACK. One of them may have begun another session without our knowing."""
        self.expires_at = math.inf
        """While there is no connection: when the broker discards its half."""
        self.ids = PacketIds()
        self.outgoing = OutgoingWindow(self.ids, 1)
        self.exchanges = Exchanges(resumable=key is not None)
        self.copies: bool | None = None
        """Whether the broker sends a copy per matching filter and cannot mark them; None until that matters."""
        self.on_processed: Callable[[Message[Any]], object] | None = None
        """The connection that the session goes on with, as far as this module knows it."""

    def is_over(self, now: float) -> bool:
        """Whether it must not be taken up any more: it has expired, and the broker, who would tell, may have told us
        already in a CONNACK that we have not seen."""
        return self.unanswered > 0 and now >= self.expires_at

    def begin(self, *, present: bool) -> list[Outgoing]:
        """CONNACK came. If the broker has forgotten the session, returns what must be published anew."""
        self.established = True
        self.unanswered = 0
        self.expires_at = math.inf
        if present:
            self.outgoing.begin_again()
            return []
        return self.end()

    def end(self) -> list[Outgoing]:
        """Nothing of it can go on any more; returns what was not acknowledged."""
        self.exchanges.clear()
        self.copies = None
        messages = self.outgoing.take_back()
        self.ids.clear()
        return messages

    def processed(self, message: Message[Any]) -> None:
        """The application is done with a QoS 2 message that an older connection of this session brought."""
        received = self.exchanges.open[message.packet_id]
        received.message, received.code = None, message._code  # pyright: ignore[reportPrivateUsage]  # the connection's
        if self.on_processed is not None:
            self.on_processed(message)
