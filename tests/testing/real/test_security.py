"""Users, TLS and mutual TLS of the real brokers."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio
import trustme

from tests.brokers.grounds import require
from tests.testing.real.visiting import BROKERS, Visit, accepted, every_broker, issue, say, trusting
from trio_mqtt_driver import MQTTDriver, TLSConfig
from trio_mqtt_driver.testing import BrokerFailedError, BrokerProcess, Ejabberd, Iotcore, Publish, TLSFiles

MUTUAL = [kind for kind in BROKERS if kind.checks_client_certs]
NOT_MUTUAL = [kind for kind in BROKERS if not kind.checks_client_certs]


@pytest.mark.broker
@every_broker
async def test_users(visit: Visit, kind: type[BrokerProcess]) -> None:
    users = {"jörg": 's"cr\\e t€', "you": "other"}
    async with require(kind(users=users)) as broker:
        for user, right in (*((user, True) for user in users.items()), (("you", 's"cr\\e t€'), False)):
            _, connack = await visit(broker, user=user)
            assert accepted(connack) is right
        await broker.restart()
        assert accepted((await visit(broker, user=("you", "other")))[1])
        assert broker.credentials == ("jörg", 's"cr\\e t€')
        assert "@127.0.0.1" in broker.url
        async with MQTTDriver(broker.url) as driver, broker.watch("t") as seen:
            await driver.publish("t", "1", qos=1)
            assert (await seen.wait_for_publish("t")).payload == b"1"


@pytest.mark.broker
@every_broker
async def test_its_url_is_all_that_a_client_needs(kind: type[BrokerProcess]) -> None:
    async with require(kind()) as broker, MQTTDriver(broker.url) as driver:
        await driver.publish("t", "1", qos=1)


@pytest.mark.parametrize("users", [{"": "x"}, {"a:b": "x"}, {"a\nb": "x"}, {}])
@every_broker
def test_user_names_that_cannot_be(kind: type[BrokerProcess], users: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^users: "):
        kind(users=users)


def test_user_names_that_ejabberd_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"^users: 'a@b' must contain none of"):
        Ejabberd(users={"a@b": "x"})


@pytest.mark.broker
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
        await visit.close()  # iotcore would wait for the end of that handshake before it begins another
        tls = TLSConfig(ca_file=tmp_path / "ca.pem")
        async with broker.watch("t/+") as seen, MQTTDriver(broker.url, tls=tls) as driver:
            await driver.publish("t/1", "1", qos=1)
            assert (await seen.wait_for_publish("t/1")).payload == b"1"


@pytest.mark.broker
@pytest.mark.parametrize("kind", MUTUAL)
async def test_mutual_tls(visit: Visit, kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path) -> None:
    context = trusting(authority)
    async with require(kind(tls=issue(authority, tmp_path, require_client_cert=True))) as broker:
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            assert accepted((await visit(broker, context))[1])
        stranger = trusting(authority)
        trustme.CA().issue_cert("me@example.org").configure_cert(stranger)  # pyright: ignore[reportUnknownMemberType]  # as in trusting()
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            assert accepted((await visit(broker, stranger))[1])
        authority.issue_cert("me@example.org").configure_cert(context)  # pyright: ignore[reportUnknownMemberType]  # as in trusting()
        client, _ = await visit(broker, context)
        assert (await say(client, "t", b"1")).payload == b"1"
        async with broker.watch() as seen:
            await client.send(Publish(topic="t", payload=b"2"))
            assert (await seen.wait_for_publish("t")).payload == b"2"


@pytest.mark.parametrize("kind", NOT_MUTUAL)
def test_mutual_tls_of_a_broker_that_would_take_any_certificate(
    kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="require_client_cert is no use"):
        kind(tls=issue(authority, tmp_path, require_client_cert=True))


# ---- files ----


@pytest.mark.broker
@every_broker
async def test_a_file_that_is_not_there(kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path) -> None:
    files = issue(authority, tmp_path)
    files.cert.unlink()
    with pytest.raises(FileNotFoundError, match=r"a file of TLSFiles is not there: .*cert\.pem"):
        async with require(kind(tls=files)):
            raise AssertionError


def test_relative_paths_are_those_of_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    files = TLSFiles(cert="a.pem", key=Path("b/c.pem"), ca="/d.pem")
    assert (files.cert, files.key, files.ca) == (tmp_path / "a.pem", tmp_path / "b/c.pem", Path("/d.pem"))


@pytest.mark.broker
@pytest.mark.parametrize("kind", [kind for kind in BROKERS if kind is not Ejabberd])  # which starts, and refuses TLS
async def test_a_key_that_is_none_shows_the_log(
    kind: type[BrokerProcess], authority: trustme.CA, tmp_path: Path
) -> None:
    files = issue(authority, tmp_path)
    files.key.write_text("this is not a key")
    words = r"cannot be used: .*PEM" if kind is Iotcore else r"(?i)ended while it started\n(.*\n)*.*key"
    with pytest.raises(BrokerFailedError, match=words):
        async with require(kind(tls=files)):
            raise AssertionError
