"""This driver."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import trio

from trio_mqtt_driver import BackoffConfig, DriverConfig, Message, MQTTDriver

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job

Work = Callable[[Job, Gauge], Awaitable[None]]
AT_ONCE = 1000
"""Subscribe calls, or drivers' connects, under way at a time."""


def run(work: Work, job: Job, gauge: Gauge) -> None:
    trio.run(work, job, gauge)


def config(job: Job, **options: Any) -> DriverConfig:
    # 3.1.1 has no Receive Maximum for the window; the driver keeps to 20 there whatever this says.
    return DriverConfig.from_url(
        f"mqtt://{HOST}:{job.port}",
        client_id="ours",
        protocol=job.version,
        receive_maximum=WINDOW,
        in_flight=WINDOW,
        **options,
    )


def properties(job: Job) -> dict[str, Any]:
    return {"content_type": CONTENT_TYPE, "user_properties": USER_PROPERTIES} if job.properties else {}


class Counter:
    """``count`` is a handler; it sets ``reached`` at the last message."""

    def __init__(self, expected: int) -> None:
        self.left = expected
        self.reached = trio.Event()

    def count(self, _message: Message[bytes]) -> None:
        self.left -= 1
        if not self.left:
            self.reached.set()


async def _subscribe_all(driver: MQTTDriver, job: Job, handler: Callable[[Message[bytes]], None]) -> None:
    filters = job.topic_filters()
    for start in range(0, len(filters), AT_ONCE):
        async with trio.open_nursery() as nursery:
            for topic_filter in filters[start : start + AT_ONCE]:
                nursery.start_soon(_subscribe, driver, topic_filter, handler, job.qos)


async def _subscribe(
    driver: MQTTDriver, topic_filter: str, handler: Callable[[Message[bytes]], None], qos: int
) -> None:
    await driver.subscribe(topic_filter, handler, qos=qos)


async def receive(job: Job, gauge: Gauge) -> None:
    async with MQTTDriver(config(job)) as driver:
        if job.api == "handler":
            counter = Counter(job.expected)
            await _subscribe_all(driver, job, counter.count)
            gauge.start()
            await counter.reached.wait()
        else:
            (topic_filter,) = job.topic_filters()
            async with driver.subscription(topic_filter, qos=job.qos) as messages:
                left = job.expected
                gauge.start()
                async for _ in messages:
                    left -= 1
                    if not left:
                        break
        gauge.stop()


async def publish(job: Job, gauge: Gauge) -> None:
    async with MQTTDriver(config(job)) as driver:
        done = Counter(1)
        await driver.subscribe(DONE, done.count)
        gauge.start()
        if job.api == "nowait":
            await (_publish_and_drain if job.qos else _publish_until_full)(driver, job)
        elif job.api == "receipts":
            await _publish_receipts(driver, job)
        elif job.qos:
            await _publish_in_tasks(driver, job)
        else:
            await _publish_one_by_one(driver, job, range(job.count))
        await driver.publish(DONE)
        await done.reached.wait()
        gauge.stop()


async def _publish_and_drain(driver: MQTTDriver, job: Job) -> None:
    """A window's worth, until all of it is acknowledged: for whoever need not know the result of each."""
    topics, content, options = job.topic_names(), job.content, properties(job)
    several = len(topics)
    for number in range(job.count):
        driver.publish_nowait(topics[number % several], content, qos=job.qos, **options)
        if number % WINDOW == WINDOW - 1:
            await driver.drain()
    await driver.drain()


async def _publish_receipts(driver: MQTTDriver, job: Job) -> None:
    """A window's worth of receipts, then each is waited for."""
    topics, content, options = job.topic_names(), job.content, properties(job)
    several = len(topics)
    for start in range(0, job.count, WINDOW):
        receipts = [
            driver.publish_nowait(topics[number % several], content, qos=job.qos, **options)
            for number in range(start, min(start + WINDOW, job.count))
        ]
        for receipt in receipts:
            await receipt.wait()


async def _publish_until_full(driver: MQTTDriver, job: Job) -> None:
    """Without waiting, but when the write buffer is full, or others have waited for long enough."""
    topics, content, options = job.topic_names(), job.content, properties(job)
    several = len(topics)
    for number in range(job.count):
        receipt = driver.publish_nowait(topics[number % several], content, **options)
        if not receipt.done or not number % WINDOW:
            await receipt.wait()


async def _publish_in_tasks(driver: MQTTDriver, job: Job) -> None:
    """As an application does that has many tasks, each of which waits for its own publish."""
    async with trio.open_nursery() as nursery:
        for task in range(100):
            nursery.start_soon(_publish_one_by_one, driver, job, range(task, job.count, 100))


async def _publish_one_by_one(driver: MQTTDriver, job: Job, numbers: range) -> None:
    topics, content, options = job.topic_names(), job.content, properties(job)
    several = len(topics)
    for number in numbers:
        await driver.publish(topics[number % several], content, qos=job.qos, **options)


async def round_trip(job: Job, gauge: Gauge) -> None:
    topic = job.topic_names()[0]
    async with MQTTDriver(config(job)) as driver:
        # Not `publish()`, which would wait for the acknowledgement: the message comes back before it.
        publish = partial(driver.publish_nowait, topic, job.content, qos=job.qos)
        if job.api == "iterator":
            async with driver.subscription(topic, qos=job.qos) as messages:
                gauge.trips([await _trip(publish, messages.receive) for _ in range(job.count)])
        else:
            returned = trio.Event()

            def handle(_message: Message[bytes]) -> None:
                returned.set()

            async def wait() -> None:
                nonlocal returned
                await returned.wait()
                returned = trio.Event()

            await driver.subscribe(topic, handle, qos=job.qos)
            gauge.trips([await _trip(publish, wait) for _ in range(job.count)])


async def _trip(publish: Callable[[], object], wait: Callable[[], Awaitable[object]]) -> float:
    await trio.sleep(0.002)
    before = time.perf_counter()
    publish()
    await wait()
    return time.perf_counter() - before


async def reconnect(job: Job, gauge: Gauge) -> None:
    # As fast as it can: an application would leave the rate limit where it is.
    at_once = BackoffConfig(start=0.001, min_interval=0, stable_after=0)
    async with MQTTDriver(config(job, backoff=at_once)) as driver:
        counter = Counter(1)
        await _subscribe_all(driver, job, counter.count)
        gauge.start()
        await counter.reached.wait()
        gauge.stop()


async def subscriptions(job: Job, gauge: Gauge) -> None:
    async with MQTTDriver(config(job)) as driver:
        counter = Counter(1)
        await driver.subscribe("warm/up", counter.count)
        gauge.memory()
        await _subscribe_all(driver, job, counter.count)
        gauge.memory()


async def drivers(job: Job, gauge: Gauge) -> None:
    async with MQTTDriver(config(job)), AsyncExitStack() as stack:
        gauge.memory()
        for _ in range(job.count):
            await stack.enter_async_context(MQTTDriver(config(job)))
        gauge.memory()
