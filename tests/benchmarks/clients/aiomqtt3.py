"""aiomqtt 3 (alpha): asyncio around a codec in Rust, one iterator, acknowledgements by hand; MQTT 5 only."""

from __future__ import annotations

import asyncio
import importlib
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, Job
from .asyncio_loop import Returns, in_tasks, run as run

aiomqtt: Any = importlib.import_module("aiomqtt")


def _client(job: Job, client_id: str = "aiomqtt") -> Any:
    return aiomqtt.Client(hostname=HOST, port=job.port, identifier=client_id, clean_start=True)


async def receive(job: Job, gauge: Gauge) -> None:
    async with _client(job) as client:
        for topic_filter in job.topic_filters():
            await client.subscribe(topic_filter, max_qos=aiomqtt.QoS(job.qos))
        left = job.expected
        at_least_once = aiomqtt.QoS.AT_LEAST_ONCE
        gauge.start()
        async for message in client.messages():
            left -= 1
            if message.qos == at_least_once:
                await client.puback(message.packet_id)
            if not left:
                break
        gauge.stop()


async def publish(job: Job, gauge: Gauge) -> None:
    topics, content = job.topic_names(), job.content
    options: dict[str, Any] = (
        {"content_type": CONTENT_TYPE, "user_properties": list(USER_PROPERTIES)} if job.properties else {}
    )
    several = len(topics)
    async with _client(job) as client:
        await client.subscribe(DONE, max_qos=aiomqtt.QoS.AT_MOST_ONCE)

        async def acknowledged(numbers: range) -> None:
            for number in numbers:
                await client.publish(
                    topics[number % several],
                    content,
                    qos=aiomqtt.QoS.AT_LEAST_ONCE,
                    packet_id=next(client.packet_ids),
                    **options,
                )

        gauge.start()
        if job.qos:
            await in_tasks(job, acknowledged)
        else:
            publish = partial(client.publish, **options)
            for number in range(job.count):
                await publish(topics[number % several], content)
        await client.publish(DONE, b"")
        async for _ in client.messages():
            break
        gauge.stop()


async def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic = job.topic_names()[0]
    trips: list[float] = []
    async with _client(job) as client:
        await client.subscribe(topic, max_qos=aiomqtt.QoS(job.qos))

        async def listen() -> None:
            async for message in client.messages():
                returns()
                if job.qos:
                    await client.puback(message.packet_id)

        listener = asyncio.create_task(listen())
        for _ in range(job.count):
            await asyncio.sleep(0.002)
            options = {"packet_id": next(client.packet_ids)} if job.qos else {}
            before = time.perf_counter()
            publishing = asyncio.create_task(client.publish(topic, job.content, qos=aiomqtt.QoS(job.qos), **options))
            await returns.wait()
            trips.append(time.perf_counter() - before)
            await publishing
        listener.cancel()
    gauge.trips(trips)


async def drivers(job: Job, gauge: Gauge) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_client(job))
        gauge.memory()
        for number in range(job.count):
            await stack.enter_async_context(_client(job, f"aiomqtt{number}"))
        gauge.memory()
