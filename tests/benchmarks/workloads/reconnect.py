"""A cut connection: from the cut to the first message on a subscription that was replayed."""

from __future__ import annotations

from ..job import Job
from .base import Workload

RECONNECT = tuple(
    Workload(
        f"reconnect-{filters}",
        f"Reconnect with {filters:,} subscriptions, first message",
        "cutter",
        Job("reconnect", "", qos=1, filters=filters),
        figure="wall",
    )
    for filters in (1_000, 10_000)
)
