"""What all tests share."""

from __future__ import annotations

import gc
import os

import hypothesis

# No deadline: a busy machine is not a slow algorithm. The gate repeats the same examples, so that it fails for the
# change under test only; anyone else's run looks for new ones.
hypothesis.settings.register_profile("look", deadline=None)
hypothesis.settings.register_profile("gate", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("gate" if os.environ.get("CI") else "look")


def pytest_collection_finish() -> None:
    """Each ``gc.collect()`` of a test would look through thousands of tests: a third of the long ones' time."""
    gc.collect()
    gc.freeze()
