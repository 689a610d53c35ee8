"""How many Topic Filters a packet has: what the options say, or fewer for a broker that ends connections over it.

Brokers have limits that no packet announces. AWS IoT Core takes 8 filters, and closes the connection; whoever tries it
again with as many is never live. So when two connections end with a request for several filters unanswered, and no
other has shown that the broker takes so many, there are only an eighth of them in a packet from then on. One such end
may be the network's doing. Hazard: so may two be, and then replays take longer than they need, for good.
"""

from __future__ import annotations

from ._config import DriverConfig, Endpoint

_MOST = 1000
"""Endpoints to know of: an options_factory or a broker may name ever new ones."""
_SUSPICIOUS = 2
_STEP = 8


class BatchSizes:
    """What was learnt of the endpoints."""

    def __init__(self) -> None:
        self._most: dict[Endpoint, int] = {}
        self._suspicions: dict[Endpoint, tuple[int, int]] = {}
        """How many connections ended so, and the least number of filters that was not answered then."""

    def applied(self, config: DriverConfig) -> DriverConfig:
        """The options for a connection."""
        most = self._most.get(config.endpoint, config.replay_batch)
        return config if most >= config.replay_batch else config.evolve(replay_batch=most)

    def ended(self, config: DriverConfig, unanswered: int, answered: int, *, by_broker: bool) -> int | None:
        """A connection ended.

        ``unanswered`` and ``answered`` are the numbers of filters of its largest requests of either kind; it is
        ``by_broker`` if that may be the reason. Returns how many there are in a packet from now on, if that is fewer.
        """
        endpoint = config.endpoint
        if len(self._most) + len(self._suspicions) >= _MOST:
            self.forget()
        count, least = self._suspicions.get(endpoint, (0, unanswered))
        if count and answered >= least:  # so many are taken
            del self._suspicions[endpoint]
            count, least = 0, unanswered
        if unanswered < 2 or answered >= unanswered or not by_broker:
            return None
        if count + 1 < _SUSPICIOUS:
            self._suspicions[endpoint] = (count + 1, min(least, unanswered))
            return None
        self._suspicions.pop(endpoint, None)
        self._most[endpoint] = fewer = max(1, unanswered // _STEP)
        return fewer

    def forget(self) -> None:
        self._most.clear()
        self._suspicions.clear()
