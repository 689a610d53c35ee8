from __future__ import annotations

import json
import math
import random
from typing import Any, cast

import attrs
import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver._backoff import Backoff, BackoffConfig
from trio_mqtt_driver._endpoints import EndpointHealth, Endpoints, FailoverConfig

# --- configuration


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("fail_after", 0, "fail_after: must be an int >= 1, got 0"),
        ("cool_down", 0, "cool_down: must be a finite number > 0, got 0"),
        ("cool_down", math.inf, "cool_down: must be a finite number > 0, got inf"),
        ("check_every", -1, "check_every: must be a finite number > 0, got -1"),
        ("return_after", 0, r"return_after is 0, allowed are seconds > 0 \(math.inf: no limit\)"),
        ("redirects", -1, "redirects is -1, allowed are whole numbers from 0 to 10"),
        ("redirects", 11, "redirects is 11, allowed are whole numbers from 0 to 10"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: float, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        FailoverConfig(**cast(Any, {field: value}))


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(FailoverConfig)])
@pytest.mark.parametrize("value", ["5", None, True])
def test_a_value_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{field}"):
        FailoverConfig(**cast(Any, {field: value}))


def test_an_endpoint_that_fails_its_tests_is_left_out_by_the_defaults_until_it_passes_one() -> None:
    config = FailoverConfig()
    connect_timeout = probe_timeout = 10
    assert config.cool_down > config.check_every + connect_timeout + probe_timeout


# --- failover


def endpoints(names: str = "abc", **options: Any) -> Endpoints[str]:
    """One endpoint for each letter, the primary first."""
    return Endpoints(names[0], names[1:], FailoverConfig(**options))


def fail(it: Endpoints[str], *expected: str, now: float = 0.0) -> None:
    """Attempts that fail, and where they went."""
    went: list[str] = []
    for _ in expected:
        went.append(it.choose(now))
        now += 0.001
        it.ended(went[-1], now, f"{went[-1]} is dead")
    assert went == list(expected)


def go_live(it: Endpoints[str], expected: str, now: float, *, stable: bool = True) -> None:
    assert it.choose(now) == expected
    it.live(expected, now)
    if stable:
        it.stable()


def health(it: Endpoints[str], now: float = 0.0) -> dict[str, EndpointHealth]:
    return {one.endpoint: one for one in it.health(now)}


def test_each_endpoint_has_its_failures_and_then_the_next_one_has_its_turn() -> None:
    fail(endpoints(), "a", "a", "b", "b", "c", "c")
    fail(endpoints(fail_after=1), "a", "b", "c")


def test_when_all_cool_down_the_one_that_is_over_first_is_taken_at_once() -> None:
    it = endpoints(fail_after=1, cool_down=60)
    for now in range(9):
        fail(it, "abc"[now % 3], now=now)


def test_a_cool_down_has_an_end_and_then_one_failure_begins_the_next() -> None:
    it = endpoints("ab", cool_down=60)
    fail(it, "a", "a", "b")
    assert it.choose(60) == "b"
    fail(it, "a", "b", now=61)
    assert it.choose(121) == "a"
    assert it.choose(200) == "a"


def test_a_stable_link_clears_failures_and_cool_down() -> None:
    it = endpoints("ab")
    fail(it, "a", "a", "b")
    go_live(it, "b", 1)
    it.ended("b", 50, "lost")
    assert health(it)["b"].failures == 0
    fail(it, "b", "b", "a", "b", now=50)


def test_a_link_that_ends_before_it_is_stable_is_a_failure() -> None:
    it = endpoints()
    for now in (1, 2):
        go_live(it, "a", now, stable=False)
        it.ended("a", now, "accepted, then dropped")
    assert it.choose(2) == "b"


def test_the_loss_of_a_stable_link_is_no_failure_but_its_reason_is_kept() -> None:
    it = endpoints(fail_after=1)
    go_live(it, "a", 0)
    assert not it.ended("a", 100, "reset by peer")
    assert it.choose(100) == "a"
    assert (health(it)["a"].failures, health(it)["a"].last_error) == (0, "reset by peer")


