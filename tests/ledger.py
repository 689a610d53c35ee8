"""What was sent and what arrived, written down at both ends; faults are told relative to the outages of a day."""

from __future__ import annotations

import math

import attrs
import trio


@attrs.define
class Outage:
    kind: str
    start: float
    end: float = math.inf
    """The network's return."""
    back: float = math.inf
    """The first message that was acknowledged after it."""


class Diary:
    """The outages of a day, and what went wrong in it."""

    def __init__(self) -> None:
        self.start = trio.current_time()
        self.outages: list[Outage] = []
        self.complaints: list[str] = []

    def begin(self, kind: str) -> Outage:
        outage = Outage(kind, trio.current_time())
        self.outages.append(outage)
        return outage

    def place(self, at: float) -> str:
        """A time of the day in words, e.g. "12.0 s into outage 3 (cut cable)"."""
        past = [outage for outage in self.outages if outage.start <= at]
        if not past:
            return f"{at - self.start:.1f} s into the day"
        last = past[-1]
        name = f"outage {len(past)} ({last.kind})"
        if at < last.end:
            return f"{at - last.start:.1f} s into {name}"
        if at < last.back:
            return f"{at - last.end:.1f} s after the end of {name}, before the first acknowledgement"
        return f"{at - last.back:.1f} s after the return from {name}"

    def complain(self, text: str) -> None:
        self.complaints.append(f"{text}; noticed {self.place(trio.current_time())}")


class Sequence:
    """The rising numbers of one topic on their way to one place.

    It keeps what has not arrived yet, and nothing of what has: a day must not fill the memory.
    """

    def __init__(self, name: str, diary: Diary, *, once: bool = False) -> None:
        self.name = name
        self.missing: dict[int, float] = {}
        """Number → when it was sent; the numbers that must arrive and have not."""
        self._diary = diary
        self._once = once
        self._highest = 0

    def expect(self, number: int) -> None:
        self.missing[number] = trio.current_time()

    def arrive(self, number: int, *, repeated: bool = False) -> None:
        """``repeated`` is what the broker says of the message; what it sends again may come late."""
        sent = self.missing.pop(number, None)
        if number > self._highest:
            self._highest = number
        elif self._once:
            self._diary.complain(f"{self.name} #{number} arrived again, or after #{self._highest}")
        elif sent is not None and not repeated:
            self._diary.complain(
                f"{self.name} #{number}, sent {self._diary.place(sent)}, arrived after #{self._highest}"
            )

    def told(self) -> list[str]:
        """What is missing, in words."""
        return [
            f"{self.name} #{number} has not arrived; sent {self._diary.place(at)}"
            for number, at in self.missing.items()
        ]
