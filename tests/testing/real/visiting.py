"""Clients of real brokers, for the tests of the brokers: made as the broker likes them, closed at the end."""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from trio_mqtt_driver.testing import (
    BrokerProcess,
    Connack,
    Connect,
    Ejabberd,
    EmbeddedBroker,
    Iotcore,
    Mosquitto,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
    TLSFiles,
)

BROKERS: list[type[BrokerProcess]] = [EmbeddedBroker, Iotcore, Mosquitto, Ejabberd]
every_broker = pytest.mark.parametrize("kind", BROKERS, ids=lambda kind: kind.name)


class Visit:
    """Makes clients that speak the broker's newest version."""

    def __init__(self) -> None:
        self.streams: list[trio.abc.Stream] = []

    async def __call__(
        self,
        broker: BrokerProcess,
        context: ssl.SSLContext | None = None,
        *,
        user: tuple[str, str] | None = None,
        path: Path | None = None,
        version: int = 0,
        **options: Any,
    ) -> tuple[RawClient, Connack | None]:
        """A client and the answer to its CONNECT, None if the broker hung up; ``options`` are fields of CONNECT."""
        stream: trio.abc.Stream
        if path is not None:
            stream = await trio.open_unix_socket(str(path))
        else:
            stream = await trio.open_tcp_stream(broker.host, broker.port)
        self.streams.append(stream)
        if context is not None:
            stream = trio.SSLStream(stream, context, server_hostname=broker.host)
        client = RawClient(stream, version=version or max(broker.versions))
        name, password = user or broker.credentials or (None, None)
        connect = Connect(
            # A name of its own: a visitor that gave up is still there for the broker, and must not be taken over.
            client_id=options.pop("client_id", f"visitor-{len(self.streams)}"),
            version=client.version,
            keep_alive=60,
            username=name,
            password=None if password is None else password.encode(),
            **options,
        )
        await client.send(connect)
        answer = await client.receive()
        assert answer is None or isinstance(answer, Connack)
        return client, answer

    async def close(self) -> None:
        for stream in self.streams:
            await trio.aclose_forcefully(stream)


def accepted(connack: Connack | None) -> bool:
    return connack is not None and connack.reason_code == 0


async def subscribe(client: RawClient, topic_filter: str, qos: int = 0) -> None:
    await client.send(Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter=topic_filter, qos=qos),)))
    suback = await client.expect(Suback)
    assert suback.reason_codes == (qos,)


async def say(client: RawClient, topic: str, payload: bytes, retain: bool = False) -> Publish:
    """Subscribe, publish, and what comes back."""
    await subscribe(client, topic)
    await client.send(Publish(topic=topic, payload=payload, retain=retain))
    return await client.expect(Publish)


async def end_of(client: RawClient) -> None:
    """Wait for the end of the connection: EOF, or a reset where the broker had not read everything."""
    try:
        assert await client.receive() is None
    except trio.BrokenResourceError:
        return


def session_of(pid: int) -> list[int]:
    """The process, its guardian, and whatever else belongs to their session."""

    def session(of: int) -> int | None:
        try:
            return os.getsid(of)
        except ProcessLookupError:
            return None

    wanted = session(pid)
    assert wanted is not None
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [other for other in pids if session(other) == wanted]


class Farewell:
    """Waits for the end of processes of others."""

    def __init__(self, pids: list[int]) -> None:
        self.pidfds: list[int] = []
        for pid in pids:
            # A broker that starts has scripts that come and go: one may be gone since it was listed.
            with contextlib.suppress(ProcessLookupError):
                self.pidfds.append(os.pidfd_open(pid))

    async def wait(self) -> None:
        for pidfd in self.pidfds:
            await trio.lowlevel.wait_readable(pidfd)

    def close(self) -> None:
        for pidfd in self.pidfds:
            os.close(pidfd)


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)  # pyright: ignore[reportUnknownMemberType]  # trustme: SSLContext | Unknown
    return context


def issue(authority: trustme.CA, directory: Path, *, require_client_cert: bool = False) -> TLSFiles:
    # The year 3000, which is trustme's default, is too far away for ejabberd.
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=20)
    server = authority.issue_cert("localhost", "127.0.0.1", not_after=end)
    server.private_key_pem.write_to_path(directory / "key.pem")
    server.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    return TLSFiles(
        cert=directory / "cert.pem",
        key=directory / "key.pem",
        ca=directory / "ca.pem",
        require_client_cert=require_client_cert,
    )
