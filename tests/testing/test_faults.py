"""Every fault of the memory broker, shown happening, and shown to end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
import trio.testing

from tests.testing.peers import join, knock, nothing, publish, subscribe
from trio_mqtt_driver.testing import (
    Ack,
    Connack,
    Connect,
    Direction,
    Disconnect,
    Faults,
    Kind,
    MemoryBroker,
    Pingreq,
    Pingresp,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Will,
)

WILL = Will(topic="status", payload=b"offline")


async def test_hold_and_release(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    with broker.faults.hold(Kind.PUBACK) as rule:
        await client.send(*(Publish(topic="t", qos=1, packet_id=number) for number in (1, 2)), Pingreq())
        assert await client.receive() == Pingresp()
        assert rule.held == 2
        rule.release()
        assert [(await client.expect(Ack)).packet_id for _ in range(2)] == [1, 2]
        await client.send(Publish(topic="t", qos=1, packet_id=3))
        assert await nothing(client)
    assert (await client.expect(Ack)).packet_id == 3
    await publish(client, "t", b"", packet_id=4)


async def test_held_packets_of_a_dead_connection_are_gone(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    rule = broker.faults.hold(Kind.PINGRESP)
    await client.send(Pingreq())
    await broker.wait_for(lambda: rule.held, "held PINGRESP")
    broker.drop("c")
    client = await join(broker, "c")
    rule.remove()
    assert await nothing(client)


async def test_hold_what_comes_from_the_client(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN):
        await client.send(Publish(topic="t", qos=1, packet_id=1), Pingreq())
        assert await client.receive() == Pingresp()
        assert not broker.published
    assert (await client.expect(Ack)).kind is Kind.PUBACK
    assert len(broker.published) == 1


@pytest.mark.parametrize("kind", [Kind.CONNACK, Kind.SUBACK, Kind.PINGRESP, Kind.PUBREC])
async def test_drop_an_answer(broker: MemoryBroker, kind: Kind) -> None:
    with broker.faults.drop(kind, times=1):
        client = RawClient(await broker.connect_stream())
        await client.send(
            Connect(client_id="c"),
            Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="a"),)),
            Pingreq(),
            Publish(topic="t", qos=2, packet_id=2),
        )
        packets = [await client.receive() for _ in range(3)]
    assert [packet and packet.kind for packet in packets] == [
        entry for entry in (Kind.CONNACK, Kind.SUBACK, Kind.PINGRESP, Kind.PUBREC) if entry is not kind
    ]
    assert await nothing(client)


async def test_first_times_and_client_choose_the_packets(broker: MemoryBroker) -> None:
    one, two = await join(broker, "one"), await join(broker, "two")
    rule = broker.faults.drop(Kind.PUBACK, first=2, times=2, client_id="one")
    for client in (one, two):
        await client.send(*(Publish(topic="t", qos=1, packet_id=number) for number in range(1, 6)))
    assert [(await one.expect(Ack)).packet_id for _ in range(3)] == [1, 4, 5]
    assert [(await two.expect(Ack)).packet_id for _ in range(5)] == [1, 2, 3, 4, 5]
    assert rule.seen == 5


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("kind", [Kind.PUBLISH, Kind.CONNACK, Kind.SUBACK])
@pytest.mark.parametrize("before", [False, True])
async def test_cut_in_what_the_broker_sends(broker: MemoryBroker, kind: Kind, reset: bool, before: bool) -> None:
    broker.faults.cut(kind, reset=reset, before=before)
    broker.publish("a", b"x", retain=True)
    client = RawClient(await broker.connect_stream())
    await client.send(
        Connect(client_id="c"), Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="a"),))
    )
    order = [Kind.CONNACK, Kind.SUBACK, Kind.PUBLISH]
    for wanted in order[: order.index(kind) + (not before)]:
        packet = await client.receive()
        assert packet is not None
        assert packet.kind is wanted
    await end_of(client, reset)
    # The rule was for one packet: the next connection works.
    await subscribe(await join(broker, "c"), "a")


async def end_of(client: RawClient, reset: bool) -> None:
    if reset:
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await client.receive()
    else:
        assert await client.receive() is None


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("before", [False, True])
async def test_cut_in_what_the_client_sends(broker: MemoryBroker, reset: bool, before: bool) -> None:
    client = await join(broker, "c", will=WILL)
    broker.faults.cut(Kind.PUBLISH, first=2, direction=Direction.IN, reset=reset, before=before)
    await client.send(*(Publish(topic="t", payload=b"%d" % number, qos=1, packet_id=number) for number in (1, 2, 3)))
    taken = [1] if before else [1, 2]
    for number in taken:
        assert (await client.expect(Ack)).packet_id == number
    await end_of(client, reset)
    assert [int(entry.payload) for entry in broker.published if entry.topic == "t"] == taken
    assert broker.published[-1].payload == b"offline"


async def test_accept_then_drop(broker: MemoryBroker) -> None:
    with broker.faults.cut(Kind.CONNECT, before=True, times=None):
        for _ in range(3):
            client = RawClient(await broker.connect_stream())
            await client.send(Connect(client_id="c"))
            assert await client.receive() is None
    with broker.faults.cut(Kind.CONNACK, times=None):
        for _ in range(3):
            client, _connack = await knock(broker, "c")
            assert await client.receive() is None
    await subscribe(await join(broker, "c"), "a")


@pytest.mark.parametrize("version,code", [(4, 5), (5, 0x87)])
async def test_refuse_connect(broker: MemoryBroker, version: int, code: int) -> None:
    broker.faults.refuse_connect(0x87, times=2)
    for _ in range(2):
        client, connack = await knock(broker, "c", version)
        assert (connack.reason_code, connack.session_present) == (code, False)
        assert await client.receive() is None
    await join(broker, "c", version)


async def test_refuse_connect_with_a_reference(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, server_reference="other:1883")
    broker.faults.refuse_connect(0x9C)
    _, connack = await knock(broker, "c")
    assert connack == Connack(reason_code=0x9C, properties={"server_reference": "other:1883"})


@pytest.mark.parametrize("version,code", [(4, 0x80), (5, 0x87)])
async def test_refuse_subscribe(broker: MemoryBroker, version: int, code: int) -> None:
    client = await join(broker, "c", version)
    with broker.faults.refuse_subscribe("b/#"):
        assert (await subscribe(client, "a", "b/#", "b/c")).reason_codes == (0, code, 0)
    assert set(broker.subscriptions("c")) == {"a", "b/c"}
    assert (await subscribe(client, "b/#", packet_id=2)).reason_codes == (0,)


@pytest.mark.parametrize("version,code", [(4, 0), (5, 0x97)])
async def test_refuse_publish(broker: MemoryBroker, version: int, code: int) -> None:
    client = await join(broker, "c", version)
    await subscribe(client, "ok")
    with broker.faults.refuse_publish("private/#", 0x97):
        await client.send(
            Publish(topic="private/x", qos=1, packet_id=1),
            Publish(topic="private/y", qos=2, packet_id=2),
            Publish(topic="private/z"),
        )
        assert await client.receive() == Ack(kind=Kind.PUBACK, packet_id=1, reason_code=code)
        assert await client.receive() == Ack(kind=Kind.PUBREC, packet_id=2, reason_code=code)
        await client.send(Publish(topic="ok"))
        await client.expect(Publish)
    assert [entry.topic for entry in broker.published] == ["ok"]


async def test_stop_reading(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    client = await join(broker, "c", keep_alive=10)
    with broker.faults.stop_reading():
        await client.send(Pingreq())
        late = RawClient(await broker.connect_stream())
        await late.send(Connect(client_id="late"))
        broker.publish("t")
        with trio.move_on_after(100) as scope:
            while True:
                await client.stream.send_all(bytes(1000))  # Until nothing more fits: the broker takes none of it.
        assert scope.cancelled_caught
        assert await nothing(late)
    # The keep alive did not count while it was the broker that was deaf.
    assert await client.receive() == Pingresp()
    assert (await late.expect(Connack)).reason_code == 0


def test_stop_reading_only_once() -> None:
    faults = Faults()
    with faults.stop_reading(), pytest.raises(RuntimeError, match="already"), faults.stop_reading():
        pass
    assert faults.reading


async def test_a_silent_connection_swallows_everything(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    client = await join(broker, "c")
    await subscribe(client, "t")
    broker.silence("c")
    for _ in range(200):
        await client.stream.send_all(bytes(1000))  # Swallowed, else this would block.
    broker.publish("t")
    with trio.move_on_after(100_000) as scope:
        await client.receive()
    assert scope.cancelled_caught
    assert (broker.clients, list(broker.violations)) == (["c"], [])
    await publish(await join(broker, "other"), "x", b"")


@pytest.mark.parametrize("by_client", [True, False])
async def test_the_end_of_a_silent_connection_is_heard(broker: MemoryBroker, by_client: bool) -> None:
    client = await join(broker, "c", keep_alive=10, will=WILL)
    broker.silence("c")
    if by_client:
        await client.stream.aclose()
        await broker.wait_for(lambda: not broker.clients, "end of the connection")
    else:
        broker.drop("c")
        assert await client.receive() is None
    assert broker.published[-1].payload == b"offline"


@pytest.mark.parametrize("gone", [True, False])
async def test_the_ends_of_a_cut_connection_do_not_hear_of_each_other(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, gone: bool
) -> None:
    client = await join(broker, "c", keep_alive=10, will=WILL)
    broker.silence("c", deaf=True)
    if gone:
        await client.stream.aclose()
    await trio.sleep(14)
    assert not broker.published
    await broker.wait_for_publish("status")
    assert trio.current_time() == 15
    assert broker.clients == []
    if not gone:
        with trio.move_on_after(1000) as scope:
            await client.receive()
        assert scope.cancelled_caught


@pytest.mark.parametrize("reset", [True, False])
async def test_the_end_of_a_cut_connection(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, reset: bool
) -> None:
    client = await join(broker, "c", will=WILL)
    broker.silence(deaf=True)
    broker.drop("c", reset=reset)
    assert broker.published[-1].payload == b"offline"
    if reset:
        await end_of(client, reset=True)
    else:
        with trio.move_on_after(1000) as scope:
            await client.receive()
        assert scope.cancelled_caught


async def test_byte_by_byte(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    broker.faults.byte_by_byte = True
    broker.send("c", b"\x30\x04\x00\x01t\x00")
    assert [await client.stream.receive_some() for _ in range(6)] == [
        b"\x30",
        b"\x04",
        b"\x00",
        b"\x01",
        b"t",
        b"\x00",
    ]
    await client.send(Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="a"),)))
    await client.expect(Suback)
    broker.faults.byte_by_byte = False
    broker.publish("a", b"x")
    assert len(await client.stream.receive_some()) == 7


@pytest.mark.parametrize("reset", [False, True])
async def test_drop_connections(broker: MemoryBroker, reset: bool) -> None:
    clients = [await join(broker, name, will=WILL) for name in "ab"]
    broker.drop(reset=reset)
    for client in clients:
        await end_of(client, reset)
    assert broker.clients == []
    assert {entry.publisher for entry in broker.published} == {"a", "b"}


async def test_drop_reaches_a_client_that_does_not_read(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    await subscribe(client, "t")
    broker.publish("t", bytes(500_000))
    await trio.testing.wait_all_tasks_blocked()
    broker.drop("c", reset=True)
    with pytest.raises(trio.BrokenResourceError):
        await client.send(Pingreq())


async def test_a_closed_connection_does_not_linger_for_a_client_that_does_not_read(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    client = await join(broker, "c")
    await subscribe(client, "t")
    broker.publish("t", bytes(500_000))
    broker.drop("c")
    await trio.sleep(10)
    with pytest.raises(trio.BrokenResourceError):
        await client.send(Pingreq())


async def test_a_client_that_sends_and_does_not_read_is_not_read_from(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, buffer_bytes=1000)
    client = await join(broker, "c")
    sent = 0
    with trio.move_on_after(math.inf) as scope:

        async def stop_when_stuck() -> None:
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()

        nursery.start_soon(stop_when_stuck)
        while True:
            await client.send(*[Pingreq()] * 1000)
            sent += 1000
    assert 60_000 < sent < 300_000
    for _ in range(sent):
        await client.expect(Pingresp)


async def test_a_held_packet_may_turn_out_to_be_a_violation(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    with broker.faults.hold(Kind.PUBLISH, direction=Direction.IN):
        await client.send(Publish(topic="", properties={"topic_alias": 1}))
        assert await nothing(client)
    assert (await client.expect(Disconnect)).reason_code == 0x82
    assert await client.receive() is None


@pytest.mark.parametrize("version", [4, 5])
async def test_server_disconnect(broker: MemoryBroker, version: int) -> None:
    client = await join(broker, "c", version, will=WILL)
    broker.disconnect("c", reason_code=0x98)
    if version == 5:
        assert await client.receive() == Disconnect(reason_code=0x98)
    assert await client.receive() is None
    assert broker.published[-1].payload == b"offline"


@pytest.mark.parametrize("keep", [True, False])
async def test_restart(broker: MemoryBroker, keep: bool) -> None:
    options: dict[str, Any] = {"clean_start": False, "properties": {"session_expiry": 100}}
    client = await join(broker, "c", will=WILL, **options)
    await subscribe(client, "t", qos=1)
    broker.publish("r", b"x", retain=True)
    broker.stop(reset=True, keep_sessions=keep)
    await end_of(client, reset=True)
    with pytest.raises(ConnectionRefusedError):
        await broker.connect_stream()
    broker.publish("t", b"meanwhile", qos=1)
    broker.start()
    client, connack = await knock(broker, "c", **options)
    assert connack.session_present is keep
    assert bool(broker.retained) is keep
    assert await nothing(client) is not keep
    # A process that is killed publishes no will.
    assert not [entry for entry in broker.published if entry.topic == "status"]
    broker.restart(keep_sessions=keep)
    await join(broker, "d")


async def test_a_stopped_broker_ends_connections_that_have_not_said_connect(broker: MemoryBroker) -> None:
    stream = await broker.connect_stream()
    broker.stop()
    assert await stream.receive_some() == b""


async def test_clear(broker: MemoryBroker) -> None:
    client = await join(broker, "c")
    broker.faults.hold(Kind.PUBACK)
    broker.faults.refuse_subscribe("a")
    broker.faults.refuse_publish("b")
    await client.send(Publish(topic="t", qos=1, packet_id=1))
    assert await nothing(client)
    broker.faults.clear()
    assert (await client.expect(Ack)).packet_id == 1
    assert (await subscribe(client, "a")).reason_codes == (0,)
    assert (await publish(client, "b", b"")).reason_code == 0x10


async def test_two_rules_for_one_packet(broker: MemoryBroker) -> None:
    """The first rule decides, and both count."""
    client = await join(broker, "c")
    drop = broker.faults.drop(Kind.PUBACK, times=1)
    cut = broker.faults.cut(Kind.PUBACK, first=2)
    await client.send(*(Publish(topic="t", qos=1, packet_id=number) for number in (1, 2)))
    assert (await client.expect(Ack)).packet_id == 2
    assert await client.receive() is None
    assert (drop.seen, cut.seen) == (2, 2)


def test_rules_that_cannot_be() -> None:
    faults = Faults()
    with pytest.raises(ValueError, match="direction: SUBACK never comes from the client"):
        faults.drop(Kind.SUBACK, direction=Direction.IN)
    with pytest.raises(ValueError, match="reason_code must be a refusal, 0x80 … 0xff, not 0x05"):
        faults.refuse_connect(5)
