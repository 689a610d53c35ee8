"""attrs validators whose messages name the field, the value and the allowed range."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from ._properties import encode_text
from ._types import OfflinePolicy, UserProperties


def seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or value <= 0:
        raise ValueError(f"{attribute.name} is {value!r}, allowed are seconds > 0 (math.inf: no limit)")


def positive(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or value <= 0:
        raise ValueError(f"{attribute.name} is {value!r}, allowed are numbers > 0 (math.inf: no limit)")


def number(
    minimum: float, *, above: bool = False, maximum: float = math.inf
) -> Callable[[object, attrs.Attribute[Any], object], None]:
    """A finite number, at least (or, with ``above``, greater than) ``minimum``, and at most ``maximum``."""
    wanted = f"a finite number {'>' if above else '>='} {minimum:g}"
    if maximum < math.inf:
        wanted += f" and <= {maximum:g}"

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{attribute.name}: must be {wanted}, got {value!r}")
        if not math.isfinite(value) or not minimum <= value <= maximum or (above and value == minimum):
            raise ValueError(f"{attribute.name}: must be {wanted}, got {value!r}")

    return check


def count(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{attribute.name}: must be an int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{attribute.name}: must be an int >= 1, got {value!r}")


def between(low: int, high: int) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{attribute.name} is {value!r}, allowed are whole numbers from {low} to {high}")

    return check


def one_of(*allowed: object) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(
                f"{attribute.name} is {value!r}, allowed are {', '.join(repr(choice) for choice in allowed)}"
            )

    return check


def text(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        encode_text(value, attribute.name)  # type: ignore[arg-type]  # it raises TypeError for what is no str


def instance(*kinds: type) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{attribute.name} must be {names}, not {type(value).__name__}")

    return check


def is_callable(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        raise TypeError(f"{attribute.name} must be callable, not {type(value).__name__}")


def optional_callable(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        is_callable(instance, attribute, value)


def pairs(instance: object, attribute: attrs.Attribute[Any], value: tuple[tuple[str, str], ...]) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{attribute.name} must hold (name, value) pairs, not {value!r:.60}")
    for pair in value:
        if not isinstance(pair, tuple) or len(pair) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
            raise TypeError(f"{attribute.name} must hold (name, value) pairs, not {pair!r}")
        for part in pair:
            encode_text(part, attribute.name)


def freeze(pairs: UserProperties) -> tuple[tuple[str, str], ...]:
    return tuple(pairs) if isinstance(pairs, Iterable) else pairs


def offline_policy(value: OfflinePolicy | str) -> OfflinePolicy:
    """The policy, by its name too."""
    try:
        return OfflinePolicy(value)
    except ValueError:
        words = ", ".join(repr(policy.value) for policy in OfflinePolicy)
        raise ValueError(f"offline is {value!r}, allowed are {words}") from None


def path(value: str | os.PathLike[str] | None) -> str | None:
    """A path as text; what is none is left to the validator."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def optional_path(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{attribute.name} must be a str or a path, not {type(value).__name__}")
    if value is not None and (not value or "\0" in value):
        raise ValueError(f"{attribute.name} is {value!r}, allowed are paths of files")
