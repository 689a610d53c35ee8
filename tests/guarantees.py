"""What is delivered, counted where it arrives, while links are cut after any byte, and processes and brokers die.

A *cell* is one cell of the table in ``docs/delivery.md``. Its test runs schedules: hypothesis says what is published
when, and after which byte of a connection the event of the cell happens. At the end all is well again and time passes;
then what has arrived is held against what was promised.
"""

from __future__ import annotations

import enum
import math
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import attrs
import pytest
import trio
import trio.testing

from tests.bytes_cut import ACKS, CutStream
from tests.stable import stable_config
from trio_mqtt_driver import DriverConfig, Endpoint, Message, MessageLostError, MQTTDriver, Receipt
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker

T = TypeVar("T")

TOPICS = ("t/x", "t/y")


class Event(enum.Enum):
    """What happens after the byte that a `Break` names."""

    DISCONNECT = "disconnect"
    PROCESS_CRASH = "process crash"
    BROKER_CRASH = "broker crash"
    """It has its sessions when it is back."""
    BROKER_LOSS = "broker crash without persistence"


@attrs.frozen
class Cell:
    qos: int
    stable: bool
    event: Event
    disk: bool = False
    """Whether the outbox is in a file."""

    def __str__(self) -> str:
        mode = "stable-ID" if self.stable else "fresh-ID"
        return f"QoS {self.qos}, {mode}, {'disk' if self.disk else 'memory'}, {self.event.value}"


# -- what a schedule is made of ---------------------------------------------------------------------------------------


@attrs.frozen
class Publish:
    topic: str
    count: int
    queue: bool = False
    """With ``offline="queue"``, one after the other; else all at once with ``publish_nowait()``."""


@attrs.frozen
class Break:
    """The event happens after so many bytes that the driver sends or receives from now on."""

    direction: Direction
    after: int
    outage: float
    """Seconds until the broker can be reached again."""


@attrs.frozen
class Lose:
    """An acknowledgement is lost, and the link stays."""

    kind: Kind
    direction: Direction


@attrs.frozen
class Hang:
    """The link is half-open: nothing passes, nothing is closed."""


@attrs.frozen
class Away:
    """The broker cannot be reached for so many seconds; what is published meanwhile waits."""

    seconds: float


@attrs.frozen
class Wait:
    seconds: float


Step = Publish | Break | Lose | Hang | Away | Wait
LOST = tuple((kind, direction) for kind in ACKS for direction in Direction)


# -- who publishes, and who counts ------------------------------------------------------------------------------------


@attrs.define
class Ledger:
    """The numbers of one topic."""

    published: int = 0
    accepted: set[int] = attrs.field(factory=set[int])
    """The driver took them."""
    acknowledged: set[int] = attrs.field(factory=set[int])
    """The driver said that it is done: stored or acknowledged by the broker."""
    arrived: list[int] = attrs.field(factory=list[int])

    def next(self) -> int:
        self.published += 1
        return self.published


@attrs.frozen
class Promise:
    at_least_once: Literal["", "accepted", "acknowledged"]
    """Which messages arrive: those that the driver took, or those that it called stored or delivered."""
    at_most_once: bool


class Books:
    """Both ends of all topics."""

    def __init__(self) -> None:
        self.by_topic = {topic: Ledger() for topic in TOPICS}

    def __getitem__(self, topic: str) -> Ledger:
        return self.by_topic[topic]

    def note(self, message: Message[bytes]) -> None:
        self[message.topic].arrived.append(int(message.payload))

    def verify(self, promise: Promise) -> None:
        for topic, ledger in self.by_topic.items():
            arrived = ledger.arrived
            assert max(arrived, default=0) <= ledger.published, (topic, "never published", arrived)
            first = list(dict.fromkeys(arrived))
            assert first == sorted(first), (topic, "out of order", arrived)
            assert ledger.published in first, (topic, "what was published last, when all was well, is missing")
            promised: dict[str, set[int]] = {
                "accepted": ledger.accepted,
                "acknowledged": ledger.acknowledged,
                "": set(),
            }
            lost = promised[promise.at_least_once] - set(first)
            assert not lost, (topic, "lost", sorted(lost))
            if promise.at_most_once:
                assert len(first) == len(arrived), (topic, "more than once", arrived)


class Traffic(Protocol):
    """What the driver under test is used for."""

    async def begin(self, life: Life, /) -> None:
        """The application has just started."""

    async def publish(self, life: Life, step: Publish, /) -> None: ...

    async def end(self, life: Life, /) -> None:
        """All is well: return when everything must have arrived."""


# -- the driver under test, its broker, and their deaths --------------------------------------------------------------


