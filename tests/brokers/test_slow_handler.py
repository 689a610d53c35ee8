"""A handler that falls behind: what waits for it, here and in the broker, is more than our Receive Maximum."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.brokers.grounds import Ground
from trio_mqtt_driver import Message, MQTTDriver

pytestmark = pytest.mark.broker

RECEIVE_MAXIMUM = 20
CALM: dict[str, Any] = {"keep_alive": 60, "ping_timeout": 20, "ack_timeout": 20, "probe_timeout": 20}
"""A link must not be lost over a busy machine: with a fresh client ID what was under way would be sent twice."""
MESSAGES = 150


class SlowHandler:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.numbers: list[int] = []
        self._all = trio.Event()

    async def handle(self, message: Message[bytes]) -> None:
        await trio.sleep(self._seconds)
        self.numbers.append(int(message.payload))
        if len(set(self.numbers)) == MESSAGES:
            self._all.set()

    async def wait_all(self) -> None:
        await self._all.wait()

    def check(self, qos: int) -> None:
        assert set(self.numbers) == set(range(MESSAGES))
        if qos == 2:  # with QoS 1 brokers may repeat what is not acknowledged, and nats-server does
            assert len(self.numbers) == MESSAGES


async def publish_all(driver: MQTTDriver, qos: int) -> None:
    receipts = [driver.publish_nowait("in", str(number), qos=qos) for number in range(MESSAGES)]
    for receipt in receipts:
        await receipt.wait()


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_slow_handler_costs_neither_the_link_nor_a_message(ground: Ground, qos: int) -> None:
    # nats-server has 100 messages unacknowledged, and repeats each after a second. If its PUBREC arrives at that very
    # moment, it does so under another identifier, and nobody can tell: so that must not be how long they wait.
    slow = SlowHandler(0.003)
    with trio.fail_after(60):
        async with (
            MQTTDriver(ground.config(receive_maximum=RECEIVE_MAXIMUM, **CALM)) as driver,
            MQTTDriver(ground.config(client_id="witness", **CALM)) as witness,
        ):
            await driver.subscribe("in", slow.handle, qos=qos)
            await publish_all(witness, qos)
            await slow.wait_all()
            assert driver.generation == 1
    slow.check(qos)


@pytest.mark.parametrize("idle_ground", ["mosquitto-5"], indirect=True)
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_session_with_too_much_in_flight_is_taken_up(ground: Ground, qos: int) -> None:
    """mosquitto 2.0.11 sends more than it may, and on the next connection all of it again."""
    slow = SlowHandler(0.01)
    with trio.fail_after(60):
        async with (
            MQTTDriver(ground.config(receive_maximum=RECEIVE_MAXIMUM, stable_id=True, **CALM)) as driver,
            MQTTDriver(ground.config(client_id="witness", **CALM)) as witness,
        ):
            await driver.subscribe("in", slow.handle, qos=qos)
            await publish_all(witness, qos)
            for generation in range(2, 5):
                driver.force_reconnect(even_if_live=True)
                await driver.wait_live()
                assert driver.generation == generation
                await trio.sleep(0.1)
            await slow.wait_all()
            assert driver.generation == 4
    slow.check(qos)
