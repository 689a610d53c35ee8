"""The sweep: an operation is disturbed at each of its steps in turn, in each state of the link, by each disturbance.

Afterwards the driver must be usable or closed, the broker must know exactly the subscriptions that somebody holds, and
nobody and nothing may be left: no task, no waiter, no lock, no callback, no stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio
import trio.testing

import trio_mqtt_driver
from tests.peers import memory_config
from trio_mqtt_driver import (
    DriverClosedError,
    Message,
    MessageLostError,
    MQTTDriver,
    NotConnectedError,
    State,
    Subscription,
)
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

LINKS = ("up", "down", "coming up")
DISTURBANCES = ("cancel", "cut", "leave", "reconnect")
PATIENCE = 1000.0
"""Seconds of virtual time in which anything must have come to an end."""


class AtStep(trio.abc.Instrument):
    """Does something just before the n-th step of a task, that is, right after its n-th checkpoint."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.task: trio.lowlevel.Task | None = None
        """Whose steps count; None for all steps of all tasks."""
        self._left = step
        self._action = action
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.fired or self.task not in (None, task):
            return
        self._left -= 1
        if not self._left:
            self.fired = True
            self._action()


@attrs.define(eq=False)
class Scene:
    """One run of one operation, by one or more callers."""

    broker: MemoryBroker
    driver: MQTTDriver
    kept: list[Subscription[Any]] = attrs.field(factory=list[Subscription[Any]])
    """Handler subscriptions that nobody has ended."""
    got: list[bytes] = attrs.field(factory=list[bytes])
    """What their handlers were called with."""

    def take(self, message: Message[Any]) -> None:
        self.got.append(message.payload)


Operation = Callable[[Scene], Awaitable[object]]


@attrs.frozen
class Case:
    """An operation, what it covers, and what it may raise if the link is lost."""

    operation: Operation
    methods: frozenset[str]
    raises: tuple[type[Exception], ...] = ()
    options: dict[str, Any] = attrs.field(factory=dict[str, Any])

    def __repr__(self) -> str:
        return self.operation.__name__


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@attrs.frozen
class Run:
    """What came of it."""

    fired: bool
    """Whether the step came."""
    completed: int
    """Callers that came to the end of their operation."""
    broker: MemoryBroker


async def run(case: Case, link: str, disturbance: str, step: int, *, callers: int = 1, any_task: bool = False) -> Run:
    """Run a case, and disturb it before step number ``step``."""
    before = tasks()
    async with trio.open_nursery() as nursery:
        broker = MemoryBroker(nursery)
        result = await _run(nursery, broker, case, link, disturbance, step, callers=callers, any_task=any_task)
        await settled()
        assert not broker.violations
        assert not broker.clients
        nursery.cancel_scope.cancel()
    await settled()
    assert tasks() == before
    return result


async def _run(
    nursery: trio.Nursery,
    broker: MemoryBroker,
    case: Case,
    link: str,
    disturbance: str,
    step: int,
    *,
    callers: int,
    any_task: bool,
) -> Run:
    completed = 0
    leave = trio.Event()
    scope = trio.CancelScope()
    driver = MQTTDriver(memory_config(broker, **case.options))
    scene = Scene(broker, driver)

    def disturb() -> None:
        if disturbance == "cancel":
            scope.cancel()
        elif disturbance == "cut":
            broker.drop()
        elif disturbance == "leave":
            leave.set()
        else:
            driver.force_reconnect("disturbed", even_if_live=True)

    instrument = AtStep(step, disturb)

    async def call(first: bool) -> None:
        nonlocal completed
        with scope if first else trio.CancelScope():
            if first:
                instrument.task = None if any_task else trio.lowlevel.current_task()
                trio.lowlevel.add_instrument(instrument)
            try:
                await case.operation(scene)
                completed += 1
            except case.raises:
                assert disturbance != "cancel" or link != "up"
            except (DriverClosedError, MessageLostError):
                assert leave.is_set()
            except NotConnectedError:
                assert leave.is_set()
                assert case.raises
            finally:
                if first:
                    trio.lowlevel.remove_instrument(instrument)

    async def all_calls() -> None:
        async with trio.open_nursery() as calls:
            for number in range(callers):
                calls.start_soon(call, number == 0)
        leave.set()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as outside, driver:
            scene.kept.append(await driver.subscribe("before/#", scene.take, qos=1))
            await _bring(link, scene, outside)
            outside.start_soon(all_calls)
            await leave.wait()
            if disturbance != "leave":
                await settled()
                await check_usable(scene)
    check_closed(scene)
    return Run(instrument.fired, completed, broker)


