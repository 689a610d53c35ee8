"""Topic Names and Topic Filters [MQTT-4.7], in the plainest way there is."""

from __future__ import annotations

from ._properties import WireError

TOPIC_FILTER_INVALID = 0x8F
TOPIC_NAME_INVALID = 0x90


def check_topic(topic: str) -> str:
    """``topic``, if it is a legal Topic Name; else :class:`WireError`."""
    if not topic or "+" in topic or "#" in topic:
        raise WireError(f"{topic!r} is not a Topic Name", TOPIC_NAME_INVALID)
    return topic


def check_filter(topic_filter: str) -> str:
    """``topic_filter``, if it is legal, ``$share`` included; else :class:`WireError`."""
    share, plain = split_share(topic_filter)
    if share is not None and (not share or "+" in share or "#" in share):
        raise WireError(f"{topic_filter!r} has no valid share name", TOPIC_FILTER_INVALID)
    levels = plain.split("/")
    wrong = any(("+" in level and level != "+") or ("#" in level and level != "#") for level in levels)
    if not plain or wrong or "#" in levels[:-1]:
        raise WireError(f"{topic_filter!r} is not a Topic Filter", TOPIC_FILTER_INVALID)
    return topic_filter


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """``$share/name/a/b`` → ``("name", "a/b")``; other filters → ``(None, filter)``."""
    if not topic_filter.startswith("$share/"):
        return None, topic_filter
    share, _, plain = topic_filter[len("$share/") :].partition("/")
    return share, plain


def has_wildcard(topic_filter: str) -> bool:
    return "+" in topic_filter or "#" in topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Whether ``topic`` matches; a wildcard at the start does not match a topic that starts with ``$``."""
    if topic.startswith("$") and topic_filter[:1] in ("+", "#"):
        return False
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or level not in ("+", levels[index]):
            return False
    return len(wanted) == len(levels)


def require_topic(topic: str) -> str:
    """:func:`check_topic` of an argument: ``ValueError``."""
    try:
        return check_topic(topic)
    except WireError as error:
        raise ValueError(f"topic: {error.args[0]}") from None


def require_filter(topic_filter: str) -> str:
    """:func:`check_filter` of an argument: ``ValueError``."""
    try:
        return check_filter(topic_filter)
    except WireError as error:
        raise ValueError(f"topic_filter: {error.args[0]}") from None
