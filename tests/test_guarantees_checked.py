"""The tests of the guarantees notice what they are there for: a broker that breaks its word fails them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guarantees import Books, Cell, Event, Outbound, Promise, Publish, Wait, World, in_a_world
from tests.stable import stable_config
from trio_mqtt_driver import MQTTDriver
from trio_mqtt_driver.testing import Kind, Publish as PublishPacket

EXACTLY_ONCE = Promise("accepted", at_most_once=True)
CELL = Cell(1, stable=True, event=Event.DISCONNECT)


def sabotaged(sabotage: Callable[[World], object]) -> Books:
    """What comes of ten messages, of which the broker spoils the last but two on the way to the one who counts."""

    async def run(world: World) -> None:
        async with MQTTDriver(stable_config(world.broker, "5", client_id="witness")) as witness:
            await witness.subscribe("t/#", world.books.note, qos=1)
            sabotage(world)
            await world.run(Outbound(world), [[Publish("t/x", 10), Wait(5.0)]])

    return in_a_world(CELL, "5", run)


def lose(world: World) -> None:
    world.broker.faults.drop(Kind.PUBLISH, first=9, times=1, client_id="witness")


def repeat(world: World) -> None:
    again = PublishPacket(topic="t/x", payload=b"8", qos=0)
    world.broker.faults.follow(Kind.PUBLISH, again, first=9, times=1, client_id="witness")


def reorder(world: World) -> None:
    early = PublishPacket(topic="t/x", payload=b"8", qos=0)
    world.broker.faults.replace(Kind.PUBLISH, early, first=6, times=1, client_id="witness")


def invent(world: World) -> None:
    other = PublishPacket(topic="t/x", payload=b"99", qos=0)
    world.broker.faults.follow(Kind.PUBLISH, other, first=9, times=1, client_id="witness")


@pytest.mark.parametrize(
    "sabotage, complaint",
    [(lose, "lost"), (repeat, "more than once"), (reorder, "out of order"), (invent, "never published")],
)
def test_a_broker_that_breaks_its_word_is_found_out(sabotage: Callable[[World], object], complaint: str) -> None:
    books = sabotaged(sabotage)
    with pytest.raises(AssertionError, match=complaint):
        books.verify(EXACTLY_ONCE)


def test_one_that_keeps_it_is_not() -> None:
    sabotaged(lambda _: None).verify(EXACTLY_ONCE)
