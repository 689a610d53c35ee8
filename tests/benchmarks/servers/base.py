"""A bare server: it answers CONNECT, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, and the QoS 1 publish that tests a link."""

from __future__ import annotations

import resource
import selectors
import socket
import sys

from .. import wire
from ..job import HOST, Job

RECEIVE = 1 << 18


class Peer:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.version = "5"
        self.receive_maximum = 65535
        self.filters = 0


class Server:
    """One thread, one selector. What comes in on the control connection is the client's "go"."""

    def __init__(self, job: Job) -> None:
        self.job = job
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._listener = self._listen()
        self._control = self._listen()
        self.port: int = self._listener.getsockname()[1]
        self.control_port: int = self._control.getsockname()[1]
        self.peers: list[Peer] = []
        self._selector = selectors.DefaultSelector()
        self._ended = False

    @staticmethod
    def _listen() -> socket.socket:
        listener = socket.socket()
        listener.bind((HOST, 0))
        listener.listen(1024)
        return listener

    def run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._control, selectors.EVENT_READ, self._accept_control)
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._end)
        while not self._ended:
            for key, _ in self._selector.select():
                key.data()

    def _end(self) -> None:
        self._ended = True

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(sock)
        self.peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._readable(peer))

    def _accept_control(self) -> None:
        sock, _ = self._control.accept()

        def readable() -> None:
            if sock.recv(1):
                self.go()
            else:
                self._selector.unregister(sock)
                sock.close()

        self._selector.register(sock, selectors.EVENT_READ, readable)

    def _readable(self, peer: Peer) -> None:
        if peer not in self.peers:
            return  # dropped since the selector found it readable
        try:
            data = peer.sock.recv(RECEIVE)
            if data:
                peer.buffer += data
                self.received(peer)
        except ConnectionError:
            data = b""
        if not data:
            self.drop(peer)

    def drop(self, peer: Peer) -> None:
        if peer in self.peers:
            self.peers.remove(peer)
            self._selector.unregister(peer.sock)
            peer.sock.close()

    def received(self, peer: Peer) -> None:
        for first, body in wire.split(peer.buffer):
            self.handle(peer, first, body)

    def handle(self, peer: Peer, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind == wire.CONNECT:
            peer.version, peer.receive_maximum = wire.receive_maximum(body)
            peer.sock.sendall(wire.connack(peer.version))
        elif kind == wire.SUBSCRIBE:
            count = wire.count_filters(first, body, peer.version)
            peer.sock.sendall(wire.suback(body, peer.version, count, self.job.qos))
            peer.filters += count
            self.subscribed(peer)
        elif kind == wire.UNSUBSCRIBE:
            peer.sock.sendall(wire.unsuback(body, peer.version, wire.count_filters(first, body, peer.version)))
        elif kind == wire.PUBLISH:
            length = int.from_bytes(body[:2], "big")
            if first & 0x06:
                peer.sock.sendall(b"\x40\x02" + body[2 + length : 4 + length])
            self.published(peer, body[2 : 2 + length])
        elif kind == wire.PINGREQ:
            peer.sock.sendall(wire.PINGRESP)
        elif kind == wire.DISCONNECT:
            self.drop(peer)

    def go(self) -> None:
        """The client's measured phase begins."""

    def subscribed(self, peer: Peer) -> None:
        """A SUBSCRIBE was answered."""

    def published(self, peer: Peer, topic: bytes) -> None:
        """A PUBLISH came, and was acknowledged."""
