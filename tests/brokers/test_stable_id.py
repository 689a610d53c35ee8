"""The stable-ID mode with real brokers: what is exactly once, and what is not, counted where the messages arrive."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from tests.brokers.grounds import Ground
from trio_mqtt_driver import BackoffConfig, Message, MQTTDriver, State
from trio_mqtt_driver.testing import Direction, FaultProxy

pytestmark = pytest.mark.broker

MESSAGES = 300
"""In each direction."""
MOSQUITTO = pytest.mark.parametrize("idle_ground", ["mosquitto-5", "mosquitto-3.1.1"], indirect=True)
EXACT = pytest.mark.parametrize(
    "idle_ground, seed",
    [("mosquitto-5", 0), ("mosquitto-3.1.1", 1), ("ejabberd-5", 2)],
    indirect=["idle_ground"],
)


@attrs.define
class Arrivals:
    """The numbers that came, in order."""

    numbers: list[int] = attrs.field(factory=list[int])
    _changed: trio.Event = attrs.field(factory=trio.Event)

    async def handle(self, message: Message[bytes]) -> None:
        self.numbers.append(int(message.payload))
        self._changed.set()
        await trio.sleep(0.001 * (self.numbers[-1] % 7))  # so that some are unacknowledged when the link is cut

    async def wait_for(self, number: int) -> None:
        while number not in self.numbers:
            self._changed = trio.Event()
            await self._changed.wait()

    async def wait_all(self) -> None:
        while len(set(self.numbers)) <= MESSAGES:
            self._changed = trio.Event()
            await self._changed.wait()


@attrs.frozen
class Field:
    """A driver with a stable ID behind a proxy, and another one that has a good link."""

    driver: MQTTDriver
    witness: MQTTDriver
    proxy: FaultProxy
    rng: random.Random
    incoming: Arrivals = attrs.field(factory=Arrivals)
    outgoing: Arrivals = attrs.field(factory=Arrivals)

    async def cut_links(self) -> None:
        """Cut the links, one after the other, after random numbers of bytes."""
        while True:
            direction = self.rng.choice(list(Direction))
            self.proxy.cut_after(self.rng.randrange(1, 1500), direction, reset=self.rng.random() < 0.5)
            await self.driver.wait_state(State.BACKING_OFF)
            await self.driver.wait_state(State.CONNECTING)

    async def publish(self, driver: MQTTDriver, topic: str, qos: int) -> None:
        """All numbers in order, several under way at a time; and one more when they have arrived at the broker."""
        receipts = []
        for number in range(MESSAGES):
            receipts.append(driver.publish_nowait(topic, str(number), qos=qos))
            await trio.sleep(self.rng.uniform(0, 0.02))
        for receipt in receipts:
            await receipt.wait()

    async def talk(self, qos: int) -> None:
        """Both directions, over links that are cut; returns when the last message has arrived after all others."""
        await self.witness.subscribe("out", self.outgoing.handle, qos=qos)
        await self.driver.subscribe("in", self.incoming.handle, qos=qos)
        async with trio.open_nursery() as trouble:
            trouble.start_soon(self.cut_links)
            async with trio.open_nursery() as traffic:
                traffic.start_soon(self.publish, self.driver, "out", qos)
                traffic.start_soon(self.publish, self.witness, "in", qos)
            trouble.cancel_scope.cancel()
        await self.driver.publish("out", str(MESSAGES), qos=qos)
        await self.witness.publish("in", str(MESSAGES), qos=qos)
        await self.outgoing.wait_all()
        await self.incoming.wait_all()


@asynccontextmanager
async def open_field(ground: Ground, seed: int) -> AsyncGenerator[Field, None]:
    async with trio.open_nursery() as nursery:
        proxy = FaultProxy(nursery, ground.broker.port)
        async with (
            MQTTDriver(ground.config(proxy.port, stable_id=True)) as driver,
            MQTTDriver(ground.config(client_id="witness")) as witness,
        ):
            yield Field(driver, witness, proxy, random.Random(seed))
        nursery.cancel_scope.cancel()


@EXACT
async def test_qos_2_arrives_exactly_once_and_in_order_over_links_that_are_cut(ground: Ground, seed: int) -> None:
    with trio.fail_after(100):
        async with open_field(ground, seed) as field:
            await field.talk(2)
            assert field.outgoing.numbers == list(range(MESSAGES + 1))
            assert field.incoming.numbers == list(range(MESSAGES + 1))
            assert field.driver.generation > 1


class BrokenOff(trio.abc.Stream):
    """A connection that is reset when CONNECT is on its way: the broker takes it, and cannot answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)
        self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self._stream.aclose()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


