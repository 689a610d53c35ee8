"""The outbox file: what is refused, and that it stays as it is; and that a row is a message."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tests.outboxes import WALL, outgoing, payloads, sql
from trio_mqtt_driver._errors import OutboxFileError
from trio_mqtt_driver._outbox_file import APPLICATION_ID, FORMAT, OutboxFile, quarantined_messages
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver._properties import encode_publish_properties
from trio_mqtt_driver._types import OfflinePolicy, PayloadFormat, PublishProperties

TEXT = st.text(st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=20)
PROPERTIES = st.builds(
    PublishProperties,
    payload_format=st.none() | st.sampled_from(PayloadFormat),
    content_type=st.none() | TEXT,
    response_topic=st.none() | TEXT,
    correlation_data=st.none() | st.binary(max_size=20),
    user_properties=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
)
FIELDS = {
    "topic": TEXT,
    "payload": st.binary(max_size=5000),
    "qos": st.integers(0, 2),
    "retain": st.booleans(),
    "properties": PROPERTIES.map(encode_publish_properties),
    "expiry": st.none() | st.integers(0, 0xFFFFFFFF),
    "priority": st.integers(-(1 << 63), (1 << 63) - 1),
    "offline": st.sampled_from(OfflinePolicy),
    "attempts": st.integers(0, 1 << 31),
}
STORED = (*FIELDS, "raw_topic", "row")


def fill(path: Path, count: int = 200, size: int = 1000) -> None:
    file = OutboxFile(path)
    file.write([(row, outgoing("t", bytes([row % 256]) * size, at=0.0)) for row in range(1, count + 1)], WALL)
    file.close()


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in it but what SQLite makes for a look at a file that a crash has left, which holds no data."""
    return {
        path.name: (path.stat().st_ino, path.read_bytes())
        for path in directory.iterdir()
        if path.is_file() and not path.name.endswith("-shm")
    }


def spoil(path: Path, *, at: int, length: int = 4096) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * length)


def truncate(path: Path, size: int) -> None:
    fill(path)
    os.truncate(path, size)


def set_version(path: Path, version: int) -> None:
    fill(path)
    sql(path, f"PRAGMA user_version = {version}")


def set_application(path: Path, application: int) -> None:
    fill(path)
    sql(path, f"PRAGMA application_id = {application}")


