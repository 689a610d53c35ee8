"""Brokers that close over a Topic Filter: the driver refuses it in their place, and all other subscriptions stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from tests.brokers.grounds import Ground, Protocol, require
from trio_mqtt_driver import MQTTDriver, State, SubscribeError
from trio_mqtt_driver.testing import BrokerProcess, Ejabberd, Iotcore

pytestmark = pytest.mark.broker


@pytest.mark.parametrize(
    "make, protocol, forbidden",
    [
        pytest.param(Iotcore, "5", "$SYS/#", id="iotcore"),
        # In MQTT 5 it says in CONNACK that it has no shared subscriptions.
        pytest.param(Ejabberd, "3.1.1", "$share/group/a", id="ejabberd"),
    ],
)
async def test_a_filter_over_which_the_broker_closes(
    make: Callable[[], BrokerProcess], protocol: Protocol, forbidden: str
) -> None:
    with trio.fail_after(60):
        async with (
            require(make()) as broker,
            MQTTDriver(Ground(broker, protocol).config(subscribe_timeout=1)) as driver,
            driver.subscription("in", qos=1) as messages,
        ):
            for _ in range(3):
                with pytest.raises(SubscribeError, match="3 connections ended over it"):
                    await driver.subscribe(forbidden, print)
                await driver.wait_live()
            await trio.sleep(1.5)  # iotcore leaves an UNSUBSCRIBE of what it does not have unanswered
            counters = driver.status().counters
            assert (driver.state, counters["losses"], counters["failures"]) == (State.LIVE, 1, 2)
            await driver.publish("in", b"still there", qos=1)
            assert (await messages.receive()).payload == b"still there"
