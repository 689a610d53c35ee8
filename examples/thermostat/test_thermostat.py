"""The thermostat on its worst days: pytest examples/thermostat

``nursery`` is a fixture of pytest-trio, ``heated`` is the application under test, all others are trio-mqtt-driver's.
With ``trio_mode = true`` in pytest's configuration the tests need no mark.
"""

from __future__ import annotations

import pytest
import trio

from examples.thermostat.thermostat import thermostat
from trio_mqtt_driver import MQTTDriver
from trio_mqtt_driver.testing import BrokerProcess, DriverProbe, FaultProxy, Kind, MemoryBroker

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
async def heated(mqtt_driver: MQTTDriver, nursery: trio.Nursery) -> None:
    await nursery.start(thermostat, mqtt_driver)


def orders(broker: MemoryBroker) -> list[str]:
    """What the heatings were told, by the messages that the broker took."""
    return [message.payload.decode() for message in broker.published if message.topic.endswith("/heating")]


async def test_a_cold_room_is_heated(heated: None, memory_broker: MemoryBroker) -> None:
    memory_broker.publish("house/kitchen/temperature", '{"celsius": 18.5}', qos=1)
    order = await memory_broker.wait_for_publish("house/kitchen/heating", timeout=5)
    assert (order.payload, order.qos, order.retain) == (b"on", 1, True)


async def test_nothing_is_said_twice(heated: None, memory_broker: MemoryBroker) -> None:
    for celsius in (18.5, 18.4, 20.0, 21.5, 20.0):
        memory_broker.publish("house/kitchen/temperature", f'{{"celsius": {celsius}}}', qos=1)
    await memory_broker.wait_for(lambda: orders(memory_broker)[-1:] == ["off"], "order to stop heating", timeout=5)
    assert orders(memory_broker) == ["on", "off"]


async def test_nonsense_does_not_stop_it(heated: None, memory_broker: MemoryBroker) -> None:
    memory_broker.publish("house/kitchen/temperature", b"\xff", qos=1)
    memory_broker.publish("house/kitchen/temperature", '{"celsius": 18.5}', qos=1)
    await memory_broker.wait_for_publish("house/kitchen/heating", timeout=5)


async def test_an_order_survives_a_lost_acknowledgement(
    autojump_mqtt_driver: MQTTDriver, heated: None, memory_broker: MemoryBroker
) -> None:
    with memory_broker.faults.drop(Kind.PUBACK, times=1):
        memory_broker.publish("house/kitchen/temperature", '{"celsius": 18.5}', qos=1)
        await memory_broker.wait_for(lambda: len(orders(memory_broker)) == 2, "repeated order", timeout=60)
    assert autojump_mqtt_driver.generation == 2


async def test_a_night_without_a_broker(
    autojump_memory_broker: MemoryBroker, heated: None, driver_probe: DriverProbe
) -> None:
    autojump_memory_broker.publish("house/kitchen/temperature", '{"celsius": 18.5}', qos=1)
    await autojump_memory_broker.wait_for_publish("house/kitchen/heating", timeout=5)
    autojump_memory_broker.stop()
    await driver_probe.wait_lost()
    await trio.sleep(8 * 3600)  # takes milliseconds
    autojump_memory_broker.start()
    await driver_probe.wait_live(timeout=60)
    autojump_memory_broker.publish("house/kitchen/temperature", '{"celsius": 21.5}', qos=1)
    await autojump_memory_broker.wait_for(lambda: orders(autojump_memory_broker) == ["on", "off"], "two orders")


@pytest.mark.broker
async def test_a_cable_that_is_pulled_from_a_real_broker(
    mqtt_broker: BrokerProcess, fault_proxy: FaultProxy, heated: None, driver_probe: DriverProbe
) -> None:
    async with mqtt_broker.watch("house/#") as seen, MQTTDriver(mqtt_broker.url) as sensor:
        fault_proxy.reset()
        await driver_probe.wait_generation(2)
        await sensor.publish("house/kitchen/temperature", '{"celsius": 18.5}', qos=1)
        order = await seen.wait_for_publish("house/kitchen/heating")
        assert order.payload == b"on"
