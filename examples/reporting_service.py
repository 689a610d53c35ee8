"""A service that reports for months, and whose absence is noticed.

    MQTT_URL=mqtt://localhost:1883 python examples/reporting_service.py

Start it before the broker, restart the broker: it goes on. `{REPORT_TO}/availability` says "online" or "offline": the
broker publishes "offline" for us (our will) when the link dies, we do when we end in an orderly way, on SIGINT or
SIGTERM. Other variables: MQTT_USERNAME, MQTT_PASSWORD_FILE, MQTT_CA_FILE, …, and REPORT_INTERVAL in seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import attrs
import trio

from trio_mqtt_driver import DriverConfig, Message, MQTTDriver, NotConnectedError, RefusedError, State, Will

BASE = os.environ.get("REPORT_TO", "plant/reporter")
INTERVAL = float(os.environ.get("REPORT_INTERVAL", "10"))
AVAILABILITY = f"{BASE}/availability"
CONFIG = DriverConfig.from_env(
    {"MQTT_URL": "mqtt://localhost:1883", "MQTT_CLIENT_ID": "reporter", **os.environ},
    will=Will(topic=AVAILABILITY, payload="offline", qos=1, retain=True),
)


@attrs.frozen
class Report:
    number: int
    load: float


def say(text: str) -> None:
    print(text, flush=True)


async def cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            say(f"{signal.Signals(number).name}: ending")
            scope.cancel()


async def assert_online(driver: MQTTDriver, message: Message[str]) -> None:
    # Each connection has a client ID of its own, so the will of a dead one may come after we said "online" on the
    # next. Whoever claims that we are offline is corrected.
    if message.value != "online":
        await driver.publish(AVAILABILITY, "online", qos=1, retain=True)


async def report(driver: MQTTDriver) -> None:
    announced = number = 0
    while True:
        # Nothing is published on a dead link: a load from ten minutes ago helps nobody.
        await driver.wait_live()
        try:
            if announced != driver.generation:
                announced = driver.generation
                await driver.publish(AVAILABILITY, "online", qos=1, retain=True, offline="fail")
                say(f"online, generation {announced}")
            number += 1
            await driver.publish(f"{BASE}/load", Report(number, os.getloadavg()[0]), offline="fail")
            say(f"reported {number}")
        except NotConnectedError as error:
            say(f"not reported: {error}")
        await trio.sleep(INTERVAL)


async def main() -> None:
    async with MQTTDriver(CONFIG, start="background") as driver:
        async with trio.open_nursery() as nursery:
            await nursery.start(cancel_on_signal, nursery.cancel_scope)
            say(f"started; the broker is {CONFIG.endpoint}")
            nursery.start_soon(report, driver)
            await driver.subscribe(AVAILABILITY, partial(assert_online, driver), str, qos=1)
        # The signal has ended the nursery. DISCONNECT tells the broker to forget the will, so we say it ourselves, but
        # only to a broker that is there, and not for long.
        if driver.state is State.LIVE:
            with trio.move_on_after(2):
                await driver.unsubscribe(AVAILABILITY)
                await driver.publish(AVAILABILITY, "offline", qos=1, retain=True)
                say("offline")


if __name__ == "__main__":
    try:
        trio.run(main)
    except RefusedError as error:  # bad credentials: no amount of waiting heals that
        sys.exit(str(error))
