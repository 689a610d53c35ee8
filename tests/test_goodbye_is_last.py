"""DISCONNECT is the last packet: after it nothing more may be sent [MQTT-3.14.4-1], whoever still has something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from trio_mqtt_driver import DriverClosedError, DriverConfig, Endpoint, Message, MQTTDriver, PublishError
from trio_mqtt_driver.testing import (
    Ack,
    Connack,
    Decoder,
    Disconnect,
    Kind,
    Packet,
    Pingresp,
    Publish,
    Suback,
    Subscribe,
    encode,
    open_pipe,
)

Act = Callable[[MQTTDriver], object]

settled = trio.testing.wait_all_tasks_blocked


class Hesitant:
    """A broker that closes half a minute after DISCONNECT, and goes on sending meanwhile."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.received: list[list[Packet]] = []
        """Of each connection."""
        self.said_goodbye = trio.Event()
        """On any connection."""
        self._nursery = nursery

    async def open_stream(self, endpoint: Endpoint) -> trio.abc.Stream:
        assert isinstance(endpoint, Endpoint)
        await trio.lowlevel.checkpoint()
        client, server = open_pipe()
        self._nursery.start_soon(self._serve, server)
        return client

    async def _serve(self, stream: trio.abc.Stream) -> None:
        decoder = Decoder(server=True)
        packets: list[Packet] = []
        self.received.append(packets)
        try:
            while data := await stream.receive_some():
                for packet in decoder.packets(bytes(data)):
                    packets.append(packet)
                    if packet.kind is Kind.DISCONNECT:
                        self.said_goodbye.set()
                        self._nursery.start_soon(self._hang_up, stream)
                    await stream.send_all(b"".join(encode(answer, 5) for answer in self._answers(packet)))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass

    async def _hang_up(self, stream: trio.abc.Stream) -> None:
        await trio.sleep(30)
        await stream.aclose()

    def _answers(self, packet: Packet) -> list[Packet]:
        if packet.kind is Kind.CONNECT:
            return [Connack(properties={"server_keep_alive": 3})]
        if packet.kind is Kind.PINGREQ:
            return [Pingresp()]
        if isinstance(packet, Publish) and packet.qos:
            return [Ack(kind=Kind.PUBACK, packet_id=packet.packet_id)]
        if isinstance(packet, Subscribe):
            return [
                Suback(packet_id=packet.packet_id, reason_codes=(2,)),
                Publish(topic="a", payload=b"1", qos=1, packet_id=7),
                Publish(topic="a", payload=b"2", qos=2, packet_id=8),
            ]
        if packet.kind is Kind.DISCONNECT:
            return [
                Publish(topic="a", payload=b"3", qos=1, packet_id=9),
                Publish(topic="a", payload=b"4", qos=2, packet_id=10),
                Ack(kind=Kind.PUBREL, packet_id=11),
                Ack(kind=Kind.PUBREC, packet_id=12),
            ]
        return []


def publish_qos_0(driver: MQTTDriver) -> None:
    driver.publish_nowait("late", b"x")


def publish_qos_1(driver: MQTTDriver) -> None:
    driver.publish_nowait("late", b"x", qos=1)


def force_reconnect(driver: MQTTDriver) -> None:
    driver.force_reconnect(even_if_live=True)


def nothing(driver: MQTTDriver) -> None: ...


@pytest.mark.parametrize("how", ["leave", "replace"])
@pytest.mark.parametrize("act", [nothing, publish_qos_0, publish_qos_1, force_reconnect])
async def test_nothing_is_sent_after_disconnect(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, act: Act, how: str
) -> None:
    """A handler that finishes late, what it does then, the keep-alive of 3 s, and answers to what comes in."""
    broker = Hesitant(nursery)
    finished: list[bytes] = []

    async def slow(message: Message[bytes]) -> None:
        await broker.said_goodbye.wait()
        await trio.sleep(1)
        try:
            act(driver)
        except (DriverClosedError, PublishError):
            pass
        finished.append(message.payload)

    config = DriverConfig(
        endpoint=Endpoint(host="hesitant", port=1883),
        open_stream=broker.open_stream,
        protocol="5",
        probe="ping",
        disconnect_timeout=60,
        drain_timeout=1,
    )
    async with MQTTDriver(config) as driver:
        await driver.subscribe("a", slow, qos=2)
        await settled()
        if how == "replace":
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
    assert finished[:2] == [b"1", b"2"]
    assert len(broker.received) == (1 if how == "leave" else 2)
    for packets in broker.received:
        assert packets.index(Disconnect()) == len(packets) - 1