def filled_and(spoiled: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        fill(path)
        spoiled(path)

    return make


def crash_after(path: Path, *statements: str) -> None:
    """Another process ends in a crash: what it wrote is in the -wal file only."""
    code = (
        "import os, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: database.execute(statement)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), *statements], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (lambda path: path.mkdir(), r"is a directory"),
    "text": (lambda path: path.write_text("my notes\n" * 1000), r"not a database; it is not an outbox file"),
    "empty": (lambda path: path.touch(), r"is not an outbox file, but another program's database, empty"),
    "header": (filled_and(lambda path: spoil(path, at=0)), r"not a database"),
    "middle": (filled_and(lambda path: spoil(path, at=20 * 4096)), r"it is damaged: move it away together with"),
    "one page": (filled_and(lambda path: spoil(path, at=2 * 4096)), r"malformed.*it is damaged"),
    "cut": (lambda path: truncate(path, 30 * 4096 + 17), r"it is damaged"),
    "cut in the header": (lambda path: truncate(path, 60), r"is not an outbox file, .* damaged at its beginning"),
    "newer": (lambda path: set_version(path, FORMAT + 1), rf"newer version .*\(format {FORMAT + 1}, this one knows"),
    "no version": (lambda path: set_version(path, 0), r"says that its format is 0: it is damaged"),
    "foreign": (lambda path: sql(path, "CREATE TABLE message (row INTEGER PRIMARY KEY)"), r"is not an outbox file"),
    "foreign number": (lambda path: set_application(path, APPLICATION_ID + 1), r"another program's database"),
    "no table": (filled_and(lambda path: sql(path, "DROP TABLE quarantine")), r"tables are not those of an outbox"),
    "no column": (filled_and(lambda path: sql(path, "ALTER TABLE message RENAME qos TO q")), r"no such column: qos"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_sound_outbox_is_refused_and_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    make, complaint = REFUSED[kind]
    path = tmp_path / "outbox.db"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(OutboxFileError, match=complaint) as caught:
        OutboxFile(path)
    assert str(path) in str(caught.value)
    assert contents(tmp_path) == before


def test_a_directory_that_is_not_there_is_what_the_error_names(tmp_path: Path) -> None:
    with pytest.raises(OutboxFileError, match=r"No such file or directory: '[^']*/missing'$"):
        OutboxFile(tmp_path / "missing" / "outbox.db")


def test_not_even_the_log_of_a_refused_file_is_moved_into_it(tmp_path: Path) -> None:
    newer, damaged = tmp_path / "newer.db", tmp_path / "damaged.db"
    fill(newer)
    crash_after(newer, f"PRAGMA user_version = {FORMAT + 1}")
    fill(damaged)
    crash_after(damaged, "DELETE FROM message WHERE row = 1")
    spoil(damaged, at=20 * 4096)
    before = contents(tmp_path)
    with pytest.raises(OutboxFileError, match=r"newer version"):
        OutboxFile(newer)
    with pytest.raises(OutboxFileError, match=r"is damaged"):
        OutboxFile(damaged)
    with pytest.raises(OutboxFileError, match=r"newer version"):
        quarantined_messages(newer)
    assert contents(tmp_path) == before


def test_a_log_that_a_crash_left_is_read_and_nothing_of_it_stays_behind(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    fill(path, count=3, size=1)
    crash_after(path, "DELETE FROM message WHERE row = 2")
    assert quarantined_messages(path) == ()
    assert payloads(path) == [b"\1", b"\3"]
    assert [one.name for one in tmp_path.iterdir()] == ["outbox.db"]


def test_one_file_is_for_one_driver(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    file = OutboxFile(path)
    names = ("OutboxFile", "quarantined_messages")
    code = "import sys; from trio_mqtt_driver import _outbox_file; getattr(_outbox_file, sys.argv[1])(sys.argv[2])"
    try:
        for written in (False, True):
            if written:
                file.write([(1, outgoing(at=0.0))], WALL)
            for open_again in (OutboxFile, quarantined_messages):
                with pytest.raises(OutboxFileError, match=r"database is locked; it is in use"):
                    open_again(path)
            # After a second attempt in the same process: POSIX would drop the locks when any descriptor is closed.
            for name in names if written else ():
                done = subprocess.run(
                    [sys.executable, "-c", code, name, str(path)], check=False, capture_output=True, text=True
                )
                assert "OutboxFileError" in done.stderr
                assert "it is in use: one file is for one driver at a time" in done.stderr
    finally:
        file.close()
    assert payloads(path) == [b"x"]


def test_a_file_that_another_program_reads_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    fill(path, count=1)
    with closing(sqlite3.connect(path)) as database:
        cursor = database.execute("SELECT * FROM message, sqlite_master")
        with pytest.raises(OutboxFileError, match=r"it is in use"):
            OutboxFile(path)
        cursor.close()
    OutboxFile(path).close()


def test_a_file_that_may_not_be_written_is_refused() -> None:
    # Root may write everything, so another process does it, which has given its rights up.
    code = (
        "import os, sys\n"
        "from trio_mqtt_driver._outbox_file import OutboxFile\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: OutboxFile(path)\n"
        "    except Exception as exc: print(type(exc).__name__, exc)\n"
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        closed, writable = directory / "closed", directory / "open"
        for one in (closed, writable):
            one.mkdir()
            fill(one / "read only.db")
            (one / "read only.db").chmod(0o444)
        fill(closed / "outbox.db")
        (closed / "outbox.db").chmod(0o666)
        closed.chmod(0o555)
        writable.chmod(0o777)
        directory.chmod(0o755)
        before = [contents(closed), contents(writable)]
        paths = [*map(str, (*closed.iterdir(), *writable.iterdir(), closed / "new.db", directory / "none" / "new.db"))]
        done = subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True, text=True)
        after = [contents(closed), contents(writable)]
        closed.chmod(0o755)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["OutboxFileError"] * 5
    for line in lines[:3]:
        assert line.endswith("the driver must be able to write the file and the directory that it is in")
    assert "Permission denied" in lines[3]
    assert "No such file or directory" in lines[4]
    assert after == before


def test_a_new_file_is_for_its_owner_only_and_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out box?#%.db"
    file = OutboxFile(path)
    try:
        file.write([(1, outgoing(at=0.0))], WALL)
        assert {one.name: one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {
            path.name: 0o600,
            f"{path.name}-wal": 0o600,
        }
    finally:
        file.close()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert payloads(path) == [b"x"]


def test_who_loses_the_race_to_create_a_file_uses_that_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "outbox.db"
    link = os.link

    def overtaken(source: str, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        fill(path, count=1, size=1)
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    assert payloads(path) == [b"\1"]
    assert [one.name for one in tmp_path.iterdir()] == ["outbox.db"]


def test_a_link_leads_to_the_file(tmp_path: Path) -> None:
    path, link = tmp_path / "outbox.db", tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    fill(link, count=1, size=1)
    crash_after(path, "DELETE FROM message")
    assert payloads(link) == []
    assert path.is_file()


@given(values=st.fixed_dictionaries(FIELDS), age=st.floats(0, 1e6))
@settings(max_examples=25)
def test_a_message_comes_back_as_it_was(values: dict[str, object], age: float) -> None:
    topic = values["topic"]
    assert isinstance(topic, str)
    message = Outgoing(raw_topic=topic.encode(), accepted_at=1000.0 - age, row=7, **values)  # type: ignore[arg-type]  # drawn by name
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "outbox.db")
        file = OutboxFile(path)
        # The next process: Trio's clock begins anew, the wall clock goes on, and 50 s have passed.
        file.write([(7, message)], WALL - 1000.0)
        messages, misfits = file.load(3.0, WALL + 50.0)
        file.close()
    assert misfits == []
    (loaded,) = messages
    assert {name: getattr(loaded, name) for name in STORED} == {name: getattr(message, name) for name in STORED}
    assert loaded.accepted_at == pytest.approx(3.0 - 50.0 - age, abs=1e-3)
    assert loaded.size == message.size


def test_a_wall_clock_that_was_set_back_makes_no_message_younger_than_now(tmp_path: Path) -> None:
    file = OutboxFile(tmp_path / "outbox.db")
    message = outgoing(at=0.0)
    message.expiry = 10
    file.write([(1, message)], WALL)
    for passed, accepted_at in ((-1e6, 100.0), (4.0, 96.0), (1e6, 100.0 - 1e6)):
        ((loaded,), _) = file.load(100.0, WALL + passed)
        assert loaded.accepted_at == accepted_at
        assert loaded.expires_at == accepted_at + 10
    file.close()


def test_a_file_that_was_large_becomes_small_again(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    fill(path, count=4000)
    large = path.stat().st_size
    file = OutboxFile(path)
    file.write([(row, None) for row in range(1, 4001)], WALL)
    assert path.stat().st_size == large
    for row in range(8):
        file.write([(5000 + row, outgoing(at=0.0))], WALL)
    (pages,) = file._database.execute("PRAGMA page_count").fetchone()
    assert pages * 4096 < large / 2
    file.close()
    assert path.stat().st_size < large / 3
    assert payloads(path) == [b"x"] * 8


def test_the_log_does_not_stay_large(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    file = OutboxFile(path)
    log = tmp_path / "outbox.db-wal"
    file.write([(1, outgoing("t", b"x" * 12_000_000, at=0.0))], WALL)
    assert log.stat().st_size > 12_000_000
    file.write([(1, None)], WALL)
    file.write([(2, outgoing(at=0.0))], WALL)
    assert log.stat().st_size <= 4 * 1024 * 1024
    file.close()


def test_a_shrink_that_fails_does_not_undo_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    fill(path, count=4000)
    file = OutboxFile(path)

    def no_shrinking(*arguments: object) -> int:
        return sqlite3.SQLITE_DENY if arguments[1] == "incremental_vacuum" else sqlite3.SQLITE_OK

    file._database.set_authorizer(no_shrinking)
    file.write([(row, None) for row in range(2, 4001)], WALL)
    file.close()
    assert payloads(path) == [b"\1" * 1000]


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    file = OutboxFile(path)
    file.write([(1, outgoing("t", b"old", at=0.0))], WALL)
    unwritable = outgoing("t", b"new", at=0.0)
    unwritable.priority = 1 << 63
    with pytest.raises(OverflowError):
        file.write([(2, outgoing("t", b"new", at=0.0)), (3, unwritable), (1, None)], WALL)
    file.write([(4, outgoing("t", b"later", at=0.0))], WALL)
    file.close()
    assert payloads(path) == [b"old", b"later"]


def test_the_file_keeps_the_page_size_and_settings_that_its_documentation_names(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    OutboxFile(path).close()
    with closing(sqlite3.connect(path)) as database:
        found = {
            name: database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "auto_vacuum", "journal_mode", "application_id", "user_version")
        }
    assert found == {
        "page_size": 4096,
        "auto_vacuum": 2,
        "journal_mode": "wal",
        "application_id": APPLICATION_ID,
        "user_version": FORMAT,
    }
