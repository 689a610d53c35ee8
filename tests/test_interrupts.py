"""Ctrl-C: our own code is protected from it, the application's is not, and the driver is left with a drain."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.lowlevel import currently_ki_protected
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Attempt, DriverConfig, Message, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


class WatchedStream(trio.abc.Stream):
    """Calls a function whenever a task of the driver is about to read or write."""

    def __init__(self, stream: trio.abc.Stream, look: Callable[[str], None]) -> None:
        self._stream = stream
        self._look = look

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._look("writer")
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        self._look("reader")
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        self._look("closer")
        await self._stream.aclose()


def watched_config(broker: MemoryBroker, look: Callable[[str], None], **options: Any) -> DriverConfig:
    async def open_stream(_endpoint: object) -> trio.abc.Stream:
        look("open_stream")
        return WatchedStream(await broker.connect_stream(), look)

    return memory_config(broker, open_stream=open_stream, **options)


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.mark.parametrize("where", ["writer", "reader"])
@pytest.mark.parametrize("after", range(3))
def test_ctrl_c_in_our_code_leaves_with_a_drain(where: str, after: int) -> None:
    arrived: list[int] = []
    left = after
    armed = False
    drivers: list[MQTTDriver] = []

    def look(what: str) -> None:
        nonlocal armed, left
        if armed and what == where:
            left -= 1
            if left < 0:
                armed = False
                signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        nonlocal armed
        async with trio.open_nursery() as nursery:
            broker = MemoryBroker(nursery)
            try:
                async with MQTTDriver(watched_config(broker, look)) as driver, trio.open_nursery() as inner:
                    drivers.append(driver)

                    async def publish_on() -> None:
                        while True:
                            await driver.publish("out", qos=1)

                    for _ in range(10):
                        inner.start_soon(publish_on)
                    armed = True
            finally:
                arrived.append(sum(message.topic == "out" for message in broker.published))
                nursery.cancel_scope.cancel()

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert caught.value.split(KeyboardInterrupt)[1] is None
    assert drivers[0].undelivered == ()
    assert arrived[0] >= 10


async def test_who_is_protected_and_who_is_not(
    broker: MemoryBroker, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Else a handler that hangs could not be interrupted."""
    seen: dict[str, set[bool]] = {}

    def look(what: str) -> None:
        seen.setdefault(what, set()).add(currently_ki_protected())

    async def options(attempt: Attempt) -> DriverConfig:
        look("options_factory")
        return attempt.config

    async def handle(_: Message[bytes]) -> None:
        look("async handler")

    def lone(_: Message[bytes]) -> None:
        look("lone handler")

    def rebuild(_: Attempt) -> None:
        look("rebuild callback")

    def connection(_: bool) -> None:
        look("connection callback")

    async with MQTTDriver(watched_config(broker, look, options_factory=options)) as driver:
        driver.register_rebuild_callback(rebuild)
        driver.register_connection_callback(connection)
        await driver.subscribe("a", handle)
        await driver.subscribe("b", lone)
        for topic in ("a", "b"):
            await driver.publish(topic)
            await trio.sleep(1)
        broker.disconnect()
        await trio.sleep(60)
    ours = {"reader", "writer", "closer"}
    theirs = {
        *("open_stream", "options_factory", "async handler", "lone handler"),
        *("rebuild callback", "connection callback"),
    }
    assert seen == {who: {who in ours} for who in ours | theirs}
