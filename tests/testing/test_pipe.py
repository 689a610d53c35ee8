"""The memory connection keeps the contract of a Trio stream, and breaks like a socket."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing

from trio_mqtt_driver.testing import PipeStream, open_pipe


async def make_pair() -> tuple[PipeStream, PipeStream]:
    await trio.lowlevel.checkpoint()
    return open_pipe()


async def make_clogged_pair() -> tuple[PipeStream, PipeStream]:
    left, right = open_pipe(capacity=1)
    await left.send_all(b"x")
    await right.send_all(b"x")
    return left, right


async def test_keeps_the_contract_of_a_trio_stream() -> None:
    await trio.testing.check_two_way_stream(make_pair, make_clogged_pair)


async def test_sending_waits_while_the_capacity_is_used_up() -> None:
    left, right = open_pipe(capacity=10)
    with trio.testing.assert_checkpoints():
        await left.send_all(b"0123456789")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, b"abc")
        await trio.testing.wait_all_tasks_blocked()
        assert await right.receive_some(4) == b"0123"
        await trio.testing.wait_all_tasks_blocked()
        assert await right.receive_some() == b"456789abc"


async def test_a_capacity_of_one_hands_over_single_bytes() -> None:
    left, right = open_pipe()
    left.capacity = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, b"abc")
        assert [await right.receive_some() for _ in range(3)] == [b"a", b"b", b"c"]


async def test_raising_the_capacity_wakes_the_sender() -> None:
    left, right = open_pipe(capacity=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, b"abc")
        await trio.testing.wait_all_tasks_blocked()
        left.capacity = math.inf
    assert await right.receive_some() == b"abc"


async def test_close_delivers_what_is_under_way_then_eof() -> None:
    left, right = open_pipe()
    await left.send_all(b"last")
    await left.aclose()
    assert await right.receive_some() == b"last"
    assert await right.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError, match="closed"):
        await right.send_all(b"x")


async def test_reset_breaks_both_directions_after_what_had_arrived() -> None:
    left, right = open_pipe()
    await left.send_all(b"last")
    left.reset()
    with pytest.raises(trio.BrokenResourceError, match="reset") as caught:
        await right.send_all(b"x")
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert await right.receive_some() == b"last"
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await right.receive_some()
    with pytest.raises(trio.ClosedResourceError):
        await left.receive_some()


async def test_reset_wakes_who_waits() -> None:
    left, right = open_pipe(capacity=1)

    async def receive() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await right.receive_some()

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await right.send_all(b"many bytes")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        left.reset()
