"""The least MQTT client that there is: it says what it is told and hands over what comes."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import trio

from ._packets import Connack, Connect, Packet
from ._properties import WireError
from ._wire import Decoder, encode

P = TypeVar("P", bound=Packet)


class RawClient:
    """Packets over a stream, nothing by itself: no acknowledgement, no keep alive. For testing brokers."""

    def __init__(self, stream: trio.abc.Stream, version: int = 5) -> None:
        self.stream = stream
        self.version = version
        self._decoder = Decoder(server=False, version=version)
        self._packets: deque[Packet] = deque()
        self._error: WireError | None = None

    async def connect(self, connect: Connect) -> Connack:
        """Send CONNECT and return the answer."""
        await self.send(connect)
        return await self.expect(Connack)

    async def send(self, *packets: Packet) -> None:
        await self.stream.send_all(b"".join(encode(packet, self.version) for packet in packets))

    async def receive(self) -> Packet | None:
        """The next packet; None at EOF. Raises ``WireError``, and ``trio.BrokenResourceError`` after a reset."""
        await trio.lowlevel.checkpoint()
        while not self._packets:
            if self._error is not None:
                raise self._error
            data = await self.stream.receive_some(65536)
            if not data:
                return None
            try:
                self._packets.extend(self._decoder.packets(bytes(data)))
            except WireError as error:
                self._error = error  # The packets before it come first.
        return self._packets.popleft()

    async def expect(self, kind: type[P]) -> P:
        """The next packet, which must be of this class."""
        packet = await self.receive()
        if not isinstance(packet, kind):
            raise AssertionError(f"expected {kind.__name__}, got {packet}")
        return packet
