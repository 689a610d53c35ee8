"""Takes what a client publishes, acknowledges it, and sends back the message that says "done"."""

from __future__ import annotations

from .. import wire
from ..job import DONE, Job
from .base import Peer, Server


class Sink(Server):
    """A run of packets of one length is handled with a few slices, whatever their number."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._taken = 0

    def received(self, peer: Peer) -> None:
        buffer = peer.buffer
        while True:
            found = wire.remaining_length(buffer, 0)
            if found is None or len(buffer) < found[0] + found[1]:
                return
            length, start = found
            size = start + length
            many = len(buffer) // size if buffer[0] >> 4 == wire.PUBLISH else 1
            while many > 1 and not self._alike(buffer, start, size, many):
                many //= 2
            if many < 2:
                first, body = buffer[0], bytes(buffer[start:size])
                del buffer[:size]
                self.handle(peer, first, body)
                continue
            if buffer[0] & 0x06:
                place = start + 2 + int.from_bytes(buffer[start : start + 2], "big")
                acknowledgements = bytearray(b"\x40\x02\x00\x00") * many
                acknowledgements[2::4] = buffer[place : size * many : size]
                acknowledgements[3::4] = buffer[place + 1 : size * many : size]
                peer.sock.sendall(acknowledgements)
            del buffer[: size * many]
            self._taken += many

    @staticmethod
    def _alike(buffer: bytearray, start: int, size: int, many: int) -> bool:
        """Whether the next ``many`` packets have the same header and the same length of topic."""
        return all(buffer[at : size * many : size] == buffer[at : at + 1] * many for at in range(start + 2))

    def published(self, peer: Peer, topic: bytes) -> None:
        if topic.startswith(b"bench/0"):
            self._taken += 1
        if topic == DONE.encode():
            if self._taken != self.job.count:
                raise RuntimeError(f"{self._taken} messages came, {self.job.count} should have")
            peer.sock.sendall(wire.done(self.job, 0))
