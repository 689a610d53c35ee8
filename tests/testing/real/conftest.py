"""What the tests of the real brokers share."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import trio
import trustme

from tests.testing.real.visiting import Visit


@pytest.fixture
async def visit() -> AsyncGenerator[Visit, None]:
    made = Visit()
    yield made
    with trio.move_on_after(1):
        await made.close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()
