"""What a fault proxy does to the bytes of one direction, and when each may leave."""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from contextlib import contextmanager

import attrs
import trio

# With a limited bandwidth, as much is sent at once as the line carries in this many seconds.
_TICK = 0.05


def check_number(name: str, value: float, least: float, *, endless: bool = False) -> None:
    """``value`` must be a number of at least ``least``, and finite unless ``endless``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= math.inf:
        raise ValueError(f"{name} must be a number of at least {least}, not {value!r}")
    if value == math.inf and not endless:
        raise ValueError(f"{name} must be finite, not {value!r}")


def check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    """``value`` must be an integer of at least ``least``, and of at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {allowed}, not {value!r}")


@attrs.frozen(eq=False, kw_only=True)
class Fault:
    """One fault that lasts."""

    hole: bool = False
    delay: float = 0.0
    jitter: float = 0.0
    bandwidth: float = math.inf
    trickle: bool = False


@attrs.define(eq=False, kw_only=True)
class _Mark:
    """A fault at one byte: ``left`` more pass before it."""

    left: int


@attrs.define(eq=False, kw_only=True)
class _Cut(_Mark):
    reset: bool


@attrs.define(eq=False, kw_only=True)
class _Corruption(_Mark):
    mask: int


class Shaping:
    """The faults of one direction, of all connections together.

    Black holes last until the last one has ended, delays add up, and the lowest bandwidth counts. All connections
    share the bandwidth, as they would share a line.
    """

    def __init__(self, rng: random.Random) -> None:
        self.clear = True
        """Nothing is done to the bytes."""
        self.hole = False
        self.late = False
        """A delay is in force."""
        self.bandwidth = math.inf
        self.trickle = False
        self.lots: set[trio.lowlevel.ParkingLot] = set()
        """Where the lanes wait: they are woken when a fault begins or ends."""
        self._rng = rng
        self._faults: list[Fault] = []
        self._marks: list[_Mark] = []
        self._line_free = -math.inf

    @contextmanager
    def during(self, fault: Fault) -> Generator[None, None, None]:
        self._faults.append(fault)
        self._change()
        try:
            yield
        finally:
            self._faults = [entry for entry in self._faults if entry is not fault]
            self._change()

    def cut_after(self, count: int, *, reset: bool) -> None:
        self._marks.append(_Cut(left=count, reset=reset))
        self._change()

    def corrupt(self, after: int, mask: int) -> None:
        self._marks.append(_Corruption(left=after, mask=mask))
        self._change()

    def due(self) -> float:
        """When a piece that comes now may leave, on Trio's clock."""
        return trio.current_time() + sum(
            fault.delay + (self._rng.uniform(0, fault.jitter) if fault.jitter else 0) for fault in self._faults
        )

    def reserve(self, count: int) -> tuple[int, float]:
        """The next free place on the line: for how many of ``count`` bytes, and when the last of them has arrived."""
        size = max(1, min(count, int(self.bandwidth * _TICK)))
        self._line_free = max(trio.current_time(), self._line_free) + size / self.bandwidth
        return size, self._line_free

    def spend(self, data: memoryview) -> tuple[bytes | memoryview, _Cut | None]:
        """What becomes of ``data`` when it passes now, and the cut that follows it at once, if one does."""
        if not self._marks:
            return data, None
        cuts = [mark for mark in self._marks if isinstance(mark, _Cut) and mark.left <= len(data)]
        cut = min(cuts, key=lambda mark: mark.left, default=None)
        passing = bytearray(data if cut is None else data[: cut.left])
        ahead: list[_Mark] = []
        for mark in self._marks:
            if isinstance(mark, _Corruption) and mark.left < len(passing):
                passing[mark.left] ^= mark.mask
            elif mark is not cut:
                mark.left -= len(passing)
                ahead.append(mark)
        self._marks = ahead
        self._change()
        return bytes(passing), cut

    def _change(self) -> None:
        faults = self._faults
        self.hole = any(fault.hole for fault in faults)
        self.late = any(fault.delay or fault.jitter for fault in faults)
        self.bandwidth = min((fault.bandwidth for fault in faults), default=math.inf)
        self.trickle = any(fault.trickle for fault in faults)
        self.clear = not faults and not self._marks
        for lot in self.lots:
            lot.unpark_all()
