from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver._topics import FilterTrie, check_filter, check_topic, matches, split_share

# A small alphabet, so that random filters and topics meet often; "$" levels and empty levels included.
LEVELS = ("a", "b", "", "$x")
FILTER_LEVELS = st.lists(st.sampled_from((*LEVELS, "+")), min_size=1, max_size=4)


@st.composite
def filters_drawn(draw: st.DrawFn) -> str:
    levels = draw(FILTER_LEVELS) + draw(st.sampled_from(([], ["#"])))
    return draw(st.sampled_from(("", "$share/g/"))) + ("/".join(levels) or "#")


FILTERS = filters_drawn()
TOPICS = st.lists(st.sampled_from(LEVELS), min_size=1, max_size=5).map("/".join).filter(bool)


def all_topics(depth: int, levels: tuple[str, ...] = LEVELS) -> Iterator[str]:
    for length in range(1, depth + 1):
        for chosen in product(levels, repeat=length):
            if topic := "/".join(chosen):
                yield topic


def gc_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


# --- validation


@pytest.mark.parametrize(
    "topic", ["a", "/", "a/b", "a//b", "/finance", "Accounts payable", "$SYS/x", "€", " ", "$share/x"]
)
def test_a_valid_topic_name_gives_its_utf8_bytes(topic: str) -> None:
    assert check_topic(topic) == topic.encode()


def test_the_length_of_a_topic_name_counts_in_bytes() -> None:
    assert len(check_topic("x" * 65535)) == 65535
    assert len(check_topic("€" * 21845)) == 65535
    with pytest.raises(ValueError, match=r"^topic: a Topic Name has 1\.\.65535 bytes of UTF-8, got 65536: 'x"):
        check_topic("x" * 65536)
    with pytest.raises(ValueError, match="got 65538"):
        check_topic("€" * 21846)


@pytest.mark.parametrize("topic", ["", "+", "#", "a/+", "a+b", "sport/#", "a\0b", "\ud800"])
def test_an_invalid_topic_name_is_refused_by_name_and_value(topic: str) -> None:
    with pytest.raises(ValueError, match=r"^will_topic: ") as caught:
        check_topic(topic, "will_topic")
    assert repr(topic) in str(caught.value)


@pytest.mark.parametrize("value", [b"a", None, 1, ["a"]])
def test_a_topic_that_is_no_str_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^topic: a Topic Name is a str, got {type(value).__name__}$"):
        check_topic(value)  # type: ignore[arg-type]  # the caller's mistake under test
    with pytest.raises(TypeError, match=rf"^topic_filter: a Topic Filter is a str, got {type(value).__name__}$"):
        check_filter(value)  # type: ignore[arg-type]  # the caller's mistake under test


def test_the_value_in_a_message_is_cut_short() -> None:
    with pytest.raises(ValueError, match="wildcard") as caught:
        check_topic("+" * 60000)
    assert len(str(caught.value)) < 160


# [MQTT-4.7.1.2], [MQTT-4.7.1.3], 4.8.2
VALID_FILTERS = [
    *(
        "#",
        "+",
        "/",
        "//",
        "sport/tennis/#",
        "sport/tennis/player1/#",
        "+/tennis/#",
        "sport/+/player1",
        "+/+",
        "/+",
        "+/",
    ),
    *("$SYS/#", "$SYS/monitor/+", "/#", "//#", "a b/#", "$share", "$queue/a", "$shared/a", "$shar/#"),
    *("$share/consumer1/sport/tennis/+", "$share/g/#", "$share/g/+", "$share/g//", "$share/g//finance", "$share/$/a"),
]
INVALID_FILTERS = [
    *(
        "",
        "sport/tennis#",
        "sport/tennis/#/ranking",
        "#/",
        "##",
        "#/#",
        "a#",
        "sport+",
        "+a",
        "a/b+/c",
        "++",
        "+#",
        "a\0",
        "\udfff",
    ),
    *(
        "$share/",
        "$share/g",
        "$share/g/",
        "$share//a",
        "$share/+/a",
        "$share/g#/a",
        "$share/g+/a",
        "$share/g/a#",
        "$share/g/+a",
    ),
]


@pytest.mark.parametrize("topic_filter", VALID_FILTERS)
def test_valid_filters_pass(topic_filter: str) -> None:
    check_filter(topic_filter)