def test_the_next_link_is_not_stable_because_the_last_one_was() -> None:
    it = endpoints(fail_after=1)
    go_live(it, "a", 0)
    it.ended("a", 100, "lost")
    go_live(it, "a", 101, stable=False)
    it.ended("a", 102, "lost")
    assert it.choose(102) == "b"


def test_what_the_driver_ends_itself_is_no_failure() -> None:
    it = endpoints(fail_after=1)
    assert not it.ended("a", 0, None)
    go_live(it, "a", 0, stable=False)
    assert not it.ended("a", 1, None)
    assert it.choose(1) == "a"
    assert health(it)["a"].live_for is None


def test_reset_forgets_failures_and_cool_downs() -> None:
    it = endpoints()
    fail(it, "a", "a", "b", "b")
    it.reset()
    assert it.choose(0) == "a"
    assert {one.failures for one in it.health(0)} == {0}
    fail(it, "a", "a", "b")


def test_an_endpoint_of_the_options_factory_is_none_of_ours() -> None:
    it = endpoints(fail_after=1)
    it.live("x", 0)
    it.stable()
    assert it.next_check() is None
    assert not it.ended("x", 1, "lost")
    assert not it.redirect("x", ["b"], 1, permanent=True)
    assert not it.tested("x", 1, "dead")
    assert set(health(it)) == {"a", "b", "c"}
    assert it.choose(1) == "a"


def test_the_same_endpoint_twice_is_one() -> None:
    it = endpoints("aba")
    fail(it, "a", "a", "b")
    assert set(health(it)) == {"a", "b"}


# --- a single endpoint


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(["fail", "drop", "lose", "end"])), max_size=30))
def test_a_single_endpoint_is_always_chosen_never_cools_down_and_changes_no_delay(steps: list[Any]) -> None:
    it = endpoints("a", fail_after=1)
    now = 0.0
    for wait, what in steps:
        now += wait
        assert it.choose(now) == "a"
        if what in ("drop", "lose"):
            it.live("a", now)
        if what == "lose":
            it.stable()
        assert it.next_check() is None
        assert it.ended("a", now, None if what == "end" else "dead") is False
        assert it.health(now)[0].cool_down_left == 0


# --- whose turn it is


def turns(it: Endpoints[str], count: int) -> str:
    """Where failed attempts went, with a space where the circuit breaker may wait."""
    went = ""
    for now in range(count):
        endpoint = it.choose(now)
        went += endpoint + ("" if it.ended(endpoint, now, "dead") else " ")
    return went.strip()


def test_between_two_waits_every_endpoint_has_its_turn() -> None:
    assert turns(endpoints(), 12) == "a ab bc cab cab c"
    assert turns(endpoints(fail_after=1), 6) == "abc abc"
    assert turns(endpoints(fail_after=100), 4) == "a a a a"


def test_a_broker_that_refers_to_ever_new_dead_servers_is_not_hammered() -> None:
    it = endpoints("a", fail_after=1)
    waits = 0
    for number in range(20):
        assert it.choose(0) in ("a", f"x{number - 1}")
        assert it.redirect("a", [f"x{number}"], 0, permanent=True)
        waits += not it.ended(it.choose(0), 0, "dead")
        it.ended("a", 0, None)
    assert waits == 20


@st.composite
def half_dead(draw: st.DrawFn) -> tuple[Endpoints[str], float]:
    """Endpoints with some past, and the time."""
    it = endpoints(
        "abcd"[: draw(st.integers(2, 4))], fail_after=draw(st.integers(1, 3)), cool_down=draw(st.floats(0.1, 1000))
    )
    now = 0.0
    for wait, what in draw(st.lists(st.tuples(st.floats(0, 500), st.sampled_from(["fail", "fail", "live"])))):
        now += wait
        endpoint = it.choose(now)
        if what == "live":
            it.live(endpoint, now)
            it.stable()
        it.ended(endpoint, now, "dead")
    return it, now


