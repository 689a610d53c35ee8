"""The outbox on disk: what is written and when, who is told, and what a disk that fails does."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.outboxes import WALL, batch_ended, messages, outgoing, payloads, store_all, watched
from trio_mqtt_driver._errors import OutboxFileError
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._outbox_file import OutboxFile, quarantined_messages
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver._store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


async def test_what_was_stored_comes_back_in_order_and_rows_go_on(path: Path) -> None:
    async with trio.open_nursery() as nursery, watched(path) as (store, _):
        nursery.start_soon(store.run)
        first = await store_all(store, "a", "b", "c")
        nursery.cancel_scope.cancel()
    store = await Store.open(path)
    try:
        assert [message.payload for message in store.messages] == [b"a", b"b", b"c"]
        assert [message.row for message in store.messages] == [message.row for message in first]
        late = outgoing("t", b"d")
        store.add(late)
        assert late.row > first[-1].row
        store.remove(store.messages[1])
    finally:
        await store.aclose()
    assert payloads(path) == [b"a", b"c", b"d"]


async def test_what_has_its_outcome_before_its_turn_is_never_written(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        for number in range(100):
            message = outgoing()
            store.add(message)
            await trio.sleep(0.04)
            store.remove(message)
            assert message.row == 0
            store.remove(message)  # no effect
            await trio.sleep(number % 3)
        assert file.batches == []
        assert file.statements == []
        nursery.cancel_scope.cancel()
    assert payloads(path) == []


async def test_what_nobody_waits_for_is_written_after_a_moment(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        first, second = messages("a", "b")
        store.add(first)
        await trio.sleep(0.04)
        store.add(second)
        await trio.sleep(0.009)
        assert not file.began.is_set()
        await file.wrote.wait()
        assert file.batches == [[(first.row, first)]]  # the other one's moment is not over
        nursery.cancel_scope.cancel()
    assert payloads(path) == [b"a", b"b"]


async def test_who_waits_need_not_wait_for_that_moment(path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with watched(path) as (store, _), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        message = outgoing()
        store.add(message)
        await trio.testing.wait_all_tasks_blocked()  # it lingers, and no time passes
        await store.wait_stored(message)
        nursery.cancel_scope.cancel()


async def test_a_batch_that_is_full_is_not_waited_with(path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        store.add(outgoing())
        await trio.testing.wait_all_tasks_blocked()  # it lingers
        for _ in range(999):
            store.add(outgoing())
        await file.began.wait()
        nursery.cancel_scope.cancel()


async def test_what_gathers_costs_one_transaction(path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        file.statements.clear()
        gathered = messages(*map(str, range(500)))
        for message in gathered:
            store.add(message)
            nursery.start_soon(store.wait_stored, message)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(store.run)
        await store.wait_stored(gathered[0])
        assert file.count("COMMIT") == file.count("BEGIN") == 1
        assert file.count("INSERT") == 500
        nursery.cancel_scope.cancel()
    assert payloads(path) == [message.payload for message in gathered]


@pytest.mark.parametrize("count, size, batches", [(2500, 1, [1000, 1000, 500]), (5, 3_000_000, [2, 2, 1])])
async def test_a_batch_is_bounded(count: int, size: int, batches: list[int], path: Path) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        gathered = [outgoing("t", b"x" * size) for _ in range(count)]
        for message in gathered:
            store.add(message)
        await store.wait_stored(gathered[-1])
        assert [len(batch) for batch in file.batches] == batches
        nursery.cancel_scope.cancel()


async def test_only_a_batch_with_a_new_message_of_qos_1_or_2_is_synced(path: Path) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)

        async def synchronous(*batch: Outgoing) -> list[str]:
            file.statements.clear()
            for message in batch:
                store.add(message)
            await store.wait_stored(batch[-1])
            return [one.split()[-1] for one in file.statements if one.startswith("PRAGMA synchronous")]

        assert await synchronous(outgoing(qos=0)) == ["NORMAL"]
        kept = outgoing(qos=1)
        assert await synchronous(outgoing(qos=0), kept) == ["FULL"]
        store.remove(kept)
        assert await synchronous(outgoing(qos=0)) == ["NORMAL"]
        assert await synchronous(outgoing(qos=2)) == ["FULL"]
        sent = outgoing(qos=0)
        assert await synchronous(sent) == ["NORMAL"]
        row = sent.row
        file.statements.clear()
        store.remove(sent)
        await store.wait_removed([row])  # so that it can be sent, once at most
        assert "PRAGMA synchronous = FULL" in file.statements
        quarantined, last = outgoing(qos=1), outgoing(qos=0)
        store.add(last)
        store.quarantine(quarantined, "bad")
        assert await synchronous(last) == ["FULL"]
        nursery.cancel_scope.cancel()


async def test_whoever_waits_is_told_once_it_is_there(path: Path) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        file.hold()
        message, later = messages("a", "b")
        store.add(message)
        told: list[str] = []

        async def wait(one: Outgoing, name: str) -> None:
            await store.wait_stored(one)
            told.append(name)

        with trio.CancelScope() as impatient:
            nursery.start_soon(wait, message, "first")
            await file.began.wait()
            impatient.cancel()
            await store.wait_stored(message)  # cancelled, with no effect on the others
        store.add(later)
        for name in ("second", "third"):
            nursery.start_soon(wait, message, name)
        nursery.start_soon(wait, later, "later")
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        file.release()
        await store.wait_stored(later)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(told) == ["first", "later", "second", "third"]
        assert [len(batch) for batch in file.batches] == [1, 1]
        with trio.testing.assert_checkpoints():
            await store.wait_stored(message)
        store.remove(message)
        with trio.testing.assert_checkpoints():
            await store.wait_stored(message)
        nursery.cancel_scope.cancel()


async def test_who_waits_for_a_message_that_is_removed_is_told(path: Path) -> None:
    async with watched(path) as (store, _), trio.open_nursery() as nursery:
        message = outgoing()
        store.add(message)
        nursery.start_soon(store.wait_stored, message)  # and nothing is written, since nothing runs
        await trio.testing.wait_all_tasks_blocked()
        store.remove(message)
    assert payloads(path) == []


async def test_what_is_removed_while_it_is_written_is_removed_from_the_file(path: Path) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        file.hold()
        message, kept = messages("a", "b")
        store.add(message)
        store.add(kept)
        nursery.start_soon(store.wait_stored, message)
        await file.began.wait()
        store.remove(message)
        file.release()
        await store.wait_stored(kept)
        nursery.cancel_scope.cancel()
    assert payloads(path) == [b"b"]


async def test_what_is_removed_while_its_batch_fails_is_not_written_later(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        file.hold()
        file.failures = 1
        removed, kept = messages("a", "b")
        store.add(removed)
        store.add(kept)
        await file.began.wait()
        store.remove(removed)
        file.release()
        await batch_ended(store, file)
        await batch_ended(store, file)
        nursery.cancel_scope.cancel()
    assert payloads(path) == [b"b"]


async def test_who_waits_for_a_removal_is_told_when_nothing_is_left_in_the_file(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        never, stored, written = messages("a", "b", "c")
        rows: list[int] = []

        def remove(message: Outgoing) -> None:
            rows.append(message.row)
            store.remove(message)

        store.add(never)
        remove(never)
        await store.wait_removed(rows)  # nothing runs yet, and nothing needs to be written
        nursery.start_soon(store.run)
        store.add(stored)
        await store.wait_stored(stored)
        file.hold()
        store.add(written)
        nursery.start_soon(store.wait_stored, written)
        file.began = trio.Event()
        await file.began.wait()
        remove(stored)
        remove(written)
        told = trio.Event()

        async def wait() -> None:
            await store.wait_removed(rows[-1:])  # its insert is being written, and then its deletion
            told.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        file.release()
        await told.wait()
        assert file._database.execute("SELECT count(*) FROM message").fetchone() == (0,)
        file.failures = 1
        last = outgoing()
        store.add(last)
        await batch_ended(store, file)
        await batch_ended(store, file)
        file.failures = 1
        remove(last)
        with pytest.raises(OutboxFileError, match=r"disk I/O error"):
            await store.wait_removed(rows)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_writer_ends_its_batch_and_loses_none(path: Path) -> None:
    async with watched(path) as (store, file):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            file.hold()
            first, second = messages("a", "b")
            store.add(first)
            nursery.start_soon(store.wait_stored, first)
            await file.began.wait()
            store.add(second)
            nursery.cancel_scope.cancel()
            file.release()
        assert [[row for row, _ in batch] for batch in file.batches] == [[first.row]]
        third = outgoing("t", b"c")
        store.add(third)
        async with store._limiter, trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            nursery.start_soon(store.wait_stored, third)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()  # before the thread begins
        assert len(file.batches) == 1
    assert payloads(path) == [b"a", b"b", b"c"]


async def test_closing_writes_what_is_left_also_when_it_is_cancelled(path: Path) -> None:
    async with watched(path) as (store, file):
        gathered = messages(*map(str, range(1500)))
        for message in gathered:
            store.add(message)
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.aclose()
        with trio.testing.assert_checkpoints():
            await store.aclose()
        late = outgoing()
        store.add(late)
        with pytest.raises(OutboxFileError, match=r"is closed"):
            await store.wait_stored(late)
        assert len(file.batches) == 2
    assert payloads(path) == [message.payload for message in gathered]
    assert [one.name for one in path.parent.iterdir()] == [path.name]


async def test_closing_tells_who_still_waits_and_what_was_not_written(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        file.failures = 1
        message = outgoing(payload=b"secret words")
        store.add(message)

        async def wait() -> None:
            with pytest.raises(OutboxFileError, match=r"cannot be written: disk I/O error") as caught:
                await store.wait_stored(message)
            assert "secret" not in str(caught.value)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await store.aclose()
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "it cannot be written: disk I/O error; what is published is sent, but would not survive a crash",
        (
            "it was closed without 1 messages that were to be kept; 0 that have their outcome are still in it, "
            "and may be sent again"
        ),
    ]
    assert payloads(path) == []


async def test_a_full_disk_is_told_of_once_and_everything_is_written_when_there_is_room(
    path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    caplog.set_level(logging.INFO)
    counters = Counters()
    async with watched(path, counters) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await store_all(store, "before")
        file.allow_pages(10)
        large = [outgoing("t", text * 30_000) for text in (b"a", b"b")]
        for message in large:
            store.add(message)
        with pytest.raises(OutboxFileError, match=r"cannot be written: database or disk is full"):
            await store.wait_stored(large[0])
        for _ in range(3):
            await batch_ended(store, file)
        # What fails is not waited for: it would hold up whoever publishes for as long as the disk is full.
        small = outgoing("t", b"small")
        store.add(small)
        with trio.testing.assert_checkpoints(), pytest.raises(OutboxFileError, match=r"disk is full"):
            await store.wait_stored(small)
        store.remove(large[1])  # it was sent
        failed = counters.store_errors
        assert failed >= 4
        file.allow_pages(1_000_000)
        await batch_ended(store, file)
        assert counters.store_errors == failed
        await store_all(store, "after")
        nursery.cancel_scope.cancel()
    assert payloads(path) == [b"before", b"a" * 30_000, b"small", b"after"]
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "it cannot be written: database or disk is full; what is published is sent, but would not survive a crash",
        "it can be written again",
    ]
    assert all("aaa" not in record.getMessage() for record in caplog.records)


async def test_the_pauses_between_attempts_grow(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    attempts: list[float] = []

    def wall_clock() -> float:
        attempts.append(trio.current_time())
        return WALL

    async with watched(path) as (_, file), trio.open_nursery() as nursery:
        store = Store(file, [], [], limiter=trio.CapacityLimiter(1), wall_clock=wall_clock, counters=Counters())
        nursery.start_soon(store.run)
        file.failures = 8
        store.add(outgoing())
        for _ in range(9):
            await batch_ended(store, file)
        await store_all(store, "after")
        file.failures = 1
        store.add(outgoing())
        for _ in range(2):
            await batch_ended(store, file)
        nursery.cancel_scope.cancel()
    pauses = [later - earlier for earlier, later in pairwise(attempts)]
    assert pauses[:8] == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30], abs=0.051)
    assert pauses[-1] == pytest.approx(1, abs=0.051)  # it begins anew


async def test_a_deletion_that_failed_is_made_later(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with watched(path) as (store, file), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        first, second, third = await store_all(store, "a", "b", "c")
        file.failures = 1
        store.remove(first)
        store.quarantine(second, "bad")
        await batch_ended(store, file)
        assert file.failures == 0
        store.remove(third)
        await batch_ended(store, file)
        nursery.cancel_scope.cancel()
    assert payloads(path) == []
    assert [message.payload for message in quarantined_messages(path)] == [b"b"]


async def test_a_refused_file_is_an_error_and_no_connection_stays_open(path: Path) -> None:
    path.write_bytes(b"notes")
    with pytest.raises(OutboxFileError, match=r"not an outbox file"):
        await Store.open(path)
    path.unlink()
    store = await Store.open(str(path))
    await store.aclose()
    with pytest.raises(OutboxFileError, match=r"is a directory"):
        await Store.open(path.parent)


async def test_a_cancelled_open_leaves_the_file_free(path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await Store.open(path)
    OutboxFile(path).close()
