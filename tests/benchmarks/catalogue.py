"""The clients that are measured: where each comes from, which interfaces it has, and what it cannot do."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

from .job import Job
from .workloads.base import Workload

OURS = "trio-mqtt-driver"
FLOOR = "floor"
TRIO_PAHO = "paho as trio-paho-mqtt"

ONE = ("",)


@dataclasses.dataclass(frozen=True, eq=False)
class Client:
    name: str
    module: str
    """In ``clients``."""
    requirements: tuple[str, ...] = ()
    """What pip installs for it; nothing for what runs in the environment of the suite."""
    pip_options: tuple[str, ...] = ()
    versions: tuple[str, ...] = ("5", "3.1.1")
    apis: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict[str, tuple[str, ...]])
    """Work, or work and QoS -> the interfaces it is done with, if there is more than one."""
    without: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Names of workloads, or patterns -> why they are not measured."""
    peer: bool = True

    def reason(self, workload: Workload) -> str | None:
        """Why it is not measured in this one; None if it is."""
        for names, reason in self.without.items():
            if fnmatch.fnmatch(workload.name, names):
                return reason
        if workload.job.version not in self.versions:
            return f"has MQTT {', '.join(self.versions)} only"
        return None

    def apis_for(self, job: Job) -> tuple[str, ...]:
        return self.apis.get(f"{job.work}-{job.qos}") or self.apis.get(job.work, ONE)


CLIENTS = (
    Client(
        FLOOR,
        "floor",
        without={
            "memory-subscriptions": "a bare loop keeps no subscriptions",
            "memory-drivers": "a bare loop keeps nothing but its socket",
        },
        peer=False,
    ),
    Client(
        OURS,
        "ours",
        apis={
            "receive": ("handler", "iterator"),
            "publish-0": ("nowait", "await"),
            "publish-1": ("nowait", "receipts", "await"),
            "round_trip": ("handler", "iterator"),
        },
        peer=False,
    ),
    Client("aiomqtt 2", "aiomqtt2", ("aiomqtt>=2.5,<3",)),
    Client(
        "aiomqtt 3 alpha",
        "aiomqtt3",
        # It asks for mqtt5 0.5, which is there as a source in Rust only; 0.6 has wheels and does the same here.
        ("aiomqtt==3.0.0a1", "mqtt5>=0.6,<0.7"),
        ("--no-deps",),
        versions=("5",),
        without={
            "receive-0-*": "loses QoS 0 messages that arrive while nobody waits for one (its issue 396)",
            "reconnect-*": "replays no subscriptions, and its random delay has no option",
            "memory-subscriptions": "keeps no subscriptions",
        },
    ),
    Client("gmqtt", "gmqtt", ("gmqtt>=0.8,<1",), apis={"receive": ("coroutine", "optimistic")}),
    Client(
        "mqttium",
        "mqttium",
        ("mqttium>=1.2,<2",),
        apis={"receive": ("handler", "iterator"), "publish": ("many", "await")},
    ),
    Client("zmqtt", "zmqtt", ("zmqtt>=0.2.5,<1",)),
    Client(
        "ohmqtt",
        "ohmqtt",
        ("ohmqtt>=1.2,<2",),
        versions=("5",),
        without={"memory-drivers": "needs a thread for each client"},
    ),
    Client(
        "awscrt",
        "awscrt",
        ("awscrt>=0.38,<1",),
        versions=("5",),
        without={
            "memory-subscriptions": "keeps no subscriptions",
            "memory-drivers": "memory of its C library and its threads, not comparable",
        },
    ),
    Client(
        "paho-mqtt",
        "paho_thread",
        ("paho-mqtt>=2.1,<3",),
        without={"memory-subscriptions": "keeps no subscriptions", "memory-drivers": "needs a thread for each client"},
    ),
    Client(
        TRIO_PAHO,
        "paho_trio",
        ("paho-mqtt>=2.1,<3", "trio>=0.31"),
        without={"memory-*": "its shape only was rebuilt: trio-paho-mqtt itself does not run"},
    ),
)