@pytest.mark.parametrize("topic_filter", INVALID_FILTERS)
def test_an_invalid_filter_is_refused_by_name_and_value(topic_filter: str) -> None:
    with pytest.raises(ValueError, match=r"^filters\[3\]: ") as caught:
        check_filter(topic_filter, "filters[3]")
    assert repr(topic_filter) in str(caught.value)


@given(FILTERS)
def test_generated_filters_are_valid(topic_filter: str) -> None:
    check_filter(topic_filter)


@pytest.mark.parametrize(
    "topic_filter, group, plain",
    [
        ("$share/workers/jobs/+", "workers", "jobs/+"),
        ("$share/g//a", "g", "/a"),
        ("$queue/jobs", None, "$queue/jobs"),
        ("$share", None, "$share"),
        ("jobs/#", None, "jobs/#"),
    ],
)
def test_split_share(topic_filter: str, group: str | None, plain: str) -> None:
    assert split_share(topic_filter) == (group, plain)


# --- matching

# The examples of [MQTT-4.7.1.2], [MQTT-4.7.1.3] and [MQTT-4.7.2].
SPECIFICATION = [
    ("sport/tennis/player1/#", "sport/tennis/player1", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
    ("sport/tennis/player1/#", "sport/tennis/player12", False),
    ("sport/#", "sport", True),
    ("#", "sport/tennis", True),
    ("#", "/", True),
    ("sport/tennis/+", "sport/tennis/player1", True),
    ("sport/tennis/+", "sport/tennis/player2", True),
    ("sport/tennis/+", "sport/tennis/player1/ranking", False),
    ("sport/+", "sport", False),
    ("sport/+", "sport/", True),
    ("+/+", "/finance", True),
    ("/+", "/finance", True),
    ("+", "/finance", False),
    ("#", "$SYS/monitor", False),
    ("+/monitor/Clients", "$SYS/monitor/Clients", False),
    ("$SYS/#", "$SYS/", True),
    ("$SYS/#", "$SYS", True),
    ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ("+/#", "$SYS/monitor", False),
    ("a/+", "a/$SYS", True),
    ("a/#", "a/$SYS/b", True),
    ("ACCOUNTS", "Accounts", False),
    ("/finance", "finance", False),
    ("$share/g/sport/+", "sport/x", True),
    ("$share/g/#", "$SYS/x", False),
    ("$queue/a", "a", False),
    ("a/b", "a", False),
    ("a", "a/b", False),
]


@pytest.mark.parametrize("topic_filter, topic, expected", SPECIFICATION)
def test_examples_of_the_specification(topic_filter: str, topic: str, expected: bool) -> None:
    trie = FilterTrie[str]()
    trie.add(topic_filter, "value")
    assert matches(topic_filter, topic) is expected
    assert trie.match(topic) == (["value"] if expected else [])
    assert trie.overlaps(topic) is expected


@given(st.lists(FILTERS, max_size=12), TOPICS)
def test_the_trie_finds_what_matches_says(filters: list[str], topic: str) -> None:
    trie = FilterTrie[int]()
    for index, topic_filter in enumerate(filters):
        trie.add(topic_filter, index)
    assert sorted(trie.match(topic)) == [i for i, topic_filter in enumerate(filters) if matches(topic_filter, topic)]


def test_a_shared_filter_does_not_match_its_own_text() -> None:
    trie = FilterTrie[int]()
    trie.add("$share/g/sport/+", 1)
    assert not matches("$share/g/sport/+", "$share/g/sport/x")
    assert trie.match("$share/g/sport/x") == []


def test_a_value_under_several_filters_is_found_once() -> None:
    trie = FilterTrie[str]()
    for topic_filter in ("a/b", "a/+", "a/#", "#", "$share/g/a/b"):
        trie.add(topic_filter, "value")
    assert trie.match("a/b") == ["value"]


# --- what is in the trie


@given(st.lists(st.tuples(FILTERS, st.integers(0, 2)), max_size=12), st.randoms(use_true_random=False), TOPICS)
def test_adding_and_removing_leaves_an_empty_trie(
    pairs: list[tuple[str, int]], rng: random.Random, topic: str
) -> None:
    trie = FilterTrie[int]()
    for topic_filter, value in pairs:
        trie.add(topic_filter, value)
        trie.add(topic_filter, value)
    kept = list({(split_share(topic_filter)[1], value) for topic_filter, value in pairs})
    kept.sort()
    rng.shuffle(kept)
    while kept:
        assert len(trie) == len(kept)
        assert set(trie.match(topic)) == {value for topic_filter, value in kept if matches(topic_filter, topic)}
        trie.remove(*kept.pop())
    assert len(trie) == 0
    assert trie.match(topic) == []
    assert not trie.overlaps("#")


@pytest.mark.parametrize(
    "topic_filter, value", [("a/b", "other"), ("a", "value"), ("a/b/c", "value"), ("a/+", "value")]
)
def test_removing_what_is_not_there_is_a_key_error_and_no_change(topic_filter: str, value: str) -> None:
    trie = FilterTrie[str]()
    trie.add("a/b", "value")
    with pytest.raises(KeyError):
        trie.remove(topic_filter, value)
    assert len(trie) == 1
    assert trie.match("a/b") == ["value"]


# --- overlap


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("+", "/#", False),
        ("+", "#", True),
        ("/#", "+/#", True),
        ("/#", "+/x", True),
        ("/#", "/", True),
        ("/#", "#", True),
    ],
)
def test_the_empty_text_is_no_topic_that_filters_could_share(one: str, other: str, expected: bool) -> None:
    for first, second in ((one, other), (other, one)):
        trie = FilterTrie[int]()
        trie.add(first, 1)
        assert trie.overlaps(second) is expected


