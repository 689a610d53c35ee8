"""A driver with its outbox on disk: what a crash, a full disk, a restart and a bad file do to what was published."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import (
    DriverConfig,
    MessageLostError,
    MQTTDriver,
    OutboxFileError,
    QuarantinedError,
    quarantined_messages,
)
from trio_mqtt_driver.testing import Direction, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def stored_config(broker: MemoryBroker, path: Path, **options: Any) -> DriverConfig:
    return memory_config(broker, outbox_path=path, **options)


def arrived(broker: MemoryBroker) -> list[bytes]:
    return [message.payload for message in broker.published if message.topic == "t"]


def crash(path: Path, to: Path) -> Path:
    """What ``kill -9`` would leave on the disk at this moment."""
    to.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if file.is_file():
            shutil.copy(file, to / file.name)
    return to / path.name


@contextmanager
def full_disk() -> Generator[None, None, None]:
    """No file of this process can grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_what_publish_has_returned_for_survives_a_crash_in_order(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path, tmp_path: Path
) -> None:
    async with MQTTDriver(stored_config(broker, path)) as driver:
        await driver.publish("t", b"live", qos=1)
        broker.stop()
        await settled()
        for number in range(20):
            result = await driver.publish("t", b"%d" % number, qos=1 + number % 2, offline="queue")
            assert result.queued
        left = crash(path, tmp_path / "crash")
    broker.start()
    async with MQTTDriver(stored_config(broker, left)) as driver:
        await driver.drain()
    assert arrived(broker) == [b"live", *(b"%d" % number for number in range(20))]
    async with MQTTDriver(stored_config(broker, left)) as driver:
        assert driver.undelivered == ()


