"""The leak check finds what was left behind, names it, and keeps quiet about all else."""

from __future__ import annotations

import gc
import re
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from tests.testing.pytest_runs import TRIO_MODE, failed, passed, run
from trio_mqtt_driver.testing import LeakCheck, LeakError, _leaks

pytest_plugins = "pytester"

# -- the check itself --


@pytest.fixture
def kept() -> Generator[list[socket.socket], None, None]:
    sockets: list[socket.socket] = []
    yield sockets
    for entry in sockets:
        entry.close()


@pytest.fixture
def end() -> Generator[threading.Event, None, None]:
    event = threading.Event()
    yield event
    event.set()


@contextmanager
def leaking() -> Generator[list[str], None, None]:
    """What the check says of the block, line by line; it must find something."""
    lines: list[str] = []
    try:
        with LeakCheck():
            yield lines
    except LeakError as exc:
        lines += str(exc).splitlines()
        return
    pytest.fail("nothing was found")


async def test_a_task_is_named_with_the_line_that_started_it() -> None:
    with leaking() as found:
        line = sys._getframe().f_lineno + 1
        trio.lowlevel.spawn_system_task(trio.sleep_forever, name="mine")
    assert found == ["left behind:", f"  task 'mine', started at {__file__}:{line}"]


async def test_tasks_of_any_nursery_and_their_children(nursery: trio.Nursery) -> None:
    async def parent() -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.sleep_forever, name="child")
            await trio.sleep_forever()

    with leaking() as found:
        nursery.start_soon(parent, name="parent")
        await trio.testing.wait_all_tasks_blocked()
    assert [line.split()[1] for line in found[1:]] == ["'child',", "'parent',"]


async def test_a_task_that_was_there_before_or_has_ended_is_none(nursery: trio.Nursery) -> None:
    nursery.start_soon(trio.sleep_forever)
    with LeakCheck():
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.lowlevel.checkpoint)
        trio.lowlevel.spawn_system_task(trio.lowlevel.checkpoint)
        await trio.testing.wait_all_tasks_blocked()


def test_sockets_are_named_by_their_addresses(kept: list[socket.socket]) -> None:
    with leaking() as found:
        kept += [server := socket.create_server(("127.0.0.1", 0)), socket.create_connection(server.getsockname())]
        kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        kept += socket.socketpair()
    there, here = (f"127.0.0.1:{entry.getsockname()[1]}" for entry in kept[:2])
    descriptors = [entry.fileno() for entry in kept]
    assert found[1:] == [
        f"  socket {there} (SOCK_STREAM, file descriptor {descriptors[0]})",
        f"  socket {here} <-> {there} (SOCK_STREAM, file descriptor {descriptors[1]})",
        f"  socket 0.0.0.0:0 (SOCK_DGRAM, file descriptor {descriptors[2]})",
        f"  socket unnamed <-> unnamed (SOCK_STREAM, file descriptor {descriptors[3]})",
        f"  socket unnamed <-> unnamed (SOCK_STREAM, file descriptor {descriptors[4]})",
    ]


def test_a_socket_that_only_the_garbage_collector_would_close() -> None:
    class Loop:
        def __init__(self) -> None:
            self.itself = self
            self.socket = socket.socket()

    gc.disable()
    try:
        with pytest.raises(LeakError, match="socket"), LeakCheck():
            Loop()
    finally:
        gc.enable()
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()


def test_a_socket_that_was_there_before_or_was_closed_is_none(kept: list[socket.socket]) -> None:
    kept.append(socket.socket())
    with LeakCheck():
        socket.socket().close()


def test_a_descriptor_that_is_used_again_is_another_socket(kept: list[socket.socket]) -> None:
    first = socket.socket()
    number = first.fileno()
    with leaking() as found:
        first.close()
        kept.append(socket.socket())
    assert kept[0].fileno() == number
    assert f"file descriptor {number}" in found[1]


