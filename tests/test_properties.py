"""The properties of PUBLISH: checked when they arrive, decoded when asked for, added to on the way out."""

from __future__ import annotations

import gc
import sys
from types import ModuleType

import attrs
import pytest
import trio
from hypothesis import example, given, strategies as st

from tests.packets import new_reader, publish_properties, texts, topics
from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, PayloadFormat, ProtocolError, PublishProperties
from trio_mqtt_driver._properties import (
    PropertyBlock,
    decode_publish_block,
    decode_publish_properties,
    encode_publish_properties,
    encode_varint,
    extend_block,
    read_publish_properties,
)
from trio_mqtt_driver.testing import MemoryBroker, Publish, encode


def binary(raw: bytes) -> bytes:
    return len(raw).to_bytes(2, "big") + raw


def text_of(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return strategy.map(lambda text: binary(text.encode()))


def tagged(identifier: int, *fields: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """One property as bytes."""
    return st.tuples(*fields).map(lambda values: bytes((identifier,)) + b"".join(values))


def number(size: int, low: int = 0) -> st.SearchStrategy[bytes]:
    return st.integers(low, 256**size - 1).map(lambda value: value.to_bytes(size, "big"))


SINGLE = (
    tagged(0x01, st.integers(0, 1).map(lambda value: bytes((value,)))),
    tagged(0x02, number(4)),
    tagged(0x03, text_of(texts)),
    tagged(0x08, text_of(topics)),
    tagged(0x09, st.binary(max_size=300).map(binary)),
    tagged(0x23, number(2, 1)),
)
REPEATABLE = (
    tagged(0x0B, st.integers(1, 268_435_455).map(encode_varint)),
    tagged(0x26, text_of(texts), text_of(texts)),
)


@st.composite
def good_blocks(draw: st.DrawFn) -> bytes:
    """Properties that MQTT allows, in any order."""
    parts = [draw(one) for one in SINGLE if draw(st.booleans())]
    parts += draw(st.lists(st.one_of(REPEATABLE), max_size=4))
    return b"".join(draw(st.permutations(parts)))


@st.composite
def nearly_good_blocks(draw: st.DrawFn) -> bytes:
    """With some bytes changed, put in or left out, the end cut off, or properties that occur twice."""
    data = bytearray(draw(good_blocks()) + b"".join(draw(st.lists(st.one_of(*SINGLE, *REPEATABLE), max_size=1))))
    for place, value, how in draw(
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255), st.integers(0, 3)), max_size=2)
    ):
        start = place % (len(data) + 1)
        if how == 3:
            del data[start:]
        else:
            data[start : start + (how > 0)] = bytes((value,)) if how < 2 else b""
    return bytes(data)


def eager(block: bytes) -> PublishProperties | str:
    """What the decoder makes of it: values, or its words."""
    try:
        return decode_publish_properties(block, 0, len(block))
    except ProtocolError as exc:
        return str(exc)


def lazy(block: bytes) -> PublishProperties | str:
    """The same by the scan, which must know every good block as one."""
    try:
        found = read_publish_properties(block)
    except ProtocolError as exc:
        return str(exc)
    assert isinstance(found, PropertyBlock)
    decoded = found.decode()
    assert found.subscription_identifiers == decoded.subscription_identifiers
    assert found.topic_alias == decoded.topic_alias
    return decoded


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


# -- what comes in ----------------------------------------------------------------------------------------------------


@given(good_blocks())
@example(b"")
def test_the_scan_knows_every_good_block(block: bytes) -> None:
    properties = lazy(block)
    assert isinstance(properties, PublishProperties)
    assert properties == eager(block)


@given(nearly_good_blocks() | st.binary(max_size=40))
@example(b"\x0b\x00")
@example(b"\x0b\x80\x00")
@example(b"\x0b\x80\x80\x80\x80\x01")
@example(b"\x0b\x80")
@example(b"\x01\x02")
@example(b"\x01")
@example(b"\x02\x00\x00\x00")
@example(b"\x23\x00\x00")
@example(b"\x23\x00")
@example(b"\x03\x00\x02a")
@example(b"\x03\x00\x01\x00")
@example(b"\x03\x00\x03\xed\xa0\x80")
@example(b"\x03\x00\x00\x03\x00\x00")
@example(b"\x08\x00\x00")
@example(b"\x08\x00\x01+")
@example(b"\x08\x00\x01#")
@example(b"\x08\x00\x02a")
@example(b"\x09\x00")
@example(b"\x09\x00\x02a")
@example(b"\x26\x00\x00")
@example(b"\x26\x00\x03\x00\x00")
@example(b"\x26\x00\x00\x00\x01\xff")
@example(b"\x21\x00\x01")
@example(b"\x81\x00\x01")
def test_scan_and_decoder_come_to_the_same_verdict_in_the_same_words(block: bytes) -> None:
    assert lazy(block) == eager(block)


