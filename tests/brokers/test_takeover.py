"""Two drivers with one client ID at a real broker, whether it says so in a DISCONNECT or just closes."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.brokers.grounds import Ground
from trio_mqtt_driver import BackoffConfig, MQTTDriver, State

pytestmark = pytest.mark.broker

PAUSE = 0.3


async def test_two_drivers_with_one_id_come_down_to_an_attempt_per_pause(ground: Ground) -> None:
    backoff = BackoffConfig(start=0.01, maximum=0.05, min_interval=0, pause_after=4, pause=PAUSE, stable_after=30)
    options: dict[str, Any] = {"client_id": "both", "stable_id": True, "backoff": backoff}
    with trio.fail_after(40):
        async with (
            MQTTDriver(ground.config(**options), start="background") as one,
            MQTTDriver(ground.config(**options), start="background") as other,
        ):
            both = (one, other)
            for driver in both:
                await driver.wait_state(State.PAUSED)
            before = [driver.status().counters["attempts"] for driver in both]
            start = trio.current_time()
            await trio.sleep(4 * PAUSE)
            most = (trio.current_time() - start) / PAUSE + 1
            for driver, attempts in zip(both, before, strict=True):
                status = driver.status()
                assert status.counters["attempts"] - attempts <= most
                assert "session taken over (0x8e)" in str(status.last_error) or "closed the connection" in str(
                    status.last_error
                )
