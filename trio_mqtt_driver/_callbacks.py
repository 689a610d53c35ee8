"""Functions of the application that are called when something happens, one after the other."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

logger = logging.getLogger("trio_mqtt_driver")


class Callbacks(Generic[T]):
    """Calls each of them with one value. ``kind`` names them in the log, ``argument`` the value in an error."""

    def __init__(self, kind: str, argument: str) -> None:
        self._kind = kind
        self._argument = argument
        self._callbacks: dict[object, Callable[[T], object]] = {}

    def register(self, callback: Callable[[T], object]) -> Callable[[], None]:
        """Call ``callback`` each time from now on; returns the function that ends that, any number of times."""
        if not callable(callback) or inspect.iscoroutinefunction(callback):
            raise TypeError(
                f"callback must be a plain function of one {self._argument}, not {callback!r}; nobody would await it"
            )
        key = object()
        self._callbacks[key] = callback

        def unregister() -> None:
            self._callbacks.pop(key, None)

        return unregister

    @trio.lowlevel.disable_ki_protection  # a callback that hangs can be interrupted
    def call(self, value: T) -> None:
        """Those that a callback registers hear the next one; those that it unregisters hear no more."""
        for key in list(self._callbacks):
            callback = self._callbacks.get(key)  # an earlier one may have unregistered it
            if callback is None:
                continue
            try:
                callback(value)
            except Exception:  # one subscriber's bug must not hurt the next, nor the supervisor
                logger.exception("%s callback %r failed", self._kind, callback)
