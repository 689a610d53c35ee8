"""The replay, kept ready.

As a rule a broker is told after a reconnect what it was told before, and answers as before. So the batches are kept
with their answers, and while nothing changes a replay sends them and compares: no registration is looked at.
Hazard: a plan must say what is wanted now. In it is only what was granted in its present form; whoever changes or ends
a registration that may be in it, or has other terms to keep to, forgets all of it. The next replay goes through the
registrations then, and its answers are the new plan, to which those of later subscriptions are added. It is complete,
and only then used, when it holds as many as are wanted, since none can be in it twice. One that has been forgotten
seldom becomes complete before that replay.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from ._registration import Batch, Terms, overhead
from ._types import UserProperties

M = TypeVar("M")


class Plan(Generic[M]):
    """The batches that a replay consists of."""

    def __init__(self) -> None:
        self.terms = Terms(1)
        """What its packets keep to; each connection says."""
        self.count = 0
        """Registrations in it."""
        self._batches: list[Batch[M]] = []
        self._last: dict[tuple[int | None, UserProperties], Batch[M]] = {}

    def add(self, batch: Batch[M]) -> None:
        """One that was granted; it may become part of another one."""
        self.count += len(batch.registrations)
        if batch.registrations[0].topic_filter in self.terms.apart:
            self._batches.append(batch)
            return
        kind = (batch.identifier, batch.user_properties)
        last = self._last.get(kind)
        if last is None or not self._join(last, batch):
            self._batches.append(batch)
            self._last[kind] = batch

    def _join(self, last: Batch[M], batch: Batch[M]) -> bool:
        length = last.length + batch.length - overhead(batch.user_properties)
        too_long = self.terms.max_bytes is not None and length > self.terms.max_bytes
        if too_long or len(last.registrations) + len(batch.registrations) > self.terms.size:
            return False
        assert last.codes is not None
        assert batch.codes is not None
        last.registrations += batch.registrations
        last.revisions += batch.revisions
        last.filters += batch.filters
        last.codes += batch.codes
        last.length = length
        return True

    def take(self) -> list[Batch[M]]:
        """All of them, to be sent. Nothing is left here until they are answered and added again."""
        batches = self._batches
        self.forget()
        return batches

    def forget(self) -> None:
        self.count = 0
        self._batches = []
        self._last = {}
