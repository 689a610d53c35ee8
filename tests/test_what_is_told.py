"""What status, history and log say: no secret, and a stranger's words on one short line."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Endpoint, MQTTDriver, State
from trio_mqtt_driver.testing import Disconnect, MemoryBroker, open_pipe

settled = trio.testing.wait_all_tasks_blocked

SECRET = "hunter2"


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def told(driver: MQTTDriver, caplog: pytest.LogCaptureFixture) -> str:
    """All that anybody can read of a driver: its log with tracebacks, its status in both forms, itself."""
    status = driver.status()
    everything = [caplog.text, repr(status), json.dumps(status.as_dict()), repr(driver), repr(driver.config)]
    return "\n".join(everything)


async def returns_a_dict(attempt: object) -> dict[str, str]:
    await trio.lowlevel.checkpoint()
    return {"password": SECRET}


async def returns_the_password(attempt: object) -> str:
    await trio.lowlevel.checkpoint()
    return SECRET


@pytest.mark.parametrize(
    "factory",
    [lambda _: {"password": SECRET}, lambda _: SECRET, returns_a_dict, returns_the_password],
    ids=["dict", "str", "async-dict", "async-str"],
)
async def test_what_an_options_factory_returned_by_mistake_is_not_quoted(
    autojump_clock: trio.testing.MockClock,
    broker: MemoryBroker,
    factory: Callable[[object], Awaitable[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with MQTTDriver(memory_config(broker, options_factory=factory), start="background") as driver:
        await trio.sleep(60)
        assert driver.state is not State.LIVE
        assert "OptionsError: options_factory must " in (driver.status().last_error or "")
        assert SECRET not in told(driver, caplog)


class Authenticator:
    method = "METHOD"

    async def start(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return SECRET.encode()

    async def answer(self, challenge: bytes | None) -> bytes | None:
        await trio.lowlevel.checkpoint()
        raise AssertionError(challenge)

    async def finish(self, data: bytes | None) -> None:
        await trio.lowlevel.checkpoint()
        raise AssertionError(data)


def packet(first: int, body: bytes, properties: bytes) -> bytes:
    body += bytes((len(properties),)) + properties
    return bytes((first, len(body))) + body


METHOD = b"\x15\x00\x06METHOD"
DATA = b"\x16\x00\x07" + SECRET.encode()
SPOILT = {
    "auth-unknown-property": packet(0xF0, b"\x18", METHOD + DATA + b"\x7f\x00"),
    "auth-data-twice": packet(0xF0, b"\x18", METHOD + DATA + DATA),
    "auth-cut-short": packet(0xF0, b"\x18", METHOD + DATA[:-2]),
    "auth-bytes-behind": packet(0xF0, b"\x18", METHOD + DATA)[:1]
    + bytes((len(METHOD + DATA) + 9,))
    + packet(0xF0, b"\x18", METHOD + DATA)[2:]
    + SECRET.encode(),
    "auth-unknown-code": packet(0xF0, b"\x55", METHOD + DATA),
    "connack-unknown-property": packet(0x20, b"\x00\x00", METHOD + DATA + b"\x7f\x00"),
    "connack-data-twice": packet(0x20, b"\x00\x00", METHOD + DATA + DATA),
    "connack-unknown-code": packet(0x20, b"\x00\x55", METHOD + DATA),
}


@pytest.mark.parametrize("answer", SPOILT.values(), ids=SPOILT)
async def test_authentication_data_is_quoted_nowhere(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    caplog.set_level(logging.DEBUG)

    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)
        while await stream.receive_some():
            pass

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        client, server = open_pipe()
        nursery.start_soon(serve, server)
        return client

    config = memory_config(
        MemoryBroker(nursery), open_stream=open_stream, authenticator=Authenticator, username="u", password=SECRET
    )
    async with MQTTDriver(config, start="background") as driver:
        await trio.sleep(10)
        assert "ProtocolError" in (driver.status().last_error or "")
        everything = told(driver, caplog)
        assert SECRET not in everything
        assert SECRET[:5] not in everything


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\u2028", "\x85"], ids=ascii)
async def test_a_brokers_words_are_one_line_of_the_log_and_not_a_long_one(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture, line_end: str
) -> None:
    caplog.set_level(logging.INFO, "trio_mqtt_driver")
    words = f"maintenance{line_end}ERROR root: forged" + "y" * 60_000
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        broker.send(driver.client_id or "", Disconnect(reason_code=0x8B, properties={"reason_string": words}))
        await settled()
        status = driver.status()
        lines = [record.getMessage() for record in caplog.records]
        assert [line for line in lines if "maintenance" in line]
        for line in [*lines, status.last_error or "", *(event.text for event in status.history)]:
            assert len(line.splitlines()) <= 1
            assert len(line) < 700
