"""Callbacks for the edges of the link: up, down, and nothing in between."""

from __future__ import annotations

from collections import deque

from ._callbacks import Callbacks


class Edges(Callbacks[bool]):
    """Calls each callback with True when the link comes up and with False when it is lost; never twice the same."""

    def __init__(self) -> None:
        super().__init__("connection", "bool")
        self._up = False
        self._pending: deque[bool] = deque()

    def set(self, up: bool) -> None:
        if up == self._up:
            return
        self._up = up
        self._pending.append(up)
        if len(self._pending) > 1:
            # A callback changed the link. It is told when all have heard of the present edge, so that all of them
            # hear the edges in order; else the last word that some hear would be the wrong one.
            return
        try:
            while self._pending:
                self.call(self._pending[0])
                self._pending.popleft()
        finally:
            self._pending.clear()
