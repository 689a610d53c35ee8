"""What the tests of the test kit share."""

from __future__ import annotations

import pytest
import trio

from trio_mqtt_driver.testing import MemoryBroker


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)
