"""A memory broker that ends a connection does so at once, whatever keep alive was agreed on."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.testing.peers import join
from trio_mqtt_driver.testing import Disconnect, MemoryBroker, Pingreq


@pytest.mark.parametrize("by_client", [True, False])
async def test_eof_follows_the_end_at_once(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, by_client: bool
) -> None:
    client = await join(broker, "c", keep_alive=30)
    before = autojump_clock.current_time()
    if by_client:
        await client.send(Disconnect())
    else:
        broker.drop()
    assert await client.receive() is None
    assert autojump_clock.current_time() == before


async def test_what_comes_in_the_moment_of_the_end_is_not_read_any_more(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await client.send(Pingreq())
    broker.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert await client.receive() is None
    assert not broker.violations