@given(it_and_now=half_dead(), data=st.data())
def test_however_long_the_delays_are_every_endpoint_has_its_turn(it_and_now: Any, data: st.DataObject) -> None:
    it, now = it_and_now
    names = set(health(it))
    waits = data.draw(st.one_of(st.floats(0, 1000).map(lambda wait: st.just(wait)), st.just(st.floats(0, 1000))))
    missing = set(names)
    row = 0
    for _ in range(5 * len(names)):
        now += data.draw(waits)
        missing.discard(endpoint := it.choose(now))
        row = row + 1 if it.ended(endpoint, now, "dead") else 0
        assert row < len(names)
    assert not missing


def attempts_until_back(seed: int, count: int, back: float) -> float:
    """Seconds from the return of one endpoint to an attempt at it, as the driver waits; the others stay dead."""
    rng = random.Random(seed)
    config = BackoffConfig()
    backoff = Backoff(config, rng)
    it = endpoints("abcd"[:count])
    alive = rng.choice("abcd"[:count])
    now = 0.0
    while (endpoint := it.choose(now)) != alive or now < back:
        now += rng.choice([0.01, 10.0])  # refused, or connect_timeout
        another = it.ended(endpoint, now, "dead")
        delay = backoff.failed().seconds
        now += min(delay, config.start) if another else delay
    return now - back


@pytest.mark.parametrize("count", [1, 2])
@given(seed=st.integers(), back=st.floats(0, 3000))
def test_back_within_a_minute_even_if_another_endpoint_stays_dead(count: int, seed: int, back: float) -> None:
    assert attempts_until_back(seed, count, back) < 55


# --- the way back


def on_fallback(names: str = "ab", **options: Any) -> Endpoints[str]:
    """Live on the last one at 0, with all others cooling down."""
    it = endpoints(names, fail_after=1, **options)
    fail(it, *names[:-1])
    go_live(it, names[-1], 0)
    return it


def test_where_it_should_be_nothing_is_tested() -> None:
    it = endpoints()
    assert it.next_check() is None
    go_live(it, "a", 0)
    assert it.next_check() is None


def test_a_preferred_endpoint_is_tested_now_and_then_and_returned_to_after_a_while() -> None:
    it = on_fallback(check_every=30, return_after=120)
    for now in (30, 60, 90, 120):
        assert it.next_check() == ("a", now)
        assert not it.tested("a", now, None)
    assert it.next_check() == ("a", 150)
    assert health(it)["a"].tests_passed == 4
    assert it.tested("a", 150, None)
    assert not it.ended("b", 151, None)
    go_live(it, "a", 151)
    assert it.next_check() is None
    assert health(it)["a"].tests_passed == 0


def test_a_failed_test_begins_the_time_anew() -> None:
    it = on_fallback(check_every=30, return_after=60)
    outcomes = [None, None, "dead", None, None, None]
    assert [it.tested("a", 30 * i, error) for i, error in enumerate(outcomes, 1)] == [False] * 5 + [True]


def test_two_tests_at_the_least() -> None:
    it = on_fallback(return_after=0.001)
    assert not it.tested("a", 30, None)
    assert it.tested("a", 60, None)


def test_going_back_is_going_there_even_during_its_cool_down() -> None:
    it = on_fallback("abc", check_every=1, return_after=1, cool_down=1000)
    assert not it.tested("b", 1, None)
    assert it.tested("b", 2, None)
    it.ended("c", 2, None)
    assert it.choose(2) == "b"
    assert health(it, 2)["b"].cool_down_left == 0 < health(it, 2)["a"].cool_down_left


def test_going_back_is_going_there_even_if_a_better_one_may_be_tried() -> None:
    it = on_fallback("abc", return_after=10, cool_down=5)
    assert not it.tested("b", 30, None)
    assert it.tested("b", 60, None)
    it.ended("c", 60, None)
    fail(it, "b", "a", now=60)


