"""Outbox files for tests: messages, a file that can be watched, held and broken, and plain SQL on it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import trio

from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._outbox_file import Operation, OutboxFile
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver._store import Store

WALL = 1_800_000_000.0


def outgoing(topic: str = "a", payload: bytes = b"x", *, qos: int = 1, at: float | None = None) -> Outgoing:
    accepted_at = trio.current_time() if at is None else at
    return Outgoing(topic, topic.encode(), payload, qos, False, b"\0", accepted_at)


def messages(*texts: str) -> list[Outgoing]:
    return [outgoing("t", text.encode()) for text in texts]


async def store_all(store: Store, *texts: str) -> list[Outgoing]:
    found = messages(*texts)
    for message in found:
        store.add(message)
    for message in found:
        await store.wait_stored(message)
    return found


class WatchedFile(OutboxFile):
    """Tells of each batch; waits in the worker thread while it is held; fails as often as ``failures`` says."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.statements: list[str] = []
        self.batches: list[Sequence[tuple[int, Operation]]] = []
        self.began = trio.Event()
        self.wrote = trio.Event()
        self.failures = 0
        self._free = threading.Event()
        self._free.set()
        self._database.set_trace_callback(self.statements.append)

    def hold(self) -> None:
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    def allow_pages(self, count: int) -> None:
        """What is not there any more is a disk that is full; only while nothing is being written."""
        self._database.execute(f"PRAGMA max_page_count = {count}")

    def count(self, start: str) -> int:
        return sum(statement.startswith(start) for statement in self.statements)

    def write(self, operations: Sequence[tuple[int, Operation]], offset: float, sync: bool = False) -> None:
        trio.from_thread.run_sync(self.began.set)
        self._free.wait()
        self.batches.append(operations)
        try:
            if self.failures:
                self.failures -= 1
                raise sqlite3.OperationalError("disk I/O error")
            super().write(operations, offset, sync)
        finally:
            trio.from_thread.run_sync(self.wrote.set)


async def batch_ended(store: Store, file: WatchedFile) -> None:
    """Return when the next batch has been written, or has failed, and the store knows it."""
    file.wrote = trio.Event()
    await file.wrote.wait()
    # The thread is not back yet; the next one may begin only then, and by its end the store has had its turn.
    await trio.to_thread.run_sync(bool, limiter=store._limiter)


@asynccontextmanager
async def watched(path: Path, counters: Counters | None = None) -> AsyncGenerator[tuple[Store, WatchedFile], None]:
    """A store on a file that is watched, with its writer not yet running."""
    file = WatchedFile(path)
    store = Store(
        file,
        [],
        [],
        limiter=trio.CapacityLimiter(1),
        wall_clock=lambda: WALL,
        counters=Counters() if counters is None else counters,
    )
    try:
        yield store, file
    finally:
        file.release()
        await store.aclose()


def sql(path: Path, statement: str, *values: Any) -> list[Any]:
    """Run a statement as any program could, while no driver has the file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        return database.execute(statement, values).fetchall()


def payloads(path: Path) -> list[bytes]:
    """What a store would find, in its order."""
    file = OutboxFile(path)
    try:
        messages, misfits = file.load(0.0, WALL)
        assert misfits == []
        return [message.payload for message in messages]
    finally:
        file.close()
