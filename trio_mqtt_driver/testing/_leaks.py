"""What a piece of code leaves behind: tasks, sockets and threads."""

from __future__ import annotations

import gc
import inspect
import os
import re
import socket
import stat
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import attrs
import trio

if TYPE_CHECKING:
    from typing_extensions import Self

_IDLE_WORKER = re.compile(r"Trio thread \d+")
"""Trio calls a worker thread so while it has no job; it waits for the next one, and ends after some seconds."""
_LAST_CHANCE = 100
_TICK = 0.01


class LeakError(AssertionError):
    """Tasks, sockets or threads were left behind; the message names each."""


class LeakCheck:
    """Raises `LeakError` at the end of the block for what the block started or opened and left behind.

    ::

        async def main():
            with LeakCheck():
                await application()

    Sockets that are open, threads that run, and, inside ``trio.run()``, tasks that live, of all nurseries and system
    tasks. A socket that nobody refers to any more is open until the garbage collector comes by: left behind, too.
    Idle worker threads of Trio are not. An exception that leaves the block is left alone.

    Leaving takes up to a second, and blocks Trio, if there are threads that might be about to end; else no time.
    """

    def __init__(self) -> None:
        self._before: _Belongings | None = None
        self._starts: _Starts | None = None

    def __enter__(self) -> Self:
        self._before = _Belongings.take()
        if trio.lowlevel.in_trio_run():
            self._starts = _Starts()
            trio.lowlevel.add_instrument(self._starts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._before is not None
        if self._starts is not None:
            trio.lowlevel.remove_instrument(self._starts)
        if exc is not None:
            return
        _let_end(_busy_threads() - self._before.threads)  # First: what a thread opened, it may be about to close.
        left = _Belongings.take().beyond(self._before)
        lines = [
            *sorted(f"task {task.name!r}{self._started(task)}" for task in left.tasks),
            *left.sockets.values(),
            *sorted(f"thread {thread.name!r}" for thread in left.threads),
        ]
        if lines:
            raise LeakError("\n  ".join(["left behind:", *lines]))

    def _started(self, task: trio.lowlevel.Task) -> str:
        place = self._starts.places.get(task) if self._starts is not None else None
        return "" if place is None else f", started at {place}"


@attrs.frozen
class _Belongings:
    tasks: frozenset[trio.lowlevel.Task]
    sockets: dict[tuple[int, ...], str]
    """What makes a socket this socket → its description. A file descriptor is used again and again."""
    threads: frozenset[threading.Thread]

    @classmethod
    def take(cls) -> _Belongings:
        return cls(
            frozenset(_living_tasks()) if trio.lowlevel.in_trio_run() else frozenset(),
            _open_sockets(),
            _busy_threads(),
        )

    def beyond(self, before: _Belongings) -> _Belongings:
        return _Belongings(
            self.tasks - before.tasks,
            {key: text for key, text in self.sockets.items() if key not in before.sockets},
            self.threads - before.threads,
        )


def _living_tasks() -> list[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    tasks = [root]
    for task in tasks:  # It grows while it is walked through.
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return tasks


class _Starts(trio.abc.Instrument):
    """Notes which line started a task: only now it can be known."""

    def __init__(self) -> None:
        self.places: weakref.WeakKeyDictionary[trio.lowlevel.Task, str] = weakref.WeakKeyDictionary()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        frame = inspect.currentframe()
        while frame is not None and _is_not_the_caller(frame):
            frame = frame.f_back
        assert frame is not None  # Somebody called trio.run().
        self.places[task] = f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_not_the_caller(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module == __name__ or module.partition(".")[0] == "trio"


def _open_sockets() -> dict[tuple[int, ...], str]:
    # Linux and macOS list what is open there, whoever opened it; elsewhere it may be the first three only.
    return _sockets_by_descriptor() if sys.platform in ("linux", "darwin") else _sockets_by_object()


def _sockets_by_descriptor() -> dict[tuple[int, ...], str]:
    found: dict[tuple[int, ...], str] = {}
    for entry in Path("/dev/fd").iterdir():
        fd = int(entry.name)
        try:
            status = os.fstat(fd)
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(fileno=os.dup(fd)) as copy:
                    found[fd, status.st_dev, status.st_ino] = _description(copy, fd)
        except OSError:
            continue  # Such as the descriptor of this listing itself.
    return found


def _sockets_by_object() -> dict[tuple[int, ...], str]:
    # type(), not isinstance(): a lazy proxy among all these objects would be woken up.
    sockets = [entry for entry in gc.get_objects() if issubclass(type(entry), socket.socket) and entry.fileno() >= 0]
    return {(id(entry), entry.fileno()): _description(entry, entry.fileno()) for entry in sockets}


def _description(entry: socket.socket, fd: int) -> str:
    ends = [text for text in (_address(entry.getsockname), _address(entry.getpeername)) if text is not None]
    kind = getattr(entry.type, "name", entry.type)
    return f"socket {' <-> '.join(ends)} ({kind}, file descriptor {fd})"


def _address(ask: Callable[[], Any]) -> str | None:
    try:
        address = ask()
    except OSError:
        return None  # It is not connected.
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address) or "unnamed"


def _busy_threads() -> frozenset[threading.Thread]:
    return frozenset(entry for entry in threading.enumerate() if not _IDLE_WORKER.fullmatch(entry.name))


def _let_end(threads: frozenset[threading.Thread]) -> None:
    for _ in range(_LAST_CHANCE):
        running = threads & _busy_threads()
        if not running:
            return
        # A thread that ends wakes us. A worker of Trio does not end with its job: the timeout is for that.
        next(iter(running)).join(_TICK)
