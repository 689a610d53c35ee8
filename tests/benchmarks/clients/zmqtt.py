"""zmqtt: asyncio, a codec of its own, an iterator for each subscription."""

from __future__ import annotations

import asyncio
import importlib
import time
from contextlib import AsyncExitStack
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .asyncio_loop import Returns, in_tasks, run as run

zmqtt: Any = importlib.import_module("zmqtt")


def _client(job: Job, client_id: str = "zmqtt", **options: Any) -> Any:
    if job.version == "5":
        options["receive_maximum"] = WINDOW
    version = "5.0" if job.version == "5" else job.version
    return zmqtt.create_client(HOST, job.port, client_id=client_id, version=version, **options)


async def receive(job: Job, gauge: Gauge) -> None:
    async with (
        _client(job) as client,
        client.subscribe(*job.topic_filters(), qos=zmqtt.QoS(job.qos), auto_ack=False) as messages,
    ):
        left = job.expected
        at_least_once = zmqtt.QoS.AT_LEAST_ONCE
        gauge.start()
        async for message in messages:
            left -= 1
            if message.qos == at_least_once:
                await message.ack()
            if not left:
                break
        gauge.stop()


async def publish(job: Job, gauge: Gauge) -> None:
    topics, content, qos = job.topic_names(), job.content, zmqtt.QoS(job.qos)
    several = len(topics)
    options: dict[str, Any] = {}
    if job.properties:
        options["properties"] = zmqtt.PublishProperties(content_type=CONTENT_TYPE, user_properties=USER_PROPERTIES)
    async with _client(job) as client, client.subscribe(DONE) as done:

        async def some(numbers: range) -> None:
            for number in numbers:
                await client.publish(topics[number % several], content, qos=qos, **options)

        gauge.start()
        if job.qos:
            await in_tasks(job, some)
        else:
            await some(range(job.count))
        await client.publish(DONE, b"")
        await done.get_message()
        gauge.stop()


async def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic, qos = job.topic_names()[0], zmqtt.QoS(job.qos)
    trips: list[float] = []
    async with _client(job) as client, client.subscribe(topic, qos=qos) as messages:

        async def listen() -> None:
            async for _ in messages:
                returns()

        listener = asyncio.create_task(listen())
        for _ in range(job.count):
            await asyncio.sleep(0.002)
            before = time.perf_counter()
            publishing = asyncio.create_task(client.publish(topic, job.content, qos=qos))
            await returns.wait()
            trips.append(time.perf_counter() - before)
            await publishing
        listener.cancel()
    gauge.trips(trips)


async def reconnect(job: Job, gauge: Gauge) -> None:
    at_once = zmqtt.ReconnectConfig(initial_delay=0.001)
    async with (
        _client(job, reconnect=at_once) as client,
        client.subscribe(*job.topic_filters(), qos=zmqtt.QoS(job.qos)) as messages,
    ):
        gauge.start()
        await messages.get_message()
        gauge.stop()


async def subscriptions(job: Job, gauge: Gauge) -> None:
    async with _client(job) as client:
        gauge.memory()
        async with client.subscribe(*job.topic_filters(), qos=zmqtt.QoS(job.qos)):
            gauge.memory()


async def drivers(job: Job, gauge: Gauge) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_client(job))
        gauge.memory()
        for number in range(job.count):
            await stack.enter_async_context(_client(job, f"zmqtt{number}"))
        gauge.memory()