class Life:
    """One process of the application: from its start to its end, or its death.

    What a killed process leaves is its outbox file as it is at that moment, and connections that are reset. Its tasks
    are cancelled, but neither what they write to the file nor what they say to a broker counts any more.
    """

    def __init__(self, world: World, number: int) -> None:
        self.alive = True
        self.breaks = 0
        self.scope = trio.CancelScope()
        self.driver: MQTTDriver = MQTTDriver(self._config(world, number), start="background", rng=random.Random(0))
        self._world = world
        self._number = number
        self._stream: CutStream | None = None
        self._limits = (math.inf, math.inf)
        self._break: Break | None = None

    def _config(self, world: World, number: int) -> DriverConfig:
        options: dict[str, Any] = {"outbox_path": world.outbox(number)} if world.cell.disk else {}
        return stable_config(
            world.broker,
            world.protocol,
            stable_id=world.cell.stable,
            open_stream=self._open_stream,
            ack_timeout=3,
            probe_timeout=3,
            in_flight=5,
            drain_timeout=200,
            **options,
        )

    async def _open_stream(self, _endpoint: Endpoint) -> trio.abc.Stream:
        if not self.alive:
            await trio.sleep_forever()
        self._stream = CutStream(await self._world.broker.connect_stream(), *self._limits, on_cut=self._cut)
        return self._stream

    def arrange(self, step: Break) -> None:
        self._break = step
        self._limit(*(step.after if step.direction is one else math.inf for one in (Direction.IN, Direction.OUT)))

    def _limit(self, to_send: float, to_receive: float) -> None:
        self._limits = (to_send, to_receive)
        if self._stream is not None:
            self._stream.limit(to_send, to_receive)

    def _cut(self) -> None:
        happening, self._break = self._break, None
        self._limits = (math.inf, math.inf)
        if happening is not None and self.alive:
            self.breaks += 1
            self._world.happen(self, happening)

    def calm(self) -> None:
        """No more breaks."""
        self._break = None
        self._limit(math.inf, math.inf)

    def die(self) -> None:
        """``kill -9``."""
        if not self.alive:
            return
        self.alive = False
        self._world.copy_outbox(self._number)
        self._limit(0, 0)
        if self._stream is not None:
            self._world.nursery.start_soon(trio.aclose_forcefully, self._stream)
        self.scope.cancel(reason="killed")


class World:
    def __init__(self, nursery: trio.Nursery, cell: Cell, protocol: str, directory: Path) -> None:
        self.cell = cell
        self.protocol = protocol
        self.nursery = nursery
        self.broker = MemoryBroker(nursery)
        self.books = Books()
        self._directory = directory

    def outbox(self, number: int) -> Path:
        return self._directory / f"{number}.outbox"

    def copy_outbox(self, number: int) -> None:
        for file in self._directory.glob(f"{number}.outbox*"):
            shutil.copyfile(file, self._directory / file.name.replace(str(number), str(number + 1), 1))

    def happen(self, life: Life, step: Break) -> None:
        """The event of the cell."""
        event = self.cell.event
        if event is Event.PROCESS_CRASH:
            life.die()
            return
        if event is not Event.DISCONNECT:
            self.broker.stop(keep_sessions=event is Event.BROKER_CRASH)
        self.nursery.start_soon(self._be_away, step.outage)

    async def _be_away(self, seconds: float) -> None:
        self.broker.down = True
        await trio.sleep(seconds)
        self.broker.down = False

    async def run(self, traffic: Traffic, lives: Sequence[Sequence[Step]]) -> None:
        """All but the last life end with their death."""
        for number, steps in enumerate(lives):
            life = Life(self, number)
            with life.scope:
                async with life.driver:
                    await traffic.begin(life)
                    for step in steps:
                        await self._take(traffic, life, step)
                    if number < len(lives) - 1:
                        life.die()
                        await trio.sleep_forever()
                    await self._settle(traffic, life)
        assert not self.broker.violations

    async def _take(self, traffic: Traffic, life: Life, step: Step) -> None:
        match step:
            case Publish():
                await traffic.publish(life, step)
            case Break():
                life.arrange(step)
            case Lose(kind, direction):
                client_id = life.driver.client_id
                if client_id is not None:
                    self.broker.faults.drop(kind, direction=direction, client_id=client_id, times=1)
            case Hang():
                if life.driver.client_id in self.broker.clients:
                    self.broker.silence(life.driver.client_id)
            case Away(seconds):
                if life.driver.client_id in self.broker.clients:
                    self.broker.drop(life.driver.client_id)
                self.nursery.start_soon(self._be_away, seconds)
            case Wait(seconds):
                await trio.sleep(seconds)

    async def _settle(self, traffic: Traffic, life: Life) -> None:
        """All is well again, and time passes."""
        life.calm()
        self.broker.faults.clear()
        await trio.sleep(100)
        await life.driver.wait_live()
        await traffic.end(life)
        assert life.driver.undelivered == ()
        await trio.sleep(100)


