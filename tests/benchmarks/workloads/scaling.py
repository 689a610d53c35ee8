"""How the cost of a message grows, this driver only: with subscriptions, topics and payload."""

from __future__ import annotations

from ..job import Job
from .base import Workload

FILTERS = "subscriptions"
TOPICS = "topics"
PAYLOAD = "payload bytes"


def _payload(size: int) -> Workload:
    # About 200 MB at most go over the wire.
    job = Job("receive", "", "handler", count=min(20_000, 200_000_000 // max(size, 1)), payload=size, topics=10)
    return Workload(f"payload-{size}", f"Payload of {size:,} bytes", "feeder", job, line=PAYLOAD, x=size, least=50)


SCALING = (
    *(
        Workload(
            f"filters-{filters}",
            f"{filters:,} subscriptions",
            "feeder",
            Job("receive", "", "handler", count=20_000, filters=filters, topics=1000),
            line=FILTERS,
            x=filters,
            least=1000,
        )
        for filters in (1, 10, 100, 1_000, 10_000, 100_000)
    ),
    *(
        Workload(
            f"topics-{topics}",
            f"{topics:,} topics",
            "feeder",
            Job("receive", "", "handler", count=20_000, topics=topics),
            line=TOPICS,
            x=topics,
            least=1000,
        )
        for topics in (1, 10, 100, 1_000, 10_000)
    ),
    *(_payload(size) for size in (0, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)),
)
