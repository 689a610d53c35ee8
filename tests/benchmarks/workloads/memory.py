"""Resident memory of what there may be many of."""

from __future__ import annotations

from ..job import Job
from .base import Workload

MEMORY = (
    Workload(
        "memory-subscriptions",
        "Memory for each of 1,000 subscriptions",
        "sink",
        Job("subscriptions", "", filters=1_000),
        figure="memory",
    ),
    Workload(
        "memory-drivers",
        "Memory for each of 1,000 clients in one process",
        "sink",
        Job("drivers", "", count=1_000),
        figure="memory",
        least=50,
    ),
)
