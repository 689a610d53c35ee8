"""The operations of the sweep: at least one for each public async method. Each leaves nothing behind but ``kept``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from tests.sweep import Case, Operation, Scene
from trio_mqtt_driver import (
    ConnectionLostError,
    DriverClosedError,
    NotConnectedError,
    PublishTimeoutError,
    State,
    StateView,
)

CASES: list[Case] = []


def covers(
    *methods: str, raises: tuple[type[Exception], ...] = (), **options: Any
) -> Callable[[Operation], Operation]:
    """Make a case of an operation that awaits these methods; ``options`` are the driver's."""

    def register(operation: Operation) -> Operation:
        CASES.append(Case(operation, frozenset(methods), raises, options))
        return operation

    return register


@covers("MQTTDriver.publish")
async def publish_qos_0(scene: Scene) -> None:
    for _ in range(257):  # the 256th time others have their turn
        await scene.driver.publish("out/0", b"x")


@covers("MQTTDriver.publish")
async def publish_qos_1(scene: Scene) -> None:
    await scene.driver.publish("out/1", b"x", qos=1)


@covers("MQTTDriver.publish")
async def publish_qos_2(scene: Scene) -> None:
    await scene.driver.publish("out/2", b"x", qos=2)


@covers("MQTTDriver.publish", raises=(NotConnectedError,))
async def publish_or_fail(scene: Scene) -> None:
    await scene.driver.publish("out/fail", b"x", qos=1, offline="fail")


@covers("MQTTDriver.publish")
async def publish_or_queue(scene: Scene) -> None:
    await scene.driver.publish("out/queue", b"x", qos=1, offline="queue", message_expiry=100)


@covers("MQTTDriver.publish")
async def publish_the_latest(scene: Scene) -> None:
    await scene.driver.publish("out/latest", b"x", qos=2, offline="latest")


@covers("MQTTDriver.publish", raises=(PublishTimeoutError,), publish_timeout=0.5)
async def publish_in_time(scene: Scene) -> None:
    await scene.driver.publish("out/timeout", b"x", qos=2)


@covers("MQTTDriver.publish", outbox_messages=1)
async def publish_through_a_full_outbox(scene: Scene) -> None:
    if not scene.driver._outbox.accepted:
        scene.driver.publish_nowait("out/full", b"first", qos=1)
    await scene.driver.publish("out/full", b"x", qos=1)


@covers("Receipt.wait")
async def wait_for_a_receipt(scene: Scene) -> None:
    await scene.driver.publish_nowait("out/receipt", b"x", qos=1).wait()


@covers("MQTTDriver.drain", drain_timeout=100)
async def drain(scene: Scene) -> None:
    for qos in (0, 1, 2):
        scene.driver.publish_nowait("out/drain", b"x", qos=qos)
    left = await scene.driver.drain()
    assert not left or scene.driver.state is State.CLOSED


@covers("MQTTDriver.subscribe")
async def subscribe(scene: Scene) -> None:
    scene.kept.append(await scene.driver.subscribe("kept/#", scene.take, qos=1))


@covers("MQTTDriver.subscribe")
async def subscribe_what_is_subscribed(scene: Scene) -> None:
    """With a higher QoS, so that the broker is told."""
    scene.kept.append(await scene.driver.subscribe("before/#", scene.take, qos=2))


@covers("MQTTDriver.subscription", "Subscription.receive")
async def receive(scene: Scene) -> None:
    async with scene.driver.subscription("held/#", qos=1) as messages:
        scene.driver.publish_nowait("held/x", b"x", qos=1)
        while not (await messages.receive()).payload:
            pass


@covers("MQTTDriver.subscription", "Subscription.__anext__")
async def iterate(scene: Scene) -> None:
    """The message is retained, so that each connection brings it."""
    scene.broker.publish("retained", b"x", retain=True)
    async with scene.driver.subscription("retained", qos=2) as messages:
        async for _ in messages:
            break


@covers("MQTTDriver.unsubscribe")
async def unsubscribe(scene: Scene) -> None:
    subscription = await scene.driver.subscribe("gone/#", scene.take)
    await scene.driver.unsubscribe(subscription)


@covers("MQTTDriver.unsubscribe")
async def unsubscribe_a_filter(scene: Scene) -> None:
    if scene.kept:
        scene.kept.clear()  # It is unsubscribed whether or not somebody waits for it.
        await scene.driver.unsubscribe("before/#")
    else:  # The other caller has done it.
        await scene.driver.wait_live()


@covers("MQTTDriver.unsubscribe", "MQTTDriver.subscribe")
async def unsubscribe_and_subscribe(scene: Scene) -> None:
    """Before the broker has answered."""
    if scene.kept:
        scene.driver.unsubscribe_nowait(scene.kept.pop())
    scene.kept.append(await scene.driver.subscribe("before/#", scene.take))


@covers("MQTTDriver.subscribe", "MQTTDriver.unsubscribe")
async def unsubscribe_while_it_is_subscribed(scene: Scene) -> None:
    """Whoever still waits for the broker's answer to SUBSCRIBE is told."""

    async def subscribe_in_vain() -> None:
        try:
            await scene.driver.subscribe("vain/#", scene.take)
        except DriverClosedError:
            pass

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(subscribe_in_vain)
            await trio.lowlevel.checkpoint()
            if scene.driver._dispatcher.find("vain/#"):
                await scene.driver.unsubscribe("vain/#")
    finally:
        for subscription in scene.driver._dispatcher.find("vain/#"):
            scene.driver.unsubscribe_nowait(subscription)


@covers("MQTTDriver.wait_live")
async def wait_live(scene: Scene) -> None:
    scene.driver.force_reconnect("test", even_if_live=True)
    await scene.driver.wait_live()


@covers("MQTTDriver.wait_state")
async def wait_state(scene: Scene) -> None:
    scene.driver.force_reconnect("test", even_if_live=True)
    with trio.move_on_after(0.1):  # It does not come.
        await scene.driver.wait_state(State.PAUSED, State.CLOSED)
    await scene.driver.wait_state(State.REPLAYING, State.LIVE, State.CLOSED)
    await scene.driver.wait_state(State.LIVE)


@covers("MQTTDriver.ping", raises=(ConnectionLostError, NotConnectedError))
async def ping(scene: Scene) -> None:
    assert await scene.driver.ping() >= 0


@covers("StateView.__aenter__", "StateView.__aexit__", "StateView.changes")
async def view(scene: Scene) -> None:
    scene.broker.publish("view/1", b"x", retain=True)
    async with StateView(scene.driver, "view/#", debounce=0.5) as topics:
        async for snapshot in topics.changes():
            if "view/2" in snapshot:
                break
            scene.broker.publish("view/2", b"x", retain=True)


@covers("EventStream.receive")
async def receive_events(scene: Scene) -> None:
    with scene.driver.events() as events:
        scene.driver.force_reconnect("test", even_if_live=True)
        for _ in range(3):
            await events.receive()


@covers("EventStream.__anext__")
async def iterate_events(scene: Scene) -> None:
    """Some are missed."""
    with scene.driver.events(buffer=1) as events:
        scene.driver.force_reconnect("test", even_if_live=True)
        async for event in events:
            if event.kind == "live":
                break