@MOSQUITTO
async def test_mosquitto_that_takes_a_session_up_in_vain_repeats_what_is_complete(ground: Ground) -> None:
    """2.0.11 then begins with PUBLISH again what it had sent PUBREL for, in some of the rounds."""
    arrivals = Arrivals()
    rounds = 12
    in_vain = 0

    async def open_stream(_endpoint: object) -> trio.abc.Stream:
        nonlocal in_vain
        if not in_vain:
            return await trio.open_tcp_stream(proxy.host, proxy.port)
        in_vain -= 1
        return BrokenOff(await trio.open_tcp_stream(ground.broker.host, ground.broker.port))

    at_once = BackoffConfig(start=0.01, factor=1, maximum=0.01, min_interval=0, stable_after=0, pause_after=1000)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            proxy = FaultProxy(nursery, ground.broker.port)
            async with (
                MQTTDriver(
                    ground.config(stable_id=True, keep_alive=60, open_stream=open_stream, backoff=at_once)
                ) as driver,
                MQTTDriver(ground.config(client_id="witness")) as witness,
            ):
                await driver.subscribe("in", arrivals.handle, qos=2)
                for number in range(rounds):
                    in_vain = 6
                    proxy.cut_after(6, Direction.IN)  # in the middle of PUBCOMP
                    await witness.publish("in", str(number), qos=2)
                    await driver.wait_state(State.BACKING_OFF)
                    await driver.wait_live()
                await witness.publish("in", str(rounds), qos=2)
                await arrivals.wait_for(rounds)
                assert arrivals.numbers == list(range(rounds + 1))
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("idle_ground", ["mosquitto-5", "nats-3.1.1"], indirect=True)
async def test_qos_1_arrives_at_least_once_over_links_that_are_cut(ground: Ground) -> None:
    with trio.fail_after(100):
        async with open_field(ground, 1) as field:
            await field.talk(1)
            assert set(field.outgoing.numbers) == set(field.incoming.numbers) == set(range(MESSAGES + 1))
            assert field.driver.generation > 1


@pytest.mark.parametrize("idle_ground", ["nats-3.1.1"], indirect=True)
async def test_qos_2_of_nats_arrives_in_any_order(ground: Ground) -> None:
    """It repeats what is unacknowledged a second later, behind what is newer, and with other identifiers if it likes;
    what it gets is in order."""
    with trio.fail_after(100):
        async with open_field(ground, 1) as field:
            await field.talk(2)
            assert field.outgoing.numbers == list(range(MESSAGES + 1))
            assert set(field.incoming.numbers) == set(range(MESSAGES + 1))


@MOSQUITTO
async def test_a_session_outlives_a_crash_of_the_broker_with_what_it_has_written(ground: Ground) -> None:
    """What is older than a second: the subscription, and the messages that wait for us."""
    got = Arrivals()
    with trio.fail_after(60):
        async with (
            MQTTDriver(ground.config(stable_id=True)) as driver,
            MQTTDriver(ground.config(client_id="witness")) as witness,
        ):
            await driver.subscribe("in", got.handle, qos=2)
            driver.pause("a test")
            await driver.wait_state(State.PAUSED)
            for number in range(MESSAGES):
                await witness.publish("in", str(number), qos=2)
            await trio.sleep(2)
            await ground.broker.kill()
            await ground.broker.start()
            driver.resume()
            await driver.wait_live()
            assert driver.status().counters["replays"] == 0
            await witness.publish("in", str(MESSAGES), qos=2)
            await got.wait_all()
            assert got.numbers == list(range(MESSAGES + 1))


@pytest.mark.parametrize("idle_ground", ["mosquitto-5"], indirect=True)
async def test_a_crash_of_the_broker_under_load_loses_and_repeats_what_it_had_not_written(ground: Ground) -> None:
    """Each publish has an end, the subscriptions are there, and all but what was acknowledged around a crash arrives.

    What the broker took and had not written is unknown to it afterwards. A PUBREL for such a message is answered like
    one that comes for the second time, so it is acknowledged, and gone.
    """
    arrived = {"in": Arrivals(), "out": Arrivals()}
    acknowledged: dict[str, list[float]] = {"in": [], "out": []}
    crashes: list[float] = []
    over = trio.Event()

    async def publish(driver: MQTTDriver, topic: str) -> None:
        while not over.is_set():
            await driver.publish(topic, str(len(acknowledged[topic])), qos=2)
            acknowledged[topic].append(trio.current_time())

    with trio.fail_after(100):
        async with (
            MQTTDriver(ground.config(stable_id=True)) as driver,
            MQTTDriver(ground.config(client_id="witness", stable_id=True)) as witness,
        ):
            await driver.subscribe("in", arrived["in"].handle, qos=2)
            await witness.subscribe("out", arrived["out"].handle, qos=2)
            async with trio.open_nursery() as traffic:
                traffic.start_soon(publish, driver, "out")
                traffic.start_soon(publish, witness, "in")
                for _ in range(2):
                    await trio.sleep(3)
                    await ground.broker.kill()
                    crashes.append(trio.current_time())
                    await ground.broker.start()
                await trio.sleep(3)
                over.set()
            for topic, times in acknowledged.items():
                await arrived[topic].wait_for(len(times) - 1)
                for number, at in enumerate(times):
                    near = min(abs(at - crash) for crash in crashes)
                    assert number in arrived[topic].numbers or near < 1.4, (topic, number, near)
