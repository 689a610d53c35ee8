"""Twenty-four hours with five outages in virtual time: not one message is lost, and the memory stays flat."""

from __future__ import annotations

import logging
import math
import random
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from tests.footprint import Footprint, blocks
from tests.long_day import OUT, Day, Pace
from tests.network import KINDS, Network
from tests.peers import memory_config
from trio_mqtt_driver import MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

DAY = 24 * 3600.0
BACK_WITHIN = 60.0
SHORTEST, LONGEST = 3.0, 3 * 3600.0
ALLOWED_BLOCKS = 1000
"""Of memory; one for every thirtieth message would be more."""
PACE = Pace(publish=(2, 8), incoming=(3, 12), turn=(300, 3600))


class MemoryPeer:
    """Publishes as the broker itself, and reads in its books what it took."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._last: dict[tuple[str, str], int] = {}

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._broker.publish(topic, payload, qos=qos, retain=retain)

    async def watch(self, day: Day) -> None:
        """The books are emptied as they are read: those of a day would fill the memory."""
        while True:
            await self._broker.wait_for(lambda: self._broker.published, timeout=math.inf)
            assert not self._broker.violations
            for message in list(self._broker.published):
                if message.topic in OUT:
                    assert message.publisher is not None
                    self._check_once(message.publisher, message.topic, int(message.payload))
                    day.taken(message.topic, message.payload)
            self._broker.forget()

    def _check_once(self, client_id: str, topic: str, number: int) -> None:
        """Each client identifier is one connection of the driver."""
        before = self._last.get((client_id, topic), 0)
        assert number > before, f"{client_id} sent {topic} #{number} after #{before}"
        self._last[client_id, topic] = number

    def forget(self) -> None:
        """What the connections so far sent, which must be over."""
        self._last.clear()


async def warm_up(driver: MQTTDriver, broker: MemoryBroker) -> None:
    """Fill the rings of driver and broker: they are bounds, not leaks."""
    for _ in range(30):
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        for _ in range(10):
            await driver.publish("warm", bytes(100), qos=1)
    broker.forget()


@pytest.mark.long
@pytest.mark.parametrize("seed, versions", [(0, (4, 5)), (1, (4,))], ids=["5", "3.1.1"])
async def test_a_day_with_five_outages(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
    seed: int,
    versions: tuple[int, ...],
) -> None:
    caplog.set_level(logging.CRITICAL, logger="trio_mqtt_driver")  # pytest keeps what is logged, like a leak
    rng = random.Random(seed)
    broker = MemoryBroker(nursery, versions=versions, history=500)
    network = Network(broker, rng)
    peer = MemoryPeer(broker)
    config = memory_config(broker, open_stream=network.open_stream, history_events=50)
    kinds = rng.sample(KINDS, 5)
    lengths = [math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) for _ in kinds]
    gaps = [rng.random() for _ in range(6)]
    calm = (DAY - sum(lengths)) / sum(gaps)
    async with MQTTDriver(config, rng=random.Random(seed)) as driver:
        await warm_up(driver, broker)
        day = Day(driver, peer, rng, PACE, within=BACK_WITHIN)
        nursery.start_soon(peer.watch, day)
        async with day.running():
            before: Footprint | None = None
            for gap, kind, length in zip(gaps, [*kinds, None], [*lengths, 0], strict=True):
                await trio.sleep(gap * calm)
                async with day.quiet():
                    now = await Footprint.take(blocks)
                before = before or now
                now.assert_no_more_than(before, ALLOWED_BLOCKS)
                if kind is not None:
                    told = await day.suffer(f"{kind.__name__}, {length:.0f} s", partial(kind, network, length))
                    assert told.back - told.end <= BACK_WITHIN
                    peer.forget()
        status = driver.status()
    assert len(day.diary.outages) == 5
    assert trio.current_time() >= DAY
    assert day.published > DAY / 6
    assert day.received > DAY / 20
    assert status.counters["dropped"] == status.counters["handler_errors"] == 0
    assert not broker.dropped
    assert not broker.violations
