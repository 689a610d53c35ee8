"""Between a client and a real broker: it cuts the connection on "go", and has a message published as soon as the
broker has granted all filters on the next one."""

from __future__ import annotations

import contextlib
import selectors
import socket

from .. import wire
from ..job import HOST, Job
from .base import RECEIVE, Peer, Server


class Relay(Server):
    """``job.port`` is the broker's. What passes is looked at after it was passed on."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._cut = False
        self._brokers: dict[Peer, Peer] = {}
        """The other side of each connection."""
        self._publisher = self._connect()
        self._publisher.sendall(wire.connect("publisher", job.version))
        self._publisher.recv(RECEIVE)  # CONNACK

    def _connect(self) -> socket.socket:
        sock = socket.create_connection((HOST, self.job.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def go(self) -> None:
        self._cut = True
        for peer in [*self.peers]:
            self.drop(peer)

    def received(self, peer: Peer) -> None:
        broker = self._brokers.get(peer)
        if broker is None:
            broker = self._brokers[peer] = Peer(self._connect())
            self._selector.register(broker.sock, selectors.EVENT_READ, lambda: self._answered(peer))
        broker.sock.sendall(peer.buffer)
        peer.buffer.clear()

    def _answered(self, peer: Peer) -> None:
        broker = self._brokers.get(peer)
        if broker is None:
            return  # as in _readable
        data = broker.sock.recv(RECEIVE)
        if not data:
            self.drop(peer)
            return
        with contextlib.suppress(ConnectionError):
            peer.sock.sendall(data)
        broker.buffer += data
        for first, body in wire.split(broker.buffer):
            if first >> 4 == wire.SUBACK:
                # Before its reason codes: the Packet Identifier, and with MQTT 5 no properties.
                broker.filters += len(body) - (3 if self.job.version == "5" else 2)
                self._granted(broker.filters)

    def _granted(self, filters: int) -> None:
        if self._cut and filters == self.job.filters:
            topic = self.job.topic_names()[-1]
            self._publisher.sendall(wire.publish(self.job, topic, self.job.content, 0))

    def drop(self, peer: Peer) -> None:
        super().drop(peer)
        broker = self._brokers.pop(peer, None)
        if broker is not None:
            self._selector.unregister(broker.sock)
            broker.sock.close()
