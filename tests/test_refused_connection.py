"""A broker that is down: the error says why, and not only that all addresses were tried."""

from __future__ import annotations

import socket

import pytest
import trio

from trio_mqtt_driver import Attempt, BackoffConfig, DriverConfig, MQTTDriver


async def test_a_refused_connection_is_called_so(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str | None] = []
    second_attempt = trio.Event()

    async def make_options(attempt: Attempt) -> DriverConfig:
        told.append(attempt.last_error)
        if attempt.number == 2:
            second_attempt.set()
            await trio.sleep_forever()
        return attempt.config

    with socket.socket() as deaf:  # bound and not listening, so nobody else can have the port
        deaf.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{deaf.getsockname()[1]}"
        backoff = BackoffConfig(start=0.01)
        async with MQTTDriver(url, options_factory=make_options, backoff=backoff, start="background"):
            with trio.fail_after(20):
                await second_attempt.wait()
    assert told[0] is None
    assert (told[1] or "").startswith(f"TransportError: connecting to {url}: Connection refused")
    assert f"connecting to {url}: Connection refused; next attempt in" in caplog.text
