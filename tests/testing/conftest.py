"""What the tests of the test kit share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
import trio

from tests.brokers.grounds import require
from tests.testing.both_brokers import Peers
from trio_mqtt_driver.testing import MemoryBroker, Mosquitto

_PATIENCE = 30


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture(params=["memory", pytest.param("mosquitto", marks=pytest.mark.broker)])
async def peers(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncGenerator[Peers, None]:
    with trio.fail_after(_PATIENCE):
        async with AsyncExitStack() as stack:
            if request.param == "memory":
                port = await MemoryBroker(nursery).listen()
            else:
                port = (await stack.enter_async_context(require(Mosquitto()))).port
            yield Peers(port, stack)
