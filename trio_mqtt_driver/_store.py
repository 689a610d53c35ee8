"""The outbox on disk: what is accepted is written in batches, by one task, in a worker thread.

A message that has its outcome before its turn to be written comes is never written: on a link that works most come and
go like that, and the disk is left alone. So the writer lingers for a moment, unless somebody waits for the disk.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Final

import trio

from ._errors import OutboxFileError
from ._history import Counters
from ._outbox_file import LAST_ROW, Misfit, Operation, OutboxFile, Refused
from ._outgoing import Outgoing
from ._replies import Reply

logger = logging.getLogger("trio_mqtt_driver")

_LINGER: Final = 0.05
"""Seconds that a message which nobody waits for is not written: by then it may have its outcome."""
_BATCH_MESSAGES: Final = 1000
_BATCH_BYTES: Final = 4 * 1024 * 1024
"""A batch ends with the message that reaches one of these."""
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
"""Seconds between attempts to write, doubled from one to the other while they fail."""


class Store:
    """The outbox on disk. ``run()`` must be running for anything to be written before ``aclose()``."""

    def __init__(
        self,
        file: OutboxFile,
        messages: list[Outgoing],
        misfits: list[Misfit],
        *,
        limiter: trio.CapacityLimiter,
        wall_clock: Callable[[], float],
        counters: Counters,
    ) -> None:
        self.messages = messages
        """What the file held when it was opened, in the order of acceptance; expired ones are among them."""
        self._file = file
        self._limiter = limiter
        self._wall_clock = wall_clock
        self._counters = counters
        rows = [message.row for message in messages] + [misfit.row for misfit in misfits]
        self._last_row = max((row for row in rows if row <= LAST_ROW), default=0)
        self._pending: dict[int, Operation] = {misfit.row: misfit for misfit in misfits}
        self._writing: dict[int, Operation] = {}
        self._waiters: dict[int, Reply[None]] = {}
        self._work = trio.Event()  # there is something to write
        self._hurry = trio.Event()  # and it should not wait for more
        if misfits:
            self._work.set()
        self._error: str | None = None
        self._closed = False

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        wall_clock: Callable[[], float] = time.time,
        counters: Counters | None = None,
    ) -> Store:
        """Open the file, or create it (mode 0600), and read what it holds, in a worker thread.

        What is in it and cannot be a message goes into the quarantine, with the next batch. Raises
        ``OutboxFileError``. Cancelling it waits for the thread.
        """
        # Its own: one call at a time is what the connection needs, and the application may have used up the default.
        limiter = trio.CapacityLimiter(1)
        counters = Counters() if counters is None else counters
        now, wall = trio.current_time(), wall_clock()
        file, messages, misfits = await trio.to_thread.run_sync(_open, path, now, wall, limiter=limiter)
        store = cls(file, messages, misfits, limiter=limiter, wall_clock=wall_clock, counters=counters)
        if misfits:
            counters.quarantined += len(misfits)
            logger.error(
                "outbox file %s: %d messages cannot be read and go into the quarantine; the first, in row %d: %s",
                file.path,
                len(misfits),
                misfits[0].row,
                misfits[0].reason,
            )
        return store

    def add(self, outgoing: Outgoing) -> None:
        """Write it with the next batch. Gives it its row: the last of all so far."""
        self._last_row += 1
        outgoing.row = self._last_row
        self._put(outgoing.row, outgoing)

    def remove(self, outgoing: Outgoing) -> None:
        """It has an outcome: forget it. No effect if it is not in the store."""
        row, outgoing.row = outgoing.row, 0
        if row in self._pending:
            del self._pending[row]
            self._wake(row)
        elif row:
            self._put(row, None)

    def quarantine(self, outgoing: Outgoing, reason: str) -> None:
        """Keep it where it is not sent any more."""
        row, outgoing.row = outgoing.row, 0
        if not row:
            self._last_row = row = self._last_row + 1
        self._pending.pop(row, None)  # its place in the quarantine is that of now
        self._put(row, Refused(outgoing=outgoing, reason=reason, at=self._wall_clock()))

    def _put(self, row: int, operation: Operation) -> None:
        self._pending[row] = operation
        self._work.set()
        if len(self._pending) >= _BATCH_MESSAGES:
            self._hurry.set()

    async def wait_stored(self, outgoing: Outgoing) -> None:
        """Return when it is on the disk, or has been removed, so that it need not be.

        Raises ``OutboxFileError`` if it could not be written, or if the latest batch could not and it is not its turn
        yet. It stays in the store then, and is written when that works again. Cancelling only ends the wait.
        """
        await trio.lowlevel.checkpoint()
        await self._written(outgoing.row)

    async def wait_removed(self, rows: Iterable[int]) -> None:
        """Return when none of what ``remove()`` was called for is on the disk any more. Errors as ``wait_stored``."""
        await trio.lowlevel.checkpoint()
        for row in rows:
            await self._written(row)

    @trio.lowlevel.enable_ki_protection
    async def _written(self, row: int) -> None:
        if row in self._pending or row in self._writing:
            if self._error is not None:
                raise OutboxFileError(self._error)
            waiter = self._waiters.setdefault(row, Reply())
            self._hurry.set()
            await waiter.wait()

    def _wake(self, row: int) -> None:
        waiter = self._waiters.pop(row, None)
        if waiter is not None:
            waiter.set(None)

    def _fail(self, text: str) -> None:
        self._error = text
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            waiter.fail(OutboxFileError(text))

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Write what gathers, one batch after the other, until cancelled. A batch that is being written is ended."""
        pause = _FIRST_PAUSE
        while True:
            await self._work.wait()
            newest = None
            if self._pending and not self._waiters and len(self._pending) < _BATCH_MESSAGES:
                newest = self._last_row
                self._hurry = trio.Event()
                with trio.move_on_after(_LINGER):
                    await self._hurry.wait()
                    newest = None
            if not self._pending:
                self._work = trio.Event()
            elif await self._write(newest):
                pause = _FIRST_PAUSE
            else:
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _write(self, newest: int | None = None) -> bool:
        """Write a batch of messages up to the ``newest``, or of all; returns whether that worked."""
        writing = self._take(newest)
        if not writing:
            await trio.lowlevel.checkpoint()
            return True
        self._writing = writing
        offset = self._wall_clock() - trio.current_time()
        # Who waits for a removal sends the message next, and may send it once only.
        sync = any(operation is None and row in self._waiters for row, operation in writing.items())
        try:
            await trio.to_thread.run_sync(self._file.write, list(writing.items()), offset, sync, limiter=self._limiter)
        except sqlite3.Error as exc:
            self._put_back(writing)
            self._failed(exc)
            return False
        except BaseException:
            self._put_back(writing)
            raise
        self._writing = {}
        if self._error is not None:
            self._error = None
            logger.warning("outbox file %s: it can be written again", self._file.path)
        for row in writing:
            if row not in self._pending:  # else it was removed meanwhile, and its deletion is still to be written
                self._wake(row)
        return True

    def _take(self, newest: int | None) -> dict[int, Operation]:
        taken: dict[int, Operation] = {}
        size = 0
        for row, operation in self._pending.items():
            if isinstance(operation, Outgoing):
                if newest is not None and row > newest:
                    continue
                size += operation.size
            taken[row] = operation
            if len(taken) >= _BATCH_MESSAGES or size >= _BATCH_BYTES:
                break
        for row in taken:
            del self._pending[row]
        return taken

    def _put_back(self, writing: dict[int, Operation]) -> None:
        self._writing = {}
        self._pending = {**writing, **self._pending}  # what was asked for meanwhile counts
        self._work.set()

    def _failed(self, exc: sqlite3.Error) -> None:
        self._counters.store_errors += 1
        if self._error is None:
            logger.error(
                "outbox file %s: it cannot be written: %s; what is published is sent, but would not survive a crash",
                self._file.path,
                exc,
            )
        self._fail(f"the outbox file {os.fspath(self._file.path)!r} cannot be written: {exc}")

    async def aclose(self) -> None:
        """Write what is left and close the file; ``run()`` must have ended. Cancelling it waits for the disk."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        # No deadline: what a thread does with a disk cannot be cancelled, only abandoned, with the file still locked.
        # And Trio's clock may be a mock, which passes any deadline while the thread works.
        with trio.CancelScope(shield=True):
            try:
                while self._pending and await self._write():
                    pass
            finally:
                await trio.to_thread.run_sync(self._file.close, limiter=self._limiter)  # noqa: ASYNC102  # see above
        if self._pending:
            lost = sum(isinstance(operation, Outgoing) for operation in self._pending.values())
            logger.error(
                "outbox file %s: it was closed without %d messages that were to be kept; %d that have their outcome "
                "are still in it, and may be sent again",
                self._file.path,
                lost,
                len(self._pending) - lost,
            )
        self._fail(f"the outbox file {os.fspath(self._file.path)!r} is closed")


def _open(path: str | os.PathLike[str], now: float, wall: float) -> tuple[OutboxFile, list[Outgoing], list[Misfit]]:
    file = OutboxFile(path)
    try:
        return file, *file.load(now, wall)
    except BaseException:
        file.close()
        raise
