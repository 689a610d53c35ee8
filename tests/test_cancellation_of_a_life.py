"""A driver's whole life, from ``__aenter__`` to ``__aexit__``, disturbed at each of its checkpoints in turn.

However it begins and whatever happens, it ends: the driver is closed, the brokers have no client, nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from tests.sweep import PATIENCE, AtStep, Scene, check_closed, tasks
from trio_mqtt_driver import (
    Availability,
    BackoffConfig,
    DriverClosedError,
    DriverConfig,
    Endpoint,
    MQTTDriver,
    RefusedError,
)
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

COVERED = {"MQTTDriver.__aenter__", "MQTTDriver.__aexit__"}

PRESENCE = Availability(topic="presence")
FALLBACKS = (Endpoint(host="second", port=1883),)


@attrs.frozen
class Kind:
    """A kind of driver, and which of the two brokers are up when it is entered."""

    name: str
    start: Literal["live", "background"] = "live"
    up: tuple[bool, bool] = (True, True)
    options: dict[str, Any] = attrs.field(factory=dict[str, Any])

    def __repr__(self) -> str:
        return self.name


KINDS = [
    Kind("live"),
    Kind("background", "background"),
    Kind("before the broker", up=(False, False)),
    Kind("before the broker, background", "background", up=(False, False)),
    Kind("availability", options={"availability": PRESENCE}),
    Kind("stable", options={"stable_id": True}),
    Kind("stable, 3.1.1", options={"stable_id": True, "protocol": "3.1.1"}),
    Kind("fallback", up=(False, True), options={"fallbacks": FALLBACKS}),
    Kind(
        "everything",
        "background",
        up=(False, True),
        options={"fallbacks": FALLBACKS, "availability": PRESENCE, "stable_id": True, "probe": "echo"},
    ),
]


def config_for(brokers: dict[str, MemoryBroker], kind: Kind) -> DriverConfig:
    async def open_stream(endpoint: Endpoint) -> trio.abc.Stream:
        return await brokers[endpoint.host].connect_stream()

    return memory_config(
        brokers["first"],
        **{
            "endpoint": Endpoint(host="first", port=1883),
            "open_stream": open_stream,
            "backoff": BackoffConfig(min_interval=0, start=0.1),
            **kind.options,
        },
    )


@attrs.frozen
class Outcome:
    fired: bool
    inside: bool
    """Whether the body began."""
    refused: bool
    cancelled: bool


async def live(kind: Kind, disturbance: str, step: int, *, any_task: bool) -> Outcome:
    before = tasks()
    async with trio.open_nursery() as nursery:
        brokers = {"first": MemoryBroker(nursery), "second": MemoryBroker(nursery)}
        for broker, up in zip(brokers.values(), kind.up, strict=True):
            broker.down = not up
        driver = MQTTDriver(config_for(brokers, kind), start=kind.start)
        scope = trio.CancelScope()
        inside = refused = False

        async def start() -> None:
            await trio.sleep(3)
            brokers["first"].start()

        def disturb() -> None:
            if disturbance == "cancel":
                scope.cancel()
            elif disturbance == "reconnect":
                force_reconnect(driver)
            else:
                for broker in brokers.values():
                    if disturbance == "refuse":
                        broker.faults.refuse_connect(0x87)
                        broker.start()  # only the first endpoint's refusal is final
                    broker.drop()

        instrument = AtStep(step, disturb)
        instrument.task = None if any_task else trio.lowlevel.current_task()
        if not any(kind.up):
            nursery.start_soon(start)
        trio.lowlevel.add_instrument(instrument)
        try:
            with trio.fail_after(PATIENCE), scope:
                async with driver:
                    inside = True
                    await driver.subscribe("in", print)
                    await driver.publish("out", b"x", qos=1)
        except RefusedError:
            refused = True
        finally:
            trio.lowlevel.remove_instrument(instrument)
        check_closed(Scene(brokers["first"], driver))
        await settled()
        for broker in brokers.values():
            assert not broker.violations
            assert not broker.clients
            said = [one.payload for one in broker.published if one.topic == PRESENCE.topic]
            assert not said or said[-1] == PRESENCE.offline
        nursery.cancel_scope.cancel()
    await settled()
    assert tasks() == before
    return Outcome(instrument.fired, inside, refused, scope.cancelled_caught)


def force_reconnect(driver: MQTTDriver) -> None:
    try:
        driver.force_reconnect("disturbed", even_if_live=True)
    except DriverClosedError:
        pass


def check_cancelled(outcome: Outcome) -> None:
    assert not outcome.refused
    assert outcome.inside or outcome.cancelled


def check_refused(outcome: Outcome) -> None:
    assert outcome.inside or outcome.refused


def check_completed(outcome: Outcome) -> None:
    assert outcome.inside
    assert not outcome.refused


CHECKS: dict[str, Callable[[Outcome], None]] = {
    "cancel": check_cancelled,
    "cut": check_completed,
    "reconnect": check_completed,
    "refuse": check_refused,
}


async def sweep(kind: Kind, disturbance: str, *, any_task: bool) -> None:
    step = 0
    fired = True
    while fired:
        step += 1
        outcome = await live(kind, disturbance, step, any_task=any_task)
        fired = outcome.fired
        CHECKS[disturbance](outcome)
    assert step > 5


@pytest.mark.long
@pytest.mark.parametrize("disturbance", CHECKS)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
async def test_a_life_ends_whatever_happens(autojump_clock: MockClock, kind: Kind, disturbance: str) -> None:
    await sweep(kind, disturbance, any_task=False)


@pytest.mark.long
@pytest.mark.parametrize("disturbance", CHECKS)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=repr)
async def test_a_life_ends_whatever_happens_between_any_two_steps(
    autojump_clock: MockClock, kind: Kind, disturbance: str
) -> None:
    """Of any task of driver and broker: while the supervisor is half-way through something."""
    await sweep(kind, disturbance, any_task=True)
