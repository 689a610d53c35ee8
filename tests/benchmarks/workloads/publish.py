"""Publishing: to a process that does nothing but acknowledge, and to a broker."""

from __future__ import annotations

from ..job import Job, Version
from .base import Workload


def _sink(qos: int, variant: str = "", version: Version = "5", properties: bool = False) -> Workload:
    job = Job("publish", "", qos=qos, count=20_000, version=version, properties=properties)
    name = f"publish-{qos}-sink" + variant.replace(", ", "-")
    return Workload(name, f"Publish QoS {qos}, sink{variant}", "sink", job, least=100)


def _broker(qos: int) -> Workload:
    job = Job("publish", "", qos=qos, count=10_000)
    return Workload(f"publish-{qos}-mosquitto", f"Publish QoS {qos}, mosquitto", "mosquitto", job, least=100)


PUBLISH = tuple(
    workload
    for qos in (0, 1)
    for workload in (
        _sink(qos),
        _sink(qos, ", properties", properties=True),
        _sink(qos, ", 3.1.1", version="3.1.1"),
        _broker(qos),
    )
)
