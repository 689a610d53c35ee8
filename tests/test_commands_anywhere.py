"""``force_reconnect()``, ``pause()``, ``resume()``, ``apply_settings()``: wherever the driver is, from whoever calls.

Two commands are given one right after the other, for that is where one could undo what the other relies on. Afterwards
the driver is where the last of them left it, it works, and there never was more than one network connection.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from tests.several import Several
from trio_mqtt_driver import (
    Attempt,
    BackoffConfig,
    DriverClosedError,
    DriverConfig,
    Endpoint,
    FailoverConfig,
    Message,
    MQTTDriver,
    RefusedError,
    State,
)
from trio_mqtt_driver.testing import Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked
DAY = 24 * 3600
OTHER = "other"


def reconnect(driver: MQTTDriver) -> None:
    driver.force_reconnect("asked for by the test")


def reconnect_even_if_live(driver: MQTTDriver) -> None:
    driver.force_reconnect("asked for by the test", even_if_live=True)


def pause(driver: MQTTDriver) -> None:
    driver.pause("asked for by the test")


def resume(driver: MQTTDriver) -> None:
    driver.resume()


def apply_settings(driver: MQTTDriver) -> None:
    driver.apply_settings(driver.config.evolve(client_id=OTHER))


Command = Callable[[MQTTDriver], None]
COMMANDS: list[Command] = [reconnect, reconnect_even_if_live, pause, resume, apply_settings]
MOVING: list[Command] = [reconnect_even_if_live, pause, apply_settings]
"""Those that do something to a live link."""
PAIRS = [(one,) for one in COMMANDS] + list(itertools.product(COMMANDS, repeat=2))


def named(commands: Iterable[Command]) -> str:
    return "+".join(one.__name__ for one in commands)


def stays_paused(commands: Iterable[Command], before: bool) -> bool:
    """Whether somebody's pause is in force after the commands: settings do not end it, all other commands do."""
    for command in commands:
        if command is not apply_settings:
            before = command is pause
    return before


class Bench:
    """A broker, the way to it, and a config whose factory and stream can be made to hang, once each."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.broker = MemoryBroker(nursery)
        self.dialer = Dialer(self.broker)
        self.got: list[bytes] = []
        self.factory_hangs = False
        self.stream_hangs = False
        self.in_factory: list[Callable[[], None]] = []
        """Called by the next attempt, in its options_factory."""
        self.config = memory_config(
            self.broker,
            open_stream=self._open_stream,
            options_factory=self._options,
            backoff=BackoffConfig(pause=DAY, pause_after=5),
        )

    async def _options(self, attempt: Attempt) -> DriverConfig:
        await trio.lowlevel.checkpoint()
        while self.in_factory:
            self.in_factory.pop(0)()
        hangs, self.factory_hangs = self.factory_hangs, False
        if hangs:
            await trio.sleep_forever()
        return attempt.config

    async def _open_stream(self, endpoint: Endpoint) -> trio.abc.Stream:
        hangs, self.stream_hangs = self.stream_hangs, False
        if hangs:
            await trio.sleep_forever()
        return await self.dialer(endpoint)

    def handle(self, message: Message[bytes]) -> None:
        self.got.append(message.payload)

    async def check_works(self, driver: MQTTDriver, commands: Iterable[Command]) -> None:
        """Messages go out and come in, over the one connection that there is, with the settings in force."""
        with trio.fail_after(60):
            await driver.wait_live()
            await driver.publish("in", b"round", qos=1)
        await settled()
        assert self.got[-1] == b"round"
        assert self.broker.clients == [driver.client_id]
        base = OTHER if apply_settings in commands else "driver"
        assert str(driver.client_id).startswith(f"{base}_")

    def check_traces(self) -> None:
        """Never two connections, nothing that MQTT forbids."""
        numbers = range(1, len(self.dialer.streams) + 1)
        assert self.dialer.order == [(what, number) for number in numbers for what in ("open", "close")]
        assert not self.broker.violations


@pytest.fixture
def bench(nursery: trio.Nursery) -> Bench:
    return Bench(nursery)


@attrs.frozen
class Place:
    """Where in its life a driver is held."""

    name: str
    state: State


IN_FACTORY = Place("options_factory", State.CONNECTING)
OPENING = Place("opening", State.CONNECTING)
IN_CONNECT = Place("CONNECT", State.CONNECTING)
VALIDATING = Place("validating", State.VALIDATING)
REPLAYING = Place("replaying", State.REPLAYING)
LIVE = Place("live", State.LIVE)
HALF_OPEN = Place("live, but half-open", State.LIVE)
BACKING_OFF = Place("backing off", State.BACKING_OFF)
BREAKER = Place("paused by failures", State.PAUSED)
PAUSED = Place("paused by pause()", State.PAUSED)
ENDING = Place("the old link ends", State.BACKING_OFF)
PLACES = [
    IN_FACTORY,
    OPENING,
    IN_CONNECT,
    VALIDATING,
    REPLAYING,
    LIVE,
    HALF_OPEN,
    BACKING_OFF,
    BREAKER,
    PAUSED,
    ENDING,
]
HELD = {IN_CONNECT: Kind.CONNACK, VALIDATING: Kind.PUBACK, REPLAYING: Kind.SUBACK}


async def go(bench: Bench, driver: MQTTDriver, place: Place) -> None:
    """Take a live driver there; it stays until something happens to it, or its patience is over."""
    broker = bench.broker
    if place in HELD:
        broker.faults.hold(HELD[place], times=1)
    bench.factory_hangs = place is IN_FACTORY
    bench.stream_hangs = place is OPENING
    if place is PAUSED:
        driver.pause("before")
    elif place is HALF_OPEN:
        broker.silence()
    elif place is ENDING:
        broker.silence()  # DISCONNECT gets no answer
        driver.force_reconnect(even_if_live=True)
    elif place in (BACKING_OFF, BREAKER):
        broker.stop()
        await settled()  # The first attempt is made at once.
        await driver.wait_state(place.state)
        broker.start()
    elif place is not LIVE:
        broker.drop()
        await driver.wait_state(place.state)
    await settled()
    assert driver.state is place.state


@asynccontextmanager
async def held_in(bench: Bench, place: Place) -> AsyncGenerator[MQTTDriver, None]:
    async with MQTTDriver(bench.config) as driver:
        await driver.subscribe("in", bench.handle, qos=1)
        await trio.sleep(60)
        await go(bench, driver, place)
        yield driver
    assert driver.state is State.CLOSED
    bench.check_traces()


async def check_outcome(bench: Bench, driver: MQTTDriver, commands: Iterable[Command], *, paused: bool) -> None:
    """``paused``: whether somebody's pause should be in force now."""
    if paused:
        with trio.fail_after(driver.config.disconnect_timeout + 0.1):
            await driver.wait_state(State.PAUSED)
        await trio.sleep(DAY * 2)
        assert driver.state is State.PAUSED
        assert not bench.broker.clients
        assert driver.resume()
    await bench.check_works(driver, commands)


