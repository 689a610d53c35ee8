"""Topic aliases towards the broker: a number for a topic that this connection has named before [MQTT-3.3.2.3.4].

Hazard: an alias is known to the broker only when the packet that sets it has arrived. So a packet for which an alias
was taken must be sent, before any for which one is taken later. That holds because packets are encoded when they are
handed to the writer, which sends in order, and because a connection that fails to send ends: the next one has a table
of its own, which begins empty as the broker's does [MQTT-3.3.2-7].
"""

from __future__ import annotations

from collections import OrderedDict

_LENGTH = 3
"""Bytes that an alias needs in a packet: a topic that is not longer is cheaper in full."""

ROOM = _LENGTH + 1
"""By how much a packet with topic and alias may be longer: the length in front of the properties can grow, too."""


class TopicAliases:
    """The aliases of one connection: at most ``maximum``, and the one least recently used goes to a new topic."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self._aliases: OrderedDict[bytes, int] = OrderedDict()

    def take(self, raw_topic: bytes, *, room: bool = True) -> tuple[bytes, int | None]:
        """The topic to write, ``b""`` if the broker knows its alias, and the alias; None where it would not pay.

        Without ``room`` in the packet for topic and alias, no new one is set. An alias alone is never longer.
        """
        if not self.maximum or len(raw_topic) <= _LENGTH:
            return raw_topic, None
        alias = self._aliases.get(raw_topic)
        if alias is not None:
            self._aliases.move_to_end(raw_topic)
            return b"", alias
        if not room:
            return raw_topic, None
        if len(self._aliases) < self.maximum:
            alias = len(self._aliases) + 1
        else:
            _, alias = self._aliases.popitem(last=False)
        self._aliases[raw_topic] = alias
        return raw_topic, alias
