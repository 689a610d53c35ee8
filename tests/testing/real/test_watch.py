"""What arrives at a real broker, seen by a watch."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from tests.brokers.grounds import require
from tests.testing.real.visiting import Visit, every_broker
from trio_mqtt_driver import MQTTDriver
from trio_mqtt_driver.testing import (
    BrokerFailedError,
    BrokerProcess,
    EmbeddedBroker,
    Iotcore,
    Mosquitto,
    Publish,
    Watch,
)

pytestmark = pytest.mark.broker


@every_broker
async def test_what_arrives_is_seen(kind: type[BrokerProcess]) -> None:
    with trio.fail_after(40):
        async with require(kind()) as broker, MQTTDriver(broker.url) as driver, broker.watch("a/#") as seen:
            for qos in (0, 1, 2):
                await driver.publish(f"a/{qos}", str(qos), qos=qos)
                message = await seen.wait_for_publish(f"a/{qos}", timeout=10)
                assert (message.topic, message.payload) == (f"a/{qos}", str(qos).encode())
                assert message.qos == (2 if kind is Iotcore else qos)
            await driver.publish("b", "not watched", qos=1)
            # More than is in flight at once: what is not acknowledged would end this early.
            for number in range(200):
                await driver.publish("a/n", str(number), qos=1 + number % 2)
            await driver.publish("a/end", "", qos=1)
            await seen.wait_for_publish("a/end", timeout=10)
            numbers = [int(message.payload) for message in seen.published if message.topic == "a/n"]
            assert sorted(numbers) == list(range(200))
            assert {message.topic for message in seen.published} == {"a/0", "a/1", "a/2", "a/n", "a/end"}
            seen.forget()
            assert not seen.published


@every_broker
async def test_what_is_retained_is_seen_when_it_is_published_and_not_again(kind: type[BrokerProcess]) -> None:
    with trio.fail_after(40):
        async with require(kind()) as broker, MQTTDriver(broker.url) as driver:
            async with broker.watch() as seen:
                await driver.publish("state", "on", qos=1, retain=True)
                # Where the broker tells.
                assert (await seen.wait_for_publish("state")).retain is (5 in kind.versions and kind is not Iotcore)
            async with broker.watch() as seen:
                await driver.publish("end", "", qos=1)
                await seen.wait_for_publish("end")
                assert "state" not in {message.topic for message in seen.published}


async def test_only_the_last_are_remembered(visit: Visit) -> None:
    async with EmbeddedBroker() as broker, broker.watch(history=3) as seen:
        client, _ = await visit(broker)
        for number in range(10):
            await client.send(Publish(topic=f"t/{number}"))
        await seen.wait_for_publish("t/9")
        assert [message.topic for message in seen.published] == ["t/7", "t/8", "t/9"]


async def test_what_does_not_arrive_is_told_with_the_last_packets(visit: Visit) -> None:
    async with EmbeddedBroker() as broker, broker.watch("t/#") as seen:
        client, _ = await visit(broker)
        await client.send(Publish(topic="t/1", payload=b"something else"))
        await seen.wait_for_publish("t/1")
        with pytest.raises(AssertionError, match=r"no PUBLISH for 't/2' in the watch of 't/#' within 0.1 s") as caught:
            await seen.wait_for_publish("t/2", timeout=0.1)
        assert "something else" in str(caught.value)
        assert "something else" in seen.tail()
        with pytest.raises(ValueError, match="topic_filter"):
            await seen.wait_for_publish("t/#/2")


@every_broker
async def test_a_broker_that_dies_ends_the_watch(kind: type[BrokerProcess]) -> None:
    with trio.fail_after(40):
        async with require(kind()) as broker:
            outside: list[Exception] = []
            seen: Watch

            async def wait(started: trio.Event) -> None:
                started.set()
                try:
                    await seen.wait_for_publish("never")
                except BrokerFailedError as exc:
                    outside.append(exc)

            async def die(nursery: trio.Nursery) -> None:
                nonlocal seen
                async with broker.watch() as seen:
                    started = trio.Event()
                    nursery.start_soon(wait, started)
                    await started.wait()
                    os.kill(broker.pid, signal.SIGKILL)
                    await trio.sleep_forever()

            async with trio.open_nursery() as nursery:
                with pytest.raises(BrokerFailedError, match=rf"{kind.name} did not go on with the watch of '#': .*\n"):
                    await die(nursery)
            assert len(outside) == 1
            await broker.kill()
            with pytest.raises(RuntimeError, match="is not running"):
                await broker.watch().__aenter__()
            await broker.start()
            async with broker.watch():
                pass


async def test_a_suspended_broker_does_not_end_the_watch(visit: Visit) -> None:
    async with EmbeddedBroker() as broker, broker.watch() as seen:
        client, _ = await visit(broker)
        broker.suspend()
        await client.send(Publish(topic="t"))
        broker.resume()
        await seen.wait_for_publish("t")


async def test_a_watch_that_is_over(visit: Visit) -> None:
    async with EmbeddedBroker() as broker:
        async with broker.watch() as seen:
            client, _ = await visit(broker)
            await client.send(Publish(topic="t"))
            await seen.wait_for_publish("t")
        assert (await seen.wait_for_publish("t")).topic == "t"
        with pytest.raises(RuntimeError, match="the watch of '#' is over"):
            await seen.wait_for_publish("u")


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a+"])
async def test_a_filter_that_is_none(topic_filter: str) -> None:
    async with EmbeddedBroker() as broker:
        with pytest.raises(ValueError, match="topic_filter"):
            await broker.watch(topic_filter).__aenter__()


async def test_a_filter_that_the_broker_refuses() -> None:
    async with require(Iotcore()) as broker:
        with pytest.raises(BrokerFailedError, match=r"iotcore did not go on with the watch of '\$SYS/#': \w"):
            await broker.watch("$SYS/#").__aenter__()


async def test_the_body_s_exception_leaves_as_itself_and_so_does_a_cancellation() -> None:
    mistake = ValueError("mine")
    async with require(Mosquitto()) as broker:
        with pytest.raises(ValueError, match="mine") as caught:
            async with broker.watch():
                raise mistake
        assert caught.value is mistake
        with trio.CancelScope() as scope:
            async with broker.watch():
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
