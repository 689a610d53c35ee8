"""A cut connection: from the cut to the first message on a subscription that was replayed.

That message comes as soon as the broker has all of them. Behind mosquitto a relay makes the cut."""

from __future__ import annotations

from ..job import Job
from .base import Server, Workload


def _reconnect(filters: int, server: Server, behind: str = "") -> Workload:
    job = Job("reconnect", "", qos=1, filters=filters)
    name = f"reconnect-{filters}" + (f"-{behind}" if behind else "")
    title = f"Reconnect with {filters:,} subscriptions, first message" + (f", {behind}" if behind else "")
    return Workload(name, title, server, job, figure="wall")


RECONNECT = (
    _reconnect(1_000, "cutter"),
    _reconnect(10_000, "cutter"),
    _reconnect(1_000, "mosquitto and relay", "mosquitto"),
    _reconnect(10_000, "mosquitto and relay", "mosquitto"),
)
