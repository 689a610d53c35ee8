"""How many Topic Filters a packet has: what the options say, or fewer for a broker that ends connections over it.

Brokers have limits that no packet announces. AWS IoT Core takes 8 filters, and closes the connection; whoever tries it
again with as many is never live. So when two connections end with a request for several filters unanswered, and no
other has shown that the broker takes so many, there are only an eighth of them in a packet from then on. One such end
may be the network's doing. So may two be: after an hour the replay of a new connection *tries* eight times as many
again. If they are answered, the one after another hour goes on from there, and as many as were once unanswered say
that it was the network; if not, that has cost one attempt, and the next try is after twice as long. No live link is
put at stake for that.
"""

from __future__ import annotations

import attrs

from ._config import DriverConfig, Endpoint

_MOST = 1000
"""Endpoints to know of: an options_factory or a broker may name ever new ones."""
_SUSPICIOUS = 2
_STEP = 8
_FIRST_HOLD, _LONGEST_HOLD = 3600.0, 7 * 86400.0
"""Seconds from what was learnt to the next try."""


@attrs.define
class _Learnt:
    most: int
    """Filters in a packet that the broker is known, or has to be assumed, to take."""
    unanswered: int
    """The least that it left unanswered."""
    next_try: float
    hold: float = _FIRST_HOLD


class BatchSizes:
    """What was learnt of the endpoints; ``now`` is Trio's time."""

    def __init__(self) -> None:
        self._learnt: dict[Endpoint, _Learnt] = {}
        self._suspicions: dict[Endpoint, tuple[int, int]] = {}
        """How many connections ended so, and the least number of filters that was not answered then."""

    def applied(self, config: DriverConfig, now: float) -> tuple[DriverConfig, int]:
        """The options for a connection, and how many filters a packet may have until it is live."""
        size = config.replay_batch
        learnt = self._learnt.get(config.endpoint)
        if learnt is None or learnt.most >= size:
            return config, size
        tried = learnt.most if now < learnt.next_try else min(learnt.most * _STEP, size)
        return config.evolve(replay_batch=learnt.most), tried

    def ended(
        self, config: DriverConfig, now: float, unanswered: int, answered: int, *, by_broker: bool
    ) -> int | None:
        """A connection ended.

        ``unanswered`` and ``answered`` are the numbers of filters of its largest requests of either kind; it is
        ``by_broker`` if that may be the reason. Returns how many there are in a packet from now on, if that is fewer.
        """
        endpoint = config.endpoint
        if len(self._learnt) + len(self._suspicions) >= _MOST:
            self.forget()
        learnt = self._learnt.get(endpoint)
        if learnt is not None and answered > learnt.most:
            if answered >= learnt.unanswered:
                del self._learnt[endpoint]
                learnt = None
            else:
                learnt.most, learnt.next_try, learnt.hold = answered, now + _FIRST_HOLD, _FIRST_HOLD
        count, least = self._suspicions.get(endpoint, (0, unanswered))
        if count and answered >= least:  # so many are taken
            del self._suspicions[endpoint]
            count, least = 0, unanswered
        if unanswered < 2 or answered >= unanswered or not by_broker:
            return None
        if learnt is not None and unanswered > learnt.most:  # it was a try
            learnt.unanswered = min(unanswered, learnt.unanswered)
            learnt.hold = min(2 * learnt.hold, _LONGEST_HOLD)
            learnt.next_try = now + learnt.hold
            return learnt.most
        if count + 1 < _SUSPICIOUS:
            self._suspicions[endpoint] = (count + 1, min(least, unanswered))
            return None
        self._suspicions.pop(endpoint, None)
        fewer = max(1, unanswered // _STEP)
        self._learnt[endpoint] = _Learnt(fewer, unanswered, now + _FIRST_HOLD)
        return fewer

    def forget(self) -> None:
        self._learnt.clear()
        self._suspicions.clear()
