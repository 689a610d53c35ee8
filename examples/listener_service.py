"""A service that listens for months.

    MQTT_URL=mqtt://localhost:1883 python examples/listener_service.py

Start it before the broker, restart the broker, pull the cable: it goes on. SIGINT and SIGTERM end it with DISCONNECT.
Other variables: MQTT_USERNAME, MQTT_PASSWORD_FILE, MQTT_CA_FILE, …, and LISTEN_TO, the topic filter.
"""

from __future__ import annotations

import os
import signal
import sys

import trio

from trio_mqtt_driver import DriverConfig, Message, MQTTDriver, RefusedError

# Reading the environment (and perhaps a password file) blocks, so it is done before Trio runs.
CONFIG = DriverConfig.from_env({"MQTT_URL": "mqtt://localhost:1883", "MQTT_CLIENT_ID": "listener", **os.environ})
LISTEN_TO = os.environ.get("LISTEN_TO", "plant/#")


def say(text: str) -> None:
    print(text, flush=True)  # in a pipe or under systemd, too, a line is seen when it is written


def on_message(message: Message[bytes]) -> None:
    # A retained message comes again with every replay of the subscription; `replayed` tells the repetitions.
    if not message.replayed:
        say(f"{message.topic}: {message.payload.decode(errors='replace')}")


def on_link(up: bool) -> None:
    say("link up" if up else "link lost, reconnecting")


async def cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            say(f"{signal.Signals(number).name}: ending")
            scope.cancel()


async def main() -> None:
    # "background": do not wait for the broker here, it may start an hour later. The driver is outside of what a signal
    # cancels, so it is left in an orderly way: what is still out is waited for, and DISCONNECT is sent.
    async with MQTTDriver(CONFIG, start="background") as driver:
        driver.register_connection_callback(on_link)
        async with trio.open_nursery() as nursery:
            await nursery.start(cancel_on_signal, nursery.cancel_scope)
            say(f"started; the broker is {CONFIG.endpoint}")
            await driver.subscribe(LISTEN_TO, on_message, qos=1)
            say(f"subscribed to {LISTEN_TO}")
            await trio.sleep_forever()


if __name__ == "__main__":
    try:
        trio.run(main)
    except RefusedError as error:  # bad credentials: no amount of waiting heals that
        sys.exit(str(error))