@pytest.mark.parametrize("commands", PAIRS, ids=named)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
async def test_from_the_body(
    bench: Bench, place: Place, commands: tuple[Command, ...], autojump_clock: MockClock
) -> None:
    async with held_in(bench, place) as driver:
        for command in commands:
            command(driver)
        await check_outcome(bench, driver, commands, paused=stays_paused(commands, place is PAUSED))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_from_a_handler(
    bench: Bench, kind: str, place: Place, command: Command, autojump_clock: MockClock
) -> None:
    now = trio.Event()
    async with MQTTDriver(bench.config) as driver:

        async def wait_for_it() -> None:
            await now.wait()
            if kind == "async":
                command(driver)
                await trio.sleep(1)

        def handle(message: Message[bytes]) -> Awaitable[None] | None:
            if message.payload == b"first":
                return wait_for_it()
            if kind == "sync":
                command(driver)
            return None

        await driver.subscribe("in", bench.handle, qos=1)
        await driver.subscribe("command", handle)
        for payload in ("first", "second"):
            bench.broker.publish("command", payload)
        await trio.sleep(60)
        await go(bench, driver, place)
        now.set()
        await settled()
        await check_outcome(bench, driver, [command], paused=stays_paused([command], place is PAUSED))
        assert driver.status().counters["handler_errors"] == 0
    bench.check_traces()


