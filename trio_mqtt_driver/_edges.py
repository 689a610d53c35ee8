"""Callbacks for the edges of the link: up, down, and nothing in between."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable

ConnectionCallback = Callable[[bool], object]

logger = logging.getLogger("trio_mqtt_driver")


class Edges:
    """Calls each callback with True when the link comes up and with False when it is lost; never twice the same."""

    def __init__(self) -> None:
        self._callbacks: dict[object, ConnectionCallback] = {}
        self._up = False
        self._pending: deque[bool] = deque()

    def register(self, callback: ConnectionCallback) -> Callable[[], None]:
        """Call ``callback`` at each edge from now on; returns the function that ends that, any number of times."""
        if not callable(callback) or inspect.iscoroutinefunction(callback):
            raise TypeError(f"callback must be a plain function of one bool, not {callback!r}; nobody would await it")
        key = object()
        self._callbacks[key] = callback

        def unregister() -> None:
            self._callbacks.pop(key, None)

        return unregister

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
                self._call(self._pending[0])
                self._pending.popleft()
        finally:
            self._pending.clear()

    def _call(self, up: bool) -> None:
        for key in list(self._callbacks):
            callback = self._callbacks.get(key)  # an earlier one may have unregistered it
            if callback is None:
                continue
            try:
                callback(up)
            except Exception:  # one subscriber's bug must not hurt the next, nor the supervisor
                logger.exception("connection callback %r failed", callback)
