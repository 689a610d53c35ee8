"""paho-mqtt itself, with the thread that ``loop_start()`` makes; callbacks."""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

from ..gauge import Gauge
from ..job import CONTENT_TYPE, DONE, HOST, USER_PROPERTIES, WINDOW, Job
from .threads import PATIENCE, Counter, Returns, run as run

paho: Any = importlib.import_module("paho.mqtt.client")
paho_enums: Any = importlib.import_module("paho.mqtt.enums")
paho_properties: Any = importlib.import_module("paho.mqtt.properties")
paho_packettypes: Any = importlib.import_module("paho.mqtt.packettypes")
paho_options: Any = importlib.import_module("paho.mqtt.subscribeoptions")


def make(job: Job, client_id: str = "paho") -> Any:
    client = paho.Client(
        paho_enums.CallbackAPIVersion.VERSION2,
        client_id,
        protocol=paho.MQTTv5 if job.version == "5" else paho.MQTTv311,
    )
    client.max_inflight_messages_set(WINDOW if job.control else 20)
    return client


def subscriptions_of(job: Job, filters: list[str]) -> list[tuple[str, Any]]:
    if job.version == "5":
        return [(topic_filter, paho_options.SubscribeOptions(qos=job.qos)) for topic_filter in filters]
    return [(topic_filter, job.qos) for topic_filter in filters]


def options_of(job: Job) -> dict[str, Any]:
    if not job.properties:
        return {}
    properties = paho_properties.Properties(paho_packettypes.PacketTypes.PUBLISH)
    properties.ContentType = CONTENT_TYPE
    properties.UserProperty = list(USER_PROPERTIES)
    return {"properties": properties}


def _connect(job: Job, on_message: Any, filters: list[str]) -> Any:
    """Subscriptions are made in ``on_connect``, as its documentation shows, so that a reconnect makes them, too."""
    client = make(job)
    subscribed = threading.Event()
    client.on_message = on_message
    client.on_connect = lambda *_: client.subscribe(subscriptions_of(job, filters))
    client.on_subscribe = lambda *_: subscribed.set()
    client.reconnect_delay_set(1, 1)
    client.connect(HOST, job.port)
    client.loop_start()
    if not subscribed.wait(PATIENCE):
        raise ConnectionError("paho did not connect")
    return client


def receive(job: Job, gauge: Gauge) -> None:
    counter = Counter(job.expected)
    client = _connect(job, counter.count, job.topic_filters())
    gauge.start()
    counter.reached.wait()
    gauge.stop()
    client.disconnect()


def publish(job: Job, gauge: Gauge) -> None:
    topics, content, options = job.topic_names(), job.content, options_of(job)
    several = len(topics)
    done = Counter(1)
    client = _connect(job, done.count, [DONE])
    gauge.start()
    for start in range(0, job.count, WINDOW):
        infos = [
            client.publish(topics[number % several], content, job.qos, **options)
            for number in range(start, min(start + WINDOW, job.count))
        ]
        for info in infos:
            info.wait_for_publish(PATIENCE)
    client.publish(DONE)
    done.reached.wait()
    gauge.stop()
    client.disconnect()


def round_trip(job: Job, gauge: Gauge) -> None:
    returns = Returns()
    topic = job.topic_names()[0]
    trips: list[float] = []
    client = _connect(job, returns, [topic])
    for _ in range(job.count):
        time.sleep(0.002)  # noqa: TID251  # no Trio here
        before = time.perf_counter()
        client.publish(topic, job.content, job.qos)
        returns.wait()
        trips.append(time.perf_counter() - before)
    gauge.trips(trips)
    client.disconnect()


def reconnect(job: Job, gauge: Gauge) -> None:
    counter = Counter(1)
    client = _connect(job, counter.count, job.topic_filters())
    gauge.start()
    counter.reached.wait()
    gauge.stop()
    client.disconnect()
