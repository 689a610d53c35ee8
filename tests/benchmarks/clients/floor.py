"""A bare loop over a socket, with no library at all: what this Python needs for the bytes alone."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from .. import wire
from ..gauge import Gauge
from ..job import DONE, HOST, WINDOW, Job

RECEIVE = 1 << 16


def run(work: Callable[[Job, Gauge], None], job: Job, gauge: Gauge) -> None:
    work(job, gauge)


class Connection:
    def __init__(self, job: Job, filters: list[str]) -> None:
        self.sock = socket.create_connection((HOST, job.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self.sock.sendall(wire.connect("floor", job.version))
        self.packet()
        if filters:
            self.sock.sendall(wire.subscribe(filters, job.qos, job.version))
            self.packet()

    def packet(self) -> tuple[int, bytes]:
        """Wait for one packet; what came after it is kept for the next call."""
        while True:
            for found in wire.split(self._buffer):
                return found
            data = self.sock.recv(RECEIVE)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._buffer += data

    def until(self, kind: int) -> None:
        while self.packet()[0] >> 4 != kind:
            pass


def receive(job: Job, gauge: Gauge) -> None:
    connection = Connection(job, job.topic_filters())
    sock = connection.sock
    gauge.start()
    left = job.expected
    rest = b""
    five = job.version == "5"
    while left:
        data = rest + sock.recv(RECEIVE)
        end = len(data)
        at = 0
        acknowledgements: list[bytes] = []
        while end - at >= 2:
            length = data[at + 1]
            start = at + 2
            if length & 0x80:
                found = wire.remaining_length(data, at)
                if found is None:
                    break
                length, start = found
            stop = start + length
            if stop > end:
                break
            first = data[at]
            if first >> 4 == 3:
                body = start + 2 + (data[start] << 8 | data[start + 1])
                topic = data[start + 2 : body].decode()
                if first & 0x06:
                    acknowledgements.append(data[body : body + 2])
                    body += 2
                if five:
                    body += 1 + data[body]
                handle(topic, data[body:stop])
                left -= 1
            at = stop
        rest = data[at:]
        if acknowledgements:
            sock.sendall(b"\x40\x02" + b"\x40\x02".join(acknowledgements))
    gauge.stop()


def handle(topic: str, payload: bytes) -> None:
    """A handler that does nothing, since one is called in all other clients, too."""


def publish(job: Job, gauge: Gauge) -> None:
    connection = Connection(job, [DONE])
    sock = connection.sock
    topics = [topic.encode() for topic in job.topic_names()]
    prefixes = [len(topic).to_bytes(2, "big") + topic for topic in topics]
    properties, content = wire.publish_properties(job), job.content
    several = len(prefixes)
    gauge.start()
    sent = 0
    if job.qos:
        # What the broker lets be in flight, which mosquitto has at 20.
        window = WINDOW if job.control else 20
        open_ids = 0
        rest = b""
        while sent < job.count or open_ids:
            out: list[bytes] = []
            for number in range(sent, min(sent + window - open_ids, job.count)):
                body = prefixes[number % several] + (number % WINDOW + 1).to_bytes(2, "big") + properties + content
                out.append(wire.packet(0x32, body) if len(body) > 127 else bytes((0x32, len(body))) + body)
            sock.sendall(b"".join(out))
            sent += len(out)
            open_ids += len(out)
            rest += sock.recv(RECEIVE)
            at, end = 0, len(rest)
            while end - at >= 2 and at + 2 + rest[at + 1] <= end:
                at += 2 + rest[at + 1]
                open_ids -= 1
            rest = rest[at:]
    else:
        while sent < job.count:
            out = []
            for number in range(sent, min(sent + 500, job.count)):
                body = prefixes[number % several] + properties + content
                out.append(wire.packet(0x30, body) if len(body) > 127 else bytes((0x30, len(body))) + body)
            sock.sendall(b"".join(out))
            sent += len(out)
    sock.sendall(wire.done(job, 0))
    connection.until(wire.PUBLISH)
    gauge.stop()


def round_trip(job: Job, gauge: Gauge) -> None:
    connection = Connection(job, job.topic_filters())
    topic = job.topic_names()[0]
    trips: list[float] = []
    for number in range(job.count):
        time.sleep(0.002)  # noqa: TID251  # what is measured is a low rate, and there is no loop here that could wait
        before = time.perf_counter()
        connection.sock.sendall(wire.publish(job, topic, job.content, job.qos, number + 1))
        identifier = b""
        while True:
            first, body = connection.packet()
            if first >> 4 == wire.PUBLISH:
                place = 2 + int.from_bytes(body[:2], "big")
                identifier = body[place : place + 2]
                break
        trips.append(time.perf_counter() - before)
        if job.qos:
            connection.sock.sendall(b"\x40\x02" + identifier)
    gauge.trips(trips)


def reconnect(job: Job, gauge: Gauge) -> None:
    """With a test publish, as this driver does."""
    filters = job.topic_filters()
    connection = Connection(job, filters)
    gauge.start()
    with contextlib.suppress(ConnectionError):
        connection.until(wire.PUBLISH)
    connection.sock.close()
    connection = Connection(job, [])
    connection.sock.sendall(wire.publish(job, "floor/test", b"", 1, 1))
    connection.until(wire.PUBACK)
    connection.sock.sendall(wire.subscribe(filters, job.qos, job.version))
    connection.until(wire.PUBLISH)
    gauge.stop()
