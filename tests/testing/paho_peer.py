"""paho-mqtt as a peer: a client that somebody else wrote, over a socket, in a thread of its own."""

from __future__ import annotations

import importlib
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

# Not by `import`: paho 1.6 has no annotations and 2.x has some, so neither checker can be content with both.
paho: Any = importlib.import_module("paho.mqtt.client")
packet_types: Any = importlib.import_module("paho.mqtt.packettypes").PacketTypes
new_properties: Any = importlib.import_module("paho.mqtt.properties").Properties
new_options: Any = importlib.import_module("paho.mqtt.subscribeoptions").SubscribeOptions


TELLS_SHORT_DISCONNECT = hasattr(paho, "CallbackAPIVersion")
"""paho 1.6 overlooks the reason code of a DISCONNECT without properties."""


def code_of(reason: Any) -> int:
    """A number in 1.6, an object in 2.x and with version 5."""
    return int(getattr(reason, "value", reason))


def some_properties(packet: str, **values: Any) -> Any:
    """paho's properties for a packet, by their names in the specification, without spaces."""
    properties = new_properties(getattr(packet_types, packet))
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def new_client(client_id: str, version: int, **options: Any) -> Any:
    """A client of paho 1.6 or 2.x; they differ in how it is made."""
    api = getattr(paho, "CallbackAPIVersion", None)
    first = () if api is None else (api.VERSION2,)
    return paho.Client(*first, client_id=client_id, protocol=version, **options)


def told_at_the_end(values: tuple[Any, ...]) -> int | None:
    """The reason code that the broker gave in DISCONNECT; those of 0x80 and less are made up by paho itself."""
    codes = [code_of(entry) for entry in values if type(entry).__name__ in ("ReasonCode", "ReasonCodes")]
    return next((code for code in codes if code > 0x80), None)


class PahoPeer:
    """A paho client whose callbacks can be awaited, in order."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._send, self._receive = trio.open_memory_channel[tuple[str, Any]](math.inf)
        self._left: list[tuple[str, Any]] = []
        token = trio.lowlevel.current_trio_token()

        def hear(what: str, which: Any) -> Callable[..., None]:
            def callback(*args: Any) -> None:
                try:
                    token.run_sync_soon(self._send.send_nowait, (what, args[which]))
                except trio.RunFinishedError:
                    return  # The test is over.

            return callback

        client.on_connect = hear("connect", slice(2, None))
        client.on_subscribe = hear("subscribe", 3)
        client.on_publish = hear("publish", 2)
        client.on_message = hear("message", 2)
        client.on_disconnect = hear("disconnect", slice(2, None))

    async def next(self) -> tuple[str, Any]:
        if self._left:
            return self._left.pop(0)
        with trio.fail_after(20):
            return await self._receive.receive()

    async def expect(self, what: str) -> Any:
        """The value of the next event, which must be this one."""
        happened, value = await self.next()
        assert happened == what, value
        return value

    async def until(self, what: str) -> Any:
        """The value of the next event of this kind; those before it stay."""
        passed: list[tuple[str, Any]] = []
        while True:
            happened, value = await self.next()
            if happened == what:
                self._left = passed + self._left
                return value
            passed.append((happened, value))

    async def messages(self, count: int) -> list[Any]:
        """The next messages."""
        return [await self.until("message") for _ in range(count)]

    async def subscribe(self, topic_filter: str, **options: Any) -> list[int]:
        """The reason codes of SUBACK; ``options`` are those of paho's ``SubscribeOptions``, or ``properties``."""
        properties = options.pop("properties", None)
        self.client.subscribe(topic_filter, options=new_options(**options), properties=properties)
        return [code_of(entry) for entry in await self.until("subscribe")]


@asynccontextmanager
async def connected(port: int, client: Any, **options: Any) -> AsyncGenerator[PahoPeer, None]:
    peer = PahoPeer(client)
    await trio.to_thread.run_sync(lambda: client.connect("127.0.0.1", port, 60, **options))
    client.loop_start()
    try:
        yield peer
    finally:
        with trio.move_on_after(20, shield=True):
            client.disconnect()
            await trio.to_thread.run_sync(client.loop_stop)
