"""Opening a stream: every failure of network and TLS is an error of ours that says what happened."""

from __future__ import annotations

import datetime
import errno
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
import trio.testing
import trustme

from trio_mqtt_driver import (
    ConnectError,
    ConnectionLostError,
    DriverConfig,
    Endpoint,
    MQTTDriverError,
    OptionsError,
    TLSConfig,
    TLSError,
    TransportError,
)
from trio_mqtt_driver._transport import _family_of, lost, open_stream, open_stream_by

Handler = Callable[[trio.SocketStream], Awaitable[None]]


async def echo(stream: trio.abc.Stream) -> None:
    async with stream:
        async for data in stream:
            await stream.send_all(data)


@asynccontextmanager
async def serving(handler: Handler, host: str = "127.0.0.1") -> AsyncGenerator[int, None]:
    """A server on a free port of ``host``."""
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, handler, 0, host=host))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def answered(config: DriverConfig) -> bytes:
    stream = await open_stream(config)
    try:
        await stream.send_all(b"ping")
        return bytes(await stream.receive_some())
    finally:
        await trio.aclose_forcefully(stream)


def config(port: int, host: str = "127.0.0.1", *, scheme: str = "mqtt", **options: Any) -> DriverConfig:
    return DriverConfig(endpoint=Endpoint(scheme=scheme, host=host, port=port), **options)


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208  # iterdir() would open one more


async def failure(options: DriverConfig) -> MQTTDriverError:
    with trio.fail_after(30), pytest.raises(MQTTDriverError) as caught:
        await open_stream(options)
    return caught.value


# -- TCP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_tcp_stream_is_opened(host: str) -> None:
    async with serving(echo) as port:
        assert await answered(config(port, host)) == b"ping"


async def test_small_packets_are_not_held_back() -> None:
    """Nagle's algorithm would let an acknowledgement wait for the broker's delayed one."""
    async with serving(echo) as port:
        stream = await open_stream(config(port))
        assert isinstance(stream, trio.SocketStream)
        assert stream.socket.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY)
        await stream.aclose()


async def test_a_refused_connection_says_so() -> None:
    async with serving(echo) as port:
        pass
    before = descriptors()
    error = await failure(config(port))
    assert descriptors() == before
    assert isinstance(error, TransportError)
    assert str(error) == f"connecting to mqtt://127.0.0.1:{port}: Connection refused"
    assert isinstance(error.__cause__, OSError)


