"""A memory broker that answers garbage: instead of a packet of its own, or right behind it."""

from __future__ import annotations

import pytest
import trio

from tests.testing.peers import join, nothing, publish, subscribe
from trio_mqtt_driver.testing import (
    Ack,
    Connack,
    Connect,
    Direction,
    Disconnect,
    Faults,
    Kind,
    MemoryBroker,
    Packet,
    Pingreq,
    Pingresp,
    Publish,
    RawClient,
    Suback,
)

GARBAGE = b"\x00\xff HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.mark.parametrize("kind", [Kind.CONNACK, Kind.SUBACK, Kind.PUBACK, Kind.PINGRESP, Kind.PUBLISH])
async def test_bytes_instead_of_an_answer(broker: MemoryBroker, kind: Kind) -> None:
    broker.faults.replace(kind, GARBAGE, times=1)
    client = RawClient(await broker.connect_stream())
    expected: list[bytes] = []
    exchanges: list[tuple[Kind, Packet, bytes]] = [
        (Kind.CONNACK, Connect(client_id="c"), b"\x20\x06\x00\x00\x03\x22\x00\x64"),
        (Kind.PINGRESP, Pingreq(), b"\xd0\x00"),
        (Kind.PUBACK, Publish(topic="t", qos=1, packet_id=1), b"\x40\x03\x00\x01\x10"),
    ]
    for packet_kind, packet, answer in exchanges:
        await client.send(packet)
        expected.append(GARBAGE if kind is packet_kind else answer)
        assert await client.stream.receive_some() == expected[-1]
    if GARBAGE in expected:
        await client.send(Disconnect())
        assert await client.receive() is None
        return
    await client.stream.send_all(bytes.fromhex("82 07 0002 00 0001 61 00"))
    assert await client.stream.receive_some() == (GARBAGE if kind is Kind.SUBACK else b"\x90\x04\x00\x02\x00\x00")
    broker.publish("a", b"x")
    assert await client.stream.receive_some() == (GARBAGE if kind is Kind.PUBLISH else b"\x30\x05\x00\x01a\x00x")
    assert not broker.violations  # The broker itself lost nothing but its answer.


async def test_a_false_packet_instead_of_an_answer(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    with broker.faults.replace(Kind.PUBACK, Ack(kind=Kind.PUBACK, packet_id=9)):
        await client.send(Publish(topic="t", qos=1, packet_id=1))
        assert await client.expect(Ack) == Ack(kind=Kind.PUBACK, packet_id=9)
    await publish(client, "t", b"", packet_id=2)
    assert ("c", Ack(kind=Kind.PUBACK, packet_id=9)) in list(broker.sent)
    assert ("c", Ack(kind=Kind.PUBACK, packet_id=1, reason_code=0x10)) not in list(broker.sent)


async def test_bytes_behind_an_answer(broker: MemoryBroker) -> None:
    broker.faults.follow(Kind.CONNACK, GARBAGE, first=2, times=1)
    assert await nothing(await join(broker, "a"))
    client = RawClient(await broker.connect_stream())
    await client.send(Connect(client_id="b"))
    data = await client.stream.receive_some()
    assert data.endswith(GARBAGE)
    assert data[:1] == b"\x20"
    assert await nothing(await join(broker, "c"))


async def test_a_packet_behind_an_answer(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    other = await join(broker, "other")
    broker.faults.follow(Kind.SUBACK, Suback(packet_id=77, reason_codes=(0,)), client_id="c")
    assert (await subscribe(client, "a")).packet_id == 1
    assert (await client.expect(Suback)).packet_id == 77
    await subscribe(other, "a")
    assert await nothing(other)


async def test_a_connection_that_ends_sends_no_garbage(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    broker.silence("c")
    broker.faults.replace(Kind.PINGRESP, GARBAGE)
    await client.send(Pingreq())
    assert await nothing(client)
    broker.faults.clear()
    client = await join(broker, "d")
    await client.send(Pingreq())
    assert await client.receive() == Pingresp()


async def test_server_disconnect_with_a_reference(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, server_reference="other:1883")
    for reason_code, properties in ((0x9D, {"server_reference": "other:1883"}), (0x8B, {})):
        client = await join(broker, "c")
        broker.disconnect("c", reason_code=reason_code)
        assert await client.receive() == Disconnect(reason_code=reason_code, properties=properties)
        assert await client.receive() is None


def test_rules_that_cannot_be() -> None:
    faults = Faults()
    with pytest.raises(ValueError, match="direction: SUBSCRIBE never comes from the broker"):
        faults.replace(Kind.SUBSCRIBE, b"")
    with pytest.raises(ValueError, match="first must be at least 1, not 0"):
        faults.hold(Kind.PUBLISH, first=0, direction=Direction.IN)
    with pytest.raises(ValueError, match="times must be at least 1, or None for all that follow, not 0"):
        faults.follow(Kind.CONNACK, Connack(), times=0)
    with pytest.raises(ValueError, match="first must be at least 1, not -1"):
        faults.refuse_connect(0x87, first=-1)
    with pytest.raises(ValueError, match="topic_filter: 'a/#/b' is not a Topic Filter"):
        faults.refuse_subscribe("a/#/b")
