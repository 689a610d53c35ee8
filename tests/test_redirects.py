"""MQTT 5 Server References [MQTT-4.13]: which are followed, for how long, and what they cannot do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trio_mqtt_driver._endpoints import Endpoints, FailoverConfig
from trio_mqtt_driver._url import parse_reference

# --- the form of a reference


@pytest.mark.parametrize(
    "reference, places",
    [
        # The examples of the specification.
        ("myserver.xyz.org", [("myserver.xyz.org", 1)]),
        ("myserver.xyz.org:8883", [("myserver.xyz.org", 8883)]),
        (
            "10.10.151.22:8883 [fe80::9610:3eff:fe1c]:1883",
            [("10.10.151.22", 8883), ("fe80::9610:3eff:fe1c", 1883)],
        ),
        ("[::1]", [("::1", 1)]),
        ("[fe80::1%eth0]:2", [("fe80::1%eth0", 2)]),
        ("bücher.example _x:65535", [("bücher.example", 1), ("_x", 65535)]),
        (" a   b ", [("a", 1), ("b", 1)]),
        ("x" * 253, [("x" * 253, 1)]),
        # What is wrong is left out, the rest stays.
        ("a:0 b", [("b", 1)]),
        ("b a:65536", [("b", 1)]),
    ],
)
def test_parse_reference(reference: str, places: list[tuple[str, int]]) -> None:
    assert parse_reference(reference, 1) == places


@pytest.mark.parametrize(
    "reference",
    [
        *("", " ", ":", ":1883", "a:", "a:x", "a:-1", "a:+1", "a:123456", "a:\u0661", "a:1:2", "::1", "[::1", "::1]"),
        *("[a]", "[]:1", "[::1]x", "[::1]:", "[fe80::1%\0]", "mqtt://a", "a/b", "u@a", "a?b", "a#b", "a\\b", "a%b"),
        *("a\tb", "a\nb", "a\0", "a\u2028b", "a\u202eb", "\ud800", "x" * 254, "x" * 65535, "[" * 65535),
    ],
)
def test_a_malformed_reference_names_no_place(reference: str) -> None:
    assert parse_reference(reference, 1) == []


@given(st.text() | st.text("a.:[]1 %"), st.integers(1, 65535))
def test_whatever_comes_is_parsed(reference: str, default: int) -> None:
    for host, port in parse_reference(reference, default):
        assert 1 <= len(host) <= 253
        assert host.isprintable()
        assert " " not in host
        assert 1 <= port <= 65535


# --- for once: use another server (0x9C)


def endpoints(names: str = "ab", **options: Any) -> Endpoints[str]:
    return Endpoints(names[0], names[1:], FailoverConfig(**options))


def order(it: Endpoints[str]) -> list[str]:
    return [one.endpoint for one in it.health(0)]


def go_live(it: Endpoints[str], expected: str, now: float) -> None:
    assert it.choose(now) == expected
    it.live(expected, now)
    it.stable()


def test_a_temporary_redirect_is_for_the_next_connection_only() -> None:
    it = endpoints()
    assert it.redirect("a", ["x"], 0, permanent=False)
    go_live(it, "x", 0)
    it.ended("x", 100, "lost")
    assert it.choose(100) == "a"
    assert order(it) == ["a", "b"]


def test_a_detour_that_fails_is_a_failure_of_who_sent_us() -> None:
    it = endpoints(fail_after=2)
    for _ in range(2):
        assert it.choose(0) == "a"
        assert it.redirect("a", ["x"], 0, permanent=False)
        assert it.choose(0) == "x"
        it.ended("x", 0, "dead")
    assert it.choose(0) == "b"
    a, _ = it.health(0)
    assert (a.failures, a.last_error) == (2, "dead")


def test_a_detour_that_works_clears_who_sent_us_and_is_where_it_should_be() -> None:
    it = endpoints(fail_after=2)
    it.ended("a", 0, "dead")
    it.redirect("a", ["x"], 0, permanent=False)
    go_live(it, "x", 10)
    assert it.next_check() is None
    a, _ = it.health(15)
    assert (a.endpoint, a.refers_to, a.live_for, a.links, a.failures) == ("a", "x", 5, 1, 0)
    it.ended("x", 20, None)
    assert it.health(20)[0].refers_to is None


def test_a_detour_to_one_of_ours_counts_for_that_one() -> None:
    it = endpoints("abc", fail_after=2)
    for _ in range(2):
        assert it.redirect("a", ["b"], 0, permanent=False)
        it.ended("b", 0, "dead")
    assert [one.failures for one in it.health(0)] == [0, 2, 0]
    assert not it.redirect("a", ["b"], 0, permanent=False)
    assert it.redirect("a", ["c"], 0, permanent=False)
    go_live(it, "c", 0)
    assert [(one.refers_to, one.live_for) for one in it.health(5)] == [("c", None), (None, None), (None, 5)]
    assert it.next_check() == ("a", 30)


def test_from_the_detour_of_a_fallback_there_is_a_way_back() -> None:
    it = endpoints(fail_after=1, return_after=1)
    it.ended("a", 0, "dead")
    it.redirect("b", ["x"], 0, permanent=False)
    go_live(it, "x", 0)
    assert it.next_check() == ("a", 30)
    it.tested("a", 30, None)
    assert it.tested("a", 60, None)
    it.ended("x", 60, None)
    assert it.choose(60) == "a"


def test_a_live_link_is_referred_on_as_an_attempt_is() -> None:
    it = endpoints()
    go_live(it, "a", 0)
    assert it.redirect("a", ["x"], 100, permanent=False)
    assert it.health(100)[0].live_for is None
    go_live(it, "x", 100)


def test_the_first_target_that_can_be_followed_is() -> None:
    it = endpoints("abc", fail_after=1)
    it.ended("a", 0, "dead")
    assert it.redirect("b", ["b", "a", "c", "x"], 0, permanent=False)
    assert it.choose(0) == "c"


@pytest.mark.parametrize("targets", [[], ["b"], ["a"], ["b", "a"]], ids=["none", "itself", "cooling", "both"])
@pytest.mark.parametrize("permanent", [False, True])
def test_a_reference_to_nowhere_to_itself_or_to_what_has_failed_is_not_followed(
    targets: list[str], permanent: bool
) -> None:
    it = endpoints(fail_after=1, cool_down=60)
    it.ended("a", 0, "dead")
    assert not it.redirect("b", targets, 0, permanent=permanent)
    assert it.choose(0) == "b"
    assert order(it) == ["a", "b"]


@pytest.mark.parametrize("redirects", [0, 1, 3])
@pytest.mark.parametrize("permanent", [False, True])
def test_so_many_in_a_row_and_no_more(redirects: int, permanent: bool) -> None:
    it = endpoints("a", redirects=redirects)
    chain = ["a", *(f"x{number}" for number in range(redirects + 1))]
    followed = [it.redirect(here, [there], 0, permanent=permanent) for here, there in pairwise(chain)]
    assert followed == [True] * redirects + [False]
    assert it.choose(0) == chain[redirects]


def test_two_that_refer_to_each_other_are_left() -> None:
    it = endpoints(redirects=10)
    assert it.redirect("a", ["x"], 0, permanent=False)
    assert it.redirect("x", ["y"], 0, permanent=False)
    assert not it.redirect("y", ["a", "x"], 0, permanent=False)


def test_a_link_that_is_not_stable_does_not_end_the_row_but_a_stable_one_does() -> None:
    it = endpoints()
    it.redirect("a", ["x"], 0, permanent=False)
    it.live("x", 0)
    assert not it.redirect("x", ["y"], 1, permanent=False)
    it.ended("x", 1, "use another server")
    it.redirect("a", ["x"], 2, permanent=False)
    go_live(it, "x", 2)
    assert it.redirect("x", ["a"], 100, permanent=False)
    assert it.choose(100) == "a"


def test_after_a_failure_a_redirect_is_followed_again() -> None:
    it = endpoints("a")
    for _ in range(10):
        assert it.redirect("a", ["x"], 0, permanent=False)
        it.ended("x", 0, "dead")


def test_a_detour_that_an_options_factory_does_not_take_is_over() -> None:
    it = endpoints()
    it.redirect("a", ["x"], 0, permanent=False)
    it.ended("a", 0, "dead")
    assert it.choose(0) == "a"
    it.redirect("a", ["x"], 0, permanent=False)
    it.live("a", 0)
    it.ended("a", 1, None)
    assert it.choose(1) == "a"


def test_reset_lets_a_detour_be() -> None:
    it = endpoints()
    it.redirect("a", ["x"], 0, permanent=False)
    it.reset()
    assert it.choose(0) == "x"


# --- for good: server moved (0x9D)


def moved(names: str = "ab", **options: Any) -> Endpoints[str]:
    """The primary has moved to x, and x has been seen to work."""
    it = endpoints(names, **options)
    assert it.redirect(names[0], ["x"], 0, permanent=True)
    go_live(it, "x", 0)
    it.ended("x", 100, "lost")
    return it


def test_a_server_that_has_moved_is_looked_for_at_its_new_place_first() -> None:
    it = moved()
    assert order(it) == ["x", "a", "b"]
    go_live(it, "x", 100)
    assert it.next_check() is None


def test_the_old_address_is_asked_again_when_the_new_one_fails_and_before_the_fallbacks() -> None:
    it = moved(fail_after=1)
    it.ended("x", 100, "dead")
    assert it.choose(100) == "a"
    it.ended("a", 100, "dead")
    assert it.choose(100) == "b"


def test_a_move_is_forgotten_when_the_old_address_serves_us_again() -> None:
    it = moved(fail_after=1)
    it.ended("x", 100, "dead")
    go_live(it, "a", 100)
    assert order(it) == ["a", "b"]


def test_the_next_move_replaces_the_last_one() -> None:
    it = moved()
    for number in range(1000):
        assert it.redirect(it.choose(100), [f"x{number}"], 100, permanent=True)
        go_live(it, f"x{number}", 100)
    assert order(it) == ["x999", "a", "b"]


def test_a_move_changes_nothing_about_the_others() -> None:
    it = endpoints("abc", fail_after=1, cool_down=60)
    it.ended("a", 0, "dead")
    it.redirect("b", ["x"], 0, permanent=True)
    assert [(one.endpoint, one.cool_down_left) for one in it.health(0)] == [("a", 60), ("x", 0), ("b", 0), ("c", 0)]


def test_a_server_can_move_back() -> None:
    it = moved()
    assert it.redirect("x", ["a"], 100, permanent=True)
    assert it.choose(100) == "a"
    assert order(it) == ["a", "b"]


def test_a_server_can_move_to_a_fallback() -> None:
    it = endpoints("abc")
    assert it.redirect("a", ["c"], 0, permanent=True)
    assert it.choose(0) == "c"
    assert order(it) == ["c", "a", "b"]


def test_a_fallback_that_has_moved_stays_a_fallback() -> None:
    it = endpoints(fail_after=1)
    it.ended("a", 0, "dead")
    assert it.redirect("b", ["x"], 0, permanent=True)
    go_live(it, "x", 0)
    assert order(it) == ["a", "x", "b"]
    assert it.next_check() == ("a", 30)


def test_who_we_were_sent_to_for_once_cannot_settle_it_for_good() -> None:
    it = endpoints("a", redirects=2)
    assert it.redirect("a", ["x"], 0, permanent=False)
    assert it.redirect("x", ["y"], 0, permanent=True)
    assert it.choose(0) == "y"
    it.ended("y", 100, "dead")
    assert it.choose(100) == "a"
    assert [(one.endpoint, one.failures) for one in it.health(100)] == [("a", 1)]


def test_a_test_connection_may_learn_of_a_move_but_makes_no_detour() -> None:
    it = endpoints("abc", fail_after=1, cool_down=60)
    it.ended("a", 0, "dead")
    it.ended("b", 0, "dead")
    go_live(it, "c", 0)
    assert not it.redirect("b", ["x"], 30, permanent=False)
    assert it.redirect("b", ["x"], 30, permanent=True)
    assert order(it) == ["a", "x", "b", "c"]
    assert it.health(40)[3].live_for == 40
    it.tested("a", 30, "dead")
    assert it.next_check() == ("x", 30)
    it.tested("x", 30, None)
    assert it.next_check() == ("a", 60)  # and not b, which has just been tested
    it.ended("c", 89, "lost")
    assert it.choose(89) == "x"
    assert it.choose(90) == "a"


def test_a_test_of_an_address_that_is_forgotten_is_nothing() -> None:
    it = moved()
    it.redirect("x", ["y"], 100, permanent=True)
    assert not it.tested("x", 100, "dead")
    assert order(it) == ["y", "a", "b"]


# --- whatever happens


class EndpointsMachine(RuleBasedStateMachine):
    """Calls as the supervisor makes them, in any order of events and with a network that sends any references."""

    references = st.lists(st.sampled_from("abcxyz") | st.text(max_size=3), max_size=3)

    @initialize(
        names=st.sampled_from(["a", "ab", "abc"]),
        fail_after=st.integers(1, 3),
        cool_down=st.floats(0.1, 200),
        redirects=st.integers(0, 3),
    )
    def begin(self, names: str, **options: Any) -> None:
        self.names = names
        self.redirects = options["redirects"]
        self.it = Endpoints(names[0], names[1:], FailoverConfig(return_after=40, **options))
        self.now = 0.0
        self.live: str | None = None
        self.in_a_row = 0
        self.free_in_a_row = 0

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def here(self) -> str:
        return self.it.choose(self.now) if self.live is None else self.live

    @rule(error=st.none() | st.just("dead"))
    def end(self, error: str | None) -> None:
        free = self.it.ended(self.here(), self.now, error)
        self.live = None
        self.in_a_row = 0
        self.free_in_a_row = self.free_in_a_row + 1 if free else 0

    @rule(references=references, permanent=st.booleans())
    def refer(self, references: list[str], permanent: bool) -> None:
        if self.it.redirect(self.here(), references, self.now, permanent=permanent):
            self.live = None
            self.in_a_row += 1
            assert self.here() in references
        else:
            self.end("not followed")

    @precondition(lambda self: self.live is None)
    @rule()
    def succeed(self) -> None:
        self.live = self.here()
        self.it.live(self.live, self.now)

    @precondition(lambda self: self.live is not None)
    @rule()
    def prove_stable(self) -> None:
        self.it.stable()
        self.in_a_row = self.free_in_a_row = 0

    @precondition(lambda self: self.live is not None)
    @rule(error=st.none() | st.just("dead"), references=references)
    def test(self, error: str | None, references: list[str]) -> None:
        check = self.it.next_check()
        if check is None:
            return
        endpoint, at = check
        self.now = max(self.now, at)
        assert endpoint != self.live
        if error is not None and self.it.redirect(endpoint, references, self.now, permanent=True):
            self.free_in_a_row = 0  # there is one more that has not had its turn
        if self.it.tested(endpoint, self.now, error):
            self.it.ended(self.here(), self.now, None)
            self.live = None
            self.in_a_row = 0
            assert self.here() == endpoint

    @rule()
    def reset(self) -> None:
        self.it.reset()
        self.in_a_row = self.free_in_a_row = 0

    @invariant()
    def an_endpoint_that_cools_down_is_chosen_only_if_all_do(self) -> None:
        if self.live is None:
            left = {one.endpoint: one.cool_down_left for one in self.it.health(self.now)}
            chosen = left.get(self.it.choose(self.now), 0)
            assert chosen == 0 or chosen == min(left.values())

    @invariant()
    def rows_are_bounded(self) -> None:
        assert self.in_a_row <= self.redirects
        assert self.free_in_a_row < 2 * len(self.names)

    @invariant()
    def memory_is_bounded(self) -> None:
        known = {one.endpoint for one in self.it.health(self.now)}
        assert set(self.names) <= known
        assert len(known) <= 2 * len(self.names)
        assert self.it._had_turn <= known
        assert self.it._moved.keys() <= set(self.names)
        assert len(self.it._chain) <= self.redirects


TestEndpointsMachine = EndpointsMachine.TestCase
TestEndpointsMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
