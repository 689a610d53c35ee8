"""What is in an outbox file and is not sent: messages that are given up, and rows that are no messages."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio

from tests.outboxes import WALL, messages, outgoing, payloads, sql, store_all, watched
from trio_mqtt_driver._history import Counters
from trio_mqtt_driver._outbox_file import OutboxFile, quarantined_messages
from trio_mqtt_driver._store import Store
from trio_mqtt_driver._types import PublishProperties


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


async def test_the_quarantine_keeps_what_is_not_sent_any_more(path: Path) -> None:
    async with watched(path) as (store, _), trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        stored, sound = await store_all(store, "stored", "sound")
        block = b"\x05\x03\x00\x02a/"
        new = outgoing("t/new", b"new", qos=2)
        new.expiry, new.retain, new.attempts, new.properties = 60, True, 4, block
        never = outgoing("never", b"never")
        store.add(new)
        for number, message in enumerate((stored, new, never)):
            store.quarantine(message, f"reason {number}")
            assert message.row == 0
            store.remove(message)  # as its outcome does
        await store_all(store, "after")
        assert sound.row
        nursery.cancel_scope.cancel()
    assert payloads(path) == [b"sound", b"after"]
    kept = quarantined_messages(path)
    assert [(one.topic, one.payload, one.qos, one.retain, one.attempts, one.reason, one.at) for one in kept] == [
        ("t", b"stored", 1, False, 0, "reason 0", WALL),
        ("t/new", b"new", 2, True, 4, "reason 1", WALL),
        ("never", b"never", 1, False, 0, "reason 2", WALL),
    ]
    assert kept[1].properties == PublishProperties(content_type="a/", message_expiry=60)
    assert "never'" in repr(kept[2])
    assert "b'never'" not in repr(kept[2])


POISON: dict[str, tuple[str, str]] = {
    "topic of another type": ("topic = x'612b'", r"topic: a Topic Name is a str, got bytes"),
    "topic with a wildcard": ("topic = 'a/#'", r"no wildcard"),
    "topic that is not UTF-8": ("topic = CAST(x'61ff' AS TEXT)", r"encodable as UTF-8"),
    "no topic": ("topic = ''", r"1\.\.65535 bytes"),
    "another topic": ("topic = 'b'", r"the checksum is another one"),
    "payload of another type": ("payload = 'text'", r"payload must be bytes, not str"),
    "another payload": ("payload = x'00'", r"the checksum is another one"),
    "QoS 3": ("qos = 3", r"qos is 3, allowed are whole numbers from 0 to 2"),
    "QoS of another type": ("qos = 'one'", r"qos is 'one'"),
    "retain 2": ("retain = 2", r"retain is 2"),
    "properties of another type": ("properties = 'none'", r"properties must be bytes"),
    "properties that are none": ("properties = x'0263'", r"length is wrong"),
    "no properties": ("properties = x''", r"longer than its packet"),
    "other properties": ("properties = x'020101'", r"the checksum is another one"),
    "accepted never": ("accepted_wall = 9e999", r"accepted_wall is inf"),
    "accepted at a word": ("accepted_wall = 'noon'", r"accepted_wall is 'noon'"),
    "expiry": ("expiry = -1", r"expiry is -1, allowed are whole numbers from 0 to 4294967295"),
    "priority": ("priority = 'high'", r"priority is 'high'"),
    "offline policy": ("offline = 'sometimes'", r"'sometimes' is not a valid OfflinePolicy"),
    "attempts": ("attempts = x'01'", r"attempts is b'\\x01'"),
    "row": ("row = -5", r"row is -5"),
}


async def test_a_row_that_is_no_message_goes_into_the_quarantine_and_holds_nobody_up(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(path) as (store, _):
        for kind in POISON:
            for message in messages("sound", f"secret of {kind}"):
                store.add(message)
    with closing(sqlite3.connect(path)) as database:
        for number, (change, _) in enumerate(POISON.values()):
            database.execute(f"UPDATE message SET {change} WHERE row = {2 * number + 2}")
        database.commit()
    counters = Counters()
    store = await Store.open(path, wall_clock=lambda: WALL, counters=counters)
    try:
        assert [message.payload for message in store.messages] == [b"sound"] * len(POISON)
        assert [message.row for message in store.messages] == [2 * number + 1 for number in range(len(POISON))]
        late = outgoing("t", b"late")
        store.add(late)
    finally:
        await store.aclose()
    assert counters.quarantined == len(POISON)
    (record,) = caplog.records
    assert f"{len(POISON)} messages cannot be read and go into the quarantine" in record.getMessage()
    assert "secret" not in record.getMessage()
    kept = {one.payload.decode().removeprefix("secret of "): one for one in quarantined_messages(path)}
    assert len(kept) == len(POISON)
    for kind, (_, reason) in POISON.items():
        one = kept[{"payload of another type": "text", "another payload": "\0"}.get(kind, kind)]
        assert re.search(reason, one.reason), one
        assert "secret" not in one.reason
        assert one.at == WALL
    assert kept["topic that is not UTF-8"].topic == "a\\xff"
    assert kept["QoS of another type"].qos == 0
    assert kept["properties that are none"].properties == PublishProperties()
    assert payloads(path) == [b"sound"] * len(POISON) + [b"late"]


async def test_a_row_that_is_no_message_stays_where_it_is_until_it_can_be_moved(path: Path) -> None:
    async with watched(path) as (store, _):
        for message in messages("a", "bad"):
            store.add(message)
    sql(path, "UPDATE message SET qos = 7 WHERE row = 2")
    OutboxFile(path).close()
    assert sql(path, "SELECT row, qos FROM message ORDER BY row") == [(1, 1), (2, 7)]
    store = await Store.open(path)
    try:
        new = outgoing("t", b"new")
        store.add(new)  # must not take the row of the one that is to be moved
    finally:
        await store.aclose()
    assert payloads(path) == [b"a", b"new"]
    assert [one.qos for one in quarantined_messages(path)] == [7]
