"""``python -m benchmarks.servers ROLE JOB``: one server, for one client; it ends when its standard input is closed."""

from __future__ import annotations

import json
import sys

from ..job import Job
from .base import Server
from .cutter import Cutter
from .feeder import Feeder
from .publisher import Publisher
from .relay import Relay
from .sink import Sink

ROLES: dict[str, type[Server]] = {
    "feeder": Feeder,
    "sink": Sink,
    "cutter": Cutter,
    "publisher": Publisher,
    "relay": Relay,
}


def main() -> None:
    role, job = sys.argv[1:]
    server = ROLES[role](Job.from_json(job))
    sys.stdout.write(json.dumps({"port": server.port, "control": server.control_port}) + "\n")
    sys.stdout.flush()
    server.run()


if __name__ == "__main__":
    main()
