"""How long to wait before the next attempt: rate limit, exponential back-off with jitter, circuit breaker.

Pure: no clock, no sleep. The caller passes the time, and waits for what it is told. Nothing here is permanent: a pause
has an end, and after it comes a trial.
"""

from __future__ import annotations

import math
import random
from typing import Any, Final

import attrs

from ._validators import count, number

_FLOOR: Final = 0.1
"""The least delay as a share of the greatest. Full jitter goes down to 0, so a run of low draws would hammer a broker
that is down; a tenth costs next to nothing in how well many clients spread out."""


def _not_below_start(instance: BackoffConfig, attribute: attrs.Attribute[Any], value: float) -> None:
    if value < instance.start:
        raise ValueError(f"{attribute.name}: must be >= start ({instance.start!r}), got {value!r}")


@attrs.frozen(kw_only=True)
class BackoffConfig:
    """When the driver tries to reconnect. Times are in seconds."""

    start: float = attrs.field(default=1.0, validator=number(0, above=True))
    """The greatest delay after the first failure."""
    factor: float = attrs.field(default=2.0, validator=number(1))
    """By what the greatest delay grows with each further failure."""
    maximum: float = attrs.field(default=30.0, validator=[number(0, above=True), _not_below_start])
    """Where it stops growing."""
    min_interval: float = attrs.field(default=5.0, validator=number(0))
    """The least time between two reconnection triggers, however fast the link flaps."""
    stable_after: float = attrs.field(default=30.0, validator=number(0))
    """A connection that ends sooner counts as a failure; one that lives this long clears the failures."""
    pause_after: int = attrs.field(default=8, validator=count)
    """So many failures open the circuit breaker."""
    pause: float = attrs.field(default=30.0, validator=number(0, above=True))
    """The breaker's cool-down: then one trial, and if it fails, the same again."""


@attrs.frozen
class Delay:
    """What to do before the next attempt: wait ``seconds``; ``paused`` if the circuit breaker is open meanwhile."""

    seconds: float
    paused: bool = False


class Backoff:
    """The memory between attempts. ``now`` is the caller's clock in seconds (Trio's); it must not go backwards."""

    def __init__(self, config: BackoffConfig, rng: random.Random) -> None:
        if not isinstance(rng, random.Random):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
            raise TypeError(f"rng must be a random.Random, not {type(rng).__name__}")
        self._config = config
        self._rng = rng
        self._failures = 0
        self._free_retry = False
        self._contested = False
        self._last_trigger = -math.inf

    @property
    def stable_after(self) -> float:
        """How long a connection must live to clear the failures.

        Longer than a pause after the session was taken over: of two clients with one client ID each is alone
        while the other pauses, so both would be forgiven again and again, and fight for ever.
        """
        config = self._config
        return max(config.stable_after, 2 * config.pause) if self._contested else config.stable_after

    @property
    def failures(self) -> int:
        """Failed attempts and short-lived connections since the last stable connection or `reset`."""
        return self._failures

    def lost(self, now: float, lived: float, *, taken_over: bool = False) -> Delay:
        """A connection was lost that had been live for ``lived`` seconds.

        After a stable connection the delay is 0. A connection that lived less than ``stable_after`` is a failure,
        with its delay or pause: else a broker that accepts and then drops us would be hammered for ever. In both
        cases ``min_interval`` since the previous trigger is kept.

        :param taken_over: another client has connected with our client ID. That is a failure however long the
            connection lived, and makes ``stable_after`` longer until a connection is stable.
        """
        self._free_retry = False
        if lived >= self.stable_after and not taken_over:
            self.stable()
            delay = Delay(0.0)
        else:
            delay = self._after_failure()
        self._contested = self._contested or taken_over
        seconds = max(delay.seconds, self._last_trigger + self._config.min_interval - now)
        self._last_trigger = now + seconds
        return Delay(seconds, delay.paused)

    def failed(self, *, retry_at_once: bool = False) -> Delay:
        """An attempt failed before the connection was live.

        :param retry_at_once: the failure may be cured by what the next attempt does anyway (fresh TLS material), so
            the delay is 0, unless the failure before this one was of that kind, too.
        """
        delay = self._after_failure()
        free, self._free_retry = retry_at_once and not self._free_retry, retry_at_once
        return Delay(0.0) if free else delay

    def stable(self) -> None:
        """The connection has been live for ``stable_after``: forget the failures."""
        self._failures = 0
        self._free_retry = False
        self._contested = False

    def reset(self) -> None:
        """Forget failures, pause and rate limit: somebody asked for an attempt now, or changed the settings."""
        self.stable()
        self._last_trigger = -math.inf

    def _after_failure(self) -> Delay:
        config = self._config
        self._failures += 1
        if self._failures >= config.pause_after:
            return Delay(config.pause, paused=True)
        try:
            bound = min(config.maximum, config.start * config.factor ** (self._failures - 1))
        except OverflowError:
            bound = config.maximum
        return Delay(self._rng.uniform(_FLOOR * bound, bound))
