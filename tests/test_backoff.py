from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import attrs
import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver._backoff import Backoff, BackoffConfig, Delay


class Fixed(random.Random):
    """Draws always the same place of a range."""

    def __init__(self, place: float) -> None:
        super().__init__()
        self._place = place

    def random(self) -> float:
        return self._place


HIGHEST = Fixed(1.0)
LOWEST = Fixed(0.0)


def backoff(rng: random.Random = HIGHEST, **options: Any) -> Backoff:
    return Backoff(BackoffConfig(**options), rng)


def seconds(step: Callable[[], Delay], times: int) -> list[float]:
    return [step().seconds for _ in range(times)]


def pairs(values: list[float]) -> Iterator[tuple[float, float]]:
    return pairwise(values)


# --- configuration


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("start", 0, "start: must be a finite number > 0, got 0"),
        ("start", math.nan, "start: must be a finite number > 0, got nan"),
        ("factor", 0.5, "factor: must be a finite number >= 1, got 0.5"),
        ("maximum", 0.5, r"maximum: must be >= start \(1.0\), got 0.5"),
        ("maximum", math.inf, "maximum: must be a finite number > 0, got inf"),
        ("min_interval", -1, "min_interval: must be a finite number >= 0, got -1"),
        ("stable_after", -0.1, "stable_after: must be a finite number >= 0, got -0.1"),
        ("pause_after", 0, "pause_after: must be an int >= 1, got 0"),
        ("pause", 0.0, "pause: must be a finite number > 0, got 0.0"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: float, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        BackoffConfig(**cast(Any, {field: value}))


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(BackoffConfig)])
@pytest.mark.parametrize("value", ["5", None, True])
def test_a_value_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{field}: must be "):
        BackoffConfig(**cast(Any, {field: value}))


def test_pause_after_counts_so_it_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"^pause_after: must be an int >= 1, got 2\.5$"):
        backoff(pause_after=2.5)


# --- failed attempts


def test_delays_double_up_to_the_maximum_and_then_the_breaker_opens_again_and_again() -> None:
    it = backoff()
    assert seconds(it.failed, 7) == [1, 2, 4, 8, 16, 30, 30]
    assert it.failed() == Delay(30.0, paused=True)
    assert it.failures == 8
    assert [it.failed() for _ in range(3)] == [Delay(30.0, paused=True)] * 3


def test_jitter_keeps_a_tenth_of_the_bound() -> None:
    assert seconds(backoff(LOWEST).failed, 6) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0])


@given(
    seed=st.integers(),
    start=st.floats(0.001, 1e6),
    factor=st.floats(1, 1e300),
    above=st.floats(0, 1e6),
)
def test_every_delay_is_between_a_tenth_of_its_bound_and_its_bound(
    seed: int, start: float, factor: float, above: float
) -> None:
    options: dict[str, Any] = {"start": start, "factor": factor, "maximum": start + above, "pause_after": 1000}
    bounds = seconds(backoff(**options).failed, 50)
    delays = seconds(backoff(random.Random(seed), **options).failed, 50)
    assert bounds[0] == pytest.approx(start)
    assert bounds[1:] == pytest.approx([min(start + above, bound * factor) for bound in bounds[:-1]])
    assert all(0.1 * bound <= delay <= bound * (1 + 1e-9) for bound, delay in zip(bounds, delays, strict=True))


def test_the_power_cannot_overflow() -> None:
    it = backoff(factor=1e300, pause_after=10**9)
    assert seconds(it.failed, 5) == [1, 30, 30, 30, 30]


def test_the_same_random_numbers_give_the_same_delays() -> None:
    first, second, other = (seconds(backoff(random.Random(seed)).failed, 7) for seed in (1, 1, 2))
    assert first == second != other


# --- a free retry


def test_one_retry_at_once_and_the_next_ones_wait() -> None:
    it = backoff()
    assert [it.failed(retry_at_once=True).seconds for _ in range(5)] == [0, 2, 4, 8, 16]
    assert it.failures == 5


def test_another_failure_in_between_gives_back_the_free_retry() -> None:
    it = backoff()
    assert it.failed(retry_at_once=True) == Delay(0.0)
    assert it.failed() == Delay(2.0)
    assert it.failed(retry_at_once=True) == Delay(0.0)


def test_a_free_retry_out_of_a_pause() -> None:
    it = backoff(pause_after=2)
    it.failed()
    assert it.failed() == Delay(30.0, paused=True)
    assert it.failed(retry_at_once=True) == Delay(0.0)
    assert it.failed(retry_at_once=True) == Delay(30.0, paused=True)


def test_a_connection_gives_back_the_free_retry() -> None:
    it = backoff()
    it.failed(retry_at_once=True)
    it.lost(100, lived=1)
    assert it.failed(retry_at_once=True) == Delay(0.0)
    it.stable()
    assert it.failed(retry_at_once=True) == Delay(0.0)


