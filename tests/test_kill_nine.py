"""What was acknowledged to the caller outlives ``kill -9``, at any moment, with a real broker and a real file."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import attrs
import pytest
import trio

from tests.brokers.grounds import Ground, require
from tests.kill_nine import TOPICS
from trio_mqtt_driver import Message, MQTTDriver
from trio_mqtt_driver.testing import FaultProxy, Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.long]

SCRIPT = Path(__file__).with_name("kill_nine.py")
LIVES = 50
SPAN = 1_000_000
"""Between the first numbers of two lives."""


@attrs.define
class Arrivals:
    """By topic, in the order of arrival."""

    numbers: dict[str, list[int]] = attrs.field(factory=lambda: {topic: list[int]() for topic in TOPICS})
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def note(self, message: Message[bytes]) -> None:
        self.numbers[message.topic].append(int(message.payload))
        self._changed.set()

    async def wait_for(self, wanted: dict[str, set[int]]) -> None:
        while any(not wanted[topic] <= set(self.numbers[topic]) for topic in TOPICS):
            self._changed = trio.Event()
            await self._changed.wait()


class Child:
    """The script in a process of its own, and what it said."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._said = trio.Event()

    async def read(self) -> None:
        assert self.process.stdout is not None
        text = b""
        async for chunk in self.process.stdout:
            *lines, text = (text + chunk).split(b"\n")  # the last line may have been cut off by the kill
            self.lines += [line.decode() for line in lines]
            if lines:
                self._said.set()
                self._said = trio.Event()

    async def wait_line(self) -> None:
        """Until it says something, if it has not."""
        while not self.lines:
            await self._said.wait()


@asynccontextmanager
async def child(*arguments: str) -> AsyncGenerator[Child, None]:
    """At the end of the block it is killed, and all that it said has been read."""
    process = await trio.lowlevel.open_process([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE)
    try:
        async with trio.open_nursery() as nursery:
            one = Child(process)
            nursery.start_soon(one.read)
            yield one
            process.kill()
            await process.wait()
    finally:
        process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()


async def live_and_be_killed(one: Child, rng: random.Random) -> None:
    """A random while: also while it starts and opens its file, and while it has just done so."""
    kind = rng.randrange(4)
    if kind == 0:
        await trio.sleep(rng.uniform(0.2, 0.6))
        return
    await one.wait_line()
    await trio.sleep(rng.uniform(0, 0.02 if kind == 1 else 0.25))


async def test_what_was_acknowledged_to_the_caller_arrives_in_order_after_fifty_kills(tmp_path: Path) -> None:
    rng = random.Random(9)
    outbox = str(tmp_path / "outbox")
    acknowledged: dict[str, set[int]] = {topic: set() for topic in TOPICS}
    arrivals = Arrivals()
    waited = 0
    with trio.fail_after(150):
        async with require(Mosquitto()) as broker, trio.open_nursery() as nursery:
            proxy = FaultProxy(nursery, broker.port)
            async with MQTTDriver(Ground(broker, "5").config(client_id="witness", stable_id=True)) as witness:
                await witness.subscribe("kill/#", arrivals.note, qos=1)
                for life in range(LIVES):
                    offline = life % 3 == 1
                    with proxy.refuse() if offline else nullcontext():
                        async with child(proxy.url, outbox, str(life * SPAN)) as one:
                            await live_and_be_killed(one, rng)
                    kept = [line.split() for line in one.lines if line != "ready"]
                    for topic, number in kept:
                        acknowledged[topic].add(int(number))
                    waited += len(kept) if offline else 0
                async with child(proxy.url, outbox, "drain") as one:
                    await one.process.wait()
                assert one.lines == ["ready", "left 0"]
                await arrivals.wait_for(acknowledged)
            nursery.cancel_scope.cancel()
    assert waited > 100
    for topic, numbers in arrivals.numbers.items():
        assert len({number // SPAN for number in acknowledged[topic]}) > LIVES / 2
        first = list(dict.fromkeys(numbers))
        assert first == sorted(first), topic
