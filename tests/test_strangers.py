"""Something else than a broker answers on that port: one error that says so, and the driver goes on until it heals."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, MQTTDriver, State
from trio_mqtt_driver.testing import Connack, MemoryBroker, Publish, encode, open_pipe

Stranger = Callable[[trio.abc.Stream], Awaitable[None]]
Protocol = Literal["auto", "5", "3.1.1"]
PROTOCOLS: list[Protocol] = ["auto", "5", "3.1.1"]

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def saying(data: bytes) -> Stranger:
    """Waits for a request, answers, and waits for the other side to hang up."""

    async def stranger(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(data)
        while await stream.receive_some():
            pass

    return stranger


async def gibberish(stream: trio.abc.Stream) -> None:
    rng = random.Random(4)
    while True:
        await stream.send_all(rng.randbytes(1000))


async def flood(stream: trio.abc.Stream) -> None:
    """A packet of 256 MiB, of which the end never comes."""
    await stream.send_all(b"\x20\xff\xff\xff\x7f")
    while True:
        await stream.send_all(bytes(65536))


async def drip(stream: trio.abc.Stream) -> None:
    """A CONNACK that is always about to be complete."""
    for byte in encode(Connack(properties={"reason_string": "x" * 1000}), 5):
        await stream.send_all(bytes([byte]))
        await trio.sleep(1)


async def mute(stream: trio.abc.Stream) -> None:
    while await stream.receive_some():
        pass


async def hang_up(stream: trio.abc.Stream) -> None:
    await stream.receive_some()


STRANGERS: dict[str, tuple[Stranger, str]] = {
    "http": (saying(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"), "ProtocolError"),
    "ssh": (saying(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "ProtocolError"),
    "tls": (saying(b"\x15\x03\x01\x00\x02\x02\x46"), "ProtocolError"),
    "publish-first": (saying(encode(Publish(topic="a", payload=b"b"), 4)), "ProtocolError"),
    "truncated": (saying(b"\x20\x02\x00"), "TransportError"),
    "gibberish": (gibberish, "ProtocolError"),
    "flood": (flood, "ProtocolError"),
    "drip": (drip, "TransportError"),
    "mute": (mute, "TransportError"),
    "hang-up": (hang_up, "ConnectionLostError"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", STRANGERS)
async def test_a_stranger_is_named_and_the_driver_tries_until_there_is_a_broker(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, nursery: trio.Nursery, name: str, protocol: Protocol
) -> None:
    stranger, kind = STRANGERS[name]
    visits = 0

    async def serve(stream: trio.abc.Stream) -> None:
        try:
            await stranger(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.lowlevel.checkpoint()  # the driver has heard enough
        finally:
            await trio.aclose_forcefully(stream)

    async def open_stream(_endpoint: Endpoint) -> trio.abc.Stream:
        nonlocal visits
        if visits >= 5:
            return await broker.connect_stream()
        visits += 1
        await trio.lowlevel.checkpoint()
        ours, theirs = open_pipe()
        nursery.start_soon(serve, theirs)
        return ours

    async with MQTTDriver(memory_config(broker, open_stream=open_stream, protocol=protocol)) as driver:
        assert driver.state is State.LIVE
        assert visits == 5
        errors = [event.error for event in driver.status().history if event.error is not None]
        assert errors
        assert all(error.startswith(kind) for error in errors), errors
        assert driver.generation == 1
        await driver.publish("a", b"1", qos=1)


@pytest.mark.parametrize("seed", range(20))
async def test_a_broker_that_loses_its_mind_ends_the_connection_and_nothing_else(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, seed: int
) -> None:
    rng = random.Random(seed)
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a", qos=1) as messages:
        for _ in range(20):
            await driver.wait_live()
            broker.send(driver.client_id or "", rng.randbytes(rng.randrange(1, 200)))
            # A half packet is no error, so the broker may then go on for a while in the middle of it.
            await trio.sleep(60)
        broker.drop()
        await settled()
        await driver.wait_live()
        receipt = driver.publish_nowait("a", b"all is well", qos=1)
        assert (await receipt.wait()).generation == driver.generation > 1
        async for message in messages:
            if message.payload == b"all is well":
                break
    assert not broker.violations
