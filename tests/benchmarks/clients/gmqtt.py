"""gmqtt: callbacks on asyncio, a codec of its own."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .asyncio_loop import TURN, Counter, Returns, run as run

gmqtt: Any = importlib.import_module("gmqtt")
constants: Any = importlib.import_module("gmqtt.mqtt.constants")


async def _connect(job: Job, on_message: Any, client_id: str = "gmqtt") -> Any:
    # Optimistic: it acknowledges before it calls the handler. Otherwise it needs a coroutine function, which is a task
    # for each message.
    client = gmqtt.Client(client_id, optimistic_acknowledgement=job.api != "coroutine")
    subscribed = asyncio.Event()
    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribed = subscribed
    await client.connect(HOST, job.port, version=constants.MQTTv50 if job.version == "5" else constants.MQTTv311)
    return client


async def _subscribe(client: Any, filters: list[str], qos: int) -> list[Any]:
    subscriptions = [gmqtt.Subscription(topic_filter, qos=qos) for topic_filter in filters]
    client.subscribe(subscriptions)
    await client.subscribed.wait()
    return subscriptions


async def receive(job: Job, gauge: Gauge) -> None:
    counter = Counter(job.expected)

    async def handle(*_: object) -> int:
        counter.count()
        return 0  # the reason code of the PUBACK

    client = await _connect(job, handle if job.api == "coroutine" else counter.count)
    await _subscribe(client, job.topic_filters(), job.qos)
    gauge.start()
    await counter.reached.wait()
    gauge.stop()


async def publish(job: Job, gauge: Gauge) -> None:
    done = Counter(1)
    client = await _connect(job, done.count)
    await _subscribe(client, [DONE], 0)
    topics, content = job.topic_names(), job.content
    several = len(topics)
    options = {"content_type": CONTENT_TYPE, "user_property": USER_PROPERTIES} if job.properties else {}
    # It has no public way to wait for an acknowledgement; a storage of one's own could do the same.
    storage = client._persistent_storage
    # Above the broker's Receive Maximum it raises instead of waiting; mosquitto's is 20.
    window = WINDOW if job.control else 19
    gauge.start()
    for number in range(job.count):
        client.publish(topics[number % several], content, qos=job.qos, **options)
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)
        if job.qos and number % window == window - 1:
            await storage.wait_empty()
    await storage.wait_empty()
    client.publish(DONE, b"", qos=0)
    await done.reached.wait()
    gauge.stop()


async def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    client = await _connect(job, returns)
    topic = job.topic_names()[0]
    await _subscribe(client, [topic], job.qos)
    trips: list[float] = []
    for _ in range(job.count):
        await asyncio.sleep(0.002)
        before = time.perf_counter()
        client.publish(topic, job.content, qos=job.qos)
        await returns.wait()
        trips.append(time.perf_counter() - before)
    gauge.trips(trips)


async def reconnect(job: Job, gauge: Gauge) -> None:
    """It reconnects by itself; its subscriptions are replayed by hand.

    All of them in one call is the quickest that its interface has: ``resubscribe()`` takes one at a time, and a packet
    for each.
    """
    counter = Counter(1)
    client = await _connect(job, counter.count)
    client.set_config({"reconnect_delay": 0, "reconnect_retries": -1})
    subscriptions = await _subscribe(client, job.topic_filters(), job.qos)

    def on_connect(client: Any, *_: object) -> None:
        client.subscribe(subscriptions)

    client.on_connect = on_connect
    gauge.start()
    await counter.reached.wait()
    gauge.stop()


async def subscriptions(job: Job, gauge: Gauge) -> None:
    client = await _connect(job, Counter(1).count)
    gauge.memory()
    await _subscribe(client, job.topic_filters(), job.qos)
    gauge.memory()


async def drivers(job: Job, gauge: Gauge) -> None:
    clients = [await _connect(job, Counter(1).count)]
    gauge.memory()
    clients += [await _connect(job, Counter(1).count, f"gmqtt{number}") for number in range(job.count)]
    gauge.memory()
