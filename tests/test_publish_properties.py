"""Each MQTT 5 property of a PUBLISH, out and in, by the public names."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, PayloadFormat, PublishProperties
from trio_mqtt_driver.testing import MemoryBroker

MOST = 65_535
"""Bytes in a text or in binary data [MQTT-1.5.4], [MQTT-1.5.6]."""


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


BOTH_WAYS = [
    ("payload_format", PayloadFormat.BYTES),
    ("payload_format", PayloadFormat.UTF8),
    ("message_expiry", 1),
    ("message_expiry", 0xFFFFFFFF),
    ("content_type", ""),
    ("content_type", "text/plain; ü"),
    ("content_type", "ü" * (MOST // 2) + "x"),
    ("response_topic", "a"),
    ("response_topic", "a" * MOST),
    ("correlation_data", b""),
    ("correlation_data", b"\x00\xff"),
    ("correlation_data", bytes(MOST)),
    ("user_properties", (("", ""),)),
    ("user_properties", (("b", "1"), ("a", "2"), ("b", "1"), ("b", "0"))),
    ("user_properties", (("n" * MOST, "v" * MOST), ("n" * MOST, "v" * MOST))),
]


def named(value: object) -> str | None:
    """A test's name does not hold values of 65,535 bytes."""
    return None if isinstance(value, str) and len(value) < 20 else f"{value!r:.20}"


@pytest.mark.parametrize("name, value", BOTH_WAYS, ids=named)
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_property_goes_out(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int, name: str, value: Any
) -> None:
    arguments: dict[str, Any] = {name: value}
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.publish("topic", "text", qos=qos, **arguments)
        await broker.wait_for_publish("topic")
    message = broker.published[-1]
    assert (message.topic, message.payload) == ("topic", b"text")
    assert message.properties == {name: value}


@pytest.mark.parametrize("name, value", BOTH_WAYS, ids=named)
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_property_comes_in(
    autojump_clock: MockClock, broker: MemoryBroker, qos: int, name: str, value: Any
) -> None:
    config = memory_config(broker, subscription_identifiers=False)
    async with MQTTDriver(config) as driver, driver.subscription("topic", qos=qos) as messages:
        broker.publish("topic", b"text", qos=qos, properties={name: value})
        message = await messages.receive()
    arguments: dict[str, Any] = {name: value}
    assert (message.topic, message.payload, message.qos) == ("topic", b"text", qos)
    assert message.properties == PublishProperties(**arguments)


