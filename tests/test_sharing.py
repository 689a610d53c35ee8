"""Several subscriptions of one filter: what the newcomer changes for those that were there, and the reverse."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import MQTTDriver, SubscribeError
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


async def test_a_retained_message_is_a_repetition_only_for_those_who_had_it(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    broker.publish("a", b"v", retain=True)
    first: list[tuple[int, bool]] = []
    second: list[tuple[int, bool]] = []

    async def reconnect() -> None:
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        await settled()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", lambda message: first.append((message.generation, message.replayed)))
        await settled()
        assert first == [(1, False)]
        await reconnect()
        assert first == [(1, False), (2, True)]
        await driver.subscribe("a", lambda message: second.append((message.generation, message.replayed)))
        await settled()
        assert second == [(2, False)]
        await reconnect()
        assert first[-1] == second[-1] == (3, True)
        assert len(second) == 2


async def test_the_first_retained_message_after_a_subscribe_that_waited_out_an_outage_is_no_repetition(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    broker.publish("a", b"v", retain=True)
    got: list[tuple[int, bool]] = []
    async with MQTTDriver(memory_config(broker)) as driver, trio.open_nursery() as nursery:
        broker.stop()
        await settled()
        nursery.start_soon(driver.subscribe, "a", lambda message: got.append((message.generation, message.replayed)))
        await trio.sleep(100)
        broker.start()
        await driver.wait_live()
        await settled()
        assert got == [(2, False)]


async def test_the_first_retained_message_is_no_repetition_for_an_iterator_either(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    broker.publish("a", b"v", retain=True)
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", print)
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        async with driver.subscription("a") as messages:
            assert not (await messages.receive()).replayed
            driver.force_reconnect(even_if_live=True)
            assert (await messages.receive()).replayed


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refused_upgrade_raises_for_who_asked_and_leaves_the_others_as_they_were(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    got: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        first = await driver.subscribe("a", lambda message: got.append(message.payload))
        with broker.faults.refuse_subscribe("a", 0x87), pytest.raises(SubscribeError, match="not authorized"):
            await driver.subscribe("a", print, qos=qos)
        await trio.sleep(1)
        assert first.degraded is None
        assert first.granted_qos == 0
        assert driver.status().degraded == ()
        assert driver.status().subscriptions == 1
        broker.publish("a", b"1")
        await settled()
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        assert broker.subscriptions(driver.client_id or "")["a"].qos == 0
        broker.publish("a", b"2")
        await settled()
        assert got == [b"1", b"2"]
        assert driver.generation == 2