class Outbound:
    """The driver under test publishes; another one, with a good link and a session of its own, counts."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._receipts: list[Receipt] = []

    async def begin(self, _life: Life) -> None:
        self._receipts.clear()

    async def publish(self, life: Life, step: Publish) -> None:
        for _ in range(step.count):
            number = self._world.books[step.topic].next()
            if step.queue:
                await self._queue(life, step.topic, number)
            else:
                self._hand_over(life, step.topic, number)

    async def _queue(self, life: Life, topic: str, number: int) -> None:
        await life.driver.publish(topic, str(number), qos=self._world.cell.qos, offline="queue")
        if life.alive:
            self._world.books[topic].accepted.add(number)
            self._world.books[topic].acknowledged.add(number)

    def _hand_over(self, life: Life, topic: str, number: int) -> None:
        receipt = life.driver.publish_nowait(topic, str(number), qos=self._world.cell.qos)
        self._world.books[topic].accepted.add(number)
        self._receipts.append(receipt)
        self._world.nursery.start_soon(self._await_receipt, life, topic, number, receipt)

    async def _await_receipt(self, life: Life, topic: str, number: int, receipt: Receipt) -> None:
        try:
            await receipt.wait()
        except MessageLostError:
            assert not life.alive
        if life.alive:
            self._world.books[topic].acknowledged.add(number)

    async def end(self, life: Life) -> None:
        for topic in TOPICS:
            self._hand_over(life, topic, self._world.books[topic].next())
        assert await life.driver.drain() == ()
        assert all(receipt.done for receipt in self._receipts)


class Inbound:
    """The driver under test has handlers, which take their time and count; the broker's own messages come in."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng

    async def begin(self, life: Life) -> None:
        async def handle(message: Message[bytes]) -> None:
            if life.alive:
                self._world.books.note(message)
                await trio.sleep(self._rng.choice((0, 0, 0.1, 3)))

        for topic in TOPICS:
            await life.driver.subscribe(topic, handle, qos=self._world.cell.qos)

    async def publish(self, _life: Life, step: Publish) -> None:
        for _ in range(step.count):
            self._publish(step.topic)

    def _publish(self, topic: str) -> None:
        ledger = self._world.books[topic]
        number = ledger.next()
        ledger.accepted.add(number)
        self._world.broker.publish(topic, str(number), qos=self._world.cell.qos)

    async def end(self, _life: Life) -> None:
        for topic in TOPICS:
            self._publish(topic)
        await trio.sleep(100)


# -- running it -------------------------------------------------------------------------------------------------------


async def slow_disk(write: Callable[..., T], *args: Any, **_options: Any) -> T:
    """Instead of a worker thread: the file changes at one moment, and the time before and after is the clock's.

    A thread would make the schedules unrepeatable, and the clock would jump ahead while it writes.
    """
    # As a worker thread's, its end is waited for even if the wait is cancelled.
    with trio.CancelScope(shield=True):
        await trio.sleep(0.01)
    result = write(*args)
    with trio.CancelScope(shield=True):
        await trio.sleep(0.01)
    return result


def in_a_world(cell: Cell, protocol: str, what: Callable[[World], Awaitable[None]]) -> Books:
    """What came of it."""

    async def main() -> Books:
        async with trio.open_nursery() as nursery:
            world = World(nursery, cell, protocol, Path(directory))
            await what(world)
            nursery.cancel_scope.cancel(reason="the end of the world")
        return world.books

    clock = trio.testing.MockClock(autojump_threshold=0)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", slow_disk)
        return trio.run(main, clock=clock)


def publish_through(cell: Cell, protocol: str, lives: Sequence[Sequence[Step]]) -> Books:
    """Run a schedule with a driver that publishes."""

    async def run(world: World) -> None:
        config = stable_config(world.broker, protocol, client_id="witness")
        async with MQTTDriver(config, rng=random.Random(0)) as witness:
            await witness.subscribe("t/#", world.books.note, qos=2)
            await world.run(Outbound(world), lives)
        if cell.event is Event.BROKER_LOSS:
            # What it took and had not passed on is gone with it; it counts itself.
            for topic in TOPICS:
                taken = [one for one in world.broker.published if one.topic == topic]
                world.books[topic].arrived = [int(one.payload) for one in taken]

    return in_a_world(cell, protocol, run)


def receive_through(cell: Cell, protocol: str, lives: Sequence[Sequence[Step]], rng: random.Random) -> Books:
    """Run a schedule with a driver that has subscribed."""
    return in_a_world(cell, protocol, lambda world: world.run(Inbound(world, rng), lives))
