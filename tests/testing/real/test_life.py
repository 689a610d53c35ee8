"""The life of the real brokers: started, killed, restarted on the same port, suspended; and what outlives that."""

from __future__ import annotations

import os

import pytest
import trio

from tests.brokers.grounds import require
from tests.testing.real.visiting import Visit, accepted, end_of, every_broker, say, subscribe
from trio_mqtt_driver.testing import (
    Ack,
    BrokerProcess,
    Disconnect,
    EmbeddedBroker,
    Kind,
    Mosquitto,
    Pingreq,
    Pingresp,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
    WireError,
)

pytestmark = pytest.mark.broker


@every_broker
async def test_kill_start_and_restart_on_the_same_port(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        directory, port = broker.directory, broker.port
        client, _ = await visit(broker)
        assert (await say(client, "t", b"1")).payload == b"1"
        before = broker.pid
        await broker.kill()
        assert not broker.running
        await end_of(client)
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await visit(broker)
        await broker.start()
        assert (broker.port, broker.running) == (port, True)
        assert broker.pid != before
        client, _ = await visit(broker)
        assert (await say(client, "t", b"2")).payload == b"2"
        await broker.restart()
        client, _ = await visit(broker)
        assert (await say(client, "t", b"3")).payload == b"3"
        with pytest.raises(RuntimeError, match="already running"):
            await broker.start()
        with pytest.raises(RuntimeError, match="entered already"):
            await broker.__aenter__()
        last = broker.pid
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@every_broker
async def test_two_at_once_and_one_twice(visit: Visit, kind: type[BrokerProcess]) -> None:
    first = require(kind())
    async with first, kind() as second:
        assert first.port != second.port
        for broker in (first, second):
            client, _ = await visit(broker)
            assert (await say(client, "t", b"1")).payload == b"1"
    async with first:
        client, _ = await visit(first)
        assert (await say(client, "t", b"2")).payload == b"2"


@every_broker
async def test_suspend_and_resume(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        client, _ = await visit(broker)
        broker.suspend()
        await client.send(Pingreq())
        # The kernel takes connection and bytes; a second of silence is what there is to see of the broker.
        with trio.move_on_after(1) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.receive)
                await visit(broker)
        assert scope.cancelled_caught
        broker.resume()
        assert await client.receive() == Pingresp()
        assert accepted((await visit(broker))[1])
        # A broker that is suspended can be stopped and killed all the same.
        broker.suspend()
        await broker.stop()
        await broker.start()
        broker.suspend()
        await broker.kill()
        with pytest.raises(RuntimeError, match="is not running"):
            broker.resume()


# ---- what the classes say about themselves ----


@every_broker
async def test_the_versions_that_it_speaks(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        for version in (4, 5):
            if version in broker.versions:
                client, connack = await visit(broker, version=version)
                assert accepted(connack)
                assert (await say(client, "t", b"1")).payload == b"1"
            else:
                try:
                    assert not accepted((await visit(broker, version=version))[1])
                except WireError:
                    continue  # nats-server refuses MQTT 5 with the CONNACK of 3.1.1.


async def is_stored(broker: BrokerProcess, *payloads: bytes) -> None:
    """Mosquitto writes what it has to keep a moment after it has acknowledged it; nats-server before."""

    def on_disk() -> bool:
        content = database.read_bytes() if database.exists() else b""
        return all(payload in content for payload in payloads)

    database = broker.directory / "state" / "mosquitto.db"
    with trio.fail_after(20):
        while isinstance(broker, Mosquitto) and not on_disk():  # noqa: ASYNC110  # another process writes the file
            await trio.sleep(0.05)


@every_broker
@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_sessions_on_disk(visit: Visit, kind: type[BrokerProcess], way: str) -> None:
    async def come_back() -> tuple[RawClient, bool]:
        client, connack = await visit(broker, client_id="sleeper", clean_start=False, properties=properties)
        assert connack is not None
        return client, connack.session_present

    async with require(kind()) as broker:
        properties = {"session_expiry": 3600} if 5 in broker.versions else {}
        sleeper, present = await come_back()
        assert not present
        await subscribe(sleeper, "queue/#", qos=1)
        await sleeper.send(Disconnect())
        await end_of(sleeper)
        sender, _ = await visit(broker)
        for topic, payload in (("queue/1", b"it waits"), ("kept", b"it stays")):
            await sender.send(Publish(topic=topic, payload=payload, qos=1, packet_id=1, retain=topic == "kept"))
            assert (await sender.expect(Ack)).kind is Kind.PUBACK
        await is_stored(broker, b"it waits", b"it stays")
        await (broker.stop() if way == "stop" else broker.kill())
        await broker.start()
        sleeper, present = await come_back()
        assert present is broker.keeps_sessions
        if present:
            assert (await sleeper.expect(Publish)).payload == b"it waits"
            reader, _ = await visit(broker)
            await subscribe(reader, "kept")
            assert (await reader.expect(Publish)).payload == b"it stays"


@every_broker
async def test_shared_subscriptions(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        member, _ = await visit(broker)
        await member.send(Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="$share/group/t"),)))
        suback = await member.receive()
        shares = isinstance(suback, Suback) and suback.reason_codes[0] < 0x80
        if shares:
            await member.send(Subscribe(packet_id=2, requests=(SubscriptionRequest(topic_filter="end"),)))
            await member.expect(Suback)
            for topic in ("t", "end"):
                await member.send(Publish(topic=topic))
            shares = (await member.expect(Publish)).topic == "t"
        assert shares is broker.shares


# ---- what only Mosquitto has ----


async def test_a_unix_socket(visit: Visit) -> None:
    broker = Mosquitto(unix_socket=True)
    require(broker)
    async with broker:
        for _ in range(2):
            client, _connack = await visit(broker, path=broker.unix_path)
            assert (await say(client, "t", b"1")).payload == b"1"
            await broker.kill()
            await broker.start()


def test_no_unix_socket_unless_asked_for() -> None:
    with pytest.raises(RuntimeError, match="without unix_socket=True"):
        _ = Mosquitto().unix_path


async def test_used_before_it_is_started() -> None:
    broker = EmbeddedBroker()
    for use in ("port", "url", "directory", "pid"):
        with pytest.raises(RuntimeError, match="nats-server"):
            getattr(broker, use)
    for call in (broker.start, broker.kill, broker.watch().__aenter__):
        with pytest.raises(RuntimeError, match=r"is not running|has not been started|outside its `async with`"):
            await call()
