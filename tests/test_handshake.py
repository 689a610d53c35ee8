"""CONNECT to CONNACK: what a broker answers just before it closes is what the driver goes by."""

from __future__ import annotations

from typing import Literal

import pytest
import trio
from trio.testing import MockClock

from trio_mqtt_driver import DriverConfig, Endpoint, MQTTDriver, ReasonCode, RefusedError
from trio_mqtt_driver.testing import Connack, encode


class AnsweringStream(trio.abc.Stream):
    """A broker that answers the first CONNECT and closes, so fast that both are there at once."""

    def __init__(self, answer: bytes) -> None:
        self._chunks = [b"", answer]
        self._asked = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        assert data
        await trio.lowlevel.checkpoint()
        self._asked.set()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        assert max_bytes
        # No checkpoint for the EOF: whoever waits for the answer must not get a turn in between.
        if not self._asked.is_set():
            await self._asked.wait()
        return self._chunks.pop()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("version, protocol", [(5, "5"), (4, "3.1.1")])
async def test_a_refusal_followed_by_eof_is_a_refusal(
    autojump_clock: MockClock, version: int, protocol: Literal["5", "3.1.1"]
) -> None:
    code = ReasonCode.BAD_USER_NAME_OR_PASSWORD if version == 5 else 4
    attempts = 0

    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        nonlocal attempts
        attempts += 1
        assert endpoint.host == "memory"
        await trio.lowlevel.checkpoint()
        return AnsweringStream(encode(Connack(reason_code=code), version))

    config = DriverConfig(
        endpoint=Endpoint(host="memory", port=1883), open_stream=open_stream, protocol=protocol, client_id="refused"
    )
    with trio.fail_after(60), pytest.raises(RefusedError) as caught:
        async with MQTTDriver(config):
            raise AssertionError("entered")
    assert caught.value.reason_code is ReasonCode.BAD_USER_NAME_OR_PASSWORD
    assert attempts == 1
    assert autojump_clock.current_time() < 1
