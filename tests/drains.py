"""What the tests of the drain share: drivers of all kinds, handlers, and what was said and acknowledged."""

from __future__ import annotations

from typing import Any

import attrs
import trio

from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, DriverConfig, Message, MQTTDriver
from trio_mqtt_driver.testing import Ack, Connect, Disconnect, Kind, MemoryBroker

KINDS = [(protocol, stable_id) for protocol in ("5", "3.1.1") for stable_id in (False, True)]


@attrs.frozen
class Maker:
    """Makes the configs of one kind of driver; the broker knows it as "driver", or by a name that begins so."""

    broker: MemoryBroker
    protocol: str
    stable_id: bool

    def __call__(self, **options: Any) -> DriverConfig:
        kind = {"protocol": self.protocol, "stable_id": self.stable_id, "backoff": BackoffConfig(min_interval=0)}
        return memory_config(self.broker, **{**kind, "drain_timeout": 100, **options})


class Worker:
    """A handler that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.begun: list[bytes] = []
        self.done: list[bytes] = []
        self._seconds = seconds

    async def __call__(self, message: Message[Any], *_: object) -> None:
        self.begun.append(message.payload)
        await trio.sleep(self._seconds)
        self.done.append(message.payload)


def left_behind(driver: MQTTDriver) -> list[str]:
    """What the history says of it, without the words that are always there."""
    return [
        event.text.removeprefix("left behind: ") for event in driver.status().history if event.kind == "left behind"
    ]


def answered(broker: MemoryBroker) -> int:
    """How many QoS 1 and 2 messages the driver acknowledged on its last connection, before DISCONNECT."""
    count = 0
    over = False
    for _, packet in broker.received:
        if isinstance(packet, Connect):
            count, over = 0, False
        elif isinstance(packet, Disconnect):
            over = True
        elif isinstance(packet, Ack) and packet.kind in (Kind.PUBACK, Kind.PUBREC):
            assert not over
            count += 1
    assert over
    return count


def sent(broker: MemoryBroker, topic_filter: str) -> list[bytes]:
    """The payloads that the broker has taken on a topic."""
    return [one.payload for one in broker.published if one.topic == topic_filter]
