"""The long day with real brokers, compressed to two minutes: both at the same time, so that it costs them once."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio

from tests.brokers.grounds import QUICK, Ground, require
from tests.footprint import blocks
from tests.long_day import Day, Pace
from trio_mqtt_driver import Attempt, BackoffConfig, DriverConfig, MQTTDriver
from trio_mqtt_driver.testing import (
    Ack,
    Connect,
    EmbeddedBroker,
    FaultProxy,
    Kind,
    Mosquitto,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
)

pytestmark = pytest.mark.broker

DAY = 120.0
SHORTEST, LONGEST = 1.0, 12.0
PACE = Pace(publish=(0.02, 0.1), incoming=(0.02, 0.15), turn=(1, 5))
# An hour of the long day is five seconds here. What bounds the day on the network's side is as short as in QUICK; what
# a busy machine might miss is not: a link must not be lost outside of the outages.
COMPRESSED: dict[str, Any] = {
    **QUICK,
    "keep_alive": 2,  # nats-server ends a link after a second of silence with 1, a quarter after PINGREQ was due
    "ping_timeout": 5,
    "ack_timeout": 5,
    "history_events": 50,
    "backoff": BackoffConfig(
        start=0.05, factor=2, maximum=1, min_interval=0.2, stable_after=1, pause_after=6, pause=1.5
    ),
}
PATIENCE = 40.0
"""Seconds in which all must be well again, on a machine however busy."""
ATTEMPTS = 2
"""How many may be begun after the network's return: that it is back in time is a matter of the driver's decisions. One
that was begun before it may still fail, and takes up to ``connect_timeout``; then comes a pause at most. The first
thereafter finds a network; it is allowed to lose that one to what was on its way from before."""
ALLOWED_BLOCKS = 20_000
"""Of memory, over ten thousand messages. They are counted while the other day goes on."""


class DirectPeer:
    """A client beside the proxy, with a session that lasts: it hears of everything that the broker took."""

    def __init__(self, ground: Ground, nursery: trio.Nursery) -> None:
        self.day: Day | None = None
        self._ground = ground
        self._nursery = nursery
        self._client: RawClient | None = None
        self._connected = trio.Event()
        self._subscribed = trio.Event()
        self._sending = trio.Lock()
        self._packet_id = 0
        self._waiting: dict[int, trio.Event] = {}
        self._done: set[int] = set()

    async def connect(self) -> None:
        """Connect again to the session that there is, if any."""
        version = 5 if self._ground.protocol == "5" else 4
        broker = self._ground.broker
        client = RawClient(await trio.open_tcp_stream(broker.host, broker.port), version)
        properties = {"session_expiry": 3600} if version == 5 else {}
        await client.connect(Connect(client_id="peer", version=version, clean_start=False, properties=properties))
        self._client = client
        self._subscribed = trio.Event()
        self._nursery.start_soon(self._read, client)
        await client.send(
            Subscribe(packet_id=self._next_id(), requests=(SubscriptionRequest(topic_filter="out/#", qos=1),))
        )
        await self._subscribed.wait()
        self._connected.set()

    def _next_id(self) -> int:
        self._packet_id = self._packet_id % 65535 + 1
        return self._packet_id

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        """Again with each connection, until the broker has it."""
        while True:
            await self._connected.wait()
            if self._client is None:
                continue  # Lost again before the scheduler came to us: nobody would end this wait.
            packet_id = self._next_id()
            answered = self._waiting[packet_id] = trio.Event()
            await self._send(Publish(topic=topic, payload=payload, qos=qos, retain=retain, packet_id=packet_id))
            await answered.wait()
            if packet_id in self._done:
                self._done.remove(packet_id)
                return

    async def _send(self, packet: Publish | Ack) -> None:
        client = self._client
        if client is None:
            return
        async with self._sending:
            try:
                await client.send(packet)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # The reader finds out, too, and says so.

    async def _read(self, client: RawClient) -> None:
        async with client.stream:
            try:
                while packet := await client.receive():
                    if isinstance(packet, Suback):
                        assert packet.reason_codes == (1,)
                        self._subscribed.set()
                    elif isinstance(packet, Publish):
                        await self._heard(packet)
                    elif isinstance(packet, Ack):
                        await self._answered(packet)
            except trio.BrokenResourceError:
                await trio.lowlevel.checkpoint()
        self._client = None
        self._connected = trio.Event()
        for event in self._waiting.values():
            event.set()
        self._waiting.clear()

    async def _heard(self, message: Publish) -> None:
        assert self.day is not None
        self.day.taken(message.topic, message.payload, repeated=message.dup)
        if message.qos:
            await self._send(Ack(kind=Kind.PUBACK, packet_id=message.packet_id))

    async def _answered(self, ack: Ack) -> None:
        assert ack.reason_code < 0x80
        if ack.kind is Kind.PUBREC:
            await self._send(Ack(kind=Kind.PUBREL, packet_id=ack.packet_id))
        else:
            self._done.add(ack.packet_id)
            self._waiting.pop(ack.packet_id).set()


class Attempts:
    """An ``options_factory`` that notes when attempts begin."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    async def __call__(self, attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        self.begun.append(trio.current_time())
        return attempt.config


