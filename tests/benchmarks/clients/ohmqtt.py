"""ohmqtt: a thread of its own, callbacks; MQTT 5 only."""

from __future__ import annotations

import importlib
import time
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .threads import PATIENCE, Counter, Returns, run as run

ohmqtt: Any = importlib.import_module("ohmqtt")
ohmqtt_property: Any = importlib.import_module("ohmqtt.property")


def _connect(job: Job, client_id: str = "ohmqtt", **options: Any) -> Any:
    client = ohmqtt.Client()
    client.start_loop()
    client.connect(
        f"mqtt://{HOST}:{job.port}",
        client_id=client_id,
        clean_start=True,
        connect_properties=ohmqtt_property.MQTTConnectProps(ReceiveMaximum=WINDOW),
        **options,
    )
    client.wait_for_connect(PATIENCE)
    return client


def _subscribe(client: Any, filters: list[str], callback: Any, qos: int) -> None:
    handles = [client.subscribe(topic_filter, callback, qos) for topic_filter in filters]
    for handle in handles:
        handle.wait_for_ack(PATIENCE)


def receive(job: Job, gauge: Gauge) -> None:
    counter = Counter(job.expected)
    client = _connect(job)
    _subscribe(client, job.topic_filters(), counter.count, job.qos)
    gauge.start()
    counter.reached.wait()
    gauge.stop()
    client.shutdown()


def publish(job: Job, gauge: Gauge) -> None:
    topics, content = job.topic_names(), job.content
    several = len(topics)
    options: dict[str, Any] = {}
    if job.properties:
        options["properties"] = ohmqtt_property.MQTTPublishProps(
            ContentType=CONTENT_TYPE, UserProperty=list(USER_PROPERTIES)
        )
    done = Counter(1)
    client = _connect(job)
    _subscribe(client, [DONE], done.count, 0)
    gauge.start()
    for start in range(0, job.count, WINDOW):
        handles = [
            client.publish(topics[number % several], content, qos=job.qos, **options)
            for number in range(start, min(start + WINDOW, job.count))
        ]
        if job.qos:
            for handle in handles:
                handle.wait_for_ack(PATIENCE)
    client.publish(DONE, b"")
    done.reached.wait()
    gauge.stop()
    client.shutdown()


def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic = job.topic_names()[0]
    trips: list[float] = []
    client = _connect(job)
    _subscribe(client, [topic], returns, job.qos)
    for _ in range(job.count):
        time.sleep(0.002)  # noqa: TID251  # no Trio here
        before = time.perf_counter()
        client.publish(topic, job.content, qos=job.qos)
        returns.wait()
        trips.append(time.perf_counter() - before)
    gauge.trips(trips)
    client.shutdown()


def reconnect(job: Job, gauge: Gauge) -> None:
    counter = Counter(1)
    client = _connect(job, reconnect_delay=0.001)
    _subscribe(client, job.topic_filters(), counter.count, job.qos)
    gauge.start()
    counter.reached.wait()
    gauge.stop()
    client.shutdown()


def subscriptions(job: Job, gauge: Gauge) -> None:
    client = _connect(job)
    gauge.memory()
    _subscribe(client, job.topic_filters(), Counter(1).count, job.qos)
    gauge.memory()
    client.shutdown()
