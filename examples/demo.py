"""A broker dies under a running application, and everything comes back: `make demo`.

The broker is a real one (nats-server, from its wheel), a subprocess on a free port of 127.0.0.1. Exit code 0 means
that everything came back.
"""

from __future__ import annotations

import argparse
import logging
import sys

import attrs
import trio

from trio_mqtt_driver import BackoffConfig, DriverConfig, Message, MQTTDriver, State, Subscription
from trio_mqtt_driver.testing import BrokerNotInstalledError, EmbeddedBroker

BEFORE, MEANWHILE, AFTER = 3, 3, 2  # messages
TOTAL = BEFORE + MEANWHILE + AFTER
PACE, DOWNTIME = 0.25, 2.0  # seconds
# Short, for the demo. The defaults are kinder to a broker: up to 30 s, and a pause of 45 s after 8 failures.
BACKOFF = BackoffConfig(start=0.3, maximum=0.6, min_interval=0.3, pause_after=1000)


@attrs.frozen
class Reading:
    number: int
    celsius: float


class Stage:
    """Prints what happens: when (seconds since the start), and who does it."""

    def __init__(self) -> None:
        self.start = trio.current_time()

    def say(self, who: str, text: str) -> None:
        print(f"{trio.current_time() - self.start:6.2f} s  {who:<8}  {text}", flush=True)

    def title(self, text: str) -> None:
        print(f"\n{text}\n", flush=True)


class Narrator(logging.Handler):
    """The driver logs each step of its life once, in plain words: all there is to tell about it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        self._stage.say("driver", record.getMessage().removeprefix("demo: "))


class Counted:
    """The numbers of the messages that arrived, and waiting for them."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self._changed = trio.Event()

    def add(self, number: int) -> None:
        self.numbers.add(number)
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for(self, count: int) -> None:
        while len(self.numbers) < count:
            await self._changed.wait()


async def watch_alarms(alarms: Subscription[int], seen: Counted, stage: Stage) -> None:
    # One loop for the whole life of the application: it does not see the outage.
    async for alarm in alarms:
        stage.say("iterator", f"alarm {alarm.value} (generation {alarm.generation})")
        seen.add(alarm.value)


async def publish(driver: MQTTDriver, number: int, stage: Stage) -> None:
    # No word about outages here either: publish() returns when the broker has the message, whenever that is.
    await driver.publish("sensors/kitchen", Reading(number, 20 + number / 10), qos=1)
    result = await driver.publish("alarms/kitchen", str(number), qos=1)
    stage.say("app", f"reading {number} and alarm {number} are acknowledged (generation {result.generation})")


async def wait_lost(driver: MQTTDriver) -> None:
    lost = trio.Event()
    unregister = driver.register_connection_callback(lambda up: None if up else lost.set())
    if driver.state is State.LIVE:
        await lost.wait()
    unregister()


async def perform(stage: Stage, *, restart: bool, patience: float) -> bool:
    readings, alarms = Counted(), Counted()
    client_ids: list[str] = []
    back_after: float | None = None

    def on_reading(message: Message[Reading]) -> None:
        reading = message.value
        stage.say("handler", f"reading {reading.number}: {reading.celsius} C (generation {message.generation})")
        readings.add(reading.number)

    def on_link(up: bool) -> None:
        if up and driver.client_id is not None:
            client_ids.append(driver.client_id)

    async def all_arrived(count: int) -> None:
        await readings.wait_for(count)
        await alarms.wait_for(count)

    async with EmbeddedBroker() as broker:
        stage.title("The application starts")
        stage.say("broker", f"{broker.name} is ready at {broker.url}, process {broker.pid}")
        config = DriverConfig.from_url(broker.url, client_id="demo", backoff=BACKOFF)
        driver = MQTTDriver(config, start="background")
        driver.register_connection_callback(on_link)
        async with (
            driver,
            driver.subscription("alarms/#", int, qos=1) as alarm_messages,
            trio.open_nursery() as nursery,
        ):
            await driver.subscribe("sensors/+", on_reading, Reading, qos=1)
            stage.say("app", "has an iterator on alarms/# and a handler on sensors/+ (message class Reading)")
            nursery.start_soon(watch_alarms, alarm_messages, alarms, stage)
            for number in range(1, BEFORE + 1):
                await publish(driver, number, stage)
                await trio.sleep(PACE)
            await all_arrived(BEFORE)

            stage.title("The broker is killed; the application goes on publishing")
            await broker.kill()
            died = trio.current_time()
            stage.say("broker", "KILLED (SIGKILL)")
            await wait_lost(driver)
            for number in range(BEFORE + 1, BEFORE + MEANWHILE + 1):
                stage.say("app", f"publishes reading {number}, and waits")
                nursery.start_soon(publish, driver, number, stage)
                await trio.sleep(PACE)
            await trio.sleep_until(died + DOWNTIME)

            with trio.move_on_after(patience):
                started = trio.current_time()
                if restart:
                    stage.title("The broker is started again, on the same port")
                    await broker.start()
                    started = trio.current_time()
                    stage.say("broker", f"ready, process {broker.pid}")
                await driver.wait_live()
                back_after = trio.current_time() - started
                await all_arrived(BEFORE + MEANWHILE)
                for number in range(BEFORE + MEANWHILE + 1, TOTAL + 1):
                    await trio.sleep(PACE)
                    await publish(driver, number, stage)
                await all_arrived(TOTAL)
            status = driver.status()
            stage.title("The application ends")
            nursery.cancel_scope.cancel()

    reconnects = status.generation - 1
    validated = sum(event.kind == State.REPLAYING.value for event in status.history)
    stage.title("What came back")
    checks = [
        check(
            status.state is State.LIVE and reconnects > 0,
            f"the link: {status.state.value}, generation {status.generation}",
        ),
        check(validated > reconnects > 0, f"the test publish: acknowledged on {validated} connections"),
        check(
            len(set(client_ids)) == status.generation > 1 and "_reconnect_" in client_ids[-1],
            f"a fresh client ID for each connection: {', '.join(client_ids)}",
        ),
        check(
            status.subscriptions == 2 and status.counters["replays"] == 2 * reconnects > 0 and not status.degraded,
            f"the subscriptions: {status.counters['replays']} of {2 * max(reconnects, 1)} replayed, "
            f"{len(status.degraded)} refused",
        ),
        check(len(readings.numbers) == TOTAL, f"the handler: {len(readings.numbers)} of {TOTAL} readings"),
        check(len(alarms.numbers) == TOTAL, f"the iterator: {len(alarms.numbers)} of {TOTAL} alarms"),
    ]
    print()
    if back_after is not None:
        print(f"The driver was live {back_after:.2f} s after the broker was ready again.", end=" ")
    return all(checks)


def check(good: bool, text: str) -> bool:
    print(f"  {'ok    ' if good else 'FAILED'}  {text}", flush=True)
    return good


async def main(arguments: argparse.Namespace) -> bool:
    stage = Stage()
    logger = logging.getLogger("trio_mqtt_driver")
    logger.setLevel(logging.INFO)
    logger.addHandler(Narrator(stage))
    print("A broker dies under a running application. Everything that `driver` says is trio_mqtt_driver's own log.")
    good = await perform(stage, restart=not arguments.leave_dead, patience=arguments.patience)
    print("Everything came back." if good else "NOT everything came back.", flush=True)
    return good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leave-dead", action="store_true", help="do not start the broker again: see it fail")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds to wait for everything (default: 15)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(0 if trio.run(main, parse()) else 1)
    except BrokerNotInstalledError as error:
        sys.exit(str(error))