def test_sockets_without_a_list_of_descriptors(kept: list[socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_leaks, "_open_sockets", _leaks._sockets_by_object)
    kept.append(socket.socket())
    with leaking() as found:
        kept.append(socket.socket())
        kept[1].close()
        kept.append(socket.create_server(("127.0.0.1", 0)))
    address = kept[2].getsockname()
    assert found[1:] == [f"  socket {address[0]}:{address[1]} (SOCK_STREAM, file descriptor {kept[2].fileno()})"]


def test_a_thread_is_named(end: threading.Event) -> None:
    with leaking() as found:
        threading.Thread(target=end.wait, name="mine").start()
    assert found == ["left behind:", "  thread 'mine'"]


def test_a_thread_that_is_about_to_end_is_waited_for_and_its_socket() -> None:
    entered = threading.Event()

    def work() -> None:
        with socket.socket():
            entered.set()
            # Nothing tells a thread that it is being waited for. A check that begins later has less to do.
            threading.Event().wait(0.1)

    with LeakCheck():
        threading.Thread(target=work).start()
        entered.wait()


async def test_a_worker_of_trio_is_a_leak_while_it_has_a_job_only(end: threading.Event) -> None:
    with LeakCheck():
        await trio.to_thread.run_sync(int)  # Now there is a worker that waits for its next job.
    token = trio.lowlevel.current_trio_token()

    def work() -> None:
        token.run_sync_soon(scope.cancel)
        end.wait()

    with leaking() as found, trio.CancelScope() as scope:
        await trio.to_thread.run_sync(work, abandon_on_cancel=True)
    assert "work from " in found[1]


def test_an_exception_of_the_block_is_left_alone(kept: list[socket.socket]) -> None:
    def fail() -> None:
        with LeakCheck():
            kept.append(socket.socket())
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        fail()


def test_outside_of_trio_too() -> None:
    with LeakCheck():
        trio.run(trio.lowlevel.checkpoint)


# -- as a fixture, and by the ini option --

LEAKS = {
    "trio.lowlevel.spawn_system_task(trio.sleep_forever, name='mine')": "  task 'mine', started at *test_*.py:*",
    "KEPT.append(socket.create_server(('127.0.0.1', 0)))": "  socket 127.0.0.1:* (SOCK_STREAM, *)",
    "threading.Thread(target=END.wait, name='mine').start()": "  thread 'mine'",
}
HEAD = """
import socket, threading
import pytest, trio

END, KEPT = threading.Event(), []

@pytest.fixture(autouse=True, scope="module")
def _tidy():
    yield
    END.set()
    for entry in KEPT:
        entry.close()
"""
MARKED = "[pytest]\n"
EVERYWHERE = TRIO_MODE + "mqtt_leak_check = true\n"

every_leak = pytest.mark.parametrize("leak, line", LEAKS.items(), ids=["task", "socket", "thread"])


@every_leak
def test_a_test_that_leaks_fails(pytester: pytest.Pytester, leak: str, line: str) -> None:
    test = f"""
@pytest.mark.trio
async def test(leak_check):
    {leak}
"""
    failed(run(pytester, HEAD + test, ini=MARKED), "the test has left behind:", line)


@every_leak
def test_a_fixture_that_leaks_fails_its_test(pytester: pytest.Pytester, leak: str, line: str) -> None:
    test = f"""
@pytest.fixture
async def leaking():
    yield
    {leak}

@pytest.mark.usefixtures("leak_check")
class TestIt:
    async def test(self, leaking):
        await trio.sleep(0)
"""
    failed(run(pytester, HEAD + test), "the test has left behind:", line)


@every_leak
def test_without_being_asked_for(pytester: pytest.Pytester, leak: str, line: str) -> None:
    test = f"""
async def test():
    {leak}
"""
    failed(run(pytester, HEAD + test, ini=EVERYWHERE), "the test has left behind:", line)


@every_leak
def test_not_without_it(pytester: pytest.Pytester, leak: str, line: str) -> None:
    test = f"""
async def test():
    {leak}
"""
    passed(run(pytester, HEAD + test))


def test_the_message_is_all_that_is_shown(pytester: pytest.Pytester) -> None:
    test = """
async def test(leak_check):
    KEPT.append(socket.socket())
"""
    shown = run(pytester, HEAD + test, "--color=no").outlines
    start = shown.index("the test has left behind:")
    assert re.fullmatch(r"_+ test _+", shown[start - 1])
    assert shown[start + 1].startswith("  socket 0.0.0.0:0 ")
    assert shown[start + 2].startswith("=")


def test_a_failing_test_shows_its_own_failure(pytester: pytest.Pytester) -> None:
    test = """
async def test(leak_check):
    KEPT.append(socket.socket())
    assert 1 == 2
"""
    result = run(pytester, HEAD + test)
    failed(result, "*assert 1 == 2*")
    result.stdout.no_fnmatch_line("*left behind*")


def test_skipped_and_expected_to_fail(pytester: pytest.Pytester) -> None:
    test = """
async def test_skipped(leak_check):
    pytest.skip("not today")

@pytest.mark.xfail
async def test_expected(leak_check):
    assert 1 == 2
"""
    run(pytester, HEAD + test).assert_outcomes(skipped=1, xfailed=1)


def test_all_that_a_test_may_do(pytester: pytest.Pytester) -> None:
    test = """
import sys
from trio_mqtt_driver.testing import MemoryBroker

@pytest.mark.parametrize("number", range(3))
async def test_threads(number):
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(trio.to_thread.run_sync, int)

async def test_sockets(nursery, memory_broker):
    port = await memory_broker.listen()
    stream = await trio.open_tcp_stream("localhost", port)
    nursery.start_soon(trio.sleep_forever)
    async with stream:
        await stream.send_all(b"x")

async def test_processes():
    await trio.run_process([sys.executable, "-c", ""])

async def test_driver(mqtt_driver, driver_probe, memory_broker):
    async with driver_probe.reconnect():
        memory_broker.drop()

async def test_virtual(autojump_mqtt_driver):
    await trio.sleep(1000)

async def test_cancelled():
    with trio.move_on_after(0.01):
        async with await trio.open_file(__file__) as file:
            await trio.sleep_forever()

def test_without_trio():
    KEPT.append(socket.socket())
"""
    passed(run(pytester, HEAD + test, ini=EVERYWHERE), 9)


def test_every_test_has_its_own_check(pytester: pytest.Pytester) -> None:
    test = """
async def test_leaking(leak_check):
    KEPT.append(socket.socket())
    threading.Thread(target=END.wait).start()

async def test_clean(leak_check):
    await trio.sleep(0)
"""
    run(pytester, HEAD + test).assert_outcomes(failed=1, passed=1)


def test_examples_of_hypothesis(pytester: pytest.Pytester) -> None:
    test = """
from hypothesis import given, settings, strategies

@pytest.mark.parametrize("kept", [False, True])
@settings(max_examples=5, database=None)
@given(number=strategies.integers())
async def test(kept, number, leak_check):
    if kept:
        KEPT.append(socket.socket())
    await trio.sleep(0)
"""
    result = run(pytester, HEAD + test)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*LeakError: left behind:", "*socket 0.0.0.0:0*"])


def test_it_is_for_trio_tests(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test(leak_check): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["leak_check: only for tests that pytest-trio runs"])