@given(st.lists(FILTERS, max_size=4), FILTERS)
def test_overlaps_is_what_trying_all_topics_says(filters: list[str], topic_filter: str) -> None:
    trie = FilterTrie[int]()
    for index, other in enumerate(filters):
        trie.add(other, index)
    # Filters have at most 5 levels: a topic that two of them match has one of at most 5 levels, too.
    expected = any(
        matches(topic_filter, topic) and any(matches(other, topic) for other in filters) for topic in ALL_TOPICS
    )
    assert trie.overlaps(topic_filter) is expected


ALL_TOPICS = tuple(all_topics(5, ("a", "b", "", "$x")))


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("a/+", "+/b", True),
        ("a/#", "a", True),
        ("a/#", "+/+/c", True),
        ("#", "$SYS/#", False),
        ("+/x", "$SYS/x", False),
        ("#", "+", True),
        ("a/+", "a/b/+", False),
        ("$share/g/a/+", "$share/h/a/b", True),
    ],
)
def test_overlap_examples(one: str, other: str, expected: bool) -> None:
    for first, second in ((one, other), (other, one)):
        trie = FilterTrie[int]()
        trie.add(first, 1)
        assert trie.overlaps(second) is expected


# --- size: CPU time of this process with a wide margin, since the mistakes guarded against cost minutes or a crash


def test_a_topic_of_65536_levels_neither_crashes_nor_takes_long() -> None:
    started = time.process_time()
    slashes = "/" * 65535
    deep_wildcard = "/".join(["+"] * 32768)
    trie = FilterTrie[str]()
    for topic_filter in (slashes, deep_wildcard, "/".join(["+"] * 32767 + ["#"]), "#", "/+/#"):
        check_filter(topic_filter)
        trie.add(topic_filter, topic_filter[:8] + topic_filter[-2:])
    assert check_topic(slashes) == slashes.encode()
    assert matches("/".join(["+"] * 32767 + ["#"]), slashes)
    assert len(trie.match(slashes)) == 4
    assert len(trie.match("/" * 32767)) == 4
    assert trie.overlaps(deep_wildcard)
    assert not trie.overlaps("$" + slashes[1:])
    trie.remove(slashes, slashes[:8] + slashes[-2:])
    del trie  # a chain of 32,768 nodes is freed here: no C stack overflow
    assert time.process_time() - started < 20


def test_wildcards_at_every_level_do_not_multiply() -> None:
    started = time.process_time()
    trie = FilterTrie[int]()
    # All 2^12 ways to put "+" or "a" into 12 levels: the same levels are walked once, not once per combination.
    for index, levels in enumerate(product("+a", repeat=12)):
        trie.add("/".join(levels), index)
    assert len(trie.match("/".join("a" * 12))) == 4096
    assert trie.match("/".join("a" * 11)) == []
    assert not trie.overlaps("/".join("+" * 11))
    assert time.process_time() - started < 10


def test_a_hundred_thousand_filters() -> None:
    trie = FilterTrie[int]()
    for index in range(100_000):
        trie.add(f"site/{index % 100}/device/{index}/+", index)
    assert len(trie) == 100_000
    started = time.process_time()
    for index in range(0, 100_000, 10):
        assert trie.match(f"site/{index % 100}/device/{index}/state") == [index]
        assert trie.overlaps(f"+/{index % 100}/device/{index}/#")
    assert time.process_time() - started < 10
