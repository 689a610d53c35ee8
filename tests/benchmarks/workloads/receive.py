"""Receiving: from a process that sends ready-made packets, so that the client is the bottleneck, and from a broker."""

from __future__ import annotations

from ..job import Job, Version
from .base import Workload


def _feeder(qos: int, variant: str = "", version: Version = "5", properties: bool = False) -> Workload:
    job = Job("receive", "", qos=qos, count=20_000, version=version, properties=properties)
    name = f"receive-{qos}-feeder" + variant.replace(", ", "-")
    return Workload(name, f"Receive QoS {qos}, feeder{variant}", "feeder", job, least=100)


def _broker(qos: int) -> Workload:
    job = Job("receive", "", qos=qos, count=10_000)
    title = f"Receive QoS {qos}, mosquitto"
    return Workload(f"receive-{qos}-mosquitto", title, "mosquitto and publisher", job, least=100)


RECEIVE = tuple(
    workload
    for qos in (0, 1)
    for workload in (
        _feeder(qos),
        _feeder(qos, ", properties", properties=True),
        _feeder(qos, ", 3.1.1", version="3.1.1"),
        _broker(qos),
    )
)
