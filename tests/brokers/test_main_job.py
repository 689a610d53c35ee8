"""The driver's main job with real brokers: both ways at every QoS, retained messages, wills, credentials, probes."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.brokers.grounds import GROUNDS, Ground, every_ground_but, require
from trio_mqtt_driver import Endpoint, Message, MQTTDriver, RefusedError, State, Will
from trio_mqtt_driver.testing import FaultProxy, Mosquitto

pytestmark = pytest.mark.broker


# iotcore sends every message with the QoS of the subscription.
@every_ground_but("iotcore-5")
@pytest.mark.smoke
async def test_messages_go_both_ways_at_every_qos(ground: Ground) -> None:
    handled: list[tuple[bytes, int]] = []
    every = trio.Event()

    async def handler(message: Message[str]) -> None:
        await trio.lowlevel.checkpoint()
        handled.append((message.payload, message.qos))
        if len(handled) == 3:
            every.set()

    with trio.fail_after(20):
        async with MQTTDriver(ground.config()) as driver:
            await driver.subscribe("handled/+", handler, str, qos=2)
            async with driver.subscription("iterated/#", qos=1) as messages:
                for qos in (0, 1, 2):
                    for topic in ("handled/1", "iterated/1"):
                        result = await driver.publish(topic, f"qos {qos}", qos=qos)
                        assert (result.generation, result.attempts) == (1, 1)
                got = [await messages.receive() for _ in range(3)]
            await every.wait()
            status = driver.status()
            assert driver.state is State.LIVE
            assert status.protocol == ground.protocol
    assert handled == [(b"qos 0", 0), (b"qos 1", 1), (b"qos 2", 2)]
    assert sorted((message.payload, message.qos) for message in got) == [(b"qos 0", 0), (b"qos 1", 1), (b"qos 2", 1)]


async def test_protocol_auto_settles_on_what_the_broker_speaks(ground: Ground) -> None:
    with trio.fail_after(20):
        async with MQTTDriver(ground.config(protocol="auto")) as driver:
            spoken = driver.status().protocol
    assert spoken == ("3.1.1" if ground.broker.name == "nats-server" else "5")


async def test_a_retained_message_comes_with_the_subscription_and_again_with_its_replay(ground: Ground) -> None:
    with trio.fail_after(20):
        async with MQTTDriver(ground.config()) as driver:
            await driver.publish("state", b"on", qos=1, retain=True)
            async with driver.subscription("state", qos=1) as states:
                first = await states.receive()
                driver.force_reconnect(even_if_live=True)
                await driver.wait_live()
                again = await states.receive()
            await driver.publish("state", b"", qos=1, retain=True)
    assert (first.payload, first.retain, first.replayed, first.generation) == (b"on", True, False, 1)
    assert (again.payload, again.retain, again.replayed, again.generation) == (b"on", True, True, 2)


async def test_the_will_is_published_when_the_link_is_lost_and_not_after_a_clean_end(
    ground: Ground, nursery: trio.Nursery
) -> None:
    proxy = FaultProxy(nursery, ground.broker.port)
    will = Will(topic="will/mortal", payload="gone", qos=1)
    with trio.fail_after(20):
        async with MQTTDriver(ground.config()) as watcher, watcher.subscription("will/#", qos=1) as wills:
            async with MQTTDriver(ground.config(proxy.port, client_id="mortal", will=will)):
                proxy.reset()
                assert (await wills.receive()).payload == b"gone"
            await watcher.publish("will/end", b"end", qos=1)
            assert (await wills.receive()).payload == b"end"


# iotcore hangs up on wrong credentials without a CONNACK, as on a fault that may heal.
@pytest.mark.parametrize("name", [name for name in GROUNDS if name != "iotcore-5"])
async def test_wrong_credentials_are_refused_for_good_and_right_ones_are_not(name: str) -> None:
    make, protocol = GROUNDS[name]
    broker = require(make(users={"u1": "p1"}))
    with trio.fail_after(30):
        async with broker:
            ground = Ground(broker, protocol)
            async with MQTTDriver(ground.config(username="u1", password="p1")) as driver:
                assert driver.state is State.LIVE

            async def enter(password: str) -> None:
                async with MQTTDriver(ground.config(username="u1", password=password)):
                    raise AssertionError("the driver was entered")

            with pytest.raises(RefusedError, match="refused the connection") as caught:
                await enter("p2-secret")
    assert caught.value.terminal
    assert "p2-secret" not in str(caught.value)


@pytest.mark.parametrize("probe", ["publish", "echo", "ping"])
async def test_every_probe_works(ground: Ground, probe: str) -> None:
    with trio.fail_after(20):
        async with MQTTDriver(ground.config(probe=probe)) as driver:
            (replaying,) = [event for event in driver.status().history if event.kind == "replaying"]
            assert ("PINGREQ answered" if probe == "ping" else "acknowledged in") in replaying.text
            assert await driver.ping() < 2
            assert driver.status().round_trip is not None


async def test_overlapping_filters_each_get_every_message_once(ground: Ground) -> None:
    got: dict[str, list[bytes]] = {"a/#": [], "a/+": [], "+/b": []}
    expected = [str(number).encode() for number in range(60)]

    def into(payloads: list[bytes]) -> Any:
        def handler(message: Message[bytes]) -> None:
            payloads.append(message.payload)
            if all(len(entry) >= len(expected) for entry in got.values()):
                complete.set()

        return handler

    complete = trio.Event()
    with trio.fail_after(20):
        async with MQTTDriver(ground.config()) as driver, driver.subscription("end", qos=1) as end:
            for topic_filter, payloads in got.items():
                await driver.subscribe(topic_filter, into(payloads), qos=1)
            for number, payload in enumerate(expected):
                await driver.publish("a/b", payload, qos=number % 3)
            await complete.wait()
            # What would come once too often comes before this does.
            await driver.publish("end", b"", qos=1)
            await end.receive()
    # Between QoS 0 and QoS 1 there is no order on some brokers.
    assert {topic_filter: sorted(payloads) for topic_filter, payloads in got.items()} == {
        topic_filter: sorted(expected) for topic_filter in got
    }


async def test_a_unix_socket() -> None:
    broker = Mosquitto(unix_socket=True)
    require(broker)
    with trio.fail_after(20):
        async with broker:
            endpoint = Endpoint(scheme="unix", path=str(broker.unix_path))
            config = Ground(broker, "5").config(endpoint=endpoint)
            async with MQTTDriver(config) as driver, driver.subscription("a", qos=1) as messages:
                await driver.publish("a", b"1", qos=1)
                assert (await messages.receive()).payload == b"1"
                await broker.kill()
                await broker.start()
                await driver.wait_live()
                await driver.publish("a", b"2", qos=1)
                assert (await messages.receive()).payload == b"2"
                assert driver.generation == 2
