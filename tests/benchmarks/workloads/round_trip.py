"""Round trips through a broker at a low rate: a publish, and the same message in the client's own handler."""

from __future__ import annotations

from ..job import Job
from .base import Workload

ROUND_TRIP = tuple(
    Workload(
        f"round-trip-{qos}",
        f"Round trip QoS {qos}, mosquitto",
        "mosquitto",
        Job("round_trip", "", qos=qos, count=300),
        figure="p50",
        least=20,
    )
    for qos in (0, 1)
)
