"""Sphinx: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

project = "trio-mqtt-driver"
author = "trio-mqtt-driver contributors"
project_copyright = f"2026, {author}"
_pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
release = version = re.findall(r'^version = "(.+)"$', _pyproject, re.MULTILINE)[0]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
maximum_signature_line_length = 100
