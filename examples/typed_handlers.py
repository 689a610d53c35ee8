"""Handlers chosen by topic filter and message class: python examples/typed_handlers.py [URL]

Two kinds of JSON share one topic here, and a third sender talks nonsense. Each handler gets what fits its class,
checked; the nonsense goes to the dead letters, and the next message is delivered as if nothing had happened.
"""

from __future__ import annotations

import sys

import attrs
import trio

from trio_mqtt_driver import Message, MQTTDriver, PayloadError

URL = sys.argv[1] if len(sys.argv) > 1 else "mqtt://localhost:1883"


@attrs.frozen
class Reading:
    celsius: float = attrs.field(validator=[attrs.validators.ge(-50), attrs.validators.le(150)])


@attrs.frozen
class Fault:
    code: int
    text: str


async def main() -> None:
    done = trio.Event()

    def on_reading(message: Message[Reading]) -> None:
        print(f"reading      {message.value.celsius} C from {message.topic}")

    # A handler may be async. Its messages come one after the other; another subscription's do not wait for it.
    async def on_fault(message: Message[Fault]) -> None:
        print(f"fault        {message.value.code} ({message.value.text}) from {message.topic}")
        await driver.publish("plant/acknowledged", str(message.value.code))
        done.set()

    def on_dead_letter(message: Message[object], error: PayloadError) -> None:
        print(f"dead letter  {message.payload!r}: {error}")

    def told_already(*_: object) -> None:
        """What fits neither class is a dead letter of both; one of them prints it."""

    async with MQTTDriver(URL, client_id="typed") as driver:
        readings = await driver.subscribe("plant/+/events", on_reading, Reading, qos=1, on_dead_letter=on_dead_letter)
        faults = await driver.subscribe("plant/+/events", on_fault, Fault, qos=1, on_dead_letter=told_already)

        await driver.publish("plant/oven/events", Reading(celsius=120.5), qos=1)
        await driver.publish("plant/oven/events", '{"celsius": 900}', qos=1)  # JSON, but out of range
        await driver.publish("plant/oven/events", b"\xff\xfe", qos=1)
        await driver.publish("plant/oven/events", Fault(code=7, text="door open"), qos=1)
        await done.wait()

        print(f"readings: {readings.statistics()}")
        print(f"faults:   {faults.statistics()}")


if __name__ == "__main__":
    trio.run(main)
