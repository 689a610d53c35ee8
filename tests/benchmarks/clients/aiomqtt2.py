"""aiomqtt 2: asyncio around paho-mqtt, one iterator."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .asyncio_loop import Returns, in_tasks, run as run

aiomqtt: Any = importlib.import_module("aiomqtt")
paho_properties: Any = importlib.import_module("paho.mqtt.properties")
paho_packettypes: Any = importlib.import_module("paho.mqtt.packettypes")
paho_options: Any = importlib.import_module("paho.mqtt.subscribeoptions")


def _client(job: Job, client_id: str = "aiomqtt") -> Any:
    version = aiomqtt.ProtocolVersion.V5 if job.version == "5" else aiomqtt.ProtocolVersion.V311
    client = aiomqtt.Client(
        HOST, job.port, identifier=client_id, protocol=version, max_inflight_messages=WINDOW, clean_session=None
    )
    client.pending_calls_threshold = WINDOW  # else it logs a warning for each call above 10
    return client


async def _subscribe(client: Any, job: Job, filters: list[str]) -> None:
    if job.version == "5":
        await client.subscribe([(one, paho_options.SubscribeOptions(qos=job.qos)) for one in filters])
    else:
        await client.subscribe([(one, job.qos) for one in filters])


async def receive(job: Job, gauge: Gauge) -> None:
    async with _client(job) as client:
        await _subscribe(client, job, job.topic_filters())
        left = job.expected
        gauge.start()
        async for _ in client.messages:
            left -= 1
            if not left:
                break
        gauge.stop()


async def publish(job: Job, gauge: Gauge) -> None:
    topics, content, options = job.topic_names(), job.content, _options(job)
    several = len(topics)
    async with _client(job) as client:
        await _subscribe(client, job, [DONE])

        async def some(numbers: range) -> None:
            for number in numbers:
                await client.publish(topics[number % several], content, qos=job.qos, **options)

        gauge.start()
        if job.qos:
            await in_tasks(job, some)
        else:
            await some(range(job.count))
        await client.publish(DONE)
        async for _ in client.messages:
            break
        gauge.stop()


def _options(job: Job) -> dict[str, Any]:
    if not job.properties:
        return {}
    properties = paho_properties.Properties(paho_packettypes.PacketTypes.PUBLISH)
    properties.ContentType = CONTENT_TYPE
    properties.UserProperty = list(USER_PROPERTIES)
    return {"properties": properties}


async def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic = job.topic_names()[0]
    trips: list[float] = []
    async with _client(job) as client:
        await _subscribe(client, job, [topic])

        async def listen() -> None:
            async for _ in client.messages:
                returns()

        listener = asyncio.create_task(listen())
        for _ in range(job.count):
            await asyncio.sleep(0.002)
            before = time.perf_counter()
            # In a task: `publish` waits for the acknowledgement, and the message may be there before it.
            publishing = asyncio.create_task(client.publish(topic, job.content, qos=job.qos))
            await returns.wait()
            trips.append(time.perf_counter() - before)
            await publishing
        listener.cancel()
    gauge.trips(trips)


async def reconnect(job: Job, gauge: Gauge) -> None:
    """By hand, as its documentation shows: a loop around the client."""
    await _one_connection(job, gauge.start)
    await _one_connection(job)
    gauge.stop()


async def _one_connection(job: Job, subscribed: Callable[[], None] = lambda: None) -> None:
    """Return when a message has come, or the connection is lost."""
    try:
        async with _client(job) as client:
            await _subscribe(client, job, job.topic_filters())
            subscribed()
            async for _ in client.messages:
                break
    except aiomqtt.MqttError:
        return


async def subscriptions(job: Job, gauge: Gauge) -> None:
    async with _client(job) as client:
        gauge.memory()
        await _subscribe(client, job, job.topic_filters())
        gauge.memory()


async def drivers(job: Job, gauge: Gauge) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_client(job))
        gauge.memory()
        for number in range(job.count):
            await stack.enter_async_context(_client(job, f"aiomqtt{number}"))
        gauge.memory()
