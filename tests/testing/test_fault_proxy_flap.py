"""A fault proxy that flaps, that is asked for nonsense, that is cancelled at any moment."""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Any

import pytest
import trio

from tests.brokers.grounds import require
from tests.testing.proxies import ask, broken, call, reachable, serve
from trio_mqtt_driver.testing import (
    Connect,
    FaultProxy,
    Mosquitto,
    Pingreq,
    Pingresp,
    RawClient,
)


@pytest.fixture
async def proxy(nursery: trio.Nursery) -> FaultProxy:
    return FaultProxy(nursery, await serve(nursery), rng=random.Random(3))


# -- flapping --


async def test_flapping_keeps_its_schedule(nursery: trio.Nursery, autojump_clock: object) -> None:
    # Nobody listens on port 1, and nothing has to pass: so time may jump in spite of the sockets.
    proxy = FaultProxy(nursery, 1)
    with proxy.flap([(10, 5), (0, 2), (3, 1)]):
        seen: list[bool] = []
        await trio.sleep(0.5)
        for _ in range(23):
            seen.append(reachable(proxy))
            await trio.sleep(1)
    expected = "1" * 10 + "0" * 7 + "1" * 3 + "0" + "1" * 2
    assert "".join(str(int(up)) for up in seen) == expected
    with proxy.flap(itertools.repeat((1, math.inf))):
        await trio.sleep(1000)
        assert not reachable(proxy)
    assert reachable(proxy)


async def test_flapping_resets_what_is_open(proxy: FaultProxy) -> None:
    async with await call(proxy) as stream:
        await ask(stream, b"x")
        with proxy.flap([(0, math.inf)]):
            assert await broken(stream)
            with pytest.raises(OSError, match="connect"):
                await call(proxy)
    async with await call(proxy) as stream:
        assert await ask(stream, b"x") == b"x"


async def test_flapping_for_no_time_is_an_error() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="must not both be 0")):
        async with trio.open_nursery() as nursery:
            with FaultProxy(nursery, 1).flap([(0, 0)]):
                await trio.sleep_forever()


# -- what it refuses --


def begin(fault: object) -> None:
    """One that lasts begins with its block only."""
    if isinstance(fault, AbstractContextManager):
        with fault:
            pass


@pytest.mark.parametrize(
    "fault, complaint",
    [
        (lambda proxy: proxy.cut_after(0), r"count must be an integer of at least 1, not 0"),
        (lambda proxy: proxy.cut_after(1, None), r"direction must be Direction.IN or Direction.OUT, not None"),
        (lambda proxy: proxy.corrupt(-1), r"after must be an integer of at least 0, not -1"),
        (lambda proxy: proxy.corrupt(1.0), r"after must be an integer of at least 0, not 1.0"),
        (lambda proxy: proxy.corrupt(mask=256), r"mask must be an integer from 1 to 255, not 256"),
        (lambda proxy: proxy.corrupt(mask=0), r"mask must be an integer from 1 to 255, not 0"),
        (lambda proxy: proxy.fin("out"), r"direction must be Direction.IN or Direction.OUT, not 'out'"),
        (lambda proxy: proxy.blackhole("out"), r"direction must be Direction.IN, Direction.OUT or None, not 'out'"),
        (lambda proxy: proxy.delay(-1), r"seconds must be a number of at least 0, not -1"),
        (lambda proxy: proxy.delay(math.nan), r"seconds must be a number of at least 0, not nan"),
        (lambda proxy: proxy.delay(math.inf), r"seconds must be finite, not inf"),
        (lambda proxy: proxy.delay(1, jitter=True), r"jitter must be a number of at least 0, not True"),
        (lambda proxy: proxy.bandwidth(0.5), r"bytes_per_second must be a number of at least 1, not 0.5"),
        (lambda proxy: proxy.bandwidth("1"), r"bytes_per_second must be a number of at least 1, not '1'"),
    ],
)
async def test_bad_arguments_are_named(proxy: FaultProxy, fault: Callable[[FaultProxy], Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        begin(fault(proxy))


async def test_a_bad_port_is_named(nursery: trio.Nursery) -> None:
    with pytest.raises(ValueError, match=r"port must be an integer from 1 to 65535, not 0"):
        FaultProxy(nursery, 0)


# -- what it leaves behind --


async def test_it_can_be_cancelled_at_any_moment(nursery: trio.Nursery) -> None:
    """Under load with all faults on, at the n-th turn of the scheduler: no socket stays open, or pytest says so."""
    port = await serve(nursery)
    for turns in range(0, 120, 3):
        async with trio.open_nursery() as own, AsyncExitStack() as stack:
            proxy = FaultProxy(own, port)

            async def use(proxy: FaultProxy = proxy) -> None:
                try:
                    async with await call(proxy) as stream:
                        await ask(stream, bytes(300_000))
                except (OSError, trio.BrokenResourceError):
                    pass

            if turns % 2:
                stack.enter_context(proxy.delay(0.0001, jitter=0.0001))
                stack.enter_context(proxy.flap(itertools.repeat((0.005, 0.001))))
            for _ in range(3):
                own.start_soon(use)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            own.cancel_scope.cancel()
        assert proxy.open == 0
        assert not reachable(proxy)
    gc.collect()


async def test_a_refusal_may_outlive_the_proxy() -> None:
    async with trio.open_nursery() as nursery:
        proxy = FaultProxy(nursery, 1)
        refusal = proxy.refuse()
        refusal.__enter__()
        nursery.cancel_scope.cancel()
    refusal.__exit__(None, None, None)
    assert not reachable(proxy)


async def test_a_closed_nursery_gets_no_proxy() -> None:
    async with trio.open_nursery() as nursery:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        FaultProxy(nursery, 1)
    gc.collect()


@pytest.mark.broker
async def test_a_broker_on_a_bad_network(nursery: trio.Nursery) -> None:
    async with require(Mosquitto()) as broker:
        proxy = FaultProxy(nursery, broker.port, rng=random.Random(1))
        with proxy.delay(0.02, jitter=0.02), proxy.bandwidth(2000), proxy.byte_by_byte():
            async with await call(proxy) as stream:
                client = RawClient(stream)
                with trio.fail_after(20):
                    assert (await client.connect(Connect(client_id="far"))).reason_code == 0
                    await client.send(Pingreq())
                    await client.expect(Pingresp)
