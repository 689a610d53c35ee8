"""What nearly all messages are has no dict of its own: to make one costs more than all the rest of handling it."""

from __future__ import annotations

import gc

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked
MANY = 100
"""The first few instances of a class get away with attributes that come late."""


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def has_dict(value: object) -> bool:
    # To ask it for __dict__ would make one.
    return any(type(referent) is dict for referent in gc.get_referents(value))


class Ordinary:
    late: int
    later: int


def test_a_dict_is_seen() -> None:
    several = [Ordinary() for _ in range(MANY)]
    for one in several:
        one.late, one.later = 1, 2
    assert all(map(has_dict, several))


# On 5 each has a Subscription Identifier; on 3.1.1 there is nothing about it.
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1])
async def test_messages_have_none(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, protocol: str
) -> None:
    handled: list[Message[bytes]] = []
    iterated: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("handled", handled.append, qos=qos)
        async with driver.subscription("iterated", qos=qos) as messages:
            for topic in ("handled", "iterated"):
                for _ in range(MANY):
                    broker.publish(topic, b"1", qos=qos)
            async for message in messages:
                iterated.append(message)
                if len(iterated) == MANY:
                    break
        await settled()
    assert len(handled) == MANY
    assert not any(has_dict(message) for message in handled + iterated)
    assert all(message.value == message.payload == b"1" for message in handled + iterated)


async def test_receipts_have_none(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker, in_flight=MANY // 2)) as driver:
        receipts = [driver.publish_nowait("a", b"1", qos=1) for _ in range(MANY)]
        await driver.drain()
        assert all(receipt.done for receipt in receipts)
        assert not any(map(has_dict, receipts))  # whether they were sent at once or not


async def test_a_subscription_has_few_enough_attributes_to_share_their_names(broker: MemoryBroker) -> None:
    """CPython gives instances with thirty or more a dict of their own, which was an eighth of a subscription."""
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", lambda _: None)
        broker.publish("a")
        await settled()
        assert len(vars(subscription)) < 30
