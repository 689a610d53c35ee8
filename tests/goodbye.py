"""What the tests of a driver's end look at: was the broker told, is anything left."""

from __future__ import annotations

from typing import Any

import trio

from tests.peers import memory_config
from trio_mqtt_driver import DriverConfig, Will
from trio_mqtt_driver.testing import Disconnect, MemoryBroker


def config_for(broker: MemoryBroker, **options: Any) -> DriverConfig:
    return memory_config(broker, **{"will": Will(topic="will", payload="lost"), **options})


def check_goodbye(broker: MemoryBroker) -> None:
    """The last packet of the last connection was DISCONNECT, so that no will was published."""
    assert isinstance(broker.received[-1][1], Disconnect)
    assert "will" not in [message.topic for message in broker.published]
    assert not broker.clients
    assert not broker.violations


def count_tasks() -> int:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    todo, count = [root], 0
    while todo:
        task = todo.pop()
        count += 1
        todo.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return count
