"""What the tests of availability share: a driver that says whether it is there, and what was said."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Availability, BackoffConfig, DriverConfig, MQTTDriver
from trio_mqtt_driver.testing import Connect, MemoryBroker, Packet

TOPIC = "state"
HERE = Availability(topic=TOPIC)
QUICK = BackoffConfig(min_interval=0, start=0.1, maximum=1, stable_after=0, pause_after=1000)


def presence_config(broker: MemoryBroker, protocol: str, **options: Any) -> DriverConfig:
    return memory_config(broker, **{"availability": HERE, "protocol": protocol, "backoff": QUICK, **options})


@asynccontextmanager
async def present(broker: MemoryBroker, protocol: str, **options: Any) -> AsyncGenerator[MQTTDriver, None]:
    """A driver whose birth the broker has seen."""
    async with MQTTDriver(presence_config(broker, protocol, **options)) as driver:
        await trio.testing.wait_all_tasks_blocked()
        yield driver


async def live(driver: MQTTDriver) -> None:
    """Return when the link is live and the broker has seen the birth."""
    await driver.wait_live()
    await trio.testing.wait_all_tasks_blocked()


def told(broker: MemoryBroker, topic: str = TOPIC) -> list[str]:
    """What was said on the topic, by anybody."""
    return [message.payload.decode() for message in broker.published if message.topic == topic]


def retained(broker: MemoryBroker, topic: str = TOPIC) -> str:
    """What a newcomer is told."""
    return broker.retained[topic].payload.decode()


def last_packets(broker: MemoryBroker) -> list[Packet]:
    """What came since the last CONNECT."""
    packets: list[Packet] = []
    for _, packet in broker.received:
        packets = [packet] if isinstance(packet, Connect) else [*packets, packet]
    return packets