@attrs.frozen
class Network:
    """What happens to the driver's link, and once to the broker itself."""

    proxy: FaultProxy
    peer: DirectPeer
    ground: Ground

    async def nothing_passes(self, length: float) -> None:
        """For a while: what was held up goes on then."""
        with self.proxy.blackhole():
            await trio.sleep(length)

    async def nothing_passes_and_connections_are_lost(self, length: float) -> None:
        with self.proxy.blackhole():
            await trio.sleep(length)
            self.proxy.reset()

    async def reset_and_refused(self, length: float) -> None:
        with self.proxy.refuse():
            self.proxy.reset()
            await trio.sleep(length)

    async def reset_and_hanging(self, length: float) -> None:
        with self.proxy.hang():
            self.proxy.reset()
            await trio.sleep(length)

    async def broker_stopped(self, length: float) -> None:
        # Not killed: what it has acknowledged and not yet stored would be its loss, not the driver's.
        await self.ground.broker.stop()
        await trio.sleep(length)
        await self.ground.broker.start()
        await self.peer.connect()

    @property
    def kinds(self) -> list[Callable[[float], Awaitable[None]]]:
        return [
            self.nothing_passes,
            self.nothing_passes_and_connections_are_lost,
            self.reset_and_refused,
            self.reset_and_hanging,
            self.broker_stopped,
        ]


@asynccontextmanager
async def peer_of(ground: Ground) -> AsyncGenerator[tuple[FaultProxy, DirectPeer], None]:
    async with trio.open_nursery() as nursery:
        proxy = FaultProxy(nursery, ground.broker.port)
        peer = DirectPeer(ground, nursery)
        await peer.connect()
        yield proxy, peer
        nursery.cancel_scope.cancel(reason="the day is over")


async def live_through(ground: Ground, rng: random.Random) -> None:
    attempts = Attempts()
    end = trio.current_time() + DAY
    async with (
        ground.broker,
        peer_of(ground) as (proxy, peer),
        MQTTDriver(ground.config(proxy.port, options_factory=attempts, **COMPRESSED)) as driver,
    ):
        kinds = rng.sample(Network(proxy, peer, ground).kinds, 5)
        lengths = [math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) for _ in kinds]
        gaps = [rng.uniform(0.5, 1.5) for _ in range(6)]
        calm = (0.9 * DAY - sum(lengths)) / sum(gaps)
        day = Day(driver, peer, rng, PACE, within=PATIENCE)
        peer.day = day
        before: int | None = None
        async with day.running():
            for gap, kind, length in zip(gaps, kinds, lengths, strict=False):
                await trio.sleep(gap * calm)
                async with day.quiet():
                    before = before or blocks()
                    assert blocks() - before < ALLOWED_BLOCKS
                told = await day.suffer(f"{kind.__name__}, {length:.1f} s", partial(kind, length))
                begun = [at - told.end for at in attempts.begun if told.end < at <= told.back]
                assert len(begun) <= ATTEMPTS, f"{kind.__name__}: attempts {begun} s after the end"
            await trio.sleep_until(end)
            async with day.quiet():
                assert blocks() - (before or 0) < ALLOWED_BLOCKS
        status = driver.status()
        assert len(day.diary.outages) == 5
        assert min(day.published, day.received) > DAY
        assert status.counters["dropped"] == status.counters["handler_errors"] == 0


async def test_the_day_in_two_minutes() -> None:
    grounds = [Ground(require(Mosquitto()), "5"), Ground(require(EmbeddedBroker()), "3.1.1")]
    async with trio.open_nursery() as days:
        for seed, ground in enumerate(grounds):
            days.start_soon(live_through, ground, random.Random(seed))
