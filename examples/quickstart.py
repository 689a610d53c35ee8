"""The driver in a few lines: python examples/quickstart.py [URL]   (default: mqtt://localhost:1883)"""

from __future__ import annotations

import sys

import trio

from trio_mqtt_driver import Message, MQTTDriver

URL = sys.argv[1] if len(sys.argv) > 1 else "mqtt://localhost:1883"


def on_temperature(message: Message[str]) -> None:
    print("handler: ", message.topic, message.value)


async def main() -> None:
    # Entered when the link is live; from here on outages are the driver's business, not ours.
    async with MQTTDriver(URL, client_id="quickstart") as driver:
        await driver.subscribe("sensors/+/temperature", on_temperature, str, qos=1)
        async with driver.subscription("alarms/#", str, qos=1) as alarms:
            await driver.publish("sensors/kitchen/temperature", "21.5", qos=1)
            await driver.publish("alarms/kitchen", "smoke", qos=1)
            async for alarm in alarms:
                print("iterator:", alarm.topic, alarm.value)
                break


if __name__ == "__main__":
    trio.run(main)