class Addresses(trio.abc.HostnameResolver):
    """A host with two addresses."""

    def __init__(self, first: str, second: str) -> None:
        self._addresses = (first, second)

    async def getaddrinfo(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002  # Trio's names
        await trio.lowlevel.checkpoint()
        kind = (trio.socket.AF_INET, trio.socket.SOCK_STREAM, trio.socket.IPPROTO_TCP, "")
        return [(*kind, (address, port)) for address in self._addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


async def test_the_next_address_of_a_host_is_tried_when_one_refuses() -> None:
    trio.socket.set_custom_hostname_resolver(Addresses("127.0.0.2", "127.0.0.1"))
    async with serving(echo) as port:
        assert await answered(config(port, "two.example")) == b"ping"


async def test_when_every_address_refuses_the_reason_is_told_once() -> None:
    trio.socket.set_custom_hostname_resolver(Addresses("127.0.0.2", "127.0.0.3"))
    async with serving(echo) as port:
        pass
    assert str(await failure(config(port, "two.example"))).endswith(f"two.example:{port}: Connection refused")


@pytest.mark.parametrize(
    "host",
    ["a..b", "x" * 70, "x." * 200, "a\0b", "\ud800", "ü" * 70, "-", "*", " "],
    ids=["empty label", "long label", "long name", "NUL", "surrogate", "long IDNA label", "dash", "star", "space"],
)
async def test_a_host_name_that_is_none_is_a_transport_error(host: str) -> None:
    error = await failure(config(1883, host))
    assert isinstance(error, TransportError)
    assert str(error).startswith("connecting to mqtt://")


async def test_opening_can_be_cancelled() -> None:
    async with serving(_silent) as port:
        with trio.move_on_after(0.05) as scope:
            await open_stream(config(port, scheme="mqtts"))
        assert scope.cancelled_caught


async def test_an_address_that_is_given_up_leaves_no_socket() -> None:
    async with serving(_silent) as port:
        before = descriptors()
        with trio.CancelScope() as scope:
            scope.cancel()
            await open_stream(config(port))
        assert scope.cancelled_caught
        assert descriptors() == before


class Spawned(trio.abc.Instrument):
    """Counts tasks."""

    count = 0

    def task_spawned(self, task: object) -> None:  # noqa: ARG002  # Trio's name
        self.count += 1


@pytest.mark.parametrize("host, tasks", [("127.0.0.1", False), ("localhost", True)])
async def test_an_address_is_not_looked_up_and_has_no_eyeballs(host: str, tasks: bool) -> None:
    """They take tasks, which a reconnect to an address does not need to wait for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        spawned = Spawned()
        trio.lowlevel.add_instrument(spawned)
        stream = await open_stream(config(server.getsockname()[1], host))
        trio.lowlevel.remove_instrument(spawned)
        await stream.aclose()
    assert (spawned.count > 0) == tasks


def test_an_address_with_a_scope_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system takes the scope for a part of the address, it would be lost."""

    def takes_anything(_family: int, _host: str) -> bytes:
        return bytes(16)

    monkeypatch.setattr(socket, "inet_pton", takes_anything)
    assert _family_of("fe80::1") is not None
    assert _family_of("fe80::1%eth0") is None


async def test_an_address_of_version_6_is_one() -> None:
    """Refused, or not even there on a machine without IPv6; in either case it is told once."""
    async with serving(echo) as port:
        pass
    error = await failure(config(port, "::1"))
    assert isinstance(error, TransportError)
    assert str(error).startswith(f"connecting to mqtt://[::1]:{port}: ")
    assert str(error).count("::1") == 1


async def _silent(stream: trio.SocketStream) -> None:
    async with stream:
        await trio.sleep_forever()


# -- Unix sockets ---------------------------------------------------------------------------------------------------


async def test_a_unix_socket_is_opened(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with trio.open_nursery() as nursery:
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listening.bind(path)
        listening.listen()
        nursery.start_soon(trio.serve_listeners, echo, [trio.SocketListener(listening)])
        assert await answered(DriverConfig(endpoint=Endpoint(scheme="unix", path=path))) == b"ping"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "path, words",
    [("/no/such/socket", "No such file"), ("/" + "x" * 300, "too long"), ("/a\0b", ""), ("/\ud800", "")],
    ids=["missing", "long", "NUL", "surrogate"],
)
async def test_a_unix_socket_that_cannot_be_opened_is_a_transport_error(path: str, words: str) -> None:
    error = await failure(DriverConfig(endpoint=Endpoint(scheme="unix", path=path)))
    assert isinstance(error, TransportError)
    assert words in str(error)


# -- a stream opener of the application -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised", [OSError(errno.ENETUNREACH, "Network is unreachable"), RuntimeError("bug"), KeyError()]
)
async def test_whatever_the_application_s_opener_raises_is_a_transport_error(raised: Exception) -> None:
    async def opener(endpoint: Endpoint) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        raise raised

    error = await failure(config(1, open_stream=opener))
    assert isinstance(error, TransportError)
    assert error.__cause__ is raised
    assert (str(raised.args[-1]) if raised.args else "KeyError") in str(error)


# -- TLS ------------------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority and what it issues."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.file = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)
        self._directory = directory

    def server(self, name: str = "127.0.0.1", *, days: int = 30, client_ca: bool = False) -> Handler:
        now = datetime.datetime.now(datetime.timezone.utc)
        issued = self.ca.issue_cert(
            name, not_before=now - datetime.timedelta(days=60), not_after=now + datetime.timedelta(days=days)
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        issued.configure_cert(context)
        if client_ca:
            self.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED

        async def handler(stream: trio.SocketStream) -> None:
            secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            try:
                await echo(secure)
            except trio.BrokenResourceError:
                await trio.aclose_forcefully(secure)

        return handler

    def client(self) -> tuple[Path, Path]:
        issued = self.ca.issue_cert("client")
        cert, key = self._directory / "client.pem", self._directory / "client-key.pem"
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return cert, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_a_tls_stream_is_opened(authority: Authority) -> None:
    async with serving(authority.server()) as port:
        assert await answered(config(port, scheme="mqtts", tls=TLSConfig(ca_file=authority.file))) == b"ping"


async def test_a_foreign_authority_is_a_tls_error(authority: Authority) -> None:
    foreign = trustme.CA().cert_pem.bytes().decode()
    async with serving(authority.server()) as port:
        for tls in (TLSConfig(ca_data=foreign), None):
            error = await failure(config(port, scheme="mqtts", tls=tls))
            assert isinstance(error, TLSError)
            assert f"TLS handshake with mqtts://127.0.0.1:{port}: certificate verify failed: " in str(error)


async def test_a_wrong_host_name_is_a_tls_error_and_may_be_set_right(authority: Authority) -> None:
    async with serving(authority.server("broker.example")) as port:
        for tls in (
            TLSConfig(ca_file=authority.file, server_hostname="broker.example"),
            TLSConfig(ca_file=authority.file, check_hostname=False),
            TLSConfig(verify=False, check_hostname=False),
        ):
            assert await answered(config(port, scheme="mqtts", tls=tls)) == b"ping"


@pytest.mark.parametrize(
    "asked, mismatch",
    [
        (None, "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ("other.example", "Hostname mismatch, certificate is not valid for 'other.example'"),
    ],
)
@pytest.mark.parametrize(
    "decision, other", [("retry", 'wrong_host="stop" would end the driver'), ("stop", 'wrong_host="retry" would try')]
)
async def test_a_wrong_host_name_is_said_plainly_and_terminal_if_so_decided(
    authority: Authority, asked: str | None, mismatch: str, decision: Literal["retry", "stop"], other: str
) -> None:
    tls = TLSConfig(ca_file=authority.file, server_hostname=asked, wrong_host=decision)
    async with serving(authority.server("broker.example")) as port:
        error = await failure(config(port, scheme="mqtts", tls=tls))
    assert isinstance(error, TLSError)
    assert str(error).startswith(
        f"TLS handshake with mqtts://127.0.0.1:{port}: certificate verify failed: {mismatch}; "
        f"set server_hostname to a name that the certificate has ({other}"
    )
    assert error.terminal is (decision == "stop")


async def test_an_expired_certificate_is_a_tls_error(authority: Authority) -> None:
    async with serving(authority.server(days=-1)) as port:
        error = await failure(config(port, scheme="mqtts", tls=TLSConfig(ca_file=authority.file)))
    assert isinstance(error, TLSError)
    assert "certificate has expired" in str(error)


async def test_mutual_tls_needs_a_certificate_of_the_client(authority: Authority) -> None:
    cert, key = authority.client()
    async with serving(authority.server(client_ca=True)) as port:
        tls = TLSConfig(ca_file=authority.file, cert_file=cert, key_file=key)
        assert await answered(config(port, scheme="mqtts", tls=tls)) == b"ping"
        # With TLS 1.3 the server refuses after the handshake, when the client reads; and Trio's SSLStream, which plays
        # the server here, sends no alert but closes.
        try:
            answer = await answered(config(port, scheme="mqtts", tls=TLSConfig(ca_file=authority.file)))
        except trio.BrokenResourceError:
            answer = b""
        assert answer == b""


async def test_a_server_without_tls_is_a_tls_error(authority: Authority) -> None:
    async def plain(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"\x20\x02\x00\x00 and so on")
            await stream.receive_some()

    async with serving(plain) as port:
        error = await failure(config(port, scheme="mqtts", tls=TLSConfig(ca_file=authority.file)))
    assert isinstance(error, TLSError)
    assert "TLS handshake" in str(error)
    assert str(error).endswith("; does this port speak TLS? mqtts:// does, mqtt:// does not")


async def test_a_server_that_closes_during_the_handshake_is_a_connect_failure(authority: Authority) -> None:
    async def closing(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.aclose()

    async with serving(closing) as port:
        error = await failure(config(port, scheme="mqtts", tls=TLSConfig(ca_file=authority.file)))
    assert isinstance(error, ConnectError | ConnectionLostError)
    assert "TLS handshake" in str(error)
    assert "does this port speak TLS?" in str(error)


async def test_a_server_that_says_nothing_to_a_handshake_was_reached(mock_clock: trio.testing.MockClock) -> None:
    async def mute(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            mock_clock.jump(10)
            await trio.sleep_forever()

    async with serving(mute) as port:
        with pytest.raises(TransportError, match=r"or did not end the TLS handshake, within connect_timeout=10 s"):
            await open_stream_by(config(port, scheme="mqtts"), trio.current_time() + 10)


@pytest.mark.parametrize(
    "tls, kind",
    [
        (TLSConfig(ca_file="/no/such/file"), OptionsError),
        (TLSConfig(ca_file="/"), OptionsError),
        (TLSConfig(ca_file="a\0b"), OptionsError),
        (TLSConfig(ca_data="ü"), OptionsError),
        (TLSConfig(ca_data="no certificate"), TLSError),
        (TLSConfig(alpn_protocols=("",)), TLSError),
        (TLSConfig(alpn_protocols=("ü",)), OptionsError),
    ],
    ids=["missing", "directory", "NUL", "not ASCII", "no PEM", "empty ALPN", "ALPN not ASCII"],
)
async def test_tls_material_that_cannot_be_used_fails_before_the_broker_is_bothered(
    tls: TLSConfig, kind: type[MQTTDriverError]
) -> None:
    connections: list[trio.SocketStream] = []

    async def note(stream: trio.SocketStream) -> None:
        connections.append(stream)
        await stream.aclose()

    async with serving(note) as port:
        error = await failure(config(port, scheme="mqtts", tls=tls))
        await trio.testing.wait_all_tasks_blocked()
    assert isinstance(error, kind)
    assert "TLS material" in str(error)
    assert str(error).endswith(f"; look at {tls.material}")
    assert connections == []


def test_of_the_tls_material_what_is_given_is_named() -> None:
    tls = TLSConfig(ca_file="/ca.pem", ca_data="SECRET", cert_file="/cert.pem", key_password="SECRET")
    assert tls.material == "ca_file=/ca.pem, ca_data, cert_file=/cert.pem"
    assert TLSConfig().material == "the system's certificate authorities"


@pytest.mark.parametrize("name", [".broker", "a" * 70 + ".", "ü" * 70])
async def test_a_server_name_that_tls_cannot_carry_is_a_connect_error(authority: Authority, name: str) -> None:
    tls = TLSConfig(ca_file=authority.file, server_hostname=name)
    async with serving(authority.server()) as port:
        assert isinstance(await failure(config(port, scheme="mqtts", tls=tls)), ConnectError)


# -- translation ----------------------------------------------------------------------------------------------------


def caused(exc: BaseException, cause: BaseException) -> BaseException:
    exc.__cause__ = cause
    return exc


@pytest.mark.parametrize(
    "exc, kind, words",
    [
        (
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            TransportError,
            "Connection reset by peer",
        ),
        (OSError(), TransportError, "OSError"),
        (
            caused(
                trio.BrokenResourceError("broken"), ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            ),
            ConnectionLostError,
            "Connection reset by peer",
        ),
        (trio.BrokenResourceError(), ConnectionLostError, "BrokenResourceError"),
        (trio.ClosedResourceError("closed by us"), ConnectionLostError, "closed by us"),
        (caused(trio.BrokenResourceError(), ssl.SSLError(1, "bad record")), TLSError, "bad record"),
        (ssl.SSLError("made by Python"), TLSError, "made by Python"),
    ],
)
def test_what_a_stream_raises_is_told_apart(exc: BaseException, kind: type[MQTTDriverError], words: str) -> None:
    error = lost(exc, "reading")
    assert type(error) is kind
    assert str(error).startswith("reading: ")
    assert words in str(error)
