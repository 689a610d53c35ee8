"""awscrt: a client in C with threads of its own, callbacks and futures; MQTT 5 only."""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .threads import PATIENCE, Counter, Returns, run as run

mqtt5: Any = importlib.import_module("awscrt.mqtt5")


def _connect(job: Job, on_message: Any, on_connect: Any = None) -> Any:
    connected = threading.Event()

    def connection_success(_: object) -> None:
        if on_connect is not None:
            on_connect()
        connected.set()

    client = mqtt5.Client(
        mqtt5.ClientOptions(
            host_name=HOST,
            port=job.port,
            connect_options=mqtt5.ConnectPacket(client_id="awscrt", receive_maximum=WINDOW),
            on_publish_callback_fn=on_message,
            on_lifecycle_event_connection_success_fn=connection_success,
            min_reconnect_delay_ms=1,
            max_reconnect_delay_ms=1,
            disable_metrics=True,
        )
    )
    client.start()
    if not connected.wait(PATIENCE):
        raise ConnectionError("awscrt did not connect")
    return client


def _subscribe(client: Any, filters: list[str], qos: int) -> Any:
    return client.subscribe(
        mqtt5.SubscribePacket([mqtt5.Subscription(topic_filter, mqtt5.QoS(qos)) for topic_filter in filters])
    )


def receive(job: Job, gauge: Gauge) -> None:
    counter = Counter(job.expected)
    client = _connect(job, counter.count)
    _subscribe(client, job.topic_filters(), job.qos).result(PATIENCE)
    gauge.start()
    counter.reached.wait()
    gauge.stop()
    client.stop()


def publish(job: Job, gauge: Gauge) -> None:
    topics, content, qos = job.topic_names(), job.content, mqtt5.QoS(job.qos)
    several = len(topics)
    options: dict[str, Any] = {}
    if job.properties:
        options["content_type"] = CONTENT_TYPE
        options["user_properties"] = [mqtt5.UserProperty(name, value) for name, value in USER_PROPERTIES]
    done = Counter(1)
    client = _connect(job, done.count)
    _subscribe(client, [DONE], 0).result(PATIENCE)
    gauge.start()
    for start in range(0, job.count, WINDOW):
        futures = [
            client.publish(mqtt5.PublishPacket(topic=topics[number % several], payload=content, qos=qos, **options))
            for number in range(start, min(start + WINDOW, job.count))
        ]
        for future in futures:
            future.result(PATIENCE)
    client.publish(mqtt5.PublishPacket(topic=DONE, payload=b"", qos=mqtt5.QoS(0)))
    done.reached.wait()
    gauge.stop()
    client.stop()


def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic, qos = job.topic_names()[0], mqtt5.QoS(job.qos)
    trips: list[float] = []
    client = _connect(job, returns)
    _subscribe(client, [topic], job.qos).result(PATIENCE)
    for _ in range(job.count):
        time.sleep(0.002)  # noqa: TID251  # no Trio here
        before = time.perf_counter()
        client.publish(mqtt5.PublishPacket(topic=topic, payload=job.content, qos=qos))
        returns.wait()
        trips.append(time.perf_counter() - before)
    gauge.trips(trips)
    client.stop()


def reconnect(job: Job, gauge: Gauge) -> None:
    """It reconnects by itself; its subscriptions are replayed by hand, in its callback."""
    counter = Counter(1)
    filters = job.topic_filters()
    clients: list[Any] = []

    def replay() -> None:
        for client in clients:
            for start in range(0, len(filters), 1000):
                _subscribe(client, filters[start : start + 1000], job.qos)

    client = _connect(job, counter.count, replay)
    for start in range(0, len(filters), 1000):
        _subscribe(client, filters[start : start + 1000], job.qos).result(PATIENCE)
    clients.append(client)
    gauge.start()
    counter.reached.wait()
    gauge.stop()
    client.stop()
