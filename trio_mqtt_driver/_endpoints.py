"""Which endpoint the next attempt goes to: failover, cool-down, the way back, MQTT 5 server redirects.

Pure: no clock, no network. The caller passes the time, and tells what became of each attempt.

The endpoints are in order of preference: the primary, then the fallbacks. One that fails too often in a row cools
down, and the next in order has its turn. That is a matter of order only: when all cool down, the one that is done
first is taken at once. The end of a cool-down does not clear the failures, so the attempt that follows is a trial, and
if it fails the next cool-down begins. Only a stable link clears them.

A broker can refer to another one [MQTT-4.13]. "Use another server" is a detour of one connection. What becomes of it
counts for the endpoint that referred us, unless the target is one of ours itself: one that refers to a dead server
serves us as badly as a dead one. "Server moved" puts the new address in front of the old one, and keeps the old one:
an address that was wrong, or that moves on while we are away, must not strand the driver.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, Generic, TypeVar

import attrs

from ._validators import between, count, number, seconds

T = TypeVar("T", bound=Hashable)

_MOST_DOUBLINGS: Final = 5


@attrs.frozen(kw_only=True)
class FailoverConfig:
    """When the driver goes to another endpoint, and when back. Times are in seconds.

    Without fallbacks and redirects it has no effect.
    """

    fail_after: int = attrs.field(default=2, validator=count)
    """So many failures of an endpoint in a row (failed attempts, or links that ended before they were stable), and the
    next one is tried."""
    cool_down: float = attrs.field(default=60.0, validator=number(0, above=True))
    """How long it is then left out, unless all are. More than ``check_every`` and the time that a test connection
    takes to fail, so that an endpoint that fails its tests is left out until it passes one."""
    check_every: float = attrs.field(default=30.0, validator=number(0, above=True))
    """On a fallback: the time between two test connections to the same preferred endpoint."""
    return_after: float = attrs.field(default=120.0, validator=seconds)
    """How long a preferred endpoint must have passed every test before the driver goes back to it; one test is never
    enough. Doubled each time that it then fails all the same, up to 32 times as long. ``math.inf``: go back only
    when the fallback is lost, and test nothing."""
    redirects: int = attrs.field(default=1, validator=between(0, 10))
    """How many Server References in a row are followed [MQTT-4.13]; 0: none. The credentials are sent to where the
    broker refers us."""


@attrs.frozen(kw_only=True)
class EndpointHealth:
    """What is known of one endpoint. Times are in seconds."""

    endpoint: str
    live_for: float | None
    """Of the link that is live there, else None."""
    links: int
    """How many links have been live there."""
    failures: int
    """Failed attempts, short-lived links and failed tests since the last stable link."""
    cool_down_left: float
    """0 if it does not cool down."""
    tests_passed: int
    """In a row, while the link is live on a less preferred endpoint."""
    last_error: str | None
    refers_to: str | None
    """Where it has referred the present or the next connection to."""


@attrs.define
class _Record:
    failures: int = 0
    cools_until: float = -math.inf
    last_error: str | None = None
    links: int = 0
    tested_at: float = -math.inf
    passed: int = 0
    passing_since: float = 0.0
    returns: int = 0
    """How often its tests have brought us back to it, without a stable link so far."""

    def forgive(self) -> None:
        self.failures = self.passed = self.returns = 0
        self.cools_until = -math.inf


@attrs.frozen
class _Detour(Generic[T]):
    """Where the next connection goes, whatever the order says, and what it counts for if the target is not known."""

    target: T
    place: T


class Endpoints(Generic[T]):
    """The memory between attempts. ``now`` is the caller's clock in seconds (Trio's); it must not go backwards.

    For each attempt: `choose`; then `live` and `stable` if it comes to that; and when it is over, either a `redirect`
    that is followed, or `ended`. What is said of endpoints that are not known here is ignored: an ``options_factory``
    may have put its own in the place of the chosen one.
    """

    def __init__(self, primary: T, fallbacks: Sequence[T], config: FailoverConfig) -> None:
        self._config = config
        self._configured = (primary, *fallbacks)
        self._moved: dict[T, T] = {}
        """Configured endpoint → where its server has moved to."""
        self._records: dict[T, _Record] = {}
        """In order of preference."""
        self._detour: _Detour[T] | None = None
        self._chain: list[T] = []
        """Who referred us on, since an attempt or a link last ended otherwise, or was stable."""
        self._had_turn: set[T] = set()
        """Where attempts have failed since `ended` last called for a wait, or since a stable link."""
        self._live: T | None = None
        self._live_since = 0.0
        self._is_stable = False
        self._arrange()

    # -- which one ----------------------------------------------------------------------------------------------------

    def choose(self, now: float) -> T:
        """The endpoint for an attempt that begins now. Changes nothing."""
        if self._detour is not None:
            return self._detour.target
        return min(self._records, key=lambda endpoint: self._rank(endpoint, now))

    # -- what became of it --------------------------------------------------------------------------------------------

    def live(self, endpoint: T, now: float) -> None:
        """The attempt has become a live link."""
        self._live, self._live_since, self._is_stable = endpoint, now, False
        if self._detour is not None and self._detour.target != endpoint:
            self._detour = None  # an options_factory had its own way
        place = self._place(endpoint)
        if place is not None:
            self._records[place].links += 1

    def stable(self) -> None:
        """The live link has lived for ``BackoffConfig.stable_after``: forget the failures of its endpoint."""
        self._is_stable = True
        self._chain.clear()
        self._had_turn.clear()
        place = None if self._live is None else self._place(self._live)
        if place is not None:
            self._records[place].forgive()
            # Its server serves us itself: the one that it had moved to, and that could not be had, is no longer it.
            if self._moved.pop(place, None) is not None:
                self._arrange()

    def ended(self, endpoint: T, now: float, error: str | None) -> bool:
        """The attempt has failed, or its link is over.

        It is a failure of the endpoint unless the link was stable, or ``error`` is None: the driver itself ended or
        abandoned it.

        :param error: why, in bounded length: it is kept.
        :returns: True after a failure if the next attempt goes to an endpoint that has not had its turn since the last
            failure that brought False, or since a stable link. A circuit breaker that is open should let it through
            after a short delay: else a broker that is back waits for one pause per endpoint that is still dead. Never
            True with a single endpoint, and so often in a row only as there are endpoints.
        """
        place = self._place(endpoint)
        was_stable = self._live == endpoint and self._is_stable
        # A detour is for one attempt, taken or not. But the way back is prepared while the link is live elsewhere.
        if self._detour is not None and (self._live is None or self._detour.target == endpoint):
            self._detour = None
        self._live = None
        # Any end but a redirect ends a row of them: there is a delay now. Were only a stable link to do so, a broker
        # that once referred us to a dead server would never be followed again.
        self._chain.clear()
        if error is None or place is None:
            return False
        record = self._records[place]
        if was_stable:
            record.last_error = error
            return False
        self._fail(record, now, error)
        self._had_turn.add(place)
        if self.choose(now) not in self._had_turn:
            return True
        self._had_turn.clear()
        return False

    def redirect(self, endpoint: T, targets: Iterable[T], now: float, *, permanent: bool) -> bool:
        """The broker ended an attempt or a link with a Server Reference [MQTT-4.13]: whether it is followed.

        If so, `choose` gives the target, and `ended` must not be called for what the broker ended. If not, it is an
        end like any other, for `ended`. Followed is the first of ``targets`` that does not lead back to where we were
        referred from and does not cool down, and no more than ``redirects`` in a row: without a stable link, or
        another end, in between.

        :param permanent: reason code 0x9D "Server moved": the target stands in front of the endpoint from now on, in
            the place of an earlier such target, until the endpoint itself has a stable link again. Else 0x9C "Use
            another server": for the next connection only. A server that we were sent to for one connection cannot
            make more of it.
        """
        place = self._place(endpoint)
        if place is None or len(self._chain) >= self._config.redirects:
            return False
        tested = self._live is not None and self._live != endpoint
        if tested and not permanent:
            return False  # the live link is no worse than a detour
        target = next((one for one in targets if self._may_follow(endpoint, one, now)), None)
        if target is None:
            return False
        self._chain.append(endpoint)
        if tested:
            self._records[place].tested_at = now
        else:
            self._live = None
            self._had_turn.add(place)  # else one that refers us to ever new dead servers would be due after each
        if permanent:
            self._move(endpoint, target)
        if not tested:
            self._detour = _Detour(target, place)
        return True

    def reset(self) -> None:
        """Forget failures and cool-downs: somebody asked for an attempt now. With new settings make a new object."""
        for record in self._records.values():
            record.forgive()
        self._chain.clear()
        self._had_turn.clear()

    # -- the way back -------------------------------------------------------------------------------------------------

    def next_check(self) -> tuple[T, float] | None:
        """The preferred endpoint to test next, and when (it may be overdue); None if the live link is where it should
        be, or there is none.

        A test is a connection of its own beside the live one, with another client ID, taken as far as the test
        publish: a broker that only accepts must not pass. `tested` takes the outcome.
        """
        if self._config.return_after == math.inf:
            return None
        due = [
            (max(self._live_since, self._records[endpoint].tested_at) + self._config.check_every, endpoint)
            for endpoint in self._preferred()
        ]
        if not due:
            return None
        at, endpoint = min(due, key=lambda one: one[0])
        return endpoint, at

    def tested(self, endpoint: T, now: float, error: str | None) -> bool:
        """A test connection came to this; ``error`` is None if it passed. A failed one is a failure of the endpoint.

        :returns: True if it is time to go back: end the live link, tell `ended` so, and `choose` gives the endpoint.
        """
        record = self._records.get(endpoint)
        if record is None:  # the server has moved meanwhile
            return False
        record.tested_at = now
        if error is not None:
            self._fail(record, now, error)
            return False
        record.passed += 1
        if record.passed == 1:
            record.passing_since = now
        needed = self._config.return_after * 2 ** min(record.returns, _MOST_DOUBLINGS)
        if now - record.passing_since < needed or endpoint not in self._preferred():
            return False
        record.cools_until = -math.inf
        record.returns += 1
        self._detour = _Detour(endpoint, endpoint)
        return True

    # -- to be looked at ----------------------------------------------------------------------------------------------

    def health(self, now: float) -> tuple[EndpointHealth, ...]:
        """All endpoints in order of preference, with those that servers have moved to."""
        live = None if self._live is None else self._place(self._live)
        return tuple(
            EndpointHealth(
                endpoint=str(endpoint),
                live_for=now - self._live_since if endpoint == live else None,
                links=record.links,
                failures=record.failures,
                cool_down_left=max(0.0, record.cools_until - now),
                tests_passed=record.passed,
                last_error=record.last_error,
                refers_to=self._refers_to(endpoint),
            )
            for endpoint, record in self._records.items()
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _place(self, endpoint: T) -> T | None:
        """The endpoint that this one's fate counts for; None if it is not known here."""
        if endpoint not in self._records and self._detour is not None and self._detour.target == endpoint:
            endpoint = self._detour.place
        return endpoint if endpoint in self._records else None

    def _rank(self, endpoint: T, now: float) -> tuple[float, bool]:
        """The least is chosen; of equals the most preferred."""
        record = self._records[endpoint]
        # Where delays are long, the first one's cool-down is over whenever the last one is due. So whoever has had its
        # trial stands back until the others have had theirs.
        stands_back = endpoint in self._had_turn and record.failures >= self._config.fail_after
        return max(now, record.cools_until), stands_back

    def _refers_to(self, endpoint: T) -> str | None:
        detour = self._detour
        return str(detour.target) if detour is not None and detour.place == endpoint != detour.target else None

    def _preferred(self) -> list[T]:
        """What is better than where the link is live."""
        live = None if self._live is None else self._place(self._live)
        order = list(self._records)
        return [] if live is None else order[: order.index(live)]

    def _fail(self, record: _Record, now: float, error: str) -> None:
        record.failures += 1
        record.passed = 0
        record.last_error = error
        # A single endpoint has nobody to leave its turn to.
        if record.failures >= self._config.fail_after and len(self._records) > 1:
            record.cools_until = now + self._config.cool_down

    def _may_follow(self, endpoint: T, target: T, now: float) -> bool:
        record = self._records.get(target)
        cools_down = record is not None and record.cools_until > now
        return target != endpoint and target not in self._chain and not cools_down

    def _move(self, endpoint: T, target: T) -> None:
        for configured in self._configured:
            if endpoint in (configured, self._moved.get(configured)):
                self._moved[configured] = target
        self._arrange()

    def _arrange(self) -> None:
        """Bring the records into the order of preference. A target that was replaced is forgotten."""
        order = [
            one for configured in self._configured for one in (self._moved.get(configured, configured), configured)
        ]
        self._records = {endpoint: self._records.get(endpoint, _Record()) for endpoint in order}
        self._had_turn.intersection_update(self._records)
