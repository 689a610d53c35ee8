"""The broker's QoS 2 exchanges of a session: which PUBLISH is a new message, and which one repeats another. No I/O.

[MQTT-4.3.3] goes by the Packet Identifier alone. But brokers lose track, and then an identifier with DUP is not that
of the message which we know, or is that of one which we have done with:

- One that forgets an exchange uses its identifier for another message. To take that for a repetition would lose it.
- mosquitto (2.0.11), if a connection breaks while it takes a session up, may on the next one no longer know that it
  has sent PUBREL, and begin again with the PUBLISH. To take that for a new message would deliver it twice.

So what the message says is compared, too, and the last exchanges of a session that can go on are remembered beyond
their PUBREL: for the second connection after it, and later ones. Those that we refused are for the next one, too:
there is no PUBREL, and if the refusal was lost with the link, the broker repeats the PUBLISH.

Hazard: a broker may use an identifier again soon, and for a message that says the same as the one before; if its first
transmission is lost with the link, the second one looks like a repetition. A broker that does so is found out by a
first transmission that does arrive, and then nothing is remembered. mosquitto counts its identifiers up.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from ._types import Message

_REMEMBERED: Final = 1000


@attrs.define(eq=False)
class Received:
    """A QoS 2 message of the broker's that was delivered and is not released."""

    message: Message[Any] | None
    """None once the application is done with it."""
    content: int
    """What it says, in a number."""
    code: int = 0
    """With which it is acknowledged."""


class Exchanges:
    """``open`` has them by Packet Identifier, from PUBLISH to PUBREL.

    ``resumable``: whether the session can go on with another connection; no other one needs to remember.
    """

    def __init__(self, *, resumable: bool = True) -> None:
        self.open: dict[int, Received] = {}
        self._ended: dict[int, tuple[int, int, int]] = {}
        """What the last ones said, on which connection they ended, and with which code, the oldest first. No
        identifier is in both."""
        self._resumable = self._remembers = resumable
        self._connections = 0

    def connect(self) -> None:
        """There is another connection: one that gets no CONNACK, too, since mosquitto loses track as it sends that."""
        self._connections += 1

    def find(self, message: Message[Any], *, here: bool) -> Received | None:
        """The exchange that a PUBLISH repeats; None if it begins one. ``here``: whether this connection has already
        brought its identifier."""
        packet_id = message.packet_id
        content = hash((message.topic, message.payload))
        found = self.open.get(packet_id)
        if found is not None:
            # Without DUP the broker has never sent this before [MQTT-3.3.1-1].
            if here or (message.dup and found.content == content):
                return found
        elif message.dup:
            said, connection, code = self._ended.pop(packet_id, (None, 0, 0))
            if said == content and self._connections > connection + (0 if code else 1):
                found = self.open[packet_id] = Received(None, content, code)
                return found
        elif packet_id in self._ended:
            self._remembers = False
            self._ended.clear()
        self.open[packet_id] = Received(message, content)
        return None

    def release(self, packet_id: int) -> None:
        """PUBREL came."""
        self._end(packet_id, 0)

    def refuse(self, packet_id: int, code: int) -> None:
        """PUBREC refuses it, and no PUBREL comes [MQTT-4.3.3]."""
        self._end(packet_id, code)

    def _end(self, packet_id: int, code: int) -> None:
        content = self.open.pop(packet_id).content
        if self._remembers:
            self._ended[packet_id] = content, self._connections, code
            if len(self._ended) > _REMEMBERED:
                del self._ended[next(iter(self._ended))]

    def clear(self) -> None:
        """The broker has forgotten the session."""
        self.open.clear()
        self._ended.clear()
        self._remembers = self._resumable
