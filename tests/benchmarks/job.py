"""What one client is asked to do in one run, and the topics, filters and payloads that follow from it."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

Version = Literal["5", "3.1.1"]

HOST = "127.0.0.1"
DONE = "bench/done"
"""A publishing client subscribes to it and publishes to it last: the message that comes back ends the phase."""
WINDOW = 1000
"""QoS 1 messages in flight: what each client is set to, where it lets one."""
CONTENT_TYPE = "application/octet-stream"
USER_PROPERTIES = (("site", "north"), ("unit", "kelvin"))
"""With the content type, what a message carries where MQTT 5 is measured "with properties"."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of one client. It goes to the processes as JSON."""

    work: str
    """The function of the client's module: receive, publish, round_trip, reconnect, subscriptions or drivers."""
    client: str
    """The module in ``clients``."""
    api: str = ""
    """Which of the client's interfaces; the client says which it has."""
    version: Version = "5"
    qos: int = 0
    count: int = 0
    """Messages, round trips, or drivers."""
    topics: int = 50
    filters: int = 1
    payload: int = 64
    """Bytes."""
    properties: bool = False
    port: int = 0
    control: int = 0
    """The server's port for "go"; 0 if it needs no such word."""

    @property
    def expected(self) -> int:
        """Messages that a receiver waits for: one more comes when the others are acknowledged."""
        return self.count + 1

    @property
    def content(self) -> bytes:
        return b"x" * self.payload

    def topic_filters(self) -> list[str]:
        if self.filters == 1:
            return ["bench/#"]
        return [f"bench/{number:06}/+" for number in range(self.filters)]

    def topic_names(self) -> list[str]:
        """All of the same length, spread over the filters: each matches exactly one."""
        step = max(1, self.filters // self.topics)
        return [f"bench/{number * step % self.filters:06}/{number:06}" for number in range(self.topics)]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))
