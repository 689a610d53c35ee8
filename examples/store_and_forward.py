"""A logger that loses no reading: not while the broker is away, and not when the machine is switched off.

    MQTT_URL=mqtt://localhost:1883 python examples/store_and_forward.py

Readings wait in a file until the broker has acknowledged them. Stop the broker, kill this process (`kill -9`), start
both again: every reading that was printed as "kept" arrives, in order; one that was under way may arrive twice, with
the same time in it. Other variables: OUTBOX (the file), INTERVAL in seconds.
"""

from __future__ import annotations

import itertools
import os
import time

import attrs
import trio

from trio_mqtt_driver import DriverConfig, MQTTDriver

TOPIC = os.environ.get("LOG_TO", "plant/logger")
INTERVAL = float(os.environ.get("INTERVAL", "1"))
CONFIG = DriverConfig.from_env(
    {"MQTT_URL": "mqtt://localhost:1883", "MQTT_CLIENT_ID": "logger", **os.environ},
    outbox_path=os.environ.get("OUTBOX", "readings.outbox"),
    offline="queue",
    refill_rate=200,  # after a long outage the backlog shall not crowd out everybody else
)


@attrs.frozen
class Reading:
    number: int
    at: float
    load: float


def say(text: str) -> None:
    print(text, flush=True)


async def main() -> None:
    async with MQTTDriver(CONFIG, start="background") as driver:
        say(f"started, {len(driver.undelivered)} readings in {CONFIG.outbox_path}; the broker is {CONFIG.endpoint}")
        for number in itertools.count(1):
            reading = Reading(number, time.time(), os.getloadavg()[0])
            result = await driver.publish(TOPIC, reading, qos=1, message_expiry=7 * 24 * 3600)
            say(f"kept {number}" if result.queued else f"delivered {number}")
            await trio.sleep(INTERVAL)


if __name__ == "__main__":
    try:
        trio.run(main)
    except KeyboardInterrupt:
        say("ended; what was not delivered is in the file")
