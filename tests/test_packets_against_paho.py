"""Our codec of the PUBLISH family against paho's, both ways: what one writes the other reads the same.

Runs with whichever paho is installed; the gate runs it with 1.6.1 and with 2.x.
"""

from __future__ import annotations

from typing import Any

import paho.mqtt.client as mqtt
import pytest
from hypothesis import given, strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.packets import incoming_properties, new_reader, packet_ids, publish_properties, qos, texts, topics, versions
from trio_mqtt_driver._packets import PUBACK, PUBCOMP, PUBREC, PUBREL, encode_ack, encode_publish
from trio_mqtt_driver._paho import _make_client, _Pipe  # the client and the pipe that the driver itself uses
from trio_mqtt_driver._properties import encode_publish_properties, encode_varint
from trio_mqtt_driver._types import Message, PublishProperties

# Field of PublishProperties -> paho's name.
PAHO_NAMES = {
    "payload_format": "PayloadFormatIndicator",
    "message_expiry": "MessageExpiryInterval",
    "content_type": "ContentType",
    "response_topic": "ResponseTopic",
    "correlation_data": "CorrelationData",
    "user_properties": "UserProperty",
    "subscription_identifiers": "SubscriptionIdentifier",
    "topic_alias": "TopicAlias",
}
REPEATABLE = ("user_properties", "subscription_identifiers")


class Paho:
    """A paho client that is connected to a pipe."""

    def __init__(self, version: int) -> None:
        self.client = _make_client("oracle", version, True)
        self.pipe = self.client.pipe = _Pipe()
        self.next_packet_id = 1
        self.client.next_packet_id = lambda: self.next_packet_id
        self.messages: list[Any] = []
        self.client.on_message = lambda _client, _userdata, message: self.messages.append(message)
        self.client.connect("memory")
        self.feed(b"\x20\x03\x00\x00\x00" if version == 5 else b"\x20\x02\x00\x00")
        self.take()

    def feed(self, packet: bytes) -> None:
        self.pipe.incoming += packet
        assert self.client.loop_read() == mqtt.MQTT_ERR_SUCCESS

    def take(self) -> bytes:
        self.client.loop_write()
        data = bytes(self.pipe.outgoing)
        self.pipe.outgoing.clear()
        return data


def to_paho(properties: PublishProperties) -> Any:
    made: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho has no annotations there
    for field, name in PAHO_NAMES.items():
        value: Any = getattr(properties, field)
        values = value if field in REPEATABLE else () if value is None else (value,)
        for single in values:
            setattr(made, name, single)
    return made


def from_paho(properties: Any) -> PublishProperties:
    values: dict[str, Any] = {field: getattr(properties, name, None) for field, name in PAHO_NAMES.items()}
    for field in REPEATABLE:
        values[field] = tuple(values[field] or ())
    return PublishProperties(**values)


def read_one(data: bytes, version: int) -> object:
    reader = new_reader(version, topic_alias_maximum=65535)
    (packet,) = reader.feed(data)
    assert reader.error is None
    return packet


@given(
    topic=topics,
    payload=st.binary(max_size=300),
    qos=qos,
    retain=st.booleans(),
    dup=st.booleans(),
    packet_id=packet_ids,
    properties=publish_properties,
    version=versions,
)
def test_paho_reads_what_we_publish(
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,
    dup: bool,
    packet_id: int,
    properties: PublishProperties,
    version: int,
) -> None:
    dup = dup and qos > 0
    paho = Paho(version)
    paho.feed(
        encode_publish(
            topic.encode(),
            payload,
            qos=qos,
            retain=retain,
            dup=dup,
            packet_id=packet_id,
            properties=encode_publish_properties(properties) if version == 5 else None,
        )
    )
    if qos == 2:
        assert paho.take() == encode_ack(PUBREC, packet_id)
        paho.feed(encode_ack(PUBREL, packet_id))
        assert paho.take() == encode_ack(PUBCOMP, packet_id)
    elif qos == 1:
        assert paho.take() == encode_ack(PUBACK, packet_id)
    (message,) = paho.messages
    assert (message.topic, message.payload, message.qos) == (topic, payload, qos)
    assert (bool(message.retain), bool(message.dup), message.mid) == (retain, dup, packet_id if qos else 0)
    if version == 5:
        assert from_paho(message.properties) == properties


