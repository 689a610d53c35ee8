"""The properties of PUBLISH and outgoing topic aliases with a real broker, that announces 10 aliases."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import trio

from tests.brokers.grounds import Ground, require
from trio_mqtt_driver import MQTTDriver, PayloadFormat, PublishProperties, PublishResult
from trio_mqtt_driver.testing import FaultProxy, Mosquitto

pytestmark = pytest.mark.broker


@pytest.fixture
async def mosquitto() -> AsyncGenerator[Ground, None]:
    broker = require(Mosquitto())
    async with broker:
        yield Ground(broker, "5")


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_all_properties_go_there_and_back(mosquitto: Ground, qos: int) -> None:
    most = 65_535
    full: dict[str, Any] = {
        "payload_format": PayloadFormat.UTF8,
        "message_expiry": 0xFFFFFFFF,
        "content_type": "ü" * (most // 2) + "x",
        "response_topic": "a" * most,
        "correlation_data": bytes(range(256)) * 255,
        "user_properties": (("b", "1"), ("a", "2"), ("b", "1"), ("n" * most, "v" * most), ("", "")),
    }
    empty: dict[str, Any] = {
        "payload_format": PayloadFormat.BYTES,
        "content_type": "",
        "correlation_data": b"",
        "user_properties": (),
    }
    with trio.fail_after(20):
        async with (
            MQTTDriver(mosquitto.config()) as driver,
            driver.subscription("topic", qos=qos, identifier=2000) as messages,
        ):
            for properties in (full, empty):
                await driver.publish("topic", "text", qos=qos, **properties)
                message = await messages.receive()
                assert (message.payload, message.qos) == (b"text", qos)
                assert message.properties == PublishProperties(**properties, subscription_identifiers=(2000,))


async def test_more_topics_than_aliases_arrive_at_another_client_each_under_its_own(
    mosquitto: Ground, nursery: trio.Nursery
) -> None:
    """Over a reconnect, too, after which the broker knows no alias."""
    proxy = FaultProxy(nursery, mosquitto.broker.port)
    # One topic is used all the time, and 24 others in turn: aliases are set, used and given to others.
    topics = [f"alias/{'x' * 200}/{number % 25 if number % 2 else 0}" for number in range(300)]
    sent = [(topic, b"%d" % number) for number, topic in enumerate(topics)]
    results: list[PublishResult] = []
    with trio.fail_after(30):
        async with (
            MQTTDriver(mosquitto.config(client_id="watcher")) as watcher,
            watcher.subscription("alias/#", qos=2) as messages,
            MQTTDriver(mosquitto.config(proxy.port, topic_aliases=100)) as driver,
        ):
            for number, (topic, payload) in enumerate(sent):
                if number == 152:  # of QoS 2, after one that was acknowledged: none can get lost, or arrive twice
                    proxy.reset()
                results.append(await driver.publish(topic, payload, qos=number % 3))
            got = [await messages.receive() for _ in sent]
            written = driver.status().counters["bytes_out"]
    assert [(message.topic, message.payload) for message in got] == sent
    assert {result.generation for result in results} == {1, 2}
    assert written < 0.75 * sum(len(topic) for topic in topics)
