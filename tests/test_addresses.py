"""A host name with several addresses, some of them dead: refused, unreachable, silent, or accepted by no broker.

Real sockets on loopback; the names are those of a resolver of our own.
"""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio

from trio_mqtt_driver import BackoffConfig, DriverConfig, Endpoint, MQTTDriver, State, TransportError
from trio_mqtt_driver._transport import open_stream
from trio_mqtt_driver.testing import MemoryBroker

NAME = "broker.example"
ALIVE = "127.0.0.1"
DEAD_6 = "::1"
"""Refused, or not even there on a machine without IPv6."""
REFUSED, REFUSED_TOO = "127.0.0.2", "127.0.0.3"
UNREACHABLE = "127.255.255.255"
ODD = "127.0.0.4"
"""Where a test has something other than a broker."""


class Names(trio.abc.HostnameResolver):
    """Knows one name; ``addresses`` may be changed at any time."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked = 0

    async def getaddrinfo(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002  # Trio's names
        await trio.lowlevel.checkpoint()
        assert host == NAME.encode()
        self.asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [self._entry(address, port) for address in self.addresses]

    def _entry(self, address: str, port: int) -> Any:
        kind = (trio.socket.SOCK_STREAM, trio.socket.IPPROTO_TCP, "")
        if ":" in address:
            return (trio.socket.AF_INET6, *kind, (address, port, 0, 0))
        return (trio.socket.AF_INET, *kind, (address, port))

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError  # the base class wants it; whoever connects does not ask for names


@pytest.fixture
async def names() -> AsyncGenerator[Names, None]:
    names = Names()
    before = trio.socket.set_custom_hostname_resolver(names)
    yield names
    trio.socket.set_custom_hostname_resolver(before)


@attrs.frozen
class Site:
    """A broker at ``ALIVE``, on a port where the other addresses have what a test puts there."""

    broker: MemoryBroker
    config: DriverConfig

    @property
    def port(self) -> int:
        return self.config.endpoint.port

    async def check_reachable(self) -> None:
        async with MQTTDriver(self.config, start="background", rng=random.Random(1)) as driver:
            with trio.fail_after(60):
                await driver.publish("a", b"x", qos=1)
            assert len(self.broker.clients) == 1
        assert not self.broker.violations


@pytest.fixture
async def site(nursery: trio.Nursery, names: Names) -> Site:
    broker = MemoryBroker(nursery)
    config = DriverConfig(
        endpoint=Endpoint(host=NAME, port=await broker.listen()),
        client_id="driver",
        backoff=BackoffConfig(start=0.001, maximum=0.001, pause=0.001),
    )
    return Site(broker, config)


async def failure(config: DriverConfig) -> TransportError:
    with trio.fail_after(30), pytest.raises(TransportError) as caught:
        await open_stream(config)
    return caught.value


# -- addresses that do not accept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [(DEAD_6, ALIVE), (ALIVE, DEAD_6), (REFUSED, REFUSED_TOO, ALIVE), (UNREACHABLE, ALIVE), (ALIVE,)],
    ids=", ".join,
)
async def test_the_address_that_lives_is_found_at_the_first_attempt(
    site: Site, names: Names, addresses: tuple[str, ...]
) -> None:
    names.addresses = list(addresses)
    async with MQTTDriver(site.config) as driver:
        assert driver.status().counters["attempts"] == 1
        assert site.broker.clients == [driver.client_id]


@contextmanager
def silent(address: str, port: int) -> Generator[None, None, None]:
    """Nobody answers a SYN there, since a connection that nobody accepts fills the backlog."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind((address, port))
        listener.listen(0)
        filler.connect((address, port))
        yield


async def test_an_address_that_does_not_answer_is_passed_by(site: Site, names: Names) -> None:
    names.addresses = [ODD, ALIVE]
    with silent(ODD, site.port):
        async with MQTTDriver(site.config) as driver:
            assert driver.status().counters["attempts"] == 1


async def test_an_address_that_does_not_answer_is_passed_by_after_failures_too(site: Site, names: Names) -> None:
    """Also when it was picked to be tried by itself first."""
    names.addresses = [ODD, ALIVE]

    class Always(random.Random):
        def choice(self, seq: Any) -> Any:
            return seq[0]

    with silent(ODD, site.port), trio.fail_after(30):
        stream = await open_stream(site.config.evolve(connect_timeout=1), Always())
        assert isinstance(stream, trio.SocketStream)
        assert stream.socket.getpeername() == (ALIVE, site.port)
        await stream.aclose()


async def test_all_are_dead(site: Site, names: Names) -> None:
    names.addresses = [REFUSED, REFUSED_TOO, UNREACHABLE]
    error = await failure(site.config)
    assert str(error) == f"connecting to mqtt://{NAME}:{site.port}: Connection refused; Network is unreachable"


async def test_the_name_is_unknown(site: Site, names: Names) -> None:
    error = await failure(site.config)
    assert str(error) == f"connecting to mqtt://{NAME}:{site.port}: Name or service not known"


async def test_each_attempt_looks_the_name_up(site: Site, names: Names) -> None:
    async with MQTTDriver(site.config, start="background") as driver, trio.open_nursery() as nursery:
        nursery.start_soon(driver.publish, "a", b"x")
        for addresses in ([], [REFUSED], [DEAD_6, REFUSED_TOO]):
            names.addresses = addresses
            asked = names.asked
            with trio.fail_after(60):
                while names.asked < asked + 3:
                    await driver.wait_state(State.CONNECTING)
                    await driver.wait_state(State.BACKING_OFF, State.PAUSED)
        names.addresses = [REFUSED, ALIVE]
        with trio.fail_after(60):
            await driver.wait_live()
    assert not site.broker.violations


# -- addresses that accept, and have no broker ------------------------------------------------------------------------


@asynccontextmanager
async def stranger(address: str, port: int, *, closes: bool) -> AsyncGenerator[None, None]:
    """Somebody who accepts there, and hangs or closes."""

    async def accept(stream: trio.SocketStream) -> None:
        if closes:
            await stream.aclose()
        else:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, accept, port, host=address))
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("closes", [True, False])
async def test_a_living_address_is_found_behind_one_that_accepts_and_is_no_broker(
    site: Site, names: Names, closes: bool
) -> None:
    names.addresses = [ODD, REFUSED, ALIVE]
    async with stranger(ODD, site.port, closes=closes):
        await attrs.evolve(site, config=site.config.evolve(connect_timeout=0.5)).check_reachable()
