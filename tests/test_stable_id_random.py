"""Exactly once, counted where the messages arrive, over links that are cut after any byte.

Two drivers with stable IDs talk to each other. Their links are cut at random: after any byte in either direction, also
in the middle of CONNECT, test publish and replay; acknowledgements are lost while a link stays, until a deadline ends
it. Handlers take their time, and publishes are cancelled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.bytes_cut import BadNetwork
from tests.stable import stable_config
from trio_mqtt_driver import Message, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

NAMES = ("one", "two")
TOPICS = ("x", "y")
MESSAGES = 40
"""To each driver in each topic."""

Numbers = dict[str, list[int]]
"""By ``receiver/topic``, in the order of arrival."""


@attrs.define
class Talk:
    """What two drivers sent each other."""

    qos: int
    rng: random.Random
    arrived: Numbers = attrs.field(
        factory=lambda: {f"{name}/{topic}": list[int]() for name in NAMES for topic in TOPICS}
    )
    given_up: set[tuple[str, int]] = attrs.field(factory=set[tuple[str, int]])
    """What was cancelled: it may arrive or not."""

    async def handle(self, message: Message[bytes]) -> None:
        self.arrived[message.topic].append(int(message.payload))
        if self.rng.random() < 0.5:
            await trio.sleep(self.rng.expovariate(1))

    async def publish(self, driver: MQTTDriver, topic: str) -> None:
        for number in range(MESSAGES):
            with trio.move_on_after(self.rng.choice((math.inf, math.inf, 0, 0.5))) as scope:
                await driver.publish(topic, str(number), qos=self.qos)
            if scope.cancelled_caught:
                self.given_up.add((topic, number))
            await trio.sleep(self.rng.uniform(0, 0.5))


async def talk(
    nursery: trio.Nursery,
    protocol: str,
    qos: int,
    seed: int,
    trouble: Callable[[BadNetwork], Callable[[], Awaitable[object]]],
) -> tuple[Talk, MemoryBroker]:
    rng = random.Random(seed)
    broker = MemoryBroker(nursery)
    network = BadNetwork(broker, rng, mean=rng.choice((150, 300, 600)))
    config = stable_config(broker, protocol, open_stream=network.open_stream, ack_timeout=3, probe_timeout=3)
    said = Talk(qos, rng)
    async with (
        MQTTDriver(config.evolve(client_id="one"), rng=rng) as one,
        MQTTDriver(config.evolve(client_id="two"), rng=rng) as two,
    ):
        drivers = (one, two)
        for name, driver in zip(NAMES, drivers, strict=True):
            for topic in TOPICS:
                await driver.subscribe(f"{name}/{topic}", said.handle, qos=qos)
        async with trio.open_nursery() as background:
            background.start_soon(trouble(network))
            async with trio.open_nursery() as traffic:
                for name, driver in zip(NAMES, reversed(drivers), strict=True):
                    for topic in TOPICS:
                        traffic.start_soon(said.publish, driver, f"{name}/{topic}")
            background.cancel_scope.cancel()
        network.bad = False
        for driver in drivers:
            # What waits for an acknowledgement that was lost is finished on the next connection.
            driver.force_reconnect("the end of the bad network", even_if_live=True)
            await driver.wait_live()
        # A handler takes half a second for each message, and each lost connection may bring a window of repetitions.
        await trio.sleep(5000)
        for driver in drivers:
            status = driver.status()
            assert (status.in_flight, status.queued, status.unacknowledged) == (0, 0, 0)
    assert network.cuts > 2
    assert not broker.violations
    return said, broker


def missing(said: Talk, topic: str, numbers: list[int]) -> list[int]:
    return [one for one in range(MESSAGES) if (topic, one) not in said.given_up and one not in numbers]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_qos_2_arrives_exactly_once_and_in_order(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: str, seed: int
) -> None:
    said, _ = await talk(nursery, protocol, 2, seed, lambda network: network.lose_acknowledgements)
    for topic, numbers in said.arrived.items():
        assert not missing(said, topic, numbers)
        assert len(set(numbers)) == len(numbers), topic
        assert numbers == sorted(numbers), topic


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_qos_1_arrives_at_least_once_and_the_first_time_in_order(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: str, seed: int
) -> None:
    said, _ = await talk(nursery, protocol, 1, seed, lambda network: network.lose_acknowledgements)
    for topic, numbers in said.arrived.items():
        assert not missing(said, topic, numbers)
        first = list(dict.fromkeys(numbers))
        assert first == sorted(first), topic


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_broker_that_loses_its_sessions_gets_all_messages_at_least_once(
    autojump_clock: MockClock, nursery: trio.Nursery, protocol: str, qos: int, seed: int
) -> None:
    """Counted at the broker: what it had in its sessions for its subscribers is gone with them."""
    said, broker = await talk(nursery, protocol, qos, seed, lambda network: network.lose_sessions)
    for topic in said.arrived:
        numbers = [int(one.payload) for one in broker.published if one.topic == topic]
        assert not missing(said, topic, numbers)
        first = list(dict.fromkeys(numbers))
        assert first == sorted(first), topic
