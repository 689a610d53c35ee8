"""A service that reports for months, and whose absence is noticed.

    MQTT_URL=mqtt://localhost:1883 python examples/reporting_service.py

Start it before the broker, restart the broker: it goes on. `{REPORT_TO}/availability` says "online" or "offline": the
broker says "offline" for us (our will) when the link dies, the driver does when we end in an orderly way, on SIGINT or
SIGTERM. Other variables: MQTT_USERNAME, MQTT_PASSWORD_FILE, MQTT_CA_FILE, …, and REPORT_INTERVAL in seconds.
"""

from __future__ import annotations

import os
import signal
import sys

import attrs
import trio

from trio_mqtt_driver import Availability, DriverConfig, MQTTDriver, NotConnectedError, RefusedError

BASE = os.environ.get("REPORT_TO", "plant/reporter")
INTERVAL = float(os.environ.get("REPORT_INTERVAL", "10"))
CONFIG = DriverConfig.from_env(
    {"MQTT_URL": "mqtt://localhost:1883", "MQTT_CLIENT_ID": "reporter", **os.environ},
    availability=Availability(topic=f"{BASE}/availability"),
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


async def report(driver: MQTTDriver) -> None:
    number = 0
    while True:
        # Nothing is published on a dead link: a load from ten minutes ago helps nobody.
        await driver.wait_live()
        number += 1
        try:
            result = await driver.publish(f"{BASE}/load", Report(number, os.getloadavg()[0]), offline="fail")
            say(f"reported {number}, generation {result.generation}")
        except NotConnectedError as error:
            say(f"not reported: {error}")
        await trio.sleep(INTERVAL)


async def main() -> None:
    async with MQTTDriver(CONFIG, start="background") as driver, trio.open_nursery() as nursery:
        await nursery.start(cancel_on_signal, nursery.cancel_scope)
        say(f"started; the broker is {CONFIG.endpoint}")
        nursery.start_soon(report, driver)


if __name__ == "__main__":
    try:
        trio.run(main)
    except RefusedError as error:  # bad credentials: no amount of waiting heals that
        sys.exit(str(error))
