"""Overlapping filters on a broker that cannot say which of them a message is for.

A broker may send a message once, or once per matching subscription [MQTT-3.3.5-1]; nats-server and (with MQTT 5)
mosquitto do the latter. Subscription Identifiers tell the copies apart, but MQTT 3.1.1 has none. So the broker is
asked how it does it, once per connection and only if filters overlap (``_probe.sends_copies``); and then the copies
of a message are dealt out here, one to each registration. Equal messages are interchangeable, which is why counting is
enough, in whatever order the copies of several messages come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ._types import Message

R = TypeVar("R")

_REMEMBERED = 1000
"""Messages of which only some copies have come. What is older was cut short, by a change of the filters for one."""


class CopyDealer:
    """Deals the copies of a message out: the n-th one to the n-th of the registrations that it matches."""

    def __init__(self) -> None:
        self._dealt: dict[tuple[str, int], int] = {}

    def deal(self, message: Message[Any], registrations: Sequence[R]) -> R:
        """Which of ``registrations`` this copy is for; they must come in the same order every time."""
        key = (message.topic, hash(message.payload))
        turn = self._dealt.pop(key, 0)
        if turn + 1 < len(registrations):
            if len(self._dealt) >= _REMEMBERED:
                del self._dealt[next(iter(self._dealt))]
            self._dealt[key] = turn + 1
        return registrations[min(turn, len(registrations) - 1)]
