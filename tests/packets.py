"""What the tests of the codecs share: packets as hypothesis makes them, and a reader that is past its CONNACK."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from trio_mqtt_driver._packets import Packet, PacketReader
from trio_mqtt_driver._types import Message, PayloadFormat, PublishProperties
from trio_mqtt_driver.testing import Publish

CONNACK = {4: b"\x20\x02\x00\x00", 5: b"\x20\x03\x00\x00\x00"}

# What MQTT can carry in a string: no U+0000, no surrogates [MQTT-1.5.4].
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
topics = st.text(
    st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=12
) | st.sampled_from(["a", "a/b", "/", "$SYS/x", "t" * 200])
packet_ids = st.integers(1, 65535)
qos = st.integers(0, 2)
versions = st.sampled_from([4, 5])

publish_properties = st.builds(
    PublishProperties,
    payload_format=st.none() | st.sampled_from(PayloadFormat),
    message_expiry=st.none() | st.integers(0, 0xFFFFFFFF),
    content_type=st.none() | texts,
    response_topic=st.none() | topics,
    correlation_data=st.none() | st.binary(max_size=200),
    user_properties=st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
)
incoming_properties = st.builds(
    PublishProperties,
    payload_format=st.none() | st.sampled_from(PayloadFormat),
    message_expiry=st.none() | st.integers(0, 0xFFFFFFFF),
    content_type=st.none() | texts,
    response_topic=st.none() | topics,
    correlation_data=st.none() | st.binary(max_size=200),
    user_properties=st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
    subscription_identifiers=st.lists(st.integers(1, 268_435_455), max_size=4).map(tuple),
)

# The properties that PublishProperties and the peers' codec call by the same name.
_NAMES = (
    "payload_format",
    "message_expiry",
    "content_type",
    "response_topic",
    "correlation_data",
    "user_properties",
    "subscription_identifiers",
    "topic_alias",
)


def wire_properties(properties: PublishProperties) -> dict[str, Any]:
    """As ``trio_mqtt_driver.testing`` writes them: only what is set."""
    return {name: value for name in _NAMES if (value := getattr(properties, name)) not in (None, ())}


def wire_publish(message: Message[Any]) -> Publish:
    """A message as the peers' codec sees it."""
    return Publish(
        topic=message.topic,
        payload=message.payload,
        qos=message.qos,
        retain=message.retain,
        dup=message.dup,
        packet_id=message.packet_id,
        properties=wire_properties(message.properties),
    )


def comparables(packets: Iterable[Packet]) -> list[object]:
    """Messages have no equality of their own, and how many PUBACKs come together depends on how the stream is cut."""
    found: list[object] = []
    for packet in packets:
        if isinstance(packet, list):
            found += packet
        else:
            found.append(wire_publish(packet) if isinstance(packet, Message) else packet)
    return found


def new_reader(version: int = 5, *, connected: bool = True, **options: Any) -> PacketReader:
    arguments: dict[str, Any] = {"maximum_packet_size": 100_000, **options}
    reader = PacketReader(version=version, **arguments)
    if connected:
        assert reader.feed(CONNACK[version]) == [CONNACK[version]]
    return reader


def read(data: bytes, version: int = 5, **options: Any) -> tuple[list[Packet], str]:
    """What a reader makes of ``data`` in one piece: packets, and the error, ``""`` for none."""
    reader = new_reader(version, **options)
    packets = reader.feed(data)
    return packets, "" if reader.error is None else str(reader.error)