@given(
    topic=topics,
    payload=st.binary(max_size=300),
    qos=qos,
    retain=st.booleans(),
    packet_id=packet_ids,
    properties=incoming_properties,
    alias=st.none() | st.integers(1, 65535),
    version=versions,
)
def test_we_read_what_paho_publishes(
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,
    packet_id: int,
    properties: PublishProperties,
    alias: int | None,
    version: int,
) -> None:
    paho = Paho(version)
    paho.next_packet_id = packet_id
    made = None
    if version == 5:
        made = to_paho(properties)
        if alias is not None:
            made.TopicAlias = alias
    paho.client.publish(topic, payload, qos, retain, made)
    message = read_one(paho.take(), version)
    assert isinstance(message, Message)
    assert (message.topic, message.payload, message.qos, message.retain) == (topic, payload, qos, retain)
    assert (message.dup, message.packet_id) == (False, packet_id if qos else 0)
    assert message.properties == (from_paho(made) if made is not None else PublishProperties())


@given(properties=publish_properties)
def test_our_properties_are_paho_s_in_length_and_meaning(properties: PublishProperties) -> None:
    data = encode_publish_properties(properties)
    unpacked: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho has no annotations there
    _, length = unpacked.unpack(data)
    assert length == len(data)
    assert from_paho(unpacked) == properties
    assert len(to_paho(properties).pack()) == len(data)


@pytest.mark.parametrize("version", [4, 5])
@given(packet_id=packet_ids)
def test_we_read_what_paho_acknowledges(version: int, packet_id: int) -> None:
    paho = Paho(version)
    paho.feed(encode_publish(b"a", b"", qos=1, packet_id=packet_id, properties=b"\0" if version == 5 else None))
    assert read_one(paho.take(), version) == [packet_id]
    paho.feed(encode_publish(b"a", b"", qos=2, packet_id=packet_id, properties=b"\0" if version == 5 else None))
    assert read_one(paho.take(), version) == (PUBREC, packet_id, 0, None)
    paho.feed(encode_ack(PUBREL, packet_id))
    assert read_one(paho.take(), version) == (PUBCOMP, packet_id, 0, None)


@pytest.mark.parametrize("version", [4, 5])
@given(packet_id=packet_ids)
def test_paho_reads_what_we_acknowledge(version: int, packet_id: int) -> None:
    paho = Paho(version)
    published: list[int] = []

    def on_publish(*args: Any) -> None:  # paho 1 gives three arguments, paho 2 five; the identifier is the third
        published.append(args[2])

    paho.client.on_publish = on_publish
    paho.next_packet_id = packet_id
    paho.client.publish("a", b"", qos=1)
    paho.feed(encode_ack(PUBACK, packet_id))
    paho.client.publish("a", b"", qos=2)
    paho.take()
    paho.feed(encode_ack(PUBREC, packet_id))
    assert read_one(paho.take(), version) == (PUBREL, packet_id, 0, None)
    paho.feed(encode_ack(PUBCOMP, packet_id))
    assert published == [packet_id, packet_id]


@given(reason=texts, code=st.sampled_from([0x10, 0x80, 0x83, 0x87, 0x90, 0x97, 0x99]))
def test_the_reason_string_that_paho_packs_is_the_one_that_we_read(reason: str, code: int) -> None:
    made: Any = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]  # paho has no annotations there
    made.ReasonString = reason
    body = b"\x00\x07" + bytes((code,)) + bytes(made.pack())
    assert read_one(bytes((PUBACK,)) + encode_varint(len(body)) + body, 5) == (PUBACK, 7, code, reason)
