"""Callbacks for the edges of the link: up, down, and nothing in between."""

from __future__ import annotations

import logging
from collections.abc import Callable

ConnectionCallback = Callable[[bool], object]

logger = logging.getLogger("trio_mqtt_driver")


class Edges:
    """Calls each callback with True when the link comes up and with False when it is lost; never twice the same."""

    def __init__(self) -> None:
        self._callbacks: dict[object, ConnectionCallback] = {}
        self._up = False

    def register(self, callback: ConnectionCallback) -> Callable[[], None]:
        """Call ``callback`` at each edge from now on; returns the function that ends that, any number of times."""
        key = object()
        self._callbacks[key] = callback

        def unregister() -> None:
            self._callbacks.pop(key, None)

        return unregister

    def set(self, up: bool) -> None:
        if up == self._up:
            return
        self._up = up
        for key in list(self._callbacks):
            callback = self._callbacks.get(key)  # an earlier one may have unregistered it
            if callback is None:
                continue
            try:
                callback(up)
            except Exception:  # one subscriber's bug must not hurt the next, nor the supervisor
                logger.exception("connection callback %r failed", callback)
