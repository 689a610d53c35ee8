"""Topic ACLs of the memory broker: what is not allowed does not happen, and the client is told as far as MQTT can."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.brokers.grounds import require
from tests.testing.both_brokers import Peers
from tests.testing.peers import join, nothing, publish, subscribe
from trio_mqtt_driver.testing import (
    Access,
    Ack,
    Kind,
    MemoryBroker,
    Mosquitto,
    Publish,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Will,
)


def own_topics(access: Access) -> bool:
    """Everybody may listen to public topics and do everything under his own name."""
    if access.action == "subscribe" and access.topic.startswith("public/"):
        return True
    return access.topic.startswith(f"{access.username}/")


def nothing_at_all(_access: Access) -> bool:
    return False


@pytest.fixture
def guarded(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery, users={"me": "secret", "admin": "secret"}, acl=own_topics)


ME: dict[str, Any] = {"username": "me", "password": b"secret"}


@pytest.mark.parametrize("version,code", [(4, 0), (5, 0x87)])
async def test_publish_denied(guarded: MemoryBroker, version: int, code: int) -> None:
    client = await join(guarded, "c", version, **ME)
    await subscribe(client, "me/#")
    await client.send(
        Publish(topic="you/0", retain=True),
        Publish(topic="you/1", qos=1, packet_id=1, retain=True),
        Publish(topic="you/2", qos=2, packet_id=2, retain=True),
    )
    assert await client.receive() == Ack(kind=Kind.PUBACK, packet_id=1, reason_code=code)
    assert await client.receive() == Ack(kind=Kind.PUBREC, packet_id=2, reason_code=code)
    if version == 4:
        # It knows of no refusal, and goes on.
        await client.send(Ack(kind=Kind.PUBREL, packet_id=2))
        assert await client.receive() == Ack(kind=Kind.PUBCOMP, packet_id=2)
    await client.send(Publish(topic="me/x", payload=b"mine", qos=2, packet_id=2))
    assert (await client.expect(Publish)).payload == b"mine"
    assert [entry.topic for entry in guarded.published] == ["me/x"]
    assert guarded.retained == {}
    assert list(guarded.denied) == [
        Access(action="publish", topic=f"you/{number}", client_id="c", username="me") for number in range(3)
    ]
    assert not guarded.violations


async def test_topics_behind_an_alias_are_checked(guarded: MemoryBroker) -> None:
    client = await join(guarded, "c", **ME)
    await client.send(
        Publish(topic="you/x", properties={"topic_alias": 1}),
        Publish(topic="", qos=1, packet_id=1, properties={"topic_alias": 1}),
    )
    assert (await client.expect(Ack)).reason_code == 0x87
    assert not guarded.published


@pytest.mark.parametrize("version,code", [(4, 0x80), (5, 0x87)])
async def test_subscribe_denied(guarded: MemoryBroker, version: int, code: int) -> None:
    client = await join(guarded, "c", version, **ME)
    filters = ("me/#", "#", "public/+", "$share/g/you/x", "$share/g/me/x")
    assert (await subscribe(client, *filters, qos=1)).reason_codes == (1, code, 1, code, 1)
    assert set(guarded.subscriptions("c")) == {"me/#", "public/+", "$share/g/me/x"}
    assert [entry.topic for entry in guarded.denied] == ["#", "you/x"]


@pytest.mark.parametrize("topic,seen", [("me/status", True), ("you/status", False)])
async def test_a_will_needs_to_be_allowed(guarded: MemoryBroker, topic: str, seen: bool) -> None:
    client = await join(guarded, "c", will=Will(topic=topic, payload=b"gone", retain=True), **ME)
    await client.stream.aclose()
    await guarded.wait_for(lambda: not guarded.clients, "end of the connection")
    assert (topic in guarded.retained) is seen
    assert bool(guarded.published) is seen
    assert bool(guarded.denied) is not seen


async def test_it_may_change_while_the_broker_runs(guarded: MemoryBroker) -> None:
    client = await join(guarded, "c", **ME)
    assert (await publish(client, "me/x", b"")).reason_code == 0x10
    await subscribe(client, "me/#", packet_id=2)
    guarded.options.acl = nothing_at_all
    assert (await publish(client, "me/x", b"", packet_id=3)).reason_code == 0x87
    # What was granted before stays until it is asked for again.
    assert guarded.publish("me/x", b"of the test") == 1
    assert (await client.expect(Publish)).payload == b"of the test"
    assert (await subscribe(client, "me/#", packet_id=4)).reason_codes == (0x87,)
    guarded.options.acl = None
    assert (await publish(client, "you/x", b"", packet_id=5)).reason_code == 0x10


async def test_a_qos_2_message_is_judged_once(broker: MemoryBroker) -> None:
    """What was taken stays taken: the client sends it again because it has not heard of that."""
    client = await join(broker, "c")
    await client.send(Publish(topic="t", qos=2, packet_id=1))
    await client.expect(Ack)
    broker.options.acl = nothing_at_all
    await client.send(Publish(topic="t", qos=2, packet_id=1, dup=True))
    assert await client.expect(Ack) == Ack(kind=Kind.PUBREC, packet_id=1)
    await client.send(Ack(kind=Kind.PUBREL, packet_id=1))
    assert (await client.expect(Ack)).kind is Kind.PUBCOMP
    assert len(broker.published) == 1


async def test_a_scripted_refusal_comes_before_the_acl(guarded: MemoryBroker) -> None:
    client = await join(guarded, "c", **ME)
    with guarded.faults.refuse_publish("#", 0x97), guarded.faults.refuse_subscribe("you/x", 0x80):
        assert (await publish(client, "you/x", b"")).reason_code == 0x97
        assert await subscribe(client, "you/x") == Suback(packet_id=1, reason_codes=(0x80,))
    assert not guarded.denied


async def test_a_broker_may_close_over_what_is_not_allowed(guarded: MemoryBroker) -> None:
    guarded.options.denied = "close"
    for packet in (
        Publish(topic="you/x"),
        Publish(topic="you/x", qos=1, packet_id=1),
        Subscribe(
            packet_id=1, requests=(SubscriptionRequest(topic_filter="me/x"), SubscriptionRequest(topic_filter="you/x"))
        ),
    ):
        client = await join(guarded, "c", **ME)
        await subscribe(client, "me/y", packet_id=7)
        await client.send(packet)
        assert await client.receive() is None
        assert [access.topic for access in guarded.denied] == ["you/x"]
        guarded.forget()
    assert not guarded.published
    assert not guarded.violations


async def test_an_acl_sees_clients_without_a_name(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, acl=lambda access: access.username is None and access.client_id == "c")
    client, other = await join(broker, "c"), await join(broker, "d")
    await client.send(Publish(topic="t"))
    await broker.wait_for_publish("t")
    await other.send(Publish(topic="t"))
    assert await nothing(other)
    assert len(broker.published) == 1


class MosquittoWithACL(Mosquitto):
    """Everybody may do what he likes below ``own``, and nothing else."""

    def _arguments(self, directory: Path, port: int) -> list[str]:
        arguments = super()._arguments(directory, port)
        acl = directory / "acl"
        acl.write_text("topic readwrite own/#\n")
        acl.chmod(0o600)
        config = Path(arguments[-1])
        config.write_text(f"acl_file {acl}\n{config.read_text()}")
        return arguments


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.broker)])
@pytest.mark.parametrize("version,code", [(4, 0), (5, 0x87)])
async def test_mosquitto_denies_in_the_same_way(nursery: trio.Nursery, version: int, code: int, real: bool) -> None:
    """Except for subscriptions: the ACL file of mosquitto 2.0.11 is not asked about these, but for each delivery."""
    with trio.fail_after(30):
        async with AsyncExitStack() as stack:
            if real:
                port = (await stack.enter_async_context(require(MosquittoWithACL()))).port
            else:
                port = await MemoryBroker(nursery, acl=lambda access: access.topic.startswith("own/")).listen()
            peers = Peers(port, stack)
            watcher = await peers.join("w", version)
            await subscribe(watcher, "own/#")
            denied = Will(topic="status", payload=b"x", retain=True)
            allowed = Will(topic="own/status", payload=b"x")
            for will in (denied, allowed):
                client = await peers.join("c", version, will=will)
                await client.send(
                    Publish(topic="other/0"),
                    Publish(topic="other/1", qos=1, packet_id=1),
                    Publish(topic="other/2", qos=2, packet_id=2),
                )
                assert await client.receive() == Ack(kind=Kind.PUBACK, packet_id=1, reason_code=code)
                assert await client.receive() == Ack(kind=Kind.PUBREC, packet_id=2, reason_code=code)
                await client.stream.aclose()
            assert (await watcher.expect(Publish)).topic == "own/status"
