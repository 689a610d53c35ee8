"""Topic Filters that a broker refuses by ending the connection, where others refuse them in SUBACK.

AWS IoT Core does so with what a policy does not allow, others with ``$SYS/#`` or with shared subscriptions. Whoever
replays such a filter is never live again: one subscription would cost all of them. So the filters of the SUBSCRIBE
that was the next to be answered when the broker ended a connection are *suspects*. If they are several, and it is not
their number (``_batch_sizes``), each has a packet of its own from then on, behind the others. If it is one, it is sent
last, when all others are answered, and alone. When that has ended connections, too, it is taken for refused.

It may have been the network, or a fault of the broker that will pass. Hence the number of connections that it takes;
and after a while a filter that is taken for refused is *tried* again, on a live link as well, for that may last for
months; if nobody wants it any more, when somebody does again. In vain that costs the link. So there is one try at a
time, no other one soon after it, and the next one of this filter after twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container

import attrs

from ._config import Endpoint

COPIES = "the question about overlapping filters"
"""Of the driver's own: brokers may end connections over that as well."""

_ENOUGH = 3
"""Connections, if the broker has answered other requests on the last one."""
_FIRST_HOLD, _LONGEST_HOLD = 600.0, 86400.0
"""Seconds until the next try."""
_FORGOTTEN_AFTER = 3600.0
"""Seconds after which what speaks against a filter that is not taken for refused counts no more."""
_MOST = 10_000
"""Filters to know of, and endpoints: an options_factory or a broker may name ever new ones."""


@attrs.define
class _Suspect:
    ends: int = 0
    """How many connections have ended over it; 0 if it was one of several."""
    blamed_at: float = -math.inf
    hold: float = 0.0
    """Seconds from the last time to the next try; 0 if it is not taken for refused."""

    @property
    def try_at(self) -> float:
        return self.blamed_at + self.hold


def _nobody(_text: str) -> None:
    pass


class Suspects:
    """Those of one endpoint; ``now`` is Trio's time, and ``wanted`` are the filters that somebody wants."""

    def __init__(self, tell: Callable[[str], object] = _nobody) -> None:
        self._tell = tell
        self._suspects: dict[str, _Suspect] = {}
        self._no_try_before = -math.inf

    def __bool__(self) -> bool:
        return bool(self._suspects)

    @property
    def filters(self) -> frozenset[str]:
        """Those that have a packet of their own, behind the others, or are not sent."""
        return frozenset(self._suspects)

    def alone(self, topic_filter: str) -> bool:
        """Whether it is sent when everything else is answered, if it is."""
        suspect = self._suspects.get(topic_filter)
        return suspect is not None and suspect.ends > 0

    def next_try(self, wanted: Container[str]) -> float:
        """When one that is taken for refused is to be sent nevertheless."""
        if not self._suspects:
            return math.inf
        tries = [one.try_at for name, one in self._suspects.items() if one.hold and name in wanted]
        return max(min(tries), self._no_try_before) if tries else math.inf

    def to_try(self, now: float, wanted: Container[str]) -> str | None:
        """Which one, if it is time for that: of several the one that is due longest."""
        if not self._suspects or now < self._no_try_before:
            return None
        due = [(one.try_at, name) for name, one in self._suspects.items() if one.hold and name in wanted]
        first, name = min(due, default=(math.inf, None))
        return name if first <= now else None

    def left_out(self, now: float, wanted: Container[str]) -> dict[str, str]:
        """Those that are not to be sent now, with what there is to say of it."""
        to_try = self.to_try(now, wanted)
        return {
            name: f"{one.ends} connections ended over it"
            for name, one in self._suspects.items()
            if one.hold and name != to_try
        }

    def blame(self, topic_filter: str, now: float, *, limit: int, others: bool) -> str:
        """A connection has ended when this one was the next to be answered: says what comes of it.

        ``limit`` is how many that may be if the broker had not answered ``others`` on the last of them.
        """
        suspect = self._suspect(topic_filter, now)
        suspect.ends += 1
        what = topic_filter if topic_filter == COPIES else f"the SUBSCRIBE of {topic_filter!r}"
        enough = min(limit, _ENOUGH) if others else limit
        if suspect.hold:
            suspect.hold = min(2 * suspect.hold, _LONGEST_HOLD)
            self._no_try_before = now + _FIRST_HOLD
        elif suspect.ends < enough:
            return f"over {what}, it seems ({suspect.ends} of {enough})"
        else:
            suspect.hold = _FIRST_HOLD
        return (
            f"over {what}, it seems ({suspect.ends} by now): that is taken for refused, "
            f"the next try is in {suspect.hold / 60:.0f} min"
        )

    def blame_one_of(self, topic_filters: list[str], now: float) -> str:
        """The same for several, which were in one packet."""
        for topic_filter in topic_filters:
            self._suspect(topic_filter, now)
        return f"over a SUBSCRIBE of {len(topic_filters)} filters, it seems: each has a packet of its own now"

    def _suspect(self, topic_filter: str, now: float) -> _Suspect:
        suspect = self._suspects.get(topic_filter)
        if suspect is None or (not suspect.hold and now - suspect.blamed_at > _FORGOTTEN_AFTER):
            if suspect is None and len(self._suspects) >= _MOST:
                del self._suspects[next(iter(self._suspects))]
            suspect = self._suspects[topic_filter] = _Suspect()
        suspect.blamed_at = now
        return suspect

    def answered(self, topic_filter: str, now: float) -> None:
        """The broker has answered, whatever it said.

        One of several goes on having a packet of its own for a while: it may be all of them together that is too much.
        """
        suspect = self._suspects.get(topic_filter)
        if suspect is None or (not suspect.ends and now - suspect.blamed_at <= _FORGOTTEN_AFTER):
            return
        del self._suspects[topic_filter]
        if suspect.hold:
            self._tell(f"{topic_filter!r} is not taken for refused any more")


NOBODY = Suspects()
"""Without anybody in it, as nobody must be blamed there."""


class EndpointSuspects:
    """Those of all endpoints; ``tell`` is told what has changed for the better."""

    def __init__(self, tell: Callable[[str], object] = _nobody) -> None:
        self._tell = tell
        self._of: dict[Endpoint, tuple[Suspects, Suspects]] = {}

    def of(self, endpoint: Endpoint) -> tuple[Suspects, Suspects]:
        """The filters of the application, and what the driver itself asks."""
        both = self._of.get(endpoint)
        if both is None:
            if len(self._of) >= _MOST:
                self._of.clear()

            def tell(text: str) -> None:
                self._tell(f"{endpoint}: {text}")

            both = self._of[endpoint] = Suspects(tell), Suspects(tell)
        return both

    def forget(self) -> None:
        self._of.clear()
