"""Topic Names and Topic Filters: the rules of MQTT 5 section 4.7 and 4.8.2, and a trie that routes by them.

Everything here walks level by level with its own stack. A Topic Name may have 65,536 levels (65,535 slashes), sent by
anybody who may publish: recursion would end in ``RecursionError``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

V = TypeVar("V", bound=Hashable)

MAXIMUM_LENGTH: Final = 65535
"""Bytes in a UTF-8 Encoded String [MQTT-1.5.4]."""

_SHARE: Final = "$share"

_shown: Final = reprlib.Repr()
_shown.maxstring = 60


def check_topic(topic: str, field: str = "topic") -> bytes:
    """Validate a Topic Name and return its UTF-8 bytes [MQTT-3.3.2-2, MQTT-4.7.3].

    :param field: how the error message names the argument.
    :raises TypeError: not a str.
    :raises ValueError: empty, over 65,535 bytes, not encodable, or with ``+``, ``#`` or U+0000.
    """
    data = _encode(topic, field, "a Topic Name")
    if "+" in topic or "#" in topic:
        raise ValueError(f"{field}: a Topic Name has no wildcard '+' or '#', got {_shown.repr(topic)}")
    return data


def check_filter(topic_filter: str, field: str = "topic_filter") -> None:
    """Validate a Topic Filter, shared ones (``$share/{group}/{filter}``) included [MQTT-4.7.1, MQTT-4.8.2].

    :param field: how the error message names the argument.
    :raises TypeError: not a str.
    :raises ValueError: empty, over 65,535 bytes, not encodable, with U+0000, or with a misplaced wildcard or a
        malformed share.
    """
    _encode(topic_filter, field, "a Topic Filter")
    plain = topic_filter
    if topic_filter.startswith(_SHARE + "/"):
        group, plain = _split(topic_filter)
        if not group or "+" in group or "#" in group or not plain:
            raise ValueError(
                f"{field}: a shared subscription is '$share/{{group}}/{{filter}}' with a group of at least one "
                f"character, without '+' and '#', and a filter that is not empty, got {_shown.repr(topic_filter)}"
            )
    if "#" in plain and (plain.index("#") != len(plain) - 1 or plain[-2:-1] not in ("", "/")):
        raise ValueError(f"{field}: '#' must be the whole of the last level, got {_shown.repr(topic_filter)}")
    if "+" in plain and any("+" in level and level != "+" for level in plain.split("/")):
        raise ValueError(f"{field}: '+' must be the whole of its level, got {_shown.repr(topic_filter)}")


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """Split a valid Topic Filter into its share group (None if it is not shared) and the plain filter.

    ``$queue/…``, which some brokers know, is a plain filter: it is not in the specification.
    """
    if topic_filter.startswith(_SHARE + "/"):
        return _split(topic_filter)
    return None, topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Tell whether a Topic Name matches a Topic Filter [MQTT-4.7]; both must be valid.

    A shared filter matches what its plain filter matches. A filter that starts with a wildcard matches no topic that
    starts with ``$`` [MQTT-4.7.2-1].
    """
    filter_levels = split_share(topic_filter)[1].split("/")
    levels = topic.split("/")
    if topic.startswith("$") and filter_levels[0] in ("+", "#"):
        return False
    for index, expected in enumerate(filter_levels):
        if expected == "#":  # also stands for its parent level [MQTT-4.7.1.2]
            return True
        if index == len(levels) or expected not in ("+", levels[index]):
            return False
    return len(filter_levels) == len(levels)


class _Node(Generic[V]):
    """One level of one or more filters. A node without values and children is never kept, except the root."""

    __slots__ = ("children", "values")

    def __init__(self) -> None:
        self.children: dict[str, _Node[V]] = {}
        self.values: dict[V, None] = {}


