"""What a release promises about itself: the version, the change log, and a documented public surface."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest

import trio_mqtt_driver

ROOT = Path(__file__).parent.parent
PUBLIC = sorted(
    name for name, value in vars(trio_mqtt_driver).items() if not name.startswith("_") and not inspect.ismodule(value)
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def public_members() -> list[str]:
    """``Class.member`` for each method and property that a public class defines itself."""
    return [
        f"{name}.{member}"
        for name in PUBLIC
        if inspect.isclass(defined := getattr(trio_mqtt_driver, name))
        for member, value in vars(defined).items()
        if not member.startswith("_") and isinstance(value, property | staticmethod | classmethod | FunctionType)
    ]


def test_the_version_is_the_same_everywhere() -> None:
    found = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert found is not None
    assert importlib.metadata.version("trio-mqtt-driver") == found[1], "stale: install it again"
    assert f"\n## [{found[1]}]" in read("CHANGELOG.md")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^\.\. auto\w+:: {re.escape(name)}(\(\))?$", read("docs/reference.md"), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in PUBLIC if callable(getattr(trio_mqtt_driver, name))])
def test_a_public_name_says_what_it_is(name: str) -> None:
    # Not an inherited docstring: inspect.getdoc() would be content with Exception's.
    assert getattr(trio_mqtt_driver, name).__doc__


@pytest.mark.parametrize("path", public_members())
def test_a_public_method_says_what_it_does(path: str) -> None:
    name, member = path.split(".")
    assert inspect.getattr_static(getattr(trio_mqtt_driver, name), member).__doc__