# --- lost connections


def test_the_first_loss_of_a_stable_connection_reconnects_at_once() -> None:
    it = backoff()
    it.failed()
    assert it.lost(1000, lived=30) == Delay(0.0)
    assert it.failures == 0
    assert it.failed() == Delay(1.0)


def test_a_short_lived_connection_is_a_failure() -> None:
    it = backoff(min_interval=0)
    assert it.lost(0, lived=29.9) == Delay(1.0)
    assert it.failed() == Delay(2.0)
    assert it.lost(10, lived=0) == Delay(4.0)
    assert it.failures == 3


def test_accept_then_drop_opens_the_breaker() -> None:
    it = backoff()
    now = 0.0
    delays: list[Delay] = []
    for _ in range(9):
        delays.append(it.lost(now, lived=0))
        now += delays[-1].seconds
    assert [delay.seconds for delay in delays] == [1, 5, 5, 8, 16, 30, 30, 30, 30]
    assert [delay.paused for delay in delays] == [False] * 7 + [True] * 2


def test_triggers_keep_their_distance_even_between_stable_connections() -> None:
    it = backoff(stable_after=1)
    assert it.lost(100, lived=2) == Delay(0.0)
    assert it.lost(102, lived=2) == Delay(3.0)  # so the trigger is at 105
    assert it.lost(107, lived=2) == Delay(3.0)
    assert it.lost(115, lived=2) == Delay(0.0)


def test_a_session_that_was_taken_over_is_a_failure_however_long_it_lived() -> None:
    it = backoff()
    assert it.lost(1000, lived=1e6, taken_over=True) == Delay(1.0)
    assert it.failures == 1


def test_after_a_takeover_a_connection_must_outlive_two_pauses_to_be_stable() -> None:
    it = backoff(pause=40)
    assert it.stable_after == 30
    it.lost(0, lived=100, taken_over=True)
    assert it.stable_after == 80
    it.lost(100, lived=79)
    assert it.failures == 2
    assert it.stable_after == 80
    it.lost(200, lived=80)
    assert it.failures == 0
    assert it.stable_after == 30


@pytest.mark.parametrize("forget", [Backoff.stable, Backoff.reset])
def test_a_takeover_is_forgotten_with_the_failures(forget: Callable[[Backoff], None]) -> None:
    it = backoff()
    it.lost(0, lived=100, taken_over=True)
    forget(it)
    assert it.stable_after == 30


def test_a_longer_stable_after_is_kept() -> None:
    it = backoff(stable_after=300)
    it.lost(0, lived=1000, taken_over=True)
    assert it.stable_after == 300


def test_two_clients_with_one_id_come_down_to_one_attempt_per_pause() -> None:
    """Each is taken over when the other's wait is over, and alone until its own is over."""
    sides = [backoff(random.Random(seed)) for seed in (1, 2)]
    live, since, now, attempts = 0, 0.0, 0.0, 0
    for _ in range(1000):
        live = 1 - live
        delay = sides[1 - live].lost(now, now - since, taken_over=True)
        since = now
        attempts += 1
        now += delay.seconds
    assert attempts - 12 <= now / 30 + 1
    assert all(side.failures >= 8 for side in sides)


@given(
    seed=st.integers(),
    lives=st.lists(st.floats(0, 100), min_size=2, max_size=30),
    min_interval=st.floats(0, 60),
    stable_after=st.floats(0, 60),
)
def test_reconnection_triggers_are_never_closer_than_min_interval(
    seed: int, lives: list[float], min_interval: float, stable_after: float
) -> None:
    it = backoff(random.Random(seed), min_interval=min_interval, stable_after=stable_after)
    now = 0.0
    triggers: list[float] = []
    for lived in lives:
        now += lived
        delay = it.lost(now, lived)
        assert 0 <= delay.seconds <= max(min_interval, 30) + 1e-9
        now += delay.seconds
        triggers.append(now)
    assert all(later - earlier >= min_interval - 1e-9 for earlier, later in pairs(triggers))


# --- forgetting


def test_stable_forgets_failures_but_not_the_rate_limit() -> None:
    it = backoff(stable_after=1)
    it.lost(100, lived=2)
    it.failed()
    it.stable()
    assert it.failures == 0
    assert it.lost(101, lived=1) == Delay(4.0)


def test_reset_forgets_failures_pause_and_rate_limit() -> None:
    it = backoff(pause_after=2)
    it.lost(100, lived=60)
    it.failed(retry_at_once=True)
    assert it.failed().paused
    it.reset()
    assert it.failures == 0
    assert it.failed(retry_at_once=True) == Delay(0.0)
    it.reset()
    assert it.lost(101, lived=60) == Delay(0.0)
