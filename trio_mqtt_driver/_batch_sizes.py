"""How many Topic Filters a packet has: what the options say, or fewer for a broker that ends connections over it.

Brokers have limits that no packet announces. AWS IoT Core takes 8 filters, and closes the connection; whoever tries it
again with as many is never live. So when two connections in a row end with a request for several filters unanswered,
there are only an eighth of them in a packet from then on. One such end may be the network's doing; and if two are, all
that is lost is a little time.
"""

from __future__ import annotations

from ._config import DriverConfig, Endpoint

_MOST = 1000
"""Endpoints to know of: an options_factory or a broker may name ever new ones."""
_IN_A_ROW = 2
_STEP = 8


class BatchSizes:
    """What was learnt of the endpoints."""

    def __init__(self) -> None:
        self._most: dict[Endpoint, int] = {}
        self._suspicions: dict[Endpoint, int] = {}

    def applied(self, config: DriverConfig) -> DriverConfig:
        """The options for a connection."""
        most = self._most.get(config.endpoint, config.replay_batch)
        return config if most >= config.replay_batch else config.evolve(replay_batch=most)

    def ended(self, config: DriverConfig, unanswered: int, *, by_broker: bool, was_live: bool) -> int | None:
        """A connection ended; ``unanswered`` is the number of filters of its largest open request.

        Returns the number that packets have from now on, if it has become smaller.
        """
        endpoint = config.endpoint
        if len(self._most) + len(self._suspicions) >= _MOST:
            self.forget()
        if was_live:  # all that was asked at first was answered
            self._suspicions.pop(endpoint, None)
        if unanswered < 2 or not by_broker:
            return None
        count = self._suspicions.pop(endpoint, 0) + 1
        if count < _IN_A_ROW:
            self._suspicions[endpoint] = count
            return None
        self._most[endpoint] = fewer = max(1, unanswered // _STEP)
        return fewer

    def forget(self) -> None:
        self._most.clear()
        self._suspicions.clear()
