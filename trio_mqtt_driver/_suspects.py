"""Topic Filters that a broker refuses by ending the connection, where others refuse them in SUBACK.

AWS IoT Core does so with what a policy does not allow, others with ``$SYS/#`` or with shared subscriptions. Whoever
replays such a filter is never live again: one subscription would cost all of them. So the filters of the SUBSCRIBE
that was the next to be answered when the broker ended a connection are *suspects*. If they are several, and it is not
their number (``_batch_sizes``), each has a packet of its own from then on, behind the others. If it is one, it is sent
last, when all others are answered, and alone. When that has ended connections, too, it is taken for refused.

It may have been the network, or a fault of the broker that will pass. Hence the number of connections that it takes;
and after a while a filter that is taken for refused is *tried* again, on a live link as well, for that may last for
months. In vain that costs the link. So there is one try at a time, whatever the number of such filters, and the next
one is after twice as long. When one of them is answered, the next one is tried at once.
"""

from __future__ import annotations

import math

from ._config import Endpoint

COPIES = "the question about overlapping filters"
"""Of the driver's own: brokers may end connections over that as well."""

_ENOUGH = 3
"""Connections, if the broker has answered other requests on the last one."""
_FIRST_HOLD, _LONGEST_HOLD = 600.0, 86400.0
"""Seconds until the next try."""
_MOST = 10_000
"""Filters to know of, and endpoints: an options_factory or a broker may name ever new ones."""


class Suspects:
    """Those of one endpoint; ``now`` is Trio's time."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}
        """How many connections have ended over each; 0 if it was one of several."""
        self._refused: dict[str, None] = {}
        """Those that are taken for refused; the one whose try was the longest ago is the first."""
        self._hold = 0.0
        self._next_try = math.inf

    def __bool__(self) -> bool:
        return bool(self._ends)

    @property
    def filters(self) -> frozenset[str]:
        """Those that have a packet of their own, behind the others, or are not sent."""
        return frozenset(self._ends)

    def alone(self, topic_filter: str) -> bool:
        """Whether it is sent when everything else is answered, if it is."""
        return self._ends.get(topic_filter, 0) > 0

    @property
    def next_try(self) -> float:
        return self._next_try

    def to_try(self, now: float) -> str | None:
        """The one that is taken for refused, and is to be sent nevertheless."""
        return next(iter(self._refused), None) if now >= self._next_try else None

    def refused(self, topic_filter: str, now: float) -> str:
        """Why this one is not to be sent now; "" if it is."""
        if topic_filter not in self._refused or topic_filter == self.to_try(now):
            return ""
        return f"the broker ended {self._ends[topic_filter]} connections over it"

    def blame(self, topic_filter: str, now: float, *, limit: int, others: bool) -> str:
        """The broker has ended a connection when this one was the next to be answered: says what comes of it.

        ``limit`` is how many that may be if the broker had not answered ``others`` on the last of them.
        """
        self._suspect(topic_filter)
        self._ends[topic_filter] += 1
        ends = self._ends[topic_filter]
        what = topic_filter if topic_filter == COPIES else f"the SUBSCRIBE of {topic_filter!r}"
        enough = min(limit, _ENOUGH) if others else limit
        if topic_filter in self._refused:
            del self._refused[topic_filter]  # it is the last one now
            self._hold = min(2 * self._hold, _LONGEST_HOLD)
            self._next_try = now + self._hold
        elif ends < enough:
            return f"over {what}, it seems ({ends} of {enough})"
        elif not self._refused:
            self._hold = _FIRST_HOLD
            self._next_try = now + self._hold
        self._refused[topic_filter] = None
        return (
            f"over {what}, it seems ({ends} by now): that is taken for refused, "
            f"the next try is in {max(0.0, self._next_try - now) / 60:.0f} min"
        )

    def blame_one_of(self, topic_filters: list[str]) -> str:
        """The same for several, which were in one packet."""
        for topic_filter in topic_filters:
            self._suspect(topic_filter)
        return f"over a SUBSCRIBE of {len(topic_filters)} filters, it seems: each has a packet of its own now"

    def _suspect(self, topic_filter: str) -> None:
        if topic_filter not in self._ends:
            if len(self._ends) >= _MOST:
                self.answered(next(iter(self._ends)))
            self._ends[topic_filter] = 0

    def answered(self, topic_filter: str) -> None:
        """The broker has answered, whatever it said; or nobody wants it any more."""
        self._ends.pop(topic_filter, None)
        self._refused.pop(topic_filter, None)
        if not self._refused:
            self._next_try = math.inf


class EndpointSuspects:
    """Those of all endpoints."""

    def __init__(self) -> None:
        self._of: dict[Endpoint, Suspects] = {}

    def of(self, endpoint: Endpoint) -> Suspects:
        suspects = self._of.get(endpoint)
        if suspects is None:
            if len(self._of) >= _MOST:
                self._of.clear()
            suspects = self._of[endpoint] = Suspects()
        return suspects

    def forget(self) -> None:
        self._of.clear()