async def test_leaving_keeps_what_is_not_delivered_and_says_so(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = stored_config(broker, path, offline="queue", drain_timeout=1)
    async with MQTTDriver(config) as driver:
        broker.faults.hold(Kind.PUBLISH, direction=Direction.IN)
        under_way = driver.publish_nowait("t", b"under way", qos=1)
        await settled()
        broker.stop()
        await settled()
        await driver.publish("t", b"waits", qos=1, retain=True, content_type="text", user_properties=[("a", "b")])
    assert f"2 published and not acknowledged (kept in {path})" in caplog.text
    assert [message.payload for message in driver.undelivered] == [b"under way", b"waits"]
    with pytest.raises(MessageLostError, match="it is kept in the outbox file"):
        await under_way.wait()
    broker.faults.clear()
    broker.start()
    async with MQTTDriver(config) as driver:
        await driver.drain()
    assert arrived(broker) == [b"under way", b"waits"]
    last = list(broker.published)[-1]
    assert last.retain
    assert last.properties["content_type"] == "text"
    assert last.properties["user_properties"] == (("a", "b"),)


@pytest.mark.parametrize("stable", [False, True])
async def test_what_a_refused_or_expired_message_leaves_in_the_file_is_nothing(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path, stable: bool
) -> None:
    config = stored_config(broker, path, stable_id=stable)
    async with MQTTDriver(config) as driver:
        broker.stop()
        await settled()
        await driver.publish("t", b"expires", qos=1, offline="queue", message_expiry=5)
        await driver.publish("t", b"older", qos=1, offline="latest")
        await driver.publish("t", b"newer", qos=1, offline="latest")
        await trio.sleep(6)
        assert driver.status().counters["expired"] == 1
        assert driver.status().counters["superseded"] == 1
    async with MQTTDriver(config, start="background") as driver:
        assert [message.payload for message in driver.undelivered] == [b"newer"]


async def test_time_that_passes_between_two_runs_counts_for_the_expiry(broker: MemoryBroker, path: Path) -> None:
    """In real time: a mock clock would run on while the disk is written."""
    wall = [1_700_000_000.0]
    config = stored_config(broker, path, wall_clock=lambda: wall[0])
    broker.stop()
    async with MQTTDriver(config, start="background") as driver:
        for expiry in (100, 1000):
            await driver.publish("t", b"%d" % expiry, qos=1, offline="queue", message_expiry=expiry)
    wall[0] += 600
    broker.start()
    async with MQTTDriver(config) as driver:
        assert driver.status().counters["expired"] == 1
        await driver.drain()
    (sent,) = (message for message in broker.published if message.topic == "t")
    assert sent.payload == b"1000"
    assert sent.properties["message_expiry"] in (399, 400)


async def test_a_qos_0_message_is_out_of_the_file_before_it_is_sent(
    broker: MemoryBroker, path: Path, tmp_path: Path
) -> None:
    """At most once: it must not be sent by the process that dies, and again by the next one."""
    async with MQTTDriver(stored_config(broker, path)) as driver:
        broker.stop()
        await settled()
        for number in range(3):
            await driver.publish("t", b"%d" % number, qos=0, offline="queue")
        before = crash(path, tmp_path / "before")
        broker.start()
        await broker.wait_for(lambda: b"0" in arrived(broker))
        after = crash(path, tmp_path / "after")
    assert arrived(broker) == [b"0", b"1", b"2"]
    async with MQTTDriver(stored_config(broker, after)) as driver:
        await driver.drain()
    assert arrived(broker) == [b"0", b"1", b"2"]
    async with MQTTDriver(stored_config(broker, before)) as driver:
        await driver.drain()
    assert arrived(broker) == 2 * [b"0", b"1", b"2"]


async def test_a_link_that_works_writes_nothing(autojump_clock: MockClock, broker: MemoryBroker, path: Path) -> None:
    async with MQTTDriver(stored_config(broker, path)) as driver:
        before = {file: file.read_bytes() for file in path.parent.iterdir()}
        for number in range(100):
            await driver.publish("t", b"%d" % number, qos=number % 3)
        assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


async def test_a_message_that_ends_every_connection_is_put_aside_in_the_file(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path
) -> None:
    async with MQTTDriver(stored_config(broker, path, probe="ping", quarantine_after=2, in_flight=1)) as driver:
        broker.faults.cut(Kind.PUBLISH, times=2, direction=Direction.IN, before=True)
        bad = driver.publish_nowait("t", b"bad", qos=1)
        good = driver.publish_nowait("t", b"good", qos=1)
        with pytest.raises(QuarantinedError):
            await bad.wait()
        await good.wait()
    assert arrived(broker) == [b"good"]
    (kept,) = quarantined_messages(path)
    assert (kept.topic, kept.payload, kept.qos) == ("t", b"bad", 1)
    assert "2 connections in a row" in kept.reason
    async with MQTTDriver(stored_config(broker, path)) as driver:
        assert driver.undelivered == ()
    assert arrived(broker) == [b"good"]


async def test_a_damaged_file_leaves_the_async_with_as_itself_and_stays_as_it_is(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path
) -> None:
    path.write_bytes(b"something else entirely " * 1000)
    before = path.read_bytes()
    with pytest.raises(OutboxFileError, match="outbox"):
        async with MQTTDriver(stored_config(broker, path)):
            raise AssertionError("the body must not run")
    assert path.read_bytes() == before
    assert not broker.connects


async def test_a_path_that_is_no_file_is_refused_at_once(broker: MemoryBroker, path: Path) -> None:
    os.mkfifo(path)
    with trio.fail_after(10), pytest.raises(OutboxFileError, match="is no regular file"):
        async with MQTTDriver(stored_config(broker, path)):
            raise AssertionError("the body must not run")


async def test_two_drivers_cannot_share_a_file(autojump_clock: MockClock, broker: MemoryBroker, path: Path) -> None:
    async with MQTTDriver(stored_config(broker, path)) as driver:
        with pytest.raises(OutboxFileError, match="in use"):
            async with MQTTDriver(stored_config(broker, path)):
                raise AssertionError("the body must not run")
        await driver.publish("t", b"x", qos=1)


async def test_a_disk_that_fails_is_told_to_who_waits_for_it_and_stops_nothing_else(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path
) -> None:
    async with MQTTDriver(stored_config(broker, path, offline="queue")) as driver:
        broker.stop()
        await settled()
        with full_disk():
            with pytest.raises(OutboxFileError, match=r"accepted and will be sent.*cannot be written"):
                await driver.publish("t", b"1", qos=1)
            with pytest.raises(OutboxFileError):
                await driver.publish("t", b"2", qos=0)
            assert driver.status().counters["store_errors"] >= 1
            broker.start()
            await driver.wait_live()
            await driver.drain()
            await driver.publish("t", b"3", qos=1)
    assert arrived(broker) == [b"1", b"2", b"3"]


async def test_cancelling_a_queued_publish_at_any_point_keeps_it_at_most_once(
    autojump_clock: MockClock, broker: MemoryBroker, path: Path
) -> None:
    config = stored_config(broker, path, offline="queue")
    broker.stop()
    async with MQTTDriver(config, start="background") as driver:
        await settled()
        for number in range(6):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(driver.publish, "t", b"%d" % number, qos=1))
                    for _ in range(number):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
    broker.start()
    async with MQTTDriver(config) as driver:
        await driver.drain()
    assert len(arrived(broker)) == len(set(arrived(broker)))
    assert b"5" in arrived(broker)
