"""A TCP proxy on loopback that breaks the network between a client and a real broker."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import contextmanager

import attrs
import trio

from ._faults import Direction
from ._pipe import reset_stream
from ._ports import HOST, free_port

_BACKLOG = 128


@attrs.define(eq=False)
class _Pair:
    """One connection through the proxy."""

    client: trio.SocketStream
    broker: trio.SocketStream
    pumps: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: bool = False
    """The client got EOF while the broker goes on."""

    def end_output(self) -> None:
        self.ended = True
        try:
            self.client.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.reset()  # It was broken before.

    def reset(self) -> None:
        reset_stream(self.client)
        reset_stream(self.broker)


class FaultProxy:
    """Passes TCP connections on to ``host``:``port`` until told otherwise.

    ::

        proxy = FaultProxy(nursery, broker.port)
        client = connect_to(proxy.host, proxy.port)
        with proxy.blackhole():
            ...                         # connections stay open, nothing arrives
        proxy.reset()

    It listens on a free port of 127.0.0.1 from the start; its tasks live in ``nursery`` until that is cancelled. A
    connection that the broker refuses is accepted here and reset.
    """

    def __init__(self, nursery: trio.Nursery, port: int, host: str = HOST) -> None:
        self.host = HOST
        self.port: int = free_port()
        self.delay: float = 0.0
        """Seconds by which every piece of data is late, in each direction."""
        self.byte_by_byte = False
        """Pass every byte on its own."""
        self.accepted: int = 0
        """Connections so far."""
        self.passed: dict[Direction, int] = {Direction.IN: 0, Direction.OUT: 0}
        """Bytes that were passed on, from the client and from the broker."""
        self._nursery = nursery
        self._target = (host, port)
        self._pairs: set[_Pair] = set()
        self._frozen: dict[Direction, trio.Event] = {}
        self._hanging: trio.Event | None = None
        self._budgets: dict[Direction, int] = {}
        self._reset_at_cut = False
        self._listening = trio.CancelScope()
        self._listen()

    # -- faults that last --

    @contextmanager
    def blackhole(self, direction: Direction | None = None) -> Generator[None, None, None]:
        """Inside the block nothing passes in this direction, or in both; nothing is closed, and nothing is lost.

        New connections are accepted and get no answer. At the end of the block all that was held up goes on, as on
        a network that comes back.
        """
        directions = list(Direction) if direction is None else [direction]
        if any(entry in self._frozen for entry in directions):
            raise RuntimeError("there is a black hole in this direction already")
        for entry in directions:
            self._frozen[entry] = trio.Event()
        try:
            yield
        finally:
            for entry in directions:
                self._frozen.pop(entry).set()

    @contextmanager
    def refuse(self) -> Generator[None, None, None]:
        """Inside the block new connections are refused; those that are open stay."""
        self._listening.cancel(reason="the proxy refuses connections")
        self._listener.socket.close()
        try:
            yield
        finally:
            self._listen()

    @contextmanager
    def hang(self) -> Generator[None, None, None]:
        """Inside the block new connections are accepted and get no answer; at its end they go through."""
        if self._hanging is not None:
            raise RuntimeError("new connections hang already")
        self._hanging = trio.Event()
        try:
            yield
        finally:
            self._hanging.set()
            self._hanging = None

    # -- faults of a moment --

    def reset(self) -> None:
        """End all connections with a TCP reset, on both sides."""
        for pair in list(self._pairs):
            pair.reset()

    def fin(self) -> None:
        """Send the clients EOF on all connections; what they send is still passed on, what the broker sends is not."""
        for pair in self._pairs:
            pair.end_output()

    def cut_after(self, count: int, direction: Direction = Direction.OUT, *, reset: bool = True) -> None:
        """Pass ``count`` more bytes in this direction, then end the connection that they were on: by reset or EOF."""
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        self._budgets[direction] = count
        self._reset_at_cut = reset

    # -- the proxy --

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    def _listen(self) -> None:
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, self.port))
            sock.listen(_BACKLOG)
            self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise
        self._listening = trio.CancelScope()
        self._nursery.start_soon(self._accept, self._listener, self._listening)

    async def _accept(self, listener: trio.SocketListener, listening: trio.CancelScope) -> None:
        try:
            await trio.lowlevel.checkpoint()
            with listening:
                await trio.serve_listeners(self._serve, [listener], handler_nursery=self._nursery)
        finally:
            listener.socket.close()

    async def _serve(self, client: trio.SocketStream) -> None:
        await trio.lowlevel.checkpoint()
        self.accepted += 1
        while self._hanging is not None:
            await self._hanging.wait()
        try:
            broker = await trio.open_tcp_stream(*self._target)
        except OSError:
            reset_stream(client)
            return
        pair = _Pair(client, broker)
        self._pairs.add(pair)
        try:
            async with broker, trio.open_nursery() as nursery:
                pair.pumps = nursery.cancel_scope
                nursery.start_soon(self._pump, pair, client, broker, Direction.IN)
                nursery.start_soon(self._pump, pair, broker, client, Direction.OUT)
        finally:
            self._pairs.discard(pair)

    async def _pump(
        self, pair: _Pair, source: trio.SocketStream, sink: trio.SocketStream, direction: Direction
    ) -> None:
        await trio.lowlevel.checkpoint()
        try:
            while True:
                data: bytes | bytearray = await source.receive_some(65536)
                if self.delay:
                    await trio.sleep(self.delay)
                while direction in self._frozen:
                    await self._frozen[direction].wait()
                if not data:
                    if not (pair.ended and sink is pair.client):
                        await sink.send_eof()
                    return
                if pair.ended and sink is pair.client:
                    continue
                data, cut = self._spend(data, direction)
                await self._pass(data, sink, direction)
                if cut:
                    self._cut(pair)
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # What broke on one side breaks on the other.
            pair.reset()

    def _spend(self, data: bytes | bytearray, direction: Direction) -> tuple[bytes | bytearray, bool]:
        """What of ``data`` may still pass before the cut that was asked for, and whether the cut comes now."""
        budget = self._budgets.get(direction)
        if budget is None:
            return data, False
        if len(data) < budget:
            self._budgets[direction] = budget - len(data)
            return data, False
        del self._budgets[direction]
        return data[:budget], True

    async def _pass(self, data: bytes | bytearray, sink: trio.SocketStream, direction: Direction) -> None:
        await sink.send_all(data[:1] if self.byte_by_byte else data)
        for index in range(1, len(data) if self.byte_by_byte else 0):
            await sink.send_all(data[index : index + 1])
        self.passed[direction] += len(data)

    def _cut(self, pair: _Pair) -> None:
        if self._reset_at_cut:
            pair.reset()
        else:
            pair.pumps.cancel(reason="the proxy cut this connection")
