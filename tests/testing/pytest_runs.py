"""pytest inside of pytest, for the tests of the plugin."""

from __future__ import annotations

import pytest

TRIO_MODE = "[pytest]\ntrio_mode = true\n"


def run(
    pytester: pytest.Pytester, source: str, *arguments: str, ini: str = TRIO_MODE, conftest: str = ""
) -> pytest.RunResult:
    """Run the tests in ``source``, in this process; the plugin is there as it is for everyone who installs it."""
    pytester.makeini(ini)
    pytester.makeconftest(conftest)
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def passed(result: pytest.RunResult, number: int = 1) -> None:
    result.assert_outcomes(passed=number)


def failed(result: pytest.RunResult, *lines: str) -> None:
    """One test, which failed, with these lines in this order."""
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(lines)
