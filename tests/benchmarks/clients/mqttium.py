"""MQTTium: asyncio, a protocol engine of its own; callbacks or one iterator."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .asyncio_loop import Counter, Returns, run as run

mqttium: Any = importlib.import_module("mqttium")
api: Any = importlib.import_module("mqttium.api")


def _client(job: Job, callback: Any = None, client_id: str = "mqttium", **options: Any) -> Any:
    version = mqttium.MQTTProtocolVersion
    if callback is None:
        options["manual_ack"] = job.qos > 0
    else:
        options["message_delivery"] = "callback"
    client = api.AsyncClient(
        client_id,
        protocol=version.MQTTv5 if job.version == "5" else version.MQTTv311,
        max_inbound_inflight=WINDOW,
        max_outbound_inflight=WINDOW if job.control else None,
        **options,
    )
    if callback is not None:
        client.on_message = callback
    return client


async def receive(job: Job, gauge: Gauge) -> None:
    if job.api == "handler":
        counter = Counter(job.expected)
        client = _client(job, counter.count)
        await client.connect(HOST, job.port)
        await client.subscribe(job.topic_filters(), qos=job.qos)
        gauge.start()
        await counter.reached.wait()
    else:
        client = _client(job)
        await client.connect(HOST, job.port)
        await client.subscribe(job.topic_filters(), qos=job.qos)
        left = job.expected
        gauge.start()
        async for message in client.messages():
            left -= 1
            if message.qos:
                await client.ack(message)
            if not left:
                break
    gauge.stop()
    await client.disconnect()


async def publish(job: Job, gauge: Gauge) -> None:
    topics, content = job.topic_names(), job.content
    several = len(topics)
    options: dict[str, Any] = {}
    if job.properties:
        options["properties"] = api.Properties({"content_type": CONTENT_TYPE, "user_property": list(USER_PROPERTIES)})
    done = Counter(1)
    client = _client(job, done.count)
    await client.connect(HOST, job.port)
    await client.subscribe(DONE)
    gauge.start()
    if job.api == "many":
        batch = await client.publish_many(
            api.PublishMessage(topics[number % several], content, job.qos, **options) for number in range(job.count)
        )
        await batch.wait()
    else:
        for start in range(0, job.count, WINDOW):
            receipts = [
                await client.publish(topics[number % several], content, qos=job.qos, **options)
                for number in range(start, min(start + WINDOW, job.count))
            ]
            for receipt in receipts:
                await receipt.wait()
    await client.publish(DONE)
    await done.reached.wait()
    gauge.stop()
    await client.disconnect()


async def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic = job.topic_names()[0]
    trips: list[float] = []
    client = _client(job, returns)
    await client.connect(HOST, job.port)
    await client.subscribe(topic, qos=job.qos)
    for _ in range(job.count):
        await asyncio.sleep(0.002)
        before = time.perf_counter()
        await client.publish(topic, job.content, qos=job.qos)
        await returns.wait()
        trips.append(time.perf_counter() - before)
    gauge.trips(trips)
    await client.disconnect()


async def reconnect(job: Job, gauge: Gauge) -> None:
    """It reconnects by itself; its subscriptions are replayed by hand, in its hook."""
    counter = Counter(1)
    client = _client(job, counter.count, reconnect=api.ReconnectPolicy(initial_delay=0, max_delay=0, stable_after=0))
    await client.connect(HOST, job.port)
    await client.subscribe(job.topic_filters(), qos=job.qos)

    async def replay(*_: object) -> None:
        await client.subscribe(job.topic_filters(), qos=job.qos)

    client.on_connect = replay
    gauge.start()
    await counter.reached.wait()
    gauge.stop()
    await client.disconnect()


async def subscriptions(job: Job, gauge: Gauge) -> None:
    client = _client(job, Counter(1).count)
    await client.connect(HOST, job.port)
    gauge.memory()
    await client.subscribe(job.topic_filters(), qos=job.qos)
    gauge.memory()
    await client.disconnect()


async def drivers(job: Job, gauge: Gauge) -> None:
    clients: list[Any] = []
    for number in range(job.count + 1):
        clients.append(_client(job, Counter(1).count, f"mqttium{number}"))
        await clients[-1].connect(HOST, job.port)
        if not number:
            gauge.memory()
    gauge.memory()
    for client in clients:
        await client.disconnect()