def test_all_that_are_preferred_are_tested_in_turn_and_no_others() -> None:
    it = endpoints("abcd", fail_after=1)
    fail(it, "a", "b")
    go_live(it, "c", 0)
    seen: list[tuple[str, float]] = []
    for late in (0, 5, 0, 0):
        check = it.next_check()
        assert check is not None
        seen.append(check)
        it.tested(check[0], check[1] + late, "dead")
    assert seen == [("a", 30), ("b", 30), ("a", 60), ("b", 65)]


def test_while_it_fails_its_tests_an_endpoint_is_not_chosen() -> None:
    it = on_fallback()
    for now in range(30, 3600, 30):
        it.tested("a", now, "dead")
    it.ended("b", 3620, "lost")
    assert it.choose(3620) == "b"
    assert health(it)["a"].failures == 120


def test_a_lost_fallback_leads_to_the_primary_as_soon_as_it_does_not_cool_down() -> None:
    it = on_fallback(cool_down=60)
    it.tested("a", 30, None)
    it.ended("b", 59, "lost")
    assert it.choose(59) == "b"
    assert it.choose(61) == "a"


def test_an_endpoint_that_passes_its_tests_and_then_fails_must_pass_them_for_twice_as_long() -> None:
    it = on_fallback(check_every=10, return_after=100, cool_down=1000)
    now = 0.0
    took: list[float] = []
    for _ in range(8):
        start = now
        while not it.tested("a", now := now + 10, None):
            pass
        took.append(now - start - 10)
        it.ended("b", now, None)
        fail(it, "a", now=now)
        go_live(it, "b", now)
    assert took == [100, 200, 400, 800, 1600, 3200, 3200, 3200]
    it.tested("a", now, None)
    assert it.tested("a", now + 3200, None)
    it.ended("b", now, None)
    go_live(it, "a", now)
    it.ended("a", now, "lost")
    fail(it, "a", now=now)
    go_live(it, "b", now)
    it.tested("a", now, None)
    assert it.tested("a", now + 100, None)


def test_a_way_back_that_is_not_taken_is_forgotten_with_the_next_link() -> None:
    it = on_fallback(return_after=1)
    it.tested("a", 30, None)
    assert it.tested("a", 60, None)
    it.ended("b", 60, None)
    it.live("b", 61)  # the options_factory would have it so
    it.stable()
    it.tested("a", 91, "dead")
    it.ended("b", 100, "lost")
    assert it.choose(100) == "b"


def test_it_stays_where_it_is_if_told_so() -> None:
    it = on_fallback(return_after=math.inf)
    assert it.next_check() is None
    it.ended("b", 100, "lost")
    assert it.choose(100) == "a"


def test_a_test_that_ends_after_the_link_does_not_prepare_a_way_back() -> None:
    it = on_fallback(return_after=1, cool_down=1000)
    it.tested("a", 30, None)
    it.ended("b", 60, "lost")
    assert not it.tested("a", 60, None)
    assert it.choose(60) == "b"


# --- to be looked at


def test_health_is_plain_values() -> None:
    it = endpoints("ab")
    fail(it, "a", "a")
    go_live(it, "b", 10)
    it.tested("a", 40, None)
    a, b = (attrs.asdict(one) for one in it.health(50))
    assert json.loads(json.dumps([a, b])) == [
        {
            "endpoint": "a",
            "live_for": None,
            "links": 0,
            "failures": 2,
            "cool_down_left": pytest.approx(10, abs=0.01),
            "tests_passed": 1,
            "last_error": "a is dead",
            "refers_to": None,
        },
        {
            "endpoint": "b",
            "live_for": 40,
            "links": 1,
            "failures": 0,
            "cool_down_left": 0,
            "tests_passed": 0,
            "last_error": None,
            "refers_to": None,
        },
    ]