def lose(driver: MQTTDriver) -> None:
    """Nobody's command."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
@pytest.mark.parametrize("cause", [lose, *MOVING], ids=lambda one: one.__name__)
@pytest.mark.parametrize("edge", [False, True])
async def test_from_a_connection_callback(
    bench: Bench, edge: bool, cause: Command, command: Command, autojump_clock: MockClock
) -> None:
    edges: list[bool] = []
    async with MQTTDriver(bench.config) as driver:

        def on_link(up: bool) -> None:
            if up is edge:
                unregister()
                command(driver)

        await driver.subscribe("in", bench.handle, qos=1)
        await trio.sleep(60)
        unregister = driver.register_connection_callback(on_link)
        driver.register_connection_callback(edges.append)
        if cause is lose:
            bench.broker.drop()
        else:
            cause(driver)
        if edge and cause is pause:
            driver.resume()
        await settled()
        commands = (cause, command) if not edge else (command,)
        await check_outcome(bench, driver, [cause, command], paused=stays_paused(commands, before=False))
        assert edges == [False, True] * (len(edges) // 2)
    bench.check_traces()


@pytest.mark.parametrize("commands", PAIRS, ids=named)
async def test_from_an_options_factory(bench: Bench, commands: tuple[Command, ...], autojump_clock: MockClock) -> None:
    async with MQTTDriver(bench.config) as driver:
        await driver.subscribe("in", bench.handle, qos=1)
        await trio.sleep(60)
        bench.in_factory = [partial(command, driver) for command in commands]
        bench.broker.drop()
        await settled()
        await check_outcome(bench, driver, commands, paused=stays_paused(commands, before=False))
    bench.check_traces()


@pytest.mark.parametrize("commands", PAIRS, ids=named)
async def test_before_the_first_attempt(
    bench: Bench, commands: tuple[Command, ...], autojump_clock: MockClock
) -> None:
    driver = MQTTDriver(bench.config, start="background")
    found: list[State] = []

    async def order() -> None:
        await trio.lowlevel.checkpoint()
        found.append(driver.state)
        for command in commands:
            command(driver)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(order)
        async with driver, trio.open_nursery() as subscribing:
            subscribing.start_soon(partial(driver.subscribe, "in", bench.handle, qos=1))
            await settled()
            await check_outcome(bench, driver, commands, paused=stays_paused(commands, before=False))
    assert found == [State.NEW]
    bench.check_traces()


@pytest.mark.parametrize("second", COMMANDS, ids=lambda command: command.__name__)
@pytest.mark.parametrize("first", MOVING, ids=lambda command: command.__name__)
async def test_a_command_at_any_moment_of_the_work_of_another(
    bench: Bench, first: Command, second: Command, autojump_clock: MockClock
) -> None:
    """At each turn of the scheduler, until what the first began is done."""
    async with MQTTDriver(bench.config) as driver:
        await driver.subscribe("in", bench.handle, qos=1)
        for turns in range(60):
            first(driver)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            second(driver)
            if stays_paused([first, second], before=False):
                generation = driver.generation
                await settled()
                assert driver.state is State.PAUSED, turns
                assert driver.generation == generation, turns
                driver.resume()
            await bench.check_works(driver, [first, second])
    bench.check_traces()


class AtStep(trio.abc.Instrument):
    """Does something just before the n-th step of the task that looks for a better endpoint."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._left = step
        self._action = action
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task.name.endswith("_look_for_better"):
            self._left -= 1
            if not self._left:
                self.fired = True
                self._action()


@pytest.mark.parametrize("command", MOVING, ids=lambda command: command.__name__)
async def test_at_each_step_of_the_way_back_to_a_preferred_endpoint(
    nursery: trio.Nursery, command: Command, autojump_clock: MockClock
) -> None:
    step = 0
    fired = True
    while fired:
        step += 1
        several = Several(nursery)
        several["a"].stop()
        failover = FailoverConfig(fail_after=1, cool_down=1, check_every=10, return_after=10)
        async with MQTTDriver(several.config(failover=failover)) as driver:
            assert several["b"].clients
            several["a"].start()
            instrument = AtStep(step, partial(command, driver))
            trio.lowlevel.add_instrument(instrument)
            await trio.sleep(60)
            trio.lowlevel.remove_instrument(instrument)
            if command is pause:
                assert (driver.state is State.PAUSED) == instrument.fired
                driver.resume()
            await trio.sleep(60)
            await driver.publish("a", b"x", qos=1)
            assert several.open == ["a"]
        fired = instrument.fired
        assert not several["a"].violations
    assert step > 3


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commands", PAIRS, ids=named)
async def test_while_the_driver_is_left(
    bench: Bench, commands: tuple[Command, ...], autojump_clock: MockClock
) -> None:
    """What still goes out is waited for, and then the broker's answer to DISCONNECT, both bounded."""
    refused = 0

    async def order(driver: MQTTDriver, delay: float) -> None:
        nonlocal refused
        await trio.sleep(delay)
        try:
            for command in commands:
                command(driver)
        except DriverClosedError:
            refused += 1

    for delay in (0, 1, 5, 6):
        driver = MQTTDriver(bench.config.evolve(ack_timeout=60))
        async with trio.open_nursery() as nursery:
            with trio.fail_after(7.5):
                async with driver:
                    bench.broker.silence()
                    driver.publish_nowait("out", b"x", qos=1)
                    nursery.start_soon(order, driver, delay)
        assert driver.state is State.CLOSED
        bench.broker.drop()
        await settled()
        assert not bench.broker.clients
    bench.check_traces()
    assert refused


async def test_settings_that_heal_a_refusal_are_taken_or_refused(bench: Bench, autojump_clock: MockClock) -> None:
    """Never taken and then forgotten, for the driver ends with a refusal of the old ones."""
    bench.broker.options.users = {"me": "new"}
    wrong = bench.config.evolve(username="me", password="old")

    async def apply_after(turns: int) -> bool:
        taken = False
        try:
            async with MQTTDriver(wrong, start="background") as driver:
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                driver.apply_settings(wrong.evolve(password="new"))
                taken = True
                await driver.wait_live()
        except RefusedError:
            assert not taken, turns
        return taken

    assert {await apply_after(turns) for turns in range(60)} == {True, False}
    bench.check_traces()
