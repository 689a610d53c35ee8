"""Who gets in: versions, credentials, enhanced authentication."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import trio

from tests.testing.peers import join, knock
from trio_mqtt_driver.testing import (
    Auth,
    AuthenticationRefusedError,
    Connack,
    Connect,
    Disconnect,
    MemoryBroker,
    PropertyValue,
    RawClient,
    Will,
    encode,
)


async def test_a_311_broker_answers_version_5_as_real_ones_do(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, versions=(4,))
    stream = await broker.connect_stream()
    await stream.send_all(encode(Connect(client_id="c"), 5))
    assert await stream.receive_some() == b"\x20\x02\x00\x01"
    assert await stream.receive_some() == b""
    await join(broker, "c", version=4)


async def test_a_broker_for_version_5_only(nursery: trio.Nursery) -> None:
    broker = MemoryBroker(nursery, versions=(5,))
    _, connack = await knock(broker, "c", version=4)
    assert connack.reason_code == 1
    await join(broker, "c")


async def test_an_unknown_version(broker: MemoryBroker) -> None:
    stream = await broker.connect_stream()
    await stream.send_all(bytes.fromhex("100c 0006 4d5149736470 03 02 0000 0000"[:38]))
    assert await stream.receive_some() == b"\x20\x02\x00\x01"
    assert await stream.receive_some() == b""


async def test_something_else_than_connect_first(broker: MemoryBroker) -> None:
    stream = await broker.connect_stream()
    await stream.send_all(b"GET / HTTP/1.1\r\n")
    assert await stream.receive_some() == b""
    assert len(broker.violations) == 1


@pytest.mark.parametrize("version,code", [(4, 4), (5, 0x86)])
@pytest.mark.parametrize("username,password", [(None, None), ("me", None), ("me", b"wrong"), ("you", b"secret")])
async def test_wrong_credentials(
    nursery: trio.Nursery, version: int, code: int, username: str | None, password: bytes | None
) -> None:
    broker = MemoryBroker(nursery, users={"me": "secret"})
    client, connack = await knock(broker, "c", version, username=username, password=password)
    assert connack.reason_code == code
    assert await client.receive() is None
    await join(broker, "c", version, username="me", password=b"secret")


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(Connect(client_id="c", username="me", password=b"secret"))


@pytest.mark.parametrize(
    "will,code", [(Will(topic="t", payload=b"", qos=2), 0x9B), (Will(topic="t", payload=b"", retain=True), 0x9A)]
)
async def test_a_will_beyond_the_limits(nursery: trio.Nursery, will: Will, code: int) -> None:
    broker = MemoryBroker(nursery, maximum_qos=1, retain_available=False)
    _, connack = await knock(broker, "c", will=will)
    assert connack.reason_code == code


# ---- enhanced authentication ----


def authenticate(method: str, data: bytes) -> Generator[bytes, bytes, bytes | None]:
    """Two challenges, then a proof; "bad" is refused."""
    if method != "test":
        raise AuthenticationRefusedError(0x8C)
    answer = yield b"challenge to " + data
    if answer == b"bad":
        raise AuthenticationRefusedError(0x87)
    answer += yield b"another"
    return b"proof " + answer


def auth(data: bytes, reason_code: int = 0x18, method: str = "test") -> Auth:
    properties: dict[str, PropertyValue] = {"authentication_method": method, "authentication_data": data}
    return Auth(reason_code=reason_code, properties=properties)


async def begin(broker: MemoryBroker, method: str = "test") -> RawClient:
    client = RawClient(await broker.connect_stream())
    properties: dict[str, PropertyValue] = {"authentication_method": method, "authentication_data": b"me"}
    await client.send(Connect(client_id="c", properties=properties))
    return client


async def complete(client: RawClient) -> None:
    assert await client.receive() == auth(b"challenge to me")
    await client.send(auth(b"one"))
    assert await client.receive() == auth(b"another")
    await client.send(auth(b"two"))


@pytest.fixture
def guarded(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery, authenticate=authenticate)


async def test_authentication_and_reauthentication(guarded: MemoryBroker) -> None:
    client = await begin(guarded)
    await complete(client)
    connack = await client.expect(Connack)
    assert connack.properties["authentication_data"] == b"proof onetwo"
    await client.send(auth(b"me", 0x19))
    await complete(client)
    assert await client.receive() == auth(b"proof onetwo", 0)
    await client.send(auth(b"me", 0x19))
    await client.receive()
    await client.send(auth(b"bad"))
    assert (await client.expect(Disconnect)).reason_code == 0x87


async def test_authentication_that_fails(guarded: MemoryBroker) -> None:
    client = await begin(guarded)
    await client.receive()
    await client.send(auth(b"bad"))
    assert (await client.expect(Connack)).reason_code == 0x87
    assert await client.receive() is None
    client = await begin(guarded, "other")
    assert (await client.expect(Connack)).reason_code == 0x8C


async def test_authentication_that_is_not_on_offer_or_not_used(broker: MemoryBroker, guarded: MemoryBroker) -> None:
    client = await begin(broker)
    assert (await client.expect(Connack)).reason_code == 0x8C
    _, connack = await knock(guarded, "c")
    assert connack.reason_code == 0x87


@pytest.mark.parametrize("packet", [auth(b"one", method="other"), auth(b"one", 0x19), Disconnect()])
async def test_wrong_packets_in_the_exchange(guarded: MemoryBroker, packet: Auth | Disconnect) -> None:
    client = await begin(guarded)
    await client.receive()
    await client.send(packet)
    assert (await client.expect(Disconnect)).reason_code == 0x82
    assert len(guarded.violations) == 1