async def _bring(link: str, scene: Scene, nursery: trio.Nursery) -> None:
    """Get the link into the state in which the operation begins."""

    async def start_again() -> None:
        await trio.sleep(1)
        scene.broker.start()

    if link == "down":
        scene.broker.stop()
        await scene.driver.wait_state(State.BACKING_OFF)
        nursery.start_soon(start_again)
    elif link == "coming up":
        scene.driver.force_reconnect("for the test", even_if_live=True)
        await scene.driver.wait_state(State.CONNECTING)


async def check_usable(scene: Scene) -> None:
    """The driver works, the broker knows what it should, nobody waits for anything."""
    driver, broker = scene.driver, scene.broker
    await driver.wait_live()
    async with driver.subscription("check/#", qos=2) as messages:
        await driver.publish("check/x", b"still here", qos=2)
        assert (await messages.receive()).payload == b"still here"
    await driver.ping()
    scene.got.clear()
    for subscription in scene.kept:
        await driver.publish(subscription.topic_filter.replace("#", "x"), b"for a handler", qos=1)
    await settled()
    assert len(scene.got) >= len(scene.kept)
    wanted = {one.topic_filter for one in driver._registry}
    assert wanted == {one.topic_filter for one in scene.kept} | set(extra_filters(driver))
    assert driver.client_id is not None
    assert set(broker.subscriptions(driver.client_id)) == wanted
    status = driver.status()
    assert (status.queued, status.in_flight, status.unacknowledged, status.degraded) == (0, 0, 0, ())
    assert driver.undelivered == ()
    connection = driver._supervisor.connection
    assert connection is not None
    assert not connection.requests
    assert not connection.deadlines.pings
    dispatcher = driver._dispatcher
    assert dispatcher._open >= set(scene.kept)
    assert {member for one in driver._registry for member in one.members} == dispatcher._open
    assert dispatcher._handling == {one for one in dispatcher._open if one._handler is not None}
    assert not dispatcher._blocking
    check_nobody_waits(driver)


def extra_filters(driver: MQTTDriver) -> list[str]:
    """The driver's own."""
    availability = driver.config.availability
    return [] if availability is None else [availability.topic]


def check_nobody_waits(driver: MQTTDriver) -> None:
    assert not driver._supervisor._states._waiters
    turn = driver._outbox._turn
    assert not turn.locked()
    assert turn.statistics().tasks_waiting == 0
    assert driver._outbox.accepted == driver._outbox.accepted_bytes == 0
    registry = driver._registry
    assert not registry._leaving
    assert not registry._due
    assert len(registry._class_of) == len(registry)
    assert all(one.members and set(one.members) == set(one.wishes) for one in registry)
    assert not driver._edges._callbacks
    assert not list(driver._history._listeners)


def check_closed(scene: Scene) -> None:
    driver = scene.driver
    assert driver.state is State.CLOSED
    assert driver._supervisor.connection is None
    assert not driver._dispatcher._open
    assert not driver._dispatcher._handling
    assert not driver._supervisor._states._waiters
    assert not driver._outbox._turn.locked()
    assert driver._outbox.accepted == driver._outbox.accepted_bytes == 0
    assert not driver._edges._callbacks
    assert not list(driver._history._listeners)
    assert driver.status().next_attempt_in is None


# -- what there is to cover -------------------------------------------------------------------------------------------


def public_async_methods() -> set[str]:
    """What an application can await: of all public classes, but those that it implements itself."""
    found: set[str] = set()
    for name, value in vars(trio_mqtt_driver).items():
        if name.startswith("_") or not inspect.isclass(value) or getattr(value, "_is_protocol", False):
            continue
        for method, function in inspect.getmembers(value, inspect.isroutine):
            own = not method.startswith("_") or method in ("__aenter__", "__aexit__", "__anext__")
            if own and is_awaited(function):
                found.add(f"{name}.{method}")
    return found


def is_awaited(function: Callable[..., Any]) -> bool:
    """Whether it is a coroutine function, an async context manager, or returns something to iterate over."""
    inner = inspect.unwrap(function)
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        return True
    return "Async" in str(getattr(inner, "__annotations__", {}).get("return", ""))
