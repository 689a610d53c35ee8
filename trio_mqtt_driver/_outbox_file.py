"""The outbox file: an SQLite database, how it is opened, and what its rows are. All of it blocks: for worker threads.

A file that is not a sound outbox of this version is refused, and stays as it is. SQLite itself would write to it: who
opens a database to write finishes what a crash left in its journal, and who closes one moves its log into it. So it is
looked at first with a connection that cannot write.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs

from ._errors import OutboxFileError, ProtocolError
from ._outgoing import Outgoing
from ._properties import decode_publish_block
from ._topics import check_topic
from ._types import NO_PROPERTIES, OfflinePolicy, PublishProperties

APPLICATION_ID: Final = 0x4D515444
FORMAT: Final = 1
"""``user_version`` of the files that this module writes, and the only one that it reads."""

LAST_ROW: Final = 1 << 62

_WAL_LIMIT: Final = 4 * 1024 * 1024
"""Bytes that the ``-wal`` file is cut back to when its content has gone into the database."""
_FREE_PAGES: Final = 256
"""Unused pages (of 4 KiB) that the file keeps for what comes, and that one batch gives back at most."""

_TABLES: Final = (
    """CREATE TABLE message (
        row INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, qos INTEGER NOT NULL,
        retain INTEGER NOT NULL, properties BLOB NOT NULL, accepted_wall REAL NOT NULL, expiry INTEGER,
        priority INTEGER NOT NULL, offline TEXT NOT NULL, attempts INTEGER NOT NULL, checksum INTEGER NOT NULL
    )""",
    """CREATE TABLE quarantine (
        number INTEGER PRIMARY KEY, topic TEXT, payload BLOB, qos INTEGER, retain INTEGER, properties BLOB,
        expiry INTEGER, attempts INTEGER, reason TEXT NOT NULL, at REAL NOT NULL
    )""",
)
_MESSAGES: Final = (
    "SELECT row, topic, payload, qos, retain, properties, accepted_wall, expiry, priority, offline, attempts, checksum"
    " FROM message ORDER BY row"
)
_QUARANTINED: Final = (
    "SELECT topic, payload, qos, retain, properties, expiry, attempts, reason, at FROM quarantine ORDER BY number"
)
# "OR REPLACE": a batch that failed is written again, and whether nothing of it is there nobody knows for sure.
_INSERT: Final = "INSERT OR REPLACE INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_DELETE: Final = "DELETE FROM message WHERE row = ?"
_QUARANTINE: Final = (
    "INSERT INTO quarantine (topic, payload, qos, retain, properties, expiry, attempts, reason, at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
# Within the database: what Python cannot decode it could not write back either.
_MOVE: Final = (
    "INSERT INTO quarantine (topic, payload, qos, retain, properties, expiry, attempts, reason, at)"
    " SELECT topic, payload, qos, retain, properties, expiry, attempts, ?, ? FROM message WHERE row = ?"
)

_PERMISSIONS: Final = "the driver must be able to write the file and the directory that it is in"
_MOVE_AWAY: Final = "it is damaged: move it away together with its -wal file, and a new one is begun"
_EXPLANATIONS: Final = (
    ("locked", "it is in use: one file is for one driver at a time"),
    ("not a database", "it is not an outbox file, or its beginning is damaged: name another path, or move it away"),
    ("malformed", _MOVE_AWAY),
    ("no such", f"its tables are not those of an outbox: {_MOVE_AWAY}"),
    ("readonly", _PERMISSIONS),
    ("unable to open", _PERMISSIONS),
)
"""What is in SQLite's messages, and what it means here. Python has SQLite's error codes from 3.11 on only."""


@attrs.frozen(kw_only=True)
class Quarantined:
    """A message that is in an outbox file and is not sent, because it could not be, or must not be.

    What could not be read is shown as well as it can be: bytes of text that are not UTF-8 as ``\\xff``, a property
    block that is none as no properties, a number that is none as 0. The file keeps it as it was.
    """

    topic: str
    payload: bytes = attrs.field(repr=False)
    qos: int
    retain: bool
    properties: PublishProperties
    attempts: int
    """On how many connections it was sent."""
    reason: str
    at: float
    """When it was put there, in seconds since the epoch."""


@attrs.frozen(kw_only=True)
class Misfit:
    """A row of the file that is not a message, and why not."""

    row: int
    reason: str
    at: float


@attrs.frozen(kw_only=True)
class Refused:
    """A message that must not be sent any more, and why not."""

    outgoing: Outgoing
    reason: str
    at: float


Operation: TypeAlias = Outgoing | Refused | Misfit | None
"""What is to be done with a row: insert it, quarantine it (from memory, or within the file), or delete it."""


class OutboxFile:
    """The open file. One call at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, or create it (mode 0600). Raises ``OutboxFileError``, and then leaves it as it is."""
        with _explained(path):
            self.path: Final = Path(path).resolve()  # as SQLite does: its -wal file is beside the real one
            if not self.path.exists():
                self.path.parent.stat()  # if there is none, that is what the error should name
                _create(self.path)
            with closing(_look(self.path)) as database:
                _check(database, self.path)
                _check_pages(database)
            if not os.access(self.path, os.W_OK):  # SQLite would open it all the same, and fail to lock it
                raise OutboxFileError(f"the outbox file {os.fspath(path)!r} cannot be written: {_PERMISSIONS}")
            self._database = _connect(self.path, "rw")
            try:
                self._lock()
            except BaseException:
                self._database.close()
                raise

    def _lock(self) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
        execute("BEGIN IMMEDIATE")  # fails if somebody else has the file, or if it cannot be written
        execute("ROLLBACK")
        # With this lock SQLite has no -shm file. One that is there is left over from a look at the file after a crash;
        # nobody can be using it now.
        self.path.with_name(f"{self.path.name}-shm").unlink(missing_ok=True)

    def load(self, now: float, wall: float) -> tuple[list[Outgoing], list[Misfit]]:
        """What is in the file, in the order of acceptance; it is ``now`` on Trio's clock and ``wall`` on the wall."""
        messages: list[Outgoing] = []
        misfits: list[Misfit] = []
        with _explained(self.path):
            for values in self._database.execute(_MESSAGES):
                found = _message_or_misfit(values, now, wall)
                if isinstance(found, Outgoing):
                    messages.append(found)
                else:
                    misfits.append(found)
        return messages, misfits

    def write(self, operations: Sequence[tuple[int, Operation]], offset: float, sync: bool = False) -> None:
        """One transaction, synced to the disk if ``sync`` says so or something in it needs that.

        ``offset`` is what the wall clock is ahead of Trio's. Raises ``sqlite3.Error``.
        """
        inserts = [(row, one) for row, one in operations if isinstance(one, Outgoing)]
        refused = [one for _, one in operations if isinstance(one, Refused)]
        misfits = [one for _, one in operations if isinstance(one, Misfit)]
        # A deletion that a power failure takes back is a message sent twice at worst; an insert, one that is lost.
        durable = sync or bool(refused) or any(one.qos for _, one in inserts)
        database = self._database
        database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany(_INSERT, (_values(row, one, offset) for row, one in inserts))
            database.executemany(_QUARANTINE, (_quarantine_values(one) for one in refused))
            database.executemany(_MOVE, ((one.reason, one.at, one.row) for one in misfits))
            database.executemany(_DELETE, ((row,) for row, one in operations if not isinstance(one, Outgoing)))
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:  # SQLite has ended it by itself after some errors
                database.execute("ROLLBACK")
            raise
        try:
            self._shrink(_FREE_PAGES)
        except sqlite3.Error:
            pass  # what was to be written is written; if the disk has a fault, the next batch finds it

    def _shrink(self, pages: int) -> None:
        """Give back up to ``pages`` unused ones, if they are the greater part of a file that is not small."""
        (free,) = self._database.execute("PRAGMA freelist_count").fetchone()
        (used_and_free,) = self._database.execute("PRAGMA page_count").fetchone()
        if free <= max(_FREE_PAGES, used_and_free // 2):
            return
        pages = min(pages, free - _FREE_PAGES)
        # A script: each step of this statement gives back one page, and `execute` would make the first one only.
        self._database.executescript(f"PRAGMA synchronous = NORMAL; PRAGMA incremental_vacuum({pages})")

    def close(self) -> None:
        """Move the log into the file, and let go of both."""
        try:
            self._shrink(pages=1 << 30)
        except sqlite3.Error:
            pass  # the file stays large; what is in it is safe
        finally:
            self._database.close()


def quarantined_messages(path: str | os.PathLike[str]) -> tuple[Quarantined, ...]:
    """What is in the quarantine of an outbox file, oldest first, for people and tools.

    :param path: of a file that no driver uses at the moment.

    Blocks while it reads, and changes nothing. Raises ``OutboxFileError`` if the file is in use, damaged, newer than
    this package, or not an outbox.
    """
    with _explained(path):
        resolved = Path(path).resolve(strict=True)
        with closing(_look(resolved)) as database:
            _check(database, resolved)
            return tuple(_quarantined(values) for values in database.execute(_QUARANTINED))


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    try:
        yield
    except (sqlite3.Error, OSError) as exc:
        text = str(exc)
        advice = next((f"; {advice}" for part, advice in _EXPLANATIONS if part in text), "")
        raise OutboxFileError(f"the outbox file {os.fspath(path)!r} cannot be opened: {text}{advice}") from exc


def _connect(path: Path, parameters: str) -> sqlite3.Connection:
    database = sqlite3.connect(
        f"{path.as_uri()}?mode={parameters}",
        uri=True,
        timeout=0,  # who has the file keeps it: waiting does not help
        isolation_level=None,  # transactions begin where this module says
        check_same_thread=False,  # each call may come from another thread, but there is one call at a time
    )
    # Text that is not UTF-8 would end the reading of all rows with an error; `check_topic` refuses it by row.
    database.text_factory = _decoded
    return database


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _create(path: Path) -> None:
    """Make an empty outbox beside ``path`` and put it there: whatever happens, the file is whole or not there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600, as its -wal will have
    try:
        os.close(descriptor)
        with closing(sqlite3.connect(name, isolation_level=None)) as database:
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
            database.execute("BEGIN")
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {FORMAT}")
            for table in _TABLES:
                database.execute(table)
            database.execute("COMMIT")
            database.execute("PRAGMA journal_mode = WAL")
        # The directory is on the disk with the first sync of the log, whose file SQLite creates in it after this.
        os.link(name, path)
    except FileExistsError:
        pass  # another process was faster: its file is opened like any other
    finally:
        Path(name).unlink()


def _look(path: Path) -> sqlite3.Connection:
    """A connection that leaves the file and its log as they are."""
    if path.is_dir():
        raise OutboxFileError(f"the outbox file {os.fspath(path)!r} is a directory")
    if path.exists() and not path.is_file():  # to open a FIFO would block for ever
        raise OutboxFileError(f"the outbox file {os.fspath(path)!r} is no regular file")
    # Without a log the file is all there is, and nobody uses it. "immutable" then keeps SQLite from making files
    # beside it, and from rolling back the journal of another program's database.
    immutable = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    return _connect(path, f"ro{immutable}")


def _check(database: sqlite3.Connection, path: Path) -> None:
    shown = repr(os.fspath(path))
    (application,) = database.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise OutboxFileError(
            f"{shown} is not an outbox file, but another program's database, empty, or damaged at its beginning: name "
            "another path, or move it away"
        )
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > FORMAT:
        raise OutboxFileError(
            f"the outbox file {shown} was written by a newer version of trio-mqtt-driver (format {version}, this one "
            f"knows {FORMAT}): use that version, or name another path"
        )
    if version != FORMAT:
        raise OutboxFileError(f"the outbox file {shown} says that its format is {version}: {_MOVE_AWAY}")
    for query in (_MESSAGES, _QUARANTINED):
        database.execute(f"{query} LIMIT 0")


def _check_pages(database: sqlite3.Connection) -> None:
    (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"malformed: {' '.join(str(found).split())}")


# -- rows -------------------------------------------------------------------------------------------------------------


def _checksum(raw_topic: bytes, payload: bytes, properties: bytes) -> int:
    """SQLite checks the form of its pages, not what the application has written there."""
    return zlib.crc32(raw_topic, zlib.crc32(properties, zlib.crc32(payload)))


def _values(row: int, outgoing: Outgoing, offset: float) -> tuple[Any, ...]:
    return (
        row,
        outgoing.topic,
        outgoing.payload,
        int(outgoing.qos),
        int(outgoing.retain),
        outgoing.properties,
        outgoing.accepted_at + offset,
        outgoing.expiry,
        outgoing.priority,
        outgoing.offline.value,
        outgoing.attempts,
        _checksum(outgoing.raw_topic, outgoing.payload, outgoing.properties),
    )


def _quarantine_values(refused: Refused) -> tuple[Any, ...]:
    outgoing = refused.outgoing
    return (
        outgoing.topic,
        outgoing.payload,
        int(outgoing.qos),
        int(outgoing.retain),
        outgoing.properties,
        outgoing.expiry,
        outgoing.attempts,
        refused.reason,
        refused.at,
    )


def _integer(value: object, field: str, low: int, high: int) -> int:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{field} is {value!r:.60}, allowed are whole numbers from {low} to {high}")
    return value


def _blob(value: object, field: str) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{field} must be bytes, not {type(value).__name__}")
    return value


def _message_or_misfit(values: Sequence[Any], now: float, wall: float) -> Outgoing | Misfit:
    try:
        return _outgoing(values, now, wall)
    except (TypeError, ValueError, ProtocolError) as exc:
        return Misfit(row=values[0], reason=str(exc), at=wall)


def _outgoing(values: Iterable[Any], now: float, wall: float) -> Outgoing:
    """The message of a row. Raises ``TypeError``, ``ValueError`` or ``ProtocolError`` if it is none."""
    row, topic, payload, qos, retain, properties, accepted, expiry, priority, offline, attempts, checksum = values
    raw_topic = check_topic(topic)
    decode_publish_block(_blob(properties, "properties"))
    if not isinstance(accepted, float) or not isfinite(accepted):
        raise ValueError(f"accepted_wall is {accepted!r:.60}, allowed are seconds since the epoch")
    outgoing = Outgoing(
        topic=topic,
        raw_topic=raw_topic,
        payload=_blob(payload, "payload"),
        qos=_integer(qos, "qos", 0, 2),
        retain=bool(_integer(retain, "retain", 0, 1)),
        properties=properties,
        # The wall clock may have been set back since then.
        accepted_at=now - max(0.0, wall - accepted),
        expiry=None if expiry is None else _integer(expiry, "expiry", 0, 0xFFFFFFFF),
        priority=_integer(priority, "priority", -(1 << 63), (1 << 63) - 1),
        offline=OfflinePolicy(offline),
        row=_integer(row, "row", 1, LAST_ROW),
        attempts=max(0, _integer(attempts, "attempts", -(1 << 31), 1 << 31)),
    )
    if checksum != _checksum(raw_topic, outgoing.payload, properties):
        raise ValueError("its content is damaged: the checksum is another one")
    return outgoing


def _quarantined(values: Iterable[Any]) -> Quarantined:
    topic, payload, qos, retain, properties, expiry, attempts, reason, at = values
    try:
        decoded = decode_publish_block(_blob(properties, "properties"))
    except (TypeError, ProtocolError):
        decoded = NO_PROPERTIES
    if isinstance(expiry, int):
        decoded = attrs.evolve(decoded, message_expiry=expiry)
    return Quarantined(
        topic=_text(topic),
        payload=payload if isinstance(payload, bytes) else _text(payload).encode(),
        qos=_number(qos),
        retain=bool(_number(retain)),
        properties=decoded,
        attempts=_number(attempts),
        reason=_text(reason),
        at=at if isinstance(at, float) else 0.0,
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _text(value: object) -> str:
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")
