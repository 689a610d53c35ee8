"""What MQTT forbids ends a connection, of the memory broker and of mosquitto alike.

What mosquitto 2.0.11 lets pass is not here, but in test_wire.py: packets from the wrong side, and No Local on a shared
subscription. Nor is a second CONNECT, after which it forgets the will.
"""

from __future__ import annotations

import pytest
import trio

from tests.testing.both_brokers import Peers, over
from tests.testing.peers import subscribe
from trio_mqtt_driver.testing import (
    Connack,
    Disconnect,
    Packet,
    Publish,
    RawClient,
    Subscribe,
    Unsubscribe,
    Will,
    WireError,
    encode,
)

SESSION_EXPIRY = {"session_expiry": 5}
FORBIDDEN: list[tuple[str, bytes]] = [
    ("a topic with a wildcard", encode(Publish(topic="a/+"), 5)),
    ("an empty topic", encode(Publish(topic=""), 5)),
    ("Topic Alias that was never set", encode(Publish(topic="", properties={"topic_alias": 1}), 5)),
    ("a Topic Alias beyond the maximum", encode(Publish(topic="a", properties={"topic_alias": 65535}), 5)),
    ("QoS 3", bytes.fromhex("36 06 0001 61 0001 00")),
    ("Packet Identifier 0", encode(Publish(topic="a", qos=1, packet_id=0), 5)),
    ("a topic that is not UTF-8", bytes.fromhex("30 04 0001 ff 00")),
    ("a topic with U+0000", bytes.fromhex("30 04 0001 00 00")),
    ("an unknown property", bytes.fromhex("30 06 0001 61 02 7f 00")),
    ("SUBSCRIBE without a filter", encode(Subscribe(packet_id=1, requests=()), 5)),
    ("a filter with # in the middle", bytes.fromhex("82 09 0001 00 0003 232f61 00")),
    ("SUBSCRIBE with QoS 3", bytes.fromhex("82 07 0001 00 0001 61 03")),
    ("SUBSCRIBE with wrong flags", bytes.fromhex("80 07 0001 00 0001 61 00")),
    ("UNSUBSCRIBE without a filter", encode(Unsubscribe(packet_id=1, topic_filters=()), 5)),
    ("an expiry that CONNECT did not have", encode(Disconnect(properties=SESSION_EXPIRY), 5)),
    ("a reserved packet type", b"\x00\x00"),
    ("a Remaining Length of five bytes", bytes.fromhex("30 80 80 80 80 01")),
]


@pytest.mark.parametrize("data", [row[1] for row in FORBIDDEN], ids=[row[0] for row in FORBIDDEN])
async def test_what_is_forbidden_ends_the_connection(peers: Peers, data: bytes) -> None:
    client, watcher = await peers.join("c", will=Will(topic="w", payload=b"gone")), await peers.join("watcher")
    await subscribe(watcher, "w")
    await client.stream.send_all(data)
    said = await over(client)
    assert said is None or said.reason_code >= 0x80
    # And it was no good end.
    assert (await watcher.expect(Publish)).payload == b"gone"


@pytest.mark.parametrize(
    "data",
    [
        encode(Publish(topic="a"), 4),
        b"GET / HTTP/1.1\r\n\r\n",
        bytes.fromhex("10 0c 0004 4d515455 04 02 0000 0000"),
        bytes.fromhex("10 0c 0004 4d515454 04 03 0000 0000"),
        bytes.fromhex("10 0c 0004 4d515454 04 0a 0000 0000"),
    ],
)
async def test_what_is_no_connect_is_not_accepted(peers: Peers, data: bytes) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", peers.port)
    async with stream:
        client = RawClient(stream, 4)
        await stream.send_all(data)
        answers: list[Packet] = []
        try:
            while (packet := await client.receive()) is not None:
                answers.append(packet)
        except (trio.BrokenResourceError, WireError):
            pass  # Mosquitto may answer in version 5, and may reset.
        assert all(isinstance(entry, Connack) and entry.reason_code for entry in answers)
