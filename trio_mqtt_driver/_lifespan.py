"""How ``async with MQTTDriver(...)`` begins and ends: one body, the services it uses, and which exception leaves.

The services (supervisor, dispatch) run in a nursery around the body, shielded: whatever cancels the body, from outside
or by us, they still work until the body has unwound, so that a ``finally:`` in it can publish. Only then are they
stopped, within a bound, and cancelled.

The nursery never shows, because no exception reaches it. What the body raised is kept and raised again outside, as the
same object; ``Cancelled`` too, which then meets the scope it belongs to. What a service raised is kept in ``_error``
and cancels the body. Who wins:

1. Ctrl-C that hit the application's code in a service, such as a handler: it is Ctrl-C again. Our own code is
   protected from it, in every task of ours and wherever the application's tasks wait for us: Trio delivers it to the
   main task then, and the driver is left like any other block, with a drain;
2. what the body raised (an exception, Ctrl-C, or a cancellation from outside), as itself;
3. else why the driver stopped for good: a terminal refusal, a handler's exception under ``on_handler_error="raise"``;
   another ``Exception`` that a service raised is our bug, a ``DriverInternalError``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn, cast

import trio

from ._errors import DriverInternalError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("trio_mqtt_driver")


class Lifespan:
    """Binds services to a body."""

    def __init__(self) -> None:
        self._body = trio.CancelScope()
        self._services = trio.CancelScope(shield=True)
        self._error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Stop for good: cancel the body, and let ``error`` leave the ``async with``. The first one counts."""
        if self._error is None:
            self._error = error
            self._body.cancel(reason=f"the driver stopped: {error!r}")

    @asynccontextmanager
    async def around(
        self,
        services: Callable[[], Awaitable[None]],
        *,
        ready: Callable[[], Awaitable[None]],
        stop: Callable[[bool], Awaitable[None]],
    ) -> AsyncGenerator[None, None]:
        """Run ``services`` around the body, which begins after ``ready()``.

        ``stop(graceful)`` ends them: it must bound itself, and is shielded. ``graceful`` is False if they failed.
        """
        body_error: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run, services)
                try:
                    with self._body:
                        await ready()
                        yield
                except BaseException as exc:  # noqa: BLE001, ASYNC103  # raised again below, when the services have ended
                    body_error = exc
                try:
                    with trio.CancelScope(shield=True):
                        await self._stop(stop, graceful=self._error is None)
                finally:
                    # Whatever happens in between, Ctrl-C too: nothing else would end what is shielded.
                    self._services.cancel(reason="the driver is left")
        except BaseExceptionGroup as exc:  # Ctrl-C, again perhaps, while the services were ending
            raise _translate(exc) from exc
        error = self._error
        if body_error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
            if error is not None and error is not body_error:
                logger.error("the driver had stopped before the body raised", exc_info=error)
            _raise(body_error)
        if error is not None:
            _raise(error)

    @trio.lowlevel.enable_ki_protection
    async def _run(self, services: Callable[[], Awaitable[None]]) -> None:
        try:
            with self._services:
                await services()
        except BaseException as exc:  # noqa: BLE001, ASYNC103  # it is kept, and leaves through around()
            self.fail_with(exc)

    def fail_with(self, exc: BaseException) -> None:
        """``fail`` for an exception that came out of a service: Ctrl-C stays itself, an ``Exception`` is our bug."""
        self.fail(_translate(exc))

    async def _stop(self, stop: Callable[[bool], Awaitable[None]], *, graceful: bool) -> None:
        try:
            await stop(graceful)
        except Exception as exc:  # noqa: BLE001  # a bug of ours must not keep the body's exception from leaving
            self.fail(_translate(exc))


def _raise(error: BaseException) -> NoReturn:
    """Raise an error with the context that it has; ``raise`` alone would put there what is being handled now."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context  # no cycle through this frame


def _translate(exc: BaseException) -> BaseException:
    interrupt = _interrupt_in(exc)
    if isinstance(interrupt, KeyboardInterrupt | SystemExit) and interrupt is not exc:
        fresh = type(interrupt)(*interrupt.args)
        fresh.__cause__ = exc
        return fresh
    if interrupt is not None:
        return interrupt
    error = DriverInternalError("a bug in trio-mqtt-driver; please report it with this traceback")
    error.__cause__ = exc
    return error


def _interrupt_in(exc: BaseException) -> BaseException | None:
    """Ctrl-C and its like, such as ``pytest.fail()`` in a handler: what is no ``Exception`` and no cancellation."""
    if not isinstance(exc, BaseExceptionGroup):
        return None if isinstance(exc, Exception | trio.Cancelled) else exc
    group = cast("BaseExceptionGroup[BaseException]", exc)
    return next((found for inner in group.exceptions if (found := _interrupt_in(inner)) is not None), None)
