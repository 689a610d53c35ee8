"""Sends ready-made packets as fast as the client takes them."""

from __future__ import annotations

from .. import wire
from ..job import WINDOW, Job
from .base import RECEIVE, Peer, Server


class Feeder(Server):
    """On "go" it floods: QoS 0 until everything is sent, QoS 1 in a window, and then one message more."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._block, self._starts = wire.ready_made(job)
        self._size = (len(self._starts) - 1) // 2

    def go(self) -> None:
        (peer,) = self.peers
        if self.job.qos:
            self._in_a_window(peer)
        else:
            self._all_at_once(peer)
        peer.sock.sendall(wire.publish(self.job, self.job.topic_names()[0], self.job.content, 0))

    def _all_at_once(self, peer: Peer) -> None:
        whole = memoryview(self._block)[: self._starts[self._size]]
        for _ in range(self.job.count // self._size):
            peer.sock.sendall(whole)
        peer.sock.sendall(whole[: self._starts[self.job.count % self._size]])

    def _in_a_window(self, peer: Peer) -> None:
        block = memoryview(self._block)
        window = min(peer.receive_maximum, WINDOW)
        sent = acknowledged = 0
        while acknowledged < self.job.count:
            room = min(window - (sent - acknowledged), self.job.count - sent)
            # In big pieces: if each acknowledgement let one message go, this process would be the bottleneck.
            if room >= window // 2 or (room and sent + room == self.job.count):
                at = sent % self._size
                peer.sock.sendall(block[self._starts[at] : self._starts[at + room]])
                sent += room
            acknowledged += self._acknowledgements(peer)

    def _acknowledgements(self, peer: Peer) -> int:
        data = peer.sock.recv(RECEIVE)
        if not data:
            raise ConnectionError("the client left")
        peer.buffer += data
        whole = len(peer.buffer) // 4
        # Most often nothing but acknowledgements of the short form.
        if all(bytes(peer.buffer[at : whole * 4 : 4]) == first * whole for at, first in enumerate((b"\x40", b"\x02"))):
            del peer.buffer[: whole * 4]
            return whole
        count = 0
        for first, body in wire.split(peer.buffer):
            if first >> 4 == wire.PUBACK:
                count += 1
            else:
                self.handle(peer, first, body)
        return count
