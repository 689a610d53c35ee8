"""Sessions, wills and takeover, on a clock that jumps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.testing.peers import join, knock, nothing, publish, subscribe
from trio_mqtt_driver.testing import Ack, Connack, Disconnect, Kind, MemoryBroker, Publish, RawClient, Will

KEPT = {"session_expiry": 100}


async def resume(broker: MemoryBroker, version: int = 5, **options: object) -> tuple[RawClient, Connack]:
    properties = KEPT if version == 5 else {}
    return await knock(broker, "c", version, clean_start=False, **{"properties": properties, **options})


@pytest.mark.parametrize("version", [4, 5])
async def test_a_session_outlives_its_connection(broker: MemoryBroker, version: int) -> None:
    client, connack = await resume(broker, version)
    assert not connack.session_present
    await subscribe(client, "t", qos=1)
    await client.send(Disconnect())
    assert await client.receive() is None
    broker.publish("t", b"0", qos=0)
    broker.publish("t", b"1", qos=1)
    client, connack = await resume(broker, version)
    assert connack.session_present
    assert (await client.expect(Publish)).payload == b"1"
    assert await nothing(client)


async def test_a_clean_start_forgets_the_session(broker: MemoryBroker) -> None:
    client, _ = await resume(broker)
    await subscribe(client, "t", qos=1)
    _, connack = await knock(broker, "c", clean_start=True)
    assert not connack.session_present
    assert broker.subscriptions("c") == {}
    assert broker.publish("t") == 0


async def test_a_session_expires(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    for away, present in ((99, True), (101, False)):
        client, _ = await resume(broker)
        await subscribe(client, "t")
        await client.stream.aclose()
        await trio.sleep(away)
        assert ("c" in broker.sessions) is present
        assert broker.publish("t") == present
        _, connack = await resume(broker)
        assert connack.session_present is present
        broker.drop("c")
        await trio.sleep(200)


async def test_coming_back_stops_the_expiry(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    client, _ = await resume(broker)
    await client.stream.aclose()
    await trio.sleep(50)
    await resume(broker)
    await trio.sleep(1000)
    assert broker.sessions["c"].connected


async def test_disconnect_may_change_the_expiry(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    client, _ = await resume(broker)
    await client.send(Disconnect(properties={"session_expiry": 10}))
    await trio.sleep(9)
    assert "c" in broker.sessions
    await trio.sleep(2)
    assert "c" not in broker.sessions


async def test_the_broker_may_shorten_the_expiry(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, session_expiry_maximum=60)
    _, connack = await resume(broker)
    assert connack.properties["session_expiry"] == 60
    assert broker.sessions["c"].expiry == 60


async def test_what_was_in_flight_comes_again_first_and_in_order(broker: MemoryBroker) -> None:
    client, _ = await resume(broker)
    await subscribe(client, "t", qos=2)
    for number, qos in enumerate((1, 2, 2, 1)):
        broker.publish("t", b"%d" % number, qos=qos)
    sent = [await client.expect(Publish) for _ in range(4)]
    await client.send(Ack(kind=Kind.PUBACK, packet_id=sent[0].packet_id))
    await client.send(Ack(kind=Kind.PUBREC, packet_id=sent[1].packet_id))
    await client.expect(Ack)
    broker.drop("c")
    broker.publish("t", b"new", qos=1)
    client, _ = await resume(broker)
    assert await client.expect(Ack) == Ack(kind=Kind.PUBREL, packet_id=sent[1].packet_id)
    again = [await client.expect(Publish) for _ in range(3)]
    assert [(entry.payload, entry.dup, entry.packet_id) for entry in again[:2]] == [
        (b"2", True, sent[2].packet_id),
        (b"3", True, sent[3].packet_id),
    ]
    assert (again[2].payload, again[2].dup) == (b"new", False)


async def test_a_smaller_receive_maximum_holds_when_resuming(broker: MemoryBroker) -> None:
    client, _ = await resume(broker)
    await subscribe(client, "t", qos=1)
    for _ in range(3):
        broker.publish("t", qos=1)
    for _ in range(3):
        await client.expect(Publish)
    broker.drop("c")
    client, _ = await resume(broker, properties={**KEPT, "receive_maximum": 1})
    for _ in range(3):
        packet = await client.expect(Publish)
        assert await nothing(client)
        await client.send(Ack(kind=Kind.PUBACK, packet_id=packet.packet_id))
    assert await nothing(client)


@pytest.mark.parametrize("version", [4, 5])
async def test_an_identifier_that_an_older_connection_left_open_is_in_use(broker: MemoryBroker, version: int) -> None:
    client, _ = await resume(broker, version)
    await client.send(Publish(topic="t", payload=b"1", qos=2, packet_id=1))
    assert (await client.expect(Ack)).kind is Kind.PUBREC
    broker.drop("c")
    client, _ = await resume(broker, version)
    await client.send(Publish(topic="t", payload=b"1", qos=2, packet_id=1, dup=True))
    assert (await client.expect(Ack)).kind is Kind.PUBREC
    assert not broker.violations
    await client.send(Publish(topic="t", payload=b"2", qos=1, packet_id=1))
    assert "Packet Identifier 1 is still in use" in (await broker.wait_for(lambda: broker.violations))[0][1]
    client, _ = await resume(broker, version)
    await client.send(Ack(kind=Kind.PUBREL, packet_id=1))
    assert (await client.expect(Ack)).kind is Kind.PUBCOMP
    await publish(client, "t", b"2")
    assert len(broker.violations) == 1


async def test_qos_2_is_exactly_once_across_a_reconnect(broker: MemoryBroker) -> None:
    client, _ = await resume(broker)
    await client.send(Publish(topic="t", qos=2, packet_id=3))
    await client.expect(Ack)
    broker.drop("c")
    client, _ = await resume(broker)
    await client.send(Publish(topic="t", qos=2, packet_id=3, dup=True))
    assert (await client.expect(Ack)).kind is Kind.PUBREC
    await client.send(Ack(kind=Kind.PUBREL, packet_id=3))
    assert await client.expect(Ack) == Ack(kind=Kind.PUBCOMP, packet_id=3)
    assert len(broker.published) == 1


async def test_an_expired_message_is_not_delivered_from_the_queue(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    client, _ = await resume(broker)
    await subscribe(client, "t", qos=1)
    broker.drop("c")
    broker.publish("t", b"old", qos=1, properties={"message_expiry": 10})
    broker.publish("t", b"good", qos=1, properties={"message_expiry": 90})
    await trio.sleep(30)
    client, _ = await resume(broker)
    packet = await client.expect(Publish)
    assert (packet.payload, packet.properties) == (b"good", {"message_expiry": 60})
    assert await nothing(client)


@pytest.mark.parametrize("version", [4, 5])
async def test_takeover(broker: MemoryBroker, version: int) -> None:
    old = await join(broker, "c", version)
    new = await join(broker, "c", version)
    if version == 5:
        assert (await old.expect(Disconnect)).reason_code == 0x8E
    assert await old.receive() is None
    assert broker.clients == ["c"]
    await subscribe(new, "t")
    assert broker.publish("t") == 1


async def test_an_anonymous_client(broker: MemoryBroker) -> None:
    _, connack = await knock(broker, "")
    assert connack.properties["assigned_client_id"] == "assigned-1"
    _, connack = await knock(broker, "", version=4)
    assert connack.reason_code == 0
    _, connack = await knock(broker, "", version=4, clean_start=False)
    assert connack.reason_code == 2
    assert broker.clients == ["assigned-1", "assigned-2"]


# ---- wills ----

WILL = Will(topic="status", payload=b"offline", qos=1, retain=True)
DELAYED = Will(topic="status", payload=b"offline", properties={"will_delay": 30})


def wills(broker: MemoryBroker) -> int:
    return sum(entry.topic == "status" for entry in broker.published)


@pytest.mark.parametrize("version", [4, 5])
async def test_a_lost_connection_publishes_the_will(broker: MemoryBroker, version: int) -> None:
    watcher = await join(broker, "w")
    await subscribe(watcher, "status", qos=2)
    client = await join(broker, "c", version, will=WILL)
    await client.stream.aclose()
    packet = await watcher.expect(Publish)
    assert (packet.payload, packet.qos) == (b"offline", 1)
    assert broker.retained["status"].publisher == "c"


async def test_a_disconnect_discards_the_will(broker: MemoryBroker) -> None:
    client = await join(broker, "c", will=WILL)
    await client.send(Disconnect())
    assert await client.receive() is None
    assert wills(broker) == 0


async def test_a_disconnect_with_will(broker: MemoryBroker) -> None:
    client = await join(broker, "c", will=WILL)
    await client.send(Disconnect(reason_code=4))
    assert await client.receive() is None
    assert wills(broker) == 1


async def test_a_takeover_publishes_the_will(broker: MemoryBroker) -> None:
    await join(broker, "c", will=WILL)
    await join(broker, "c", will=WILL)
    assert wills(broker) == 1


@pytest.mark.parametrize("expiry,moment", [(100, 30), (20, 20), (0, 0)])
async def test_a_delayed_will(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, expiry: int, moment: int
) -> None:
    """The will waits for its delay, or for the end of the session, whichever is first."""
    client = await join(broker, "c", will=DELAYED, properties={"session_expiry": expiry})
    await client.stream.aclose()
    before = trio.current_time()
    await broker.wait_for_publish("status", timeout=200)
    assert trio.current_time() - before == moment
    await trio.sleep(200)
    assert wills(broker) == 1


async def test_coming_back_in_time_cancels_a_delayed_will(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    client, _ = await resume(broker, will=DELAYED)
    await client.stream.aclose()
    await trio.sleep(29)
    await resume(broker)
    await trio.sleep(100)
    assert wills(broker) == 0


async def test_a_clean_start_ends_the_session_and_with_it_the_delay(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    client, _ = await resume(broker, will=DELAYED)
    await client.stream.aclose()
    await trio.sleep(1)
    await join(broker, "c")
    assert wills(broker) == 1


# ---- keep alive ----


@pytest.mark.parametrize("version", [4, 5])
async def test_the_keep_alive_is_enforced(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, version: int
) -> None:
    client = await join(broker, "c", version, keep_alive=10, will=WILL)
    await trio.sleep(10)
    await subscribe(client, "t")
    before = trio.current_time()
    if version == 5:
        assert (await client.expect(Disconnect)).reason_code == 0x8D
    assert await client.receive() is None
    assert trio.current_time() - before == 15
    assert wills(broker) == 1


async def test_the_server_keep_alive_wins(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, server_keep_alive=4)
    client = await join(broker, "c", keep_alive=100)
    assert (await client.expect(Disconnect)).reason_code == 0x8D
    assert trio.current_time() == 6


async def test_no_keep_alive(autojump_clock: trio.testing.MockClock, broker: MemoryBroker) -> None:
    await join(broker, "c", keep_alive=0)
    await trio.sleep(10_000)
    assert broker.clients == ["c"]


async def test_a_connection_without_connect_is_closed(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    stream = await broker.connect_stream()
    assert await stream.receive_some() == b""
    assert trio.current_time() == 30
