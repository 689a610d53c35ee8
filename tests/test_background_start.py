"""``start="background"``: the driver is entered while there is no broker, and everything can be asked of it."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, State
from trio_mqtt_driver.testing import MemoryBroker


async def test_what_is_asked_for_before_the_broker_is_up_happens_when_it_is(autojump_clock: MockClock) -> None:
    got: list[Message[str]] = []
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        broker.stop()
        async with (
            MQTTDriver(memory_config(broker), start="background") as driver,
            trio.open_nursery() as body,
        ):
            assert driver.state is not State.LIVE
            body.start_soon(driver.subscribe, "early/#", got.append, str)
            receipt = driver.publish_nowait("other", b"queued", qos=1)
            await trio.sleep(100)
            assert not receipt.done
            broker.start()
            await receipt.wait()
            await broker.wait_for_subscription("early/#")
            await driver.publish("early/bird", "worm", qos=1)
        nursery.cancel_scope.cancel()
    assert [message.value for message in got] == ["worm"]


async def test_the_first_thing_in_the_block_may_be_to_subscribe(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        async with (
            MQTTDriver(memory_config(broker), start="background") as driver,
            driver.subscription("a/#") as messages,
        ):
            broker.publish("a/b", b"x")
            assert (await messages.receive()).payload == b"x"
        nursery.cancel_scope.cancel()
