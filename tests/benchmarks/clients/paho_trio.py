"""paho-mqtt driven the way trio-paho-mqtt does.

trio-paho-mqtt itself does not run: it calls ``trio.hazmat``. This has its shape: three tasks around ``loop_read``,
``loop_write`` and ``loop_misc``, a memory channel of 100, and a send buffer of 2 KiB.
"""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ..gauge import Gauge
from ..job import DONE, HOST, WINDOW, Job
from .paho_thread import make, options_of, subscriptions_of

paho: Any = importlib.import_module("paho.mqtt.client")


def run(work: Callable[[Job, Gauge], Awaitable[None]], job: Job, gauge: Gauge) -> None:
    trio.run(work, job, gauge)


class Client:
    def __init__(self, job: Job, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._job = job
        self.paho = make(job)
        self._writing = trio.Event()
        self._reading = trio.Event()
        self._reading.set()
        self._send, self._receive = trio.open_memory_channel[Any](100)
        self.dropped = 0
        self.subscribed = trio.Event()
        self.published = trio.Event()
        self.unacknowledged = 0
        self.paho.on_message = self._on_message
        self.paho.on_subscribe = lambda *_: self.subscribed.set()
        self.paho.on_publish = self._on_publish
        self.paho.on_socket_open = self._on_socket_open
        self.paho.on_socket_register_write = lambda *_: self._writing.set()
        self.paho.on_socket_unregister_write = self._on_socket_unregister_write

    async def connect(self, filters: list[str]) -> None:
        self.subscribed = trio.Event()
        connected = trio.Event()
        self.paho.on_connect = lambda *_: connected.set()
        self.paho.connect(HOST, self._job.port)
        self._nursery.start_soon(self._loop_read)
        self._nursery.start_soon(self._loop_write)
        self._nursery.start_soon(self._loop_misc)
        await connected.wait()
        self.paho.subscribe(subscriptions_of(self._job, filters))
        await self.subscribed.wait()

    def _on_socket_open(self, _client: Any, _userdata: Any, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)

    def _on_socket_unregister_write(self, *_: object) -> None:
        self._writing = trio.Event()

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        try:
            self._send.send_nowait(message)
        except trio.WouldBlock:
            self._receive.receive_nowait()
            self.dropped += 1
            self._send.send_nowait(message)
            self._reading = trio.Event()

    def _on_publish(self, *_: object) -> None:
        self.unacknowledged -= 1
        self.published.set()

    async def message(self) -> Any:
        self._reading.set()
        return await self._receive.receive()

    async def _loop_read(self) -> None:
        while True:
            await self._reading.wait()
            try:
                await trio.lowlevel.wait_readable(self.paho.socket())
            except (TypeError, ValueError, trio.ClosedResourceError):
                return  # paho has closed the socket
            if self.paho.loop_read() != paho.MQTT_ERR_SUCCESS:
                return

    async def _loop_write(self) -> None:
        while True:
            await self._writing.wait()
            try:
                await trio.lowlevel.wait_writable(self.paho.socket())
            except (TypeError, ValueError, trio.ClosedResourceError):
                return
            if self.paho.loop_write() != paho.MQTT_ERR_SUCCESS:
                return

    async def _loop_misc(self) -> None:
        while self.paho.loop_misc() == paho.MQTT_ERR_SUCCESS:  # noqa: ASYNC110  # as trio-paho-mqtt does it
            await trio.sleep(1)


async def receive(job: Job, gauge: Gauge) -> None:
    async with trio.open_nursery() as nursery:
        client = Client(job, nursery)
        await client.connect(job.topic_filters())
        left = job.expected
        gauge.start()
        while left > client.dropped:
            await client.message()
            left -= 1
        gauge.stop()
        gauge.figures["dropped"] = client.dropped
        nursery.cancel_scope.cancel()


async def publish(job: Job, gauge: Gauge) -> None:
    topics, content, options = job.topic_names(), job.content, options_of(job)
    several = len(topics)
    async with trio.open_nursery() as nursery:
        client = Client(job, nursery)
        await client.connect([DONE])
        gauge.start()
        for number in range(job.count):
            client.unacknowledged += 1
            client.paho.publish(topics[number % several], content, job.qos, **options)
            if number % 100 == 99:
                await trio.lowlevel.checkpoint()
            while client.unacknowledged >= WINDOW:
                client.published = trio.Event()
                await client.published.wait()
        client.paho.publish(DONE)
        await client.message()
        gauge.stop()
        nursery.cancel_scope.cancel()


async def round_trip(job: Job, gauge: Gauge) -> None:
    topic = job.topic_names()[0]
    trips: list[float] = []
    async with trio.open_nursery() as nursery:
        client = Client(job, nursery)
        await client.connect([topic])
        for _ in range(job.count):
            await trio.sleep(0.002)
            before = time.perf_counter()
            client.paho.publish(topic, job.content, job.qos)
            await client.message()
            trips.append(time.perf_counter() - before)
        nursery.cancel_scope.cancel()
    gauge.trips(trips)


async def reconnect(job: Job, gauge: Gauge) -> None:
    """By hand: it loses its subscriptions, and its loops end with the connection."""
    async with trio.open_nursery() as nursery:
        client = Client(job, nursery)
        lost = trio.Event()
        client.paho.on_disconnect = lambda *_: lost.set()
        await client.connect(job.topic_filters())
        gauge.start()
        await lost.wait()
        again = Client(job, nursery)
        await again.connect(job.topic_filters())
        await again.message()
        gauge.stop()
        nursery.cancel_scope.cancel()
