"""Closes the connection on "go", and sends a message to the next one as soon as all filters are subscribed there."""

from __future__ import annotations

from .. import wire
from .base import Peer, Server


class Cutter(Server):
    _cut = False

    def go(self) -> None:
        self._cut = True
        for peer in [*self.peers]:
            self.drop(peer)

    def subscribed(self, peer: Peer) -> None:
        if self._cut and peer.filters == self.job.filters:
            peer.sock.sendall(wire.publish(self.job, self.job.topic_names()[-1], self.job.content, 0))
