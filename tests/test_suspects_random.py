"""Whatever a broker forbids for a while, in the end it has what is wanted, and a replay sends each filter once."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import MQTTDriver, State, SubscribeError, Subscription
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker, Subscribe

FILTERS = [*(f"a/{number}" for number in range(8)), "a/+", "b/#", "b/x", "$share/g/c"]
PAUSES = (0, 0, 0.01, 1, 60, 700, 2500)
DAY = 86400
"""Longer than any try can be away, after what goes on for half of that."""


def plain(topic_filter: str) -> str:
    return topic_filter.removeprefix("$share/g/")


class Life:
    """A driver whose application and broker do what comes to their minds."""

    def __init__(self, broker: MemoryBroker, driver: MQTTDriver, rng: random.Random) -> None:
        self.broker = broker
        self.driver = driver
        self.rng = rng
        self.forbidden: set[str] = set()
        self.subscriptions: list[Subscription[bytes]] = []
        self.properties = {name: ((("filter", name),) if rng.random() < 0.3 else ()) for name in FILTERS}
        broker.options.acl = lambda access: access.topic not in self.forbidden

    async def subscribe(self, name: str) -> None:
        with suppress(SubscribeError):
            self.subscriptions.append(await self.driver.subscribe(name, print, user_properties=self.properties[name]))

    def step(self, nursery: trio.Nursery) -> None:
        rng, broker = self.rng, self.broker
        what = rng.random()
        name = rng.choice(FILTERS)
        if what < 0.3:
            nursery.start_soon(self.subscribe, name)
        elif what < 0.4 and self.subscriptions:
            subscription = self.subscriptions.pop(rng.randrange(len(self.subscriptions)))
            nursery.start_soon(self.driver.unsubscribe, subscription)
        elif what < 0.5:
            self.forbidden.add(plain(name))
        elif what < 0.57:
            self.forbidden.discard(plain(name))
        elif what < 0.67:
            broker.drop(reset=rng.random() < 0.5)
        elif what < 0.72:
            kind = rng.choice((Kind.SUBSCRIBE, Kind.UNSUBSCRIBE))
            broker.faults.cut(kind, direction=Direction.IN, before=rng.random() < 0.5)
        elif what < 0.74:
            self.driver.force_reconnect("for fun", even_if_live=True)
        elif what < 0.76:
            self.driver.apply_settings(self.driver.config)

    async def replay(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """What the broker is sent on the next connection, with user properties; nothing may come twice."""
        self.broker.forget()
        self.broker.drop()
        await self.driver.wait_state(State.BACKING_OFF, State.PAUSED)
        await self.driver.wait_live()
        sent: list[tuple[str, Any]] = [
            (request.topic_filter, packet.properties.get("user_properties", ()))
            for _, packet in self.broker.received
            if isinstance(packet, Subscribe)
            for request in packet.requests
            if "probe" not in request.topic_filter
        ]
        assert max(Counter(name for name, _ in sent).values(), default=1) == 1
        return {name: tuple(properties) for name, properties in sent}


@pytest.mark.parametrize("seed", range(10))
async def test_in_the_end_all_is_well(autojump_clock: MockClock, nursery: trio.Nursery, seed: int) -> None:
    rng = random.Random(seed)
    protocol = ("5", "3.1.1")[seed % 2]
    broker = MemoryBroker(nursery, denied="close", overlapping=rng.choice(("once", "copies")))
    stable = rng.random() < 0.4
    config = memory_config(
        broker,
        protocol=protocol,
        stable_id=stable,
        replay_batch=rng.choice((1, 2, 5, 500)),
        quarantine_after=rng.choice((1, 3, 10)),
        keep_alive=20_000,
    )
    async with MQTTDriver(config) as driver:
        life = Life(broker, driver, rng)
        async with trio.open_nursery() as steps:
            for _ in range(60):
                life.step(steps)
                await trio.sleep(rng.choice(PAUSES))
            life.forbidden.clear()
            broker.faults.clear()
            await trio.sleep(DAY)
        await driver.wait_live()
        wanted = {subscription.topic_filter for subscription in life.subscriptions}
        assert driver.status().degraded == ()
        on_broker = broker.subscriptions(str(driver.client_id))
        assert {name for name in on_broker if "probe" not in name} == wanted  # a session keeps a question cut short
        if not stable:  # the first replay may still have packets of their own, the later ones not
            for _ in range(3):
                properties = life.properties if protocol == "5" else dict.fromkeys(FILTERS, ())
                assert await life.replay() == {name: properties[name] for name in wanted}
                await trio.sleep(4000)
    assert not broker.violations
