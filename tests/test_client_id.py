from __future__ import annotations

import random
import re
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests.peers import memory_config
from trio_mqtt_driver import MQTTDriver
from trio_mqtt_driver._client_id import ClientIds, default_base
from trio_mqtt_driver.testing import MemoryBroker


class Clock:
    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_the_default_scheme() -> None:
    clock = Clock(1_700_000_000.0625)
    ids = ClientIds("kitchen", clock)
    assert ids.make(1) == "kitchen_1700000000062"
    clock.now += 60
    assert ids.make(2) == "kitchen_reconnect_1700000060062"
    clock.now += 60
    assert ids.make(3) == "kitchen_reconnect_1700000120062"


def test_several_in_one_millisecond_count_up() -> None:
    ids = ClientIds("k", Clock(5.0))
    assert [ids.make(n) for n in (1, 2, 3)] == ["k_5000", "k_reconnect_5001", "k_reconnect_5002"]


def test_a_clock_that_goes_backwards_does_not_take_the_ids_with_it() -> None:
    clock = Clock(5.0)
    ids = ClientIds("k", clock)
    ids.make(1)
    clock.now = 1.0
    assert ids.make(2) == "k_reconnect_5001"
    clock.now = 5.0
    assert ids.make(3) == "k_reconnect_5002"
    clock.now = 9.0
    assert ids.make(4) == "k_reconnect_9000"


@given(st.lists(st.floats(0, 1e10), min_size=2, max_size=50))
def test_ids_rise_whatever_the_clock_does(times: list[float]) -> None:
    clock = Clock()
    ids = ClientIds("k", clock)
    milliseconds: list[int] = []
    for now in times:
        clock.now = now
        milliseconds.append(int(ids.make(2).rpartition("_")[2]))
    assert milliseconds == sorted(set(milliseconds))


# --- a scheme of the user's own


def test_a_function_gets_base_generation_and_time() -> None:
    clock = Clock(5.0)
    ids = ClientIds("kitchen", clock, lambda base, generation, time: f"{base}-{generation}-{time:.3f}")
    assert ids.make(1) == "kitchen-1-5.000"
    assert ids.make(2) == "kitchen-2-5.001"
    clock.now = 7.0
    assert ids.make(3) == "kitchen-3-7.000"


def test_a_function_that_repeats_an_id_is_refused_by_name() -> None:
    ids = ClientIds("kitchen", Clock(), lambda base, generation, _time: f"{base}{generation % 2}")
    assert [ids.make(1), ids.make(2)] == ["kitchen1", "kitchen0"]
    with pytest.raises(ValueError, match=r"for generation 3: must differ from those before, got 'kitchen1' again$"):
        ids.make(3)


def test_only_the_latest_ids_are_remembered() -> None:
    ids = ClientIds("k", Clock(), lambda _base, generation, _time: str(generation))
    for generation in range(1, 102):
        ids.make(generation)
    with pytest.raises(ValueError, match="got '2' again"):
        ids.make(2)
    assert ids.make(1) == "1"


@pytest.mark.parametrize(
    "returned, error, text",
    [
        (None, TypeError, "must be a str, got NoneType"),
        (b"id", TypeError, "must be a str, got bytes"),
        ("", ValueError, r"must have 1\.\.65535 bytes of UTF-8, got 0"),
        ("€" * 21846, ValueError, r"must have 1\.\.65535 bytes of UTF-8, got 65538"),
        ("a\0", ValueError, r"must not contain U\+0000, got 'a\\x00'"),
        ("\ud800", ValueError, r"must be encodable as UTF-8, got '\\ud800'"),
    ],
)
def test_what_a_function_returns_is_checked(returned: Any, error: type[Exception], text: str) -> None:
    ids = ClientIds("k", Clock(), lambda _base, _generation, _time: returned)
    with pytest.raises(error, match=f"^client ID that the function returned for generation 7: {text}$"):
        ids.make(7)


# --- the base


@pytest.mark.parametrize("base", ["", "a\0b", "\udc00", "x" * 65510])
def test_a_base_that_makes_no_client_id_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match=r"^client_id: must "):
        ClientIds(base, Clock())


def test_the_longest_base_still_makes_a_valid_id() -> None:
    base = "x" * 65509
    assert len(ClientIds(base, Clock()).make(2)) <= 65535
    assert ClientIds("x" * 65535, Clock(), lambda base, _generation, _time: base).make(1) == "x" * 65535


def test_a_base_that_is_no_str_is_a_type_error() -> None:
    base: Any = 5
    with pytest.raises(TypeError, match=r"^client_id: must be a str, got int$"):
        ClientIds(base, Clock())


def test_the_default_base_is_short_random_and_within_what_every_broker_allows() -> None:
    rng = random.Random(1)
    bases = {default_base(rng) for _ in range(100)}
    assert len(bases) == 100
    assert default_base(random.Random(1)) in bases
    for base in bases:
        assert re.fullmatch("trio[a-z0-9]{5}", base)
        assert len(ClientIds(base, Clock()).make(1)) == 23


async def test_an_id_that_makes_the_probe_topic_too_long_is_a_failed_attempt(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    ids = ["x" * 65530, "short"]
    config = memory_config(broker, client_id_factory=lambda _base, _generation, _now: ids.pop(0), protocol="5")
    async with MQTTDriver(config) as driver:
        assert driver.client_id == "short"
        assert driver.generation == 1
        errors = [event.error for event in driver.status().history if event.error is not None]
        assert len(errors) == 1
        assert errors[0].startswith("ProbeError: ")
        assert "probe_topic" in errors[0]


async def test_an_id_that_makes_the_topic_of_the_overlap_test_too_long_leaves_the_link_alone(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """That topic is a little longer than the probe topic."""
    broker = MemoryBroker(nursery)
    name = "x" * (65535 - len("trio_mqtt_driver/probe/") - 3)
    config = memory_config(broker, client_id_factory=lambda _base, _generation, _now: name, protocol="3.1.1")
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a/#", print)
        await driver.subscribe("a/b", print)
        await trio.sleep(60)
        assert driver.generation == 1
    assert not broker.violations
