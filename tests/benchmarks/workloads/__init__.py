"""What is measured, a module for each kind of work."""

from __future__ import annotations

from .base import Workload
from .memory import MEMORY
from .publish import PUBLISH
from .receive import RECEIVE
from .reconnect import RECONNECT
from .round_trip import ROUND_TRIP
from .scaling import SCALING

WORKLOADS: tuple[Workload, ...] = (*RECEIVE, *PUBLISH, *ROUND_TRIP, *RECONNECT, *MEMORY, *SCALING)
