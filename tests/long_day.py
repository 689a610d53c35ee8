"""A long day: an application that uses its driver all along, a peer that talks to it, and outages in between."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import attrs
import trio

from tests.ledger import Diary, Outage, Sequence
from trio_mqtt_driver import Message, MQTTDriver, Receipt, Subscription

OUT = {"out/0": 0, "out/1/a": 1, "out/1/b": 1, "out/2": 2}
"""What the application publishes, and with which QoS. Order is promised within one QoS."""
IN = {"in/handled": 1, "in/iterated": 2, "in/both": 1, "in/turn": 2, "in/visit": 1}
"""What the peer publishes."""
STATE = "in/state"
"""What the peer publishes retained."""
_BURST = 5
"""Publishes that are on their way when the network breaks."""
_AT_ONCE = (1, 1, 1, 1, 6)
"""How many messages the peer publishes one after the other: order shows in the queues only."""


class Peer(Protocol):
    """Whom the application talks to, over a link of its own that does not suffer."""

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        """Return when the broker has the message."""
        ...


@attrs.frozen(kw_only=True)
class Pace:
    """Seconds between two of a kind, at least and at most."""

    publish: tuple[float, float]
    incoming: tuple[float, float]
    turn: tuple[float, float]
    """How long a subscription lasts that comes and goes."""


class Listener:
    """A handler or an iterator, and what it should be given."""

    def __init__(self, name: str, topic: str, day: Day) -> None:
        self.topic = topic
        self.listening = False
        """Whether the broker has granted the subscription and nobody has ended it."""
        self.sequence = Sequence(f"{topic} for {name}:", day.diary)
        self._day = day

    def take(self, message: Message[bytes]) -> None:
        self.sequence.arrive(int(message.payload), repeated=message.dup)
        self._day.note()

    async def take_slowly(self, message: Message[bytes]) -> None:
        await trio.sleep(0.05)
        self.take(message)

    async def iterate(self, messages: Subscription[bytes]) -> None:
        async for message in messages:
            self.take(message)


class State:
    """The retained message as the application sees it."""

    def __init__(self, day: Day) -> None:
        self.published = 0
        self.seen = 0
        self.replayed_in = 0
        """The last generation in which the broker sent it anew."""
        self._day = day

    def take(self, message: Message[bytes]) -> None:
        self.seen = int(message.payload)
        if message.replayed:
            self.replayed_in = message.generation
        self._day.note()


class Day:
    """Runs the application and its peer; ``suffer()`` breaks the network in the meantime.

    What the peer publishes while the network and the link are up must reach every listener. What it publishes
    otherwise may: nobody who is away is waited for, since the session is clean.
    """

    def __init__(self, driver: MQTTDriver, peer: Peer, rng: random.Random, pace: Pace, *, within: float) -> None:
        self.diary = Diary()
        self.published = 0
        self.received = 0
        self._driver = driver
        self._peer = peer
        self._rng = rng
        self._pace = pace
        self._within = within
        """Seconds in which everything must be well again."""
        self._numbers = dict.fromkeys([*OUT, *IN], 0)
        self._outgoing = {topic: Sequence(f"{topic} at the broker:", self.diary, once=not OUT[topic]) for topic in OUT}
        self._unanswered: dict[tuple[str, int], float] = {}
        self._listeners: list[Listener] = []
        self._state = State(self)
        self._calm = True
        self._generation = driver.generation
        self._changed = trio.Event()
        # Whoever holds these keeps the application or the peer from publishing.
        self._application_waits = trio.Lock()
        self._peer_waits = trio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Inside the block the application and the peer are at work."""
        async with trio.open_nursery() as self._nursery:
            await self._handle("in/handled")
            await self._handle("in/both")
            self._nursery.start_soon(self._iterate, "in/iterated")
            self._nursery.start_soon(self._iterate, "in/both")
            await self._driver.subscribe(STATE, self._state.take, qos=1)
            self._nursery.start_soon(self._handlers_come_and_go)
            self._nursery.start_soon(self._iterators_come_and_go)
            self._nursery.start_soon(self._publish_all_day)
            self._nursery.start_soon(self._talk_all_day)
            yield
            self._nursery.cancel_scope.cancel(reason="the day is over")

    def note(self) -> None:
        """Something arrived: whoever waits looks again."""
        self._changed.set()

    async def _wait_until(self, done: Callable[[], bool]) -> None:
        with trio.move_on_after(self._within):
            while not done():
                self._changed = trio.Event()
                await self._changed.wait()
            return
        raise AssertionError("\n".join([f"not all is well after {self._within} s:", *self.faults()]))

    # -- the application ----------------------------------------------------------------------------------------------

    async def _publish_all_day(self) -> None:
        while True:
            await trio.sleep(self._rng.uniform(*self._pace.publish))
            async with self._application_waits:
                await self._nursery.start(self._publish_one)

    async def _publish_one(self, *, task_status: trio.TaskStatus[None]) -> None:
        # The number is taken here and not before, or _publish_many() could take the next one and publish it first.
        topic, number = self._next()
        task_status.started()
        await self._driver.publish(topic, str(number), qos=OUT[topic])
        self._answered(topic, number)

    def _publish_many(self) -> None:
        """In a definite order, which tasks that are started together do not have."""
        for _ in range(_BURST):
            topic, number = self._next()
            receipt = self._driver.publish_nowait(topic, str(number), qos=OUT[topic])
            self._nursery.start_soon(self._await_receipt, topic, number, receipt)

    def _next(self) -> tuple[str, int]:
        topic = self._rng.choice(list(OUT))
        number = self._numbers[topic] = self._numbers[topic] + 1
        self._unanswered[topic, number] = trio.current_time()
        if OUT[topic]:
            self._outgoing[topic].expect(number)
        return topic, number

    async def _await_receipt(self, topic: str, number: int, receipt: Receipt) -> None:
        await receipt.wait()
        self._answered(topic, number)

    def _answered(self, topic: str, number: int) -> None:
        del self._unanswered[topic, number]
        self.note()

    def taken(self, topic: str, payload: bytes, *, repeated: bool = False) -> None:
        """The broker took a message of the application, or said so to somebody who is subscribed to it."""
        self._outgoing[topic].arrive(int(payload), repeated=repeated)
        self.published += 1
        self.note()

    def _listener(self, name: str, topic: str) -> Listener:
        listener = Listener(name, topic, self)
        self._listeners.append(listener)
        return listener

    async def _handle(self, topic: str) -> None:
        listener = self._listener("the handler", topic)
        await self._driver.subscribe(topic, listener.take_slowly, qos=2)
        listener.listening = True

    async def _iterate(self, topic: str) -> None:
        listener = self._listener("the iterator", topic)
        async with self._driver.subscription(topic, qos=2) as messages:
            listener.listening = True
            await listener.iterate(messages)

    async def _handlers_come_and_go(self) -> None:
        before: tuple[Listener, Subscription[bytes]] | None = None
        while True:
            listener = self._listener("a handler that stays for a while", "in/turn")
            subscription = await self._driver.subscribe("in/turn", listener.take, qos=2)
            listener.listening = True
            if before is not None:
                await self._dismiss(before[0])
                await self._driver.unsubscribe(before[1])
            before = listener, subscription
            await trio.sleep(self._rng.uniform(*self._pace.turn))

    async def _iterators_come_and_go(self) -> None:
        while True:
            listener = self._listener("an iterator that stays for a while", "in/visit")
            async with self._driver.subscription("in/visit", qos=2) as messages, trio.open_nursery() as nursery:
                listener.listening = True
                nursery.start_soon(listener.iterate, messages)
                await trio.sleep(self._rng.uniform(*self._pace.turn))
                await self._dismiss(listener)
                nursery.cancel_scope.cancel(reason="the iterator leaves")

    async def _dismiss(self, listener: Listener) -> None:
        """Before it ends: what is still queued then is let go of."""
        async with self._peer_waits:
            await self._wait_until(lambda: not listener.sequence.missing)
            listener.listening = False
        self._listeners.remove(listener)

    # -- the peer -----------------------------------------------------------------------------------------------------

    async def _talk_all_day(self) -> None:
        while True:
            await trio.sleep(self._rng.uniform(*self._pace.incoming))
            async with self._peer_waits:
                await self._talk(self._rng.choice([*IN, STATE]))

    async def _talk(self, topic: str) -> None:
        if topic == STATE:
            self._state.published += 1
            await self._peer.publish(STATE, b"%d" % self._state.published, qos=1, retain=True)
            return
        for _ in range(self._rng.choice(_AT_ONCE)):
            number = self._numbers[topic] = self._numbers[topic] + 1
            for listener in self._listeners:
                if listener.topic == topic and listener.listening and self._calm:
                    listener.sequence.expect(number)
                    self.received += 1
            await self._peer.publish(topic, b"%d" % number, qos=IN[topic])

    # -- outages ------------------------------------------------------------------------------------------------------

    async def suffer(self, kind: str, outage: Callable[[], Awaitable[object]]) -> Outage:
        """Go through an outage: ``outage()`` breaks the network, and returns when it is whole again.

        Returns when a message of the application was acknowledged again and all is well.
        """
        async with self._peer_waits:
            await self._wait_until(self._heard_all)
            self._check_undisturbed()
            self._calm = False
            await self._talk(STATE)
            self._publish_many()
            for _ in range(self._rng.randrange(20)):
                await trio.lowlevel.checkpoint()
            told = self.diary.begin(kind)
        await outage()
        told.end = trio.current_time()
        with trio.move_on_after(self._within) as patience:
            result = await self._driver.publish("back", qos=1)
            await self._driver.wait_live()
            assert result.generation == self._driver.generation
        assert not patience.cancelled_caught, (
            f"not back {self._within} s after the end of outage {len(self.diary.outages)} ({kind}): "
            f"{self._driver.status()}"
        )
        told.back = trio.current_time()
        async with self.quiet():
            replayed = self._driver.generation if self._driver.generation > self._generation else 0
            await self._wait_until(lambda: self._state.replayed_in >= replayed)
            self._generation = self._driver.generation
            self._calm = True
        return told

    @asynccontextmanager
    async def quiet(self) -> AsyncGenerator[None, None]:
        """Inside the block nobody publishes, all has arrived that had to, and the driver has nothing left to do.
        Nothing may be wrong then."""
        async with self._peer_waits, self._application_waits:
            await self._wait_until(lambda: self._heard_all() and not self._unanswered and not self._on_the_way())
            await self._wait_acknowledged()
            status = self._driver.status()
            assert (status.queued, status.in_flight, status.unacknowledged) == (0, 0, 0)
            self._check_undisturbed()
            assert not self.diary.complaints, "\n".join(self.diary.complaints)
            yield

    async def _wait_acknowledged(self) -> None:
        """A listener says what it was given before the driver can acknowledge it; QoS 2 takes another answer."""
        with trio.move_on_after(self._within):
            while self._driver.status().unacknowledged:  # noqa: ASYNC110  # that it is over is no event
                await trio.sleep(0.01)

    def _heard_all(self) -> bool:
        return self._state.seen == self._state.published and not any(one.sequence.missing for one in self._listeners)

    def _on_the_way(self) -> bool:
        return any(sequence.missing for sequence in self._outgoing.values())

    def _check_undisturbed(self) -> None:
        if self._calm and self._driver.generation != self._generation:
            self.diary.complain(f"the link was lost outside of an outage: {self._driver.status()}")

    def faults(self) -> list[str]:
        """All that is wrong, or has not happened yet, in words."""
        told = list(self.diary.complaints)
        for sequence in [*self._outgoing.values(), *(listener.sequence for listener in self._listeners)]:
            told += sequence.told()
        for (topic, number), at in self._unanswered.items():
            told.append(f"publish() of {topic} #{number} has not returned; called {self.diary.place(at)}")
        told.append("every other publish() has returned")
        if self._state.seen != self._state.published:
            told.append(f"{STATE} was last seen as #{self._state.seen}, but is #{self._state.published}")
        told.append(f"the broker's retained {STATE} was last replayed in generation {self._state.replayed_in}")
        told.append(f"the driver: {self._driver.status()}")
        return told
