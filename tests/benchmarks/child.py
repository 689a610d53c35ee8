"""``python -m benchmarks.child JOB``: the process of one client. It prints its figures as JSON."""

from __future__ import annotations

import importlib
import json
import sys

from .gauge import Gauge
from .job import Job


def main() -> None:
    job = Job.from_json(sys.argv[1])
    client = importlib.import_module(f".clients.{job.client}", __package__)
    gauge = Gauge(job)
    client.run(getattr(client, job.work), job, gauge)
    gauge.close()
    sys.stdout.write(json.dumps(gauge.figures) + "\n")


if __name__ == "__main__":
    main()
