"""Ports of 127.0.0.1 that a server can be stopped and started again on."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
# Below the range from which Linux and macOS take the ports of outgoing connections: there, a client that redials a
# port on loopback while the server is down can connect to itself, and so keep the server from coming back.
_PORTS = range(20_000, 32_000)
_TRIES = 200


def free_port() -> int:
    """A port that nobody listens on now; somebody else may be faster in taking it."""
    # Not reproducible on purpose: two test runs side by side must not try the same ports in the same order.
    for port in random.Random().sample(_PORTS, _TRIES):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port among {_TRIES} of {_PORTS.start} … {_PORTS.stop - 1}")
