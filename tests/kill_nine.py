"""A process to be killed: it publishes numbered messages that must not be lost, and prints those that it may forget.

    python kill_nine.py URL OUTBOX FIRST

FIRST is the number that it begins with in each topic. With "drain" it publishes nothing, and ends when all is
delivered.
"""

from __future__ import annotations

import itertools
import sys

import trio

from trio_mqtt_driver import BackoffConfig, DriverConfig, MQTTDriver

TOPICS = ("kill/a", "kill/b", "kill/c")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def publish(driver: MQTTDriver, topic: str, first: int) -> None:
    for number in itertools.count(first):
        await driver.publish(topic, str(number), qos=1, offline="queue")
        say(f"{topic} {number}")


async def main(url: str, outbox: str, first: str) -> None:
    backoff = BackoffConfig(min_interval=0, start=0.02, maximum=0.1, stable_after=0, pause_after=1000)
    config = DriverConfig.from_url(url, client_id="killed", outbox_path=outbox, backoff=backoff, drain_timeout=60)
    async with MQTTDriver(config, start="background") as driver:
        say("ready")
        if first == "drain":
            await driver.wait_live()
            say(f"left {len(await driver.drain())}")
            return
        async with trio.open_nursery() as nursery:
            for topic in TOPICS:
                nursery.start_soon(publish, driver, topic, int(first))


if __name__ == "__main__":
    url, outbox, first = sys.argv[1:]
    trio.run(main, url, outbox, first)
