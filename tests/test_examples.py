"""The examples do what they say: each is run as a user runs it, as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trio_mqtt_driver.testing import Disconnect, EmbeddedBroker, MemoryBroker

ROOT = Path(__file__).parent.parent
PATIENCE = 60


class Example:
    """A running example, and what it has printed."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.output = ""
        self.finished = trio.Event()
        self._grown = trio.Event()

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self.output += data.decode()
            self._grown.set()
        self.finished.set()

    async def printed(self, *texts: str) -> None:
        """Wait until all of ``texts`` are in the output; then forget it, up to the last of them."""
        try:
            with trio.fail_after(PATIENCE):
                await trio.lowlevel.checkpoint()
                while not all(text in self.output for text in texts):
                    self._grown = trio.Event()
                    await self._grown.wait()
        except trio.TooSlowError:
            raise AssertionError(f"not printed: one of {texts}; but:\n{self.output}") from None
        self.output = self.output[max(self.output.index(text) + len(text) for text in texts) :]

    async def ended_by(self, number: signal.Signals) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        with trio.fail_after(PATIENCE):
            return await self.process.wait()


@asynccontextmanager
async def running(name: str, *arguments: str, **environment: str) -> AsyncGenerator[Example, None]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        async with trio.open_nursery() as nursery:
            example = Example(process)
            nursery.start_soon(example.read)
            yield example
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()
        assert process.stdout is not None
        with trio.move_on_after(1, shield=True):
            await process.stdout.aclose()


async def run_to_end(name: str, *arguments: str) -> tuple[int, str]:
    async with running(name, *arguments) as example:
        with trio.fail_after(PATIENCE):
            await example.finished.wait()
            return await example.process.wait(), example.output


@pytest.mark.broker
async def test_the_quickstart_prints_both_messages() -> None:
    async with EmbeddedBroker() as broker:
        code, output = await run_to_end("quickstart.py", broker.url)
    assert sorted(output.splitlines()) == [
        "handler:  sensors/kitchen/temperature 21.5",
        "iterator: alarms/kitchen smoke",
    ]
    assert code == 0


@pytest.mark.broker
async def test_each_message_goes_to_the_handler_of_its_class_and_nonsense_to_the_dead_letters() -> None:
    async with EmbeddedBroker() as broker:
        code, output = await run_to_end("typed_handlers.py", broker.url)
    lines = output.splitlines()
    assert "reading      120.5 C from plant/oven/events" in lines
    assert "fault        7 (door open) from plant/oven/events" in lines
    assert [line for line in lines if line.startswith("dead letter  b'{\"celsius\": 900}'")]
    assert [line for line in lines if line.startswith("dead letter  b'\\xff\\xfe'")]
    assert len(lines) == 6
    assert code == 0


@pytest.mark.broker
async def test_the_services_start_before_the_broker_and_survive_its_restart() -> None:
    async with EmbeddedBroker() as broker:
        await broker.kill()  # its port is known now, and nobody listens
        async with (
            running("listener_service.py", MQTT_URL=broker.url) as listener,
            running("reporting_service.py", MQTT_URL=broker.url, REPORT_INTERVAL="0.1") as reporter,
        ):
            await listener.printed("started")
            await reporter.printed("started")
            await broker.start()
            await listener.printed("link up", "subscribed to plant/#")
            await reporter.printed("reported 1, generation 1\n")
            await listener.printed("plant/reporter/load: {")

            await broker.kill()
            await listener.printed("link lost")
            await broker.start()
            await listener.printed("link up", "plant/reporter/load: {")
            await reporter.printed(", generation 2\n")

            assert await reporter.ended_by(signal.SIGTERM) == 0
            await reporter.printed("SIGTERM: ending")
            await listener.printed("plant/reporter/availability: offline")
            assert await listener.ended_by(signal.SIGTERM) == 0