def test_a_hostile_integer_is_not_read_to_its_end() -> None:
    """A number of a million bytes would take time quadratic to its length."""
    with pytest.raises(ProtocolError, match="shortest form"):
        read_publish_properties(b"\x0b" + b"\xff" * 1_000_000)


def incoming(**properties: int | str | bytes | tuple[int, ...] | tuple[tuple[str, str], ...]) -> bytes:
    return encode(Publish(topic="a", payload=b"x", properties=properties), 5)


def test_properties_are_decoded_when_they_are_first_asked_for_and_kept() -> None:
    reader = new_reader()
    (message,) = reader.feed(incoming(content_type="text/plain", subscription_identifiers=(5,)))
    assert isinstance(message, Message)
    block = message._properties
    assert isinstance(block, PropertyBlock)
    assert block._decoded is None
    assert block.subscription_identifiers == (5,)
    properties = message.properties
    assert properties == PublishProperties(content_type="text/plain", subscription_identifiers=(5,))
    assert message.properties is properties


def test_messages_with_the_same_block_are_decoded_once() -> None:
    reader = new_reader()
    first, second = reader.feed(incoming(content_type="text/plain") * 2)
    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert first.properties is second.properties


async def test_routing_decodes_nothing_and_the_copies_for_several_subscriptions_are_decoded_once(
    broker: MemoryBroker,
) -> None:
    async with (
        MQTTDriver(memory_config(broker)) as driver,
        driver.subscription("a") as first,
        driver.subscription("a") as second,
    ):
        broker.publish("a", b"x", properties={"correlation_data": b"7"})
        messages = [await first.receive(), await second.receive()]
    for message in messages:
        block = message._properties
        assert isinstance(block, PropertyBlock)
        assert block.subscription_identifiers
        assert block._decoded is None
    assert messages[0].properties.correlation_data == b"7"
    assert messages[1].properties is messages[0].properties


@pytest.mark.parametrize("size", [10, 1000])
def test_a_message_keeps_its_own_bytes_and_not_all_that_arrived_with_it(size: int) -> None:
    small = encode(Publish(topic="a", payload=b"x", properties={"correlation_data": bytes(size)}), 5)
    large = encode(Publish(topic="a", payload=bytes(50_000)), 5)
    message, _ = new_reader().feed(small + large)
    kept: list[object] = []
    pending: list[object] = [message]
    while pending:
        one = pending.pop()
        if not isinstance(one, type | ModuleType):
            kept.append(one)
            pending += gc.get_referents(one)
    assert any(isinstance(one, PropertyBlock) for one in kept)
    assert max(sys.getsizeof(one) for one in kept) < size + 500


# -- what goes out ----------------------------------------------------------------------------------------------------


@given(
    properties=publish_properties,
    message_expiry=st.none() | st.integers(0, 0xFFFFFFFF),
    topic_alias=st.none() | st.integers(1, 65535),
)
def test_a_block_is_extended_by_what_is_added(
    properties: PublishProperties, message_expiry: int | None, topic_alias: int | None
) -> None:
    properties = attrs.evolve(properties, message_expiry=None)
    block = extend_block(encode_publish_properties(properties), message_expiry=message_expiry, topic_alias=topic_alias)
    expected = attrs.evolve(properties, message_expiry=message_expiry, topic_alias=topic_alias)
    assert decode_publish_block(block) == expected


@pytest.mark.parametrize("size", [0, 116, 117, 124, 125, 16_000, 16_372, 16_373, 16_380, 16_381, 65_535])
def test_the_length_in_front_of_an_extended_block_may_need_another_byte(size: int) -> None:
    properties = PublishProperties(payload_format=PayloadFormat.UTF8, correlation_data=bytes(size))
    block = extend_block(encode_publish_properties(properties), message_expiry=1, topic_alias=2)
    assert decode_publish_block(block) == attrs.evolve(properties, message_expiry=1, topic_alias=2)


def test_a_block_to_which_nothing_is_added_is_the_same() -> None:
    block = encode_publish_properties(PublishProperties(content_type="a"))
    assert extend_block(block) is block
