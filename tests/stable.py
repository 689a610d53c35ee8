"""What the tests of the stable-ID mode share: a driver in that mode, and what it sent on each of its connections."""

from __future__ import annotations

from typing import Any

from tests.peers import memory_config
from trio_mqtt_driver import BackoffConfig, DriverConfig, MQTTDriver, State
from trio_mqtt_driver.testing import Ack, Connect, Kind, MemoryBroker, Packet, Publish, Subscribe, Unsubscribe

QUICK = BackoffConfig(min_interval=0, start=0.1, maximum=1, stable_after=0, pause_after=1000)


def stable_config(broker: MemoryBroker, protocol: str, **options: Any) -> DriverConfig:
    # Links that break every few hundred bytes are what these tests are about: no message is to be blamed for that.
    defaults = {"stable_id": True, "protocol": protocol, "backoff": QUICK, "quarantine_after": 0}
    return memory_config(broker, **{**defaults, **options})


def connections(broker: MemoryBroker, client_id: str = "driver") -> list[list[Packet]]:
    """The packets that a client sent, by connection, each from its CONNECT on."""
    found: list[list[Packet]] = []
    for sender, packet in broker.received:
        if sender == client_id and isinstance(packet, Connect):
            found.append([packet])
        elif sender == client_id and found:
            found[-1].append(packet)
    return found


def starts(broker: MemoryBroker, client_id: str = "driver") -> list[bool]:
    """Of each CONNECT, whether it was a clean start."""
    return [connect.clean_start for connect in broker.connects if connect.client_id == client_id]


def filters(packets: list[Packet]) -> list[str]:
    """What was subscribed, and with a minus what was unsubscribed."""
    found: list[str] = []
    for packet in packets:
        if isinstance(packet, Subscribe):
            found += [request.topic_filter for request in packet.requests]
        elif isinstance(packet, Unsubscribe):
            found += ["-" + topic_filter for topic_filter in packet.topic_filters]
    return found


def exchanges(packets: list[Packet]) -> list[tuple[str, int, bool]]:
    """Our half of the QoS 1 and 2 publishes: (topic or "PUBREL", packet identifier, DUP)."""
    found: list[tuple[str, int, bool]] = []
    for packet in packets:
        if isinstance(packet, Publish) and packet.qos:
            found.append((packet.topic, packet.packet_id, packet.dup))
        elif isinstance(packet, Ack) and packet.kind is Kind.PUBREL:
            found.append(("PUBREL", packet.packet_id, False))
    return found


def acknowledged(packets: list[Packet], kind: Kind) -> list[int]:
    return [packet.packet_id for packet in packets if isinstance(packet, Ack) and packet.kind is kind]


class Log:
    """A handler that keeps what it got."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def __call__(self, message: Any) -> None:
        self.payloads.append(message.payload)


async def reconnect(driver: MQTTDriver, broker: MemoryBroker) -> None:
    """Lose the link, and wait for the next one."""
    generation = driver.generation
    broker.drop("driver")
    await driver.wait_state(State.BACKING_OFF)
    await driver.wait_live()
    assert driver.generation == generation + 1
