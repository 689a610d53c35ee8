"""A thermostat for every room of a house, small enough to be tested whole: see test_thermostat.py beside it.

    python examples/thermostat/thermostat.py mqtt://localhost:1883

``house/kitchen/temperature`` carries readings, ``{"celsius": 18.5}``; ``house/kitchen/heating`` is what the heating of
that room is to do, ``on`` or ``off``, retained.
"""

from __future__ import annotations

import sys

import attrs
import trio

from trio_mqtt_driver import MQTTDriver

TOO_COLD, TOO_WARM = 19.0, 21.0
"""Between the two the heating stays as it is."""


@attrs.frozen
class Reading:
    celsius: float


async def thermostat(driver: MQTTDriver, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Started when it is subscribed. Each reading is acknowledged when the heating has its order."""
    heating: dict[str, str] = {}
    async with driver.subscription("house/+/temperature", Reading, qos=1) as readings:
        task_status.started()
        async for reading in readings:
            room = reading.topic.split("/")[1]
            celsius = reading.value.celsius
            order = "on" if celsius < TOO_COLD else "off" if celsius > TOO_WARM else heating.get(room)
            if order is not None and order != heating.get(room):
                await driver.publish(f"house/{room}/heating", order, qos=1, retain=True)
                heating[room] = order


async def main() -> None:
    async with MQTTDriver(sys.argv[1], client_id="thermostat", start="background") as driver:
        await thermostat(driver)


if __name__ == "__main__":
    trio.run(main)
