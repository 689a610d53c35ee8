"""Cancellation that comes in a group, with something else beside it.

A task of the application that is cancelled may fail in its cleanup, and its nursery puts both in one group. The scope
that had cancelled it takes its own part out, and the rest goes on as an exception that nobody expects there: it has
passed by every ``except Exception`` inside that scope. So wherever the application's code is awaited the two part.
"""

from __future__ import annotations

import logging
import sys
from typing import cast

import trio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

logger = logging.getLogger("trio_mqtt_driver")


def only_cancelled(exc: BaseException) -> bool:
    """Whether it is a cancellation and nothing else. Out of a nursery it comes in a group, even if it is alone."""
    if isinstance(exc, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", exc).split(trio.Cancelled)[1] is None
    return isinstance(exc, trio.Cancelled)


def without_errors(group: BaseExceptionGroup[BaseException], what: str) -> BaseExceptionGroup[BaseException]:
    """What to raise instead of a group that ``what`` has raised: of a cancellation with ordinary errors beside it the
    cancellation alone. The errors are logged, since the cancellation is what the caller will speak of."""
    cancelled, rest = group.split(trio.Cancelled)
    if cancelled is None or not isinstance(rest, ExceptionGroup):
        return group
    error: Exception = cast("ExceptionGroup[Exception]", rest)
    logger.error("%s failed when it was cancelled", what, exc_info=error)
    return cancelled
