"""Availability with real brokers, as somebody sees it who listens there with a codec of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.brokers.grounds import Ground
from trio_mqtt_driver import Attempt, Availability, DriverConfig, Endpoint, MQTTDriver
from trio_mqtt_driver.testing import (
    Connect,
    FaultProxy,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
)

pytestmark = pytest.mark.broker

TOPIC = "driver/state"
HERE = Availability(topic=TOPIC)
PROGRAM = """
import json, sys
import trio
from trio_mqtt_driver import Availability, MQTTDriver

async def main():
    async with MQTTDriver(sys.argv[1], availability=Availability(topic=sys.argv[2]), **json.loads(sys.argv[3])):
        await trio.sleep_forever()

trio.run(main)
"""


class Observer:
    """What is said on the topic, from the subscription on."""

    def __init__(self, client: RawClient) -> None:
        self._client = client

    async def hears(self, *words: str) -> None:
        """The next messages are these, and fresh."""
        for expected in words:
            message = await self._client.expect(Publish)
            assert (message.topic, message.payload.decode(), message.retain) == (TOPIC, expected, False)


@asynccontextmanager
async def subscribed(ground: Ground, client_id: str) -> AsyncGenerator[RawClient, None]:
    username, password = ground.broker.credentials or (None, "")
    async with await trio.open_tcp_stream(ground.broker.host, ground.broker.port) as stream:
        client = RawClient(stream, 5 if ground.protocol == "5" else 4)
        connect = Connect(
            client_id=client_id,
            version=client.version,
            keep_alive=60,  # iotcore refuses 0
            username=username,
            password=password.encode() if username else None,
        )
        assert (await client.connect(connect)).reason_code == 0
        await client.send(Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter=TOPIC),)))
        await client.expect(Suback)
        yield client


@asynccontextmanager
async def observing(ground: Ground) -> AsyncGenerator[Observer, None]:
    """Before anything was said."""
    async with subscribed(ground, "observer") as client:
        yield Observer(client)


async def newcomer_is_told(ground: Ground) -> str:
    async with subscribed(ground, "newcomer") as client:
        message = await client.expect(Publish)
        assert (message.topic, message.retain) == (TOPIC, True)
        return message.payload.decode()


async def test_the_late_will_of_a_half_open_connection_is_answered(ground: Ground, nursery: trio.Nursery) -> None:
    """The driver finds out within a second that its link is dead; the broker after one and a half keep-alives."""
    proxy = FaultProxy(nursery, ground.broker.port)

    async def another_way(attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        port = proxy.port if attempt.generation == 1 else ground.broker.port
        return attempt.config.evolve(endpoint=Endpoint(host=ground.broker.host, port=port))

    config = ground.config(
        options_factory=another_way, availability=HERE, keep_alive=3, ack_timeout=0.3, ping_timeout=0.3
    )
    with trio.fail_after(40):
        async with observing(ground) as observer:
            async with MQTTDriver(config) as driver:
                await observer.hears("online")
                with proxy.blackhole():
                    await driver.publish("anything", qos=1)
                    assert driver.generation == 2
                    await observer.hears("online", "offline", "online")
                    assert driver.generation == 2
                assert await newcomer_is_told(ground) == "online"
            await observer.hears("offline")
        assert await newcomer_is_told(ground) == "offline"


async def test_a_clean_end_and_a_reconnect_that_is_asked_for_say_offline(ground: Ground) -> None:
    with trio.fail_after(40):
        async with observing(ground) as observer:
            async with MQTTDriver(ground.config(availability=HERE)) as driver:
                await observer.hears("online")
                driver.force_reconnect(even_if_live=True)
                await observer.hears("offline", "online")
                assert await newcomer_is_told(ground) == "online"
            await observer.hears("offline")
            async with MQTTDriver(ground.config(availability=HERE)):
                await observer.hears("online")  # and no will in between: DISCONNECT has arrived
            await observer.hears("offline")
        assert await newcomer_is_told(ground) == "offline"


async def test_a_process_that_is_killed_is_announced_offline_by_its_will(ground: Ground) -> None:
    options: dict[str, str] = {"protocol": ground.protocol}
    if ground.broker.credentials is not None:
        options["username"], options["password"] = ground.broker.credentials
    with trio.fail_after(40):
        async with observing(ground) as observer:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-W", "error", "-c", PROGRAM, ground.broker.url, TOPIC, json.dumps(options)],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent.parent,
            )
            try:
                await observer.hears("online")
                assert await newcomer_is_told(ground) == "online"
            finally:
                process.kill()
                with trio.move_on_after(10, shield=True):
                    await process.wait()
            await observer.hears("offline")
        assert await newcomer_is_told(ground) == "offline"
