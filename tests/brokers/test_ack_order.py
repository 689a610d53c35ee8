"""The order of acknowledgements with real brokers: one that insists on it, and windows that a slow handler fills."""

from __future__ import annotations

import pytest
import trio

from tests.brokers.grounds import Ground, every_ground_but
from trio_mqtt_driver import Message, MQTTDriver

pytestmark = pytest.mark.broker
# keep_alive: nats-server waits for a second only with 1, and what a link loses here is not repeated.


@pytest.mark.parametrize("slow, quick", [(1, 1), (2, 2), (1, 2), (2, 1)])
async def test_handlers_of_different_speed_keep_the_connection(ground: Ground, slow: int, quick: int) -> None:
    """iotcore ends one whose acknowledgements are not in the order of its messages, over all subscriptions."""
    count = 50
    granted = {"slow": slow, "quick": quick}
    left = {"slow": count, "quick": count}
    done = trio.Event()

    async def handle(message: Message[bytes]) -> None:
        if message.topic == "slow":
            await trio.sleep(0.003)
        left[message.topic] -= 1
        if not any(left.values()):
            done.set()

    with trio.fail_after(30):
        async with (
            MQTTDriver(ground.config(keep_alive=30)) as driver,
            MQTTDriver(ground.config(client_id="other", keep_alive=30)) as other,
        ):
            for topic, qos in granted.items():
                await driver.subscribe(topic, handle, qos=qos)
            for _ in range(count):
                for topic, qos in granted.items():
                    await other.publish(topic, qos=qos)
            await done.wait()
            assert driver.generation == 1


# iotcore ends the connection when a message is overtaken; ejabberd sends the next one when the last is acknowledged.
@every_ground_but("iotcore-5", "ejabberd-5")
async def test_a_handler_that_sleeps_for_ever_does_not_stop_the_others(ground: Ground) -> None:
    got: list[bytes] = []
    every = trio.Event()

    async def sleep(_message: Message[bytes]) -> None:
        await trio.sleep_forever()

    def count(message: Message[bytes]) -> None:
        got.append(message.payload)
        if len(got) == 150:
            every.set()

    with trio.fail_after(30):
        async with (
            MQTTDriver(ground.config(keep_alive=30, drain_timeout=0.1)) as driver,
            MQTTDriver(ground.config(client_id="other", keep_alive=30)) as other,
        ):
            await driver.subscribe("slow", sleep, qos=1)
            await driver.subscribe("quick", count, qos=1)
            await other.publish("slow", qos=1)
            for number in range(150):
                await other.publish("quick", b"%d" % number, qos=1)
            await every.wait()
            assert driver.generation == 1
