"""Overlapping filters on a broker that cannot say which of them a message is for.

A broker may send a message once, or once per matching subscription [MQTT-3.3.5-1]; nats-server and (with MQTT 5)
mosquitto do the latter. Subscription Identifiers tell the copies apart, but MQTT 3.1.1 has none. So the broker is
asked how it does it, once per connection and only if filters overlap (``_probe.sends_copies``); and then the copies
of a message are dealt out here, one to each registration. Equal messages are interchangeable, which is why counting is
enough, in whatever order the copies of several messages come.

A copy has the QoS of the message or that of the subscription, whichever is lower: so it is for none with a lower one.
That matters beyond the order, since a broker keeps the copies of QoS 1 and 2 while we are away, and not the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from ._types import Message

R = TypeVar("R", bound=Hashable)

_REMEMBERED = 1000
"""Messages of which only some copies have come. What is older was cut short, by a change of the filters for one."""


class CopyDealer:
    """Deals the copies of a message out: each to that of the registrations it may be for which has had the fewest."""

    def __init__(self) -> None:
        self._dealt: dict[tuple[str, int], dict[Hashable, int]] = {}

    def deal(self, message: Message[Any], registrations: Mapping[R, int]) -> R:
        """Which of ``registrations`` this copy is for; with each goes the QoS that was granted, or -1."""
        key = (message.topic, hash(message.payload))
        dealt = self._dealt.pop(key, {})
        able = [one for one, granted in registrations.items() if granted >= message.qos] or list(registrations)
        chosen = min(able, key=lambda one: (dealt.get(one, 0), registrations[one]))
        dealt[chosen] = dealt.get(chosen, 0) + 1
        if all(one in dealt for one, granted in registrations.items() if granted >= 0):  # each has had one
            dealt = {one: count - 1 for one, count in dealt.items() if count > 1}
        if dealt:
            if len(self._dealt) >= _REMEMBERED:
                del self._dealt[next(iter(self._dealt))]
            self._dealt[key] = dealt
        return chosen