async def test_user_properties_may_be_any_sequence_of_pairs(broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.publish("topic", qos=1, user_properties=[("a", "1"), ("a", "2")])
        await driver.publish("topic", qos=1, user_properties=[])
    first, second = list(broker.published)[-2:]
    assert first.properties == {"user_properties": (("a", "1"), ("a", "2"))}
    assert second.properties == {}


async def test_all_properties_go_there_and_back_together(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    properties: dict[str, Any] = {
        "payload_format": PayloadFormat.UTF8,
        "message_expiry": 60,
        "content_type": "text/plain",
        "response_topic": "answers",
        "correlation_data": b"\x00\x01",
        "user_properties": (("b", "1"), ("a", "2"), ("b", "1")),
    }
    async with (
        MQTTDriver(memory_config(broker)) as driver,
        driver.subscription("topic", qos=1, identifier=2000) as messages,
    ):
        await driver.publish("topic", "ü", qos=1, **properties)
        message = await messages.receive()
    assert message.properties == PublishProperties(**properties, subscription_identifiers=(2000,))


async def test_message_expiry_comes_in_as_what_is_left_of_it(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.publish("topic", b"x", qos=1, retain=True, message_expiry=60)
        await trio.sleep(45)
        async with driver.subscription("topic") as messages:
            message = await messages.receive()
    assert message.properties.message_expiry == 15


async def test_the_identifiers_of_all_subscriptions_that_a_message_is_for_come_in(broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        first = driver.subscription("a/#", identifier=2000)
        second = driver.subscription("a/+", identifier=3000)
        async with first as wide, second as narrow:
            broker.publish("a/b", b"x")
            for messages in (wide, narrow):
                message = await messages.receive()
                assert sorted(message.properties.subscription_identifiers) == [2000, 3000]


async def test_an_alias_that_the_broker_uses_is_resolved(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, use_topic_aliases=True)
    got: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, topic_alias_maximum=2)) as driver:
        async with driver.subscription("topic/#", qos=1) as messages:
            for number in (1, 2, 3, 1, 2, 3):
                broker.publish(f"topic/{number}", b"%d" % number, qos=1)
            got = [await messages.receive() for _ in range(6)]
        assert driver.status().generation == 1
    assert [message.topic for message in got] == [f"topic/{number}" for number in (1, 2, 3, 1, 2, 3)]
    assert [message.payload for message in got] == [b"1", b"2", b"3", b"1", b"2", b"3"]
    assert [message.properties.topic_alias for message in got] == [1, 2, None, 1, 2, None]


async def test_3_1_1_has_no_properties(broker: MemoryBroker) -> None:
    config = memory_config(broker, protocol="3.1.1")
    async with MQTTDriver(config) as driver, driver.subscription("topic") as messages:
        await driver.publish("topic", b"x", content_type="text/plain")
        assert (await messages.receive()).properties == PublishProperties()


# -- what MQTT cannot carry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"payload_format": 2}, "payload_format is 2, allowed are 0 (bytes) and 1 (UTF-8)"),
        ({"payload_format": True}, "payload_format is True, allowed are 0 (bytes) and 1 (UTF-8)"),
        ({"message_expiry": -1}, "message_expiry is -1, allowed are whole numbers from "),
        ({"message_expiry": 2**32}, "message_expiry is 4294967296, allowed are whole numbers from "),
        ({"content_type": "x" * 65_536}, "content_type has 65536 bytes, allowed are 0 to 65535"),
        ({"content_type": "\0"}, "content_type contains U+0000"),
        ({"content_type": "\ud800"}, "content_type cannot be encoded as UTF-8"),
        ({"response_topic": ""}, "response_topic"),
        ({"response_topic": "a/#"}, "response_topic"),
        ({"response_topic": "x" * 65_536}, "response_topic"),
        ({"correlation_data": bytes(65_536)}, "correlation_data has 65536 bytes, allowed are 0 to 65535"),
        ({"user_properties": [("x" * 65_536, "")]}, "user_properties has 65536 bytes, allowed are 0 to 65535"),
        ({"user_properties": [("a", "\0")]}, "user_properties contains U+0000"),
    ],
    ids=named,
)
async def test_a_value_that_mqtt_cannot_carry_is_refused_at_the_call(
    broker: MemoryBroker, arguments: dict[str, Any], words: str
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(ValueError, match=r".") as caught:
            await driver.publish("topic", b"x", **arguments)
        assert words in str(caught.value)
        await driver.publish("topic", b"y", qos=1)
    assert [one.payload for one in broker.published if one.topic == "topic"] == [b"y"]


@pytest.mark.parametrize("name", ["topic_alias", "subscription_identifiers"])
async def test_what_is_the_driver_s_own_is_no_argument(broker: MemoryBroker, name: str) -> None:
    arguments: dict[str, Any] = {name: 1}
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            await driver.publish("topic", b"x", **arguments)


@pytest.mark.parametrize("payload", [b"\xff", b"\xed\xa0\x80", b"ok\xc3"])
async def test_a_payload_that_is_not_the_text_it_is_called_is_refused_at_the_call(
    broker: MemoryBroker, payload: bytes
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        with pytest.raises(ValueError, match=r"payload_format is 1 \(UTF-8\), but payload is not UTF-8: b'") as caught:
            await driver.publish("topic", payload, payload_format=PayloadFormat.UTF8)
        assert repr(payload) in str(caught.value)
        await driver.publish("topic", payload, qos=1, payload_format=PayloadFormat.BYTES)
        await driver.publish("topic", payload, qos=1)
        await driver.publish("topic", b"\x00\xc3\xbc", qos=1, payload_format=PayloadFormat.UTF8)
    assert [one.payload for one in broker.published if one.topic == "topic"] == [payload, payload, b"\x00\xc3\xbc"]


async def test_a_payload_that_is_not_the_text_it_is_called_comes_in_all_the_same(broker: MemoryBroker) -> None:
    """A receiver may check it [MQTT-3.3.2.3.2]; ours leaves it to whoever wants the text."""
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("topic", qos=1) as messages:
        broker.publish("topic", b"\xff", qos=1, properties={"payload_format": 1})
        message = await messages.receive()
    assert message.payload == b"\xff"
    assert message.properties.payload_format is PayloadFormat.UTF8