class FilterTrie(Generic[V]):
    """Values filed under Topic Filters, found by Topic Name.

    Filters must be valid (`check_filter`). A shared filter is filed under its plain filter. ``len()`` is the number
    of pairs of filter and value.
    """

    def __init__(self) -> None:
        self._root: _Node[V] = _Node()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, topic_filter: str, value: V) -> None:
        """File ``value`` under ``topic_filter``; no effect if it is there already."""
        node = self._root
        for level in split_share(topic_filter)[1].split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node()
            node = child
        if value not in node.values:
            node.values[value] = None
            self._length += 1

    def remove(self, topic_filter: str, value: V) -> None:
        """Undo `add`.

        :raises KeyError: ``value`` is not filed under ``topic_filter``.
        """
        node = self._root
        path: list[tuple[_Node[V], str]] = []
        for level in split_share(topic_filter)[1].split("/"):
            path.append((node, level))
            child = node.children.get(level)
            if child is None:
                raise KeyError((topic_filter, value))
            node = child
        if value not in node.values:
            raise KeyError((topic_filter, value))
        del node.values[value]
        self._length -= 1
        for parent, level in reversed(path):
            child = parent.children[level]
            if child.values or child.children:
                break
            del parent.children[level]

    def match(self, topic: str) -> list[V]:
        """Return the values of all filters that match a valid Topic Name, each once, in no particular order."""
        levels = topic.split("/")
        found: dict[V, None] = {}
        nodes = [self._root]
        for depth, level in enumerate(levels):
            wildcards = depth > 0 or not topic.startswith("$")
            # At most two children of each node go on, and a node has one parent: the work of a level is bounded by
            # the filters that are that deep and still fit.
            deeper: list[_Node[V]] = []
            for node in nodes:
                children = node.children
                if (child := children.get(level)) is not None:
                    deeper.append(child)
                if wildcards:
                    if (child := children.get("+")) is not None:
                        deeper.append(child)
                    if (child := children.get("#")) is not None:
                        found.update(child.values)
            nodes = deeper
            if not nodes:
                break
        for node in nodes:
            found.update(node.values)
            if (child := node.children.get("#")) is not None:
                found.update(child.values)
        return list(found)

    def overlaps(self, topic_filter: str) -> bool:
        """Tell whether some topic matches both a valid filter and a filter in the trie.

        Takes time in proportion to the number of levels in the trie at worst (a filter of many ``+``).
        """
        levels = split_share(topic_filter)[1].split("/")
        todo = [(self._root, 0)]
        while todo:
            node, depth = todo.pop()
            children = node.children
            if depth == len(levels):
                if node.values or "#" in children:
                    return True
                continue
            level = levels[depth]
            if level == "#":
                # Every node that is kept leads to a filter, and each filter has a topic; but below the root, only
                # those that do not start with "$" count. And all that "/#" shares with "+" is the empty text, which
                # is no topic [MQTT-4.7.3-1].
                if depth > 1 or (depth == 1 and (levels[0] or children)):
                    return True
                if depth == 0 and any(not name.startswith("$") for name in children):
                    return True
                continue
            if "#" in children and (depth > 0 or not level.startswith("$")):
                return True
            if level == "+":
                todo += [
                    (child, depth + 1)
                    for name, child in children.items()
                    if name != "#" and (depth > 0 or (not name.startswith("$") and (name or len(levels) > 1)))
                ]
                continue
            if (child := children.get(level)) is not None:
                todo.append((child, depth + 1))
            if (depth > 0 or not level.startswith("$")) and (child := children.get("+")) is not None:
                todo.append((child, depth + 1))
        return False


def _split(topic_filter: str) -> tuple[str, str]:
    group, _, plain = topic_filter[len(_SHARE) + 1 :].partition("/")
    return group, plain


def _encode(text: str, field: str, what: str) -> bytes:
    # A caller without a type checker passes bytes or None sooner or later, hence the test of an annotated type.
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{field}: {what} is a str, got {type(text).__name__}")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field}: {what} must be encodable as UTF-8, got {_shown.repr(text)}") from None
    if not 1 <= len(data) <= MAXIMUM_LENGTH:
        raise ValueError(
            f"{field}: {what} has 1..{MAXIMUM_LENGTH} bytes of UTF-8, got {len(data)}: {_shown.repr(text)}"
        )
    if "\0" in text:
        raise ValueError(f"{field}: {what} must not contain U+0000, got {_shown.repr(text)}")
    return data
