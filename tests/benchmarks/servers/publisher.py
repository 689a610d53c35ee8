"""Publishes through a real broker: a bare loop that sends ready-made packets, for the clients that receive."""

from __future__ import annotations

import socket

from .. import wire
from ..job import HOST, Job
from .base import RECEIVE, Server

BROKER_WINDOW = 20
"""mosquitto's limit on what is in flight, and what a 3.1.1 client has to keep to."""


class Publisher(Server):
    """``job.port`` is the broker's; nobody connects to this server but to say "go"."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.port = job.port
        self._block, self._starts = wire.ready_made(job)
        self._size = (len(self._starts) - 1) // 2
        self._sock = socket.create_connection((HOST, job.port))
        self._sock.sendall(wire.connect("publisher", job.version))
        self._buffer = bytearray()
        self._packets = 0
        while not self._packets:  # CONNACK
            self._receive()

    def go(self) -> None:
        block = memoryview(self._block)
        before = self._packets
        sent = 0
        while sent < self.job.expected:
            acknowledged = self._packets - before if self.job.qos else sent
            room = min(BROKER_WINDOW - (sent - acknowledged), self.job.expected - sent)
            if room:
                at = sent % self._size
                self._sock.sendall(block[self._starts[at] : self._starts[at + room]])
                sent += room
            if self.job.qos:
                self._receive()

    def _receive(self) -> None:
        data = self._sock.recv(RECEIVE)
        if not data:
            raise ConnectionError("the broker closed the connection")
        self._buffer += data
        self._packets += sum(1 for _ in wire.split(self._buffer))
