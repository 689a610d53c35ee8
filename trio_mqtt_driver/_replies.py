"""Answers that a connection waits for."""

from __future__ import annotations

from typing import Generic, TypeVar

import attrs
import trio

T = TypeVar("T")


class Reply(Generic[T]):
    """The answer to one request. Settled on every path: by the answer, or by the end of the connection."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._value: T | None = None
        self._error: Exception | None = None

    def set(self, value: T) -> None:
        self._value = value
        self._event.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._event.set()

    @property
    def settled(self) -> bool:
        return self._event.is_set()

    @trio.lowlevel.enable_ki_protection
    async def wait(self) -> T:
        await self._event.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set() came first


@attrs.define(eq=False)
class Ping:
    sent_at: float
    reply: Reply[float]
    wire_end: int = 0
    """Where PINGREQ ends among the bytes of the connection."""
    asked_at: float = attrs.field(default=attrs.Factory(lambda self: self.sent_at, takes_self=True), init=False)
    """When it left, or bytes before it did."""