@pytest.mark.parametrize("name, ready", [("listener_service.py", "subscribed"), ("reporting_service.py", "reported")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_service_with_disconnect(name: str, ready: str, number: signal.Signals) -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        async with running(name, MQTT_URL=f"mqtt://127.0.0.1:{await broker.listen()}") as service:
            await service.printed(ready)
            assert await service.ended_by(number) == 0
            await broker.wait_for(lambda: not broker.clients, "end of the connection")
        assert isinstance(broker.received[-1][1], Disconnect)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["listener_service.py", "reporting_service.py"])
async def test_a_signal_ends_a_service_that_never_had_a_broker(name: str) -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        broker.stop()
        async with running(name, MQTT_URL=f"mqtt://127.0.0.1:{await broker.listen()}") as service:
            await service.printed("started")
            assert await service.ended_by(signal.SIGTERM) == 0
        nursery.cancel_scope.cancel()


async def test_a_service_that_the_broker_refuses_says_so_and_ends() -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery, users={"somebody": "else"})
        async with running("listener_service.py", MQTT_URL=f"mqtt://127.0.0.1:{await broker.listen()}") as service:
            await service.printed("refused the connection: ")
            with trio.fail_after(PATIENCE):
                assert await service.process.wait() == 1
        nursery.cancel_scope.cancel()


async def test_the_logger_keeps_its_readings_when_it_is_killed_while_the_broker_is_away(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        url = f"mqtt://127.0.0.1:{await broker.listen()}"
        environment = {"MQTT_URL": url, "OUTBOX": str(tmp_path / "readings"), "INTERVAL": "0.01"}
        async with running("store_and_forward.py", **environment) as logger:
            for _ in range(3):
                await logger.printed("delivered ")
            broker.stop()
            for _ in range(3):
                await logger.printed("kept ")
        kept = len(broker.published)
        async with running("store_and_forward.py", **environment) as logger:
            for _ in range(3):
                await logger.printed("kept ")
        broker.start()
        async with running("store_and_forward.py", **environment) as logger:
            await logger.printed("started, ", " readings in ")
            await logger.printed("delivered ")
            assert await logger.ended_by(signal.SIGINT) == 0
            await logger.printed("ended; ")
        readings = [message.payload for message in list(broker.published)[kept:] if message.topic == "plant/logger"]
        assert len(readings) >= 3 + 3 + 1
        times = [json.loads(payload)["at"] for payload in readings]
        assert times == sorted(times)
        nursery.cancel_scope.cancel()


def availability(broker: MemoryBroker) -> list[bytes]:
    return [message.payload for message in broker.published if message.topic == "plant/reporter/availability"]


async def test_a_reporter_that_is_killed_is_announced_offline_by_its_will() -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        async with running("reporting_service.py", MQTT_URL=f"mqtt://127.0.0.1:{await broker.listen()}") as service:
            await service.printed("reported")
            assert await service.ended_by(signal.SIGKILL) == -signal.SIGKILL
            await wait_until(broker, lambda: availability(broker) == [b"online", b"offline"])
        nursery.cancel_scope.cancel()


async def test_a_reporter_that_is_called_offline_says_that_it_is_not() -> None:
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        async with running("reporting_service.py", MQTT_URL=f"mqtt://127.0.0.1:{await broker.listen()}") as service:
            await service.printed("reported")
            await broker.wait_for_subscription("plant/reporter/availability")
            broker.publish("plant/reporter/availability", b"offline", retain=True)  # as the will of a dead connection
            await wait_until(broker, lambda: availability(broker) == [b"online", b"offline", b"online"])
            assert await service.ended_by(signal.SIGTERM) == 0
            assert availability(broker)[3:] == [b"offline"]
        nursery.cancel_scope.cancel()


async def wait_until(broker: MemoryBroker, condition: Callable[[], bool]) -> None:
    await broker.wait_for(condition, f"that; availability: {availability(broker)}", timeout=PATIENCE)


@pytest.mark.broker
async def test_in_the_demo_everything_comes_back() -> None:
    code, output = await run_to_end("demo.py")
    assert code == 0, output
    assert "FAILED" not in output
    for words in (
        "live: generation 1, ",
        "KILLED (SIGKILL)",
        "test publish to 'trio_mqtt_driver/probe/demo_reconnect_",
        "replaying 2 subscriptions",
        "live: generation 2, 2 subscriptions, 3 messages waiting",
        "reading 8: 20.8 C (generation 2)",
        "Everything came back.",
    ):
        assert words in output


@pytest.mark.broker
async def test_the_demo_fails_if_not_everything_comes_back() -> None:
    code, output = await run_to_end("demo.py", "--leave-dead", "--patience", "1")
    assert code == 1, output
    assert "FAILED  the link: " in output
    assert "NOT everything came back." in output
