"""TLS settings: what contradicts itself is refused; contexts are made anew, and never ask anybody for a password."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from trio_mqtt_driver import TLSConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, ``cert.pem``, ``key.pem``, and ``locked.pem``: the key, encrypted with "geheim"."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"geheim"),
    )
    (directory / "locked.pem").write_bytes(locked)
    return directory


@pytest.mark.parametrize(
    "options, words",
    [
        ({"key_file": "key.pem"}, "tls: key_file and key_password need a cert_file"),
        ({"key_password": "x"}, "tls: key_file and key_password need a cert_file"),
        ({"ca_file": 5}, "ca_file must be str or PathLike, not int"),
        ({"ca_path": b"x"}, "ca_path must be str or PathLike, not bytes"),
        ({"cert_file": 5}, "cert_file must be str or PathLike, not int"),
        ({"cert_file": "x", "key_file": 5}, "key_file must be str or PathLike, not int"),
        ({"ca_data": 5}, "ca_data must be str, not int"),
        ({"cert_file": "x", "key_password": 5}, "key_password must be str, not int"),
        ({"server_hostname": 5}, "server_hostname must be str, not int"),
        ({"server_hostname": "a\0b"}, "server_hostname contains U+0000"),
        ({"check_hostname": None}, "check_hostname must be bool, not NoneType"),
        ({"verify": 0}, "verify must be bool, not int"),
        ({"wrong_host": "warn"}, "wrong_host is 'warn', allowed are 'retry', 'stop'"),
        ({"wrong_host": True}, "wrong_host is True, allowed are 'retry', 'stop'"),
        ({"minimum_version": "1.2"}, "minimum_version must be TLSVersion, not str"),
        ({"alpn_protocols": "mqtt"}, "alpn_protocols must be tuple, not str"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        TLSConfig(**options)
    assert words in str(caught.value)


def test_the_default_verifies_certificate_and_host_name_with_tls_1_2_at_least() -> None:
    context = TLSConfig().make_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_verification_is_switched_off_only_as_told() -> None:
    context = TLSConfig(check_hostname=False).make_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)
    context = TLSConfig(verify=False).make_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)
    context = TLSConfig(minimum_version=ssl.TLSVersion.TLSv1_3).make_context()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("form", ["file", "path", "data"])
def test_an_authority_of_one_s_own_replaces_those_of_the_system(files: Path, form: str) -> None:
    config = {
        "file": TLSConfig(ca_file=files / "ca.pem"),
        "path": TLSConfig(ca_path=str(files)),
        "data": TLSConfig(ca_data=(files / "ca.pem").read_text()),
    }[form]
    # A directory is read when a certificate is looked up, so it holds none at first.
    assert len(config.make_context().get_ca_certs()) == (0 if form == "path" else 1)


def test_the_files_are_read_again_for_each_context(files: Path, tmp_path: Path) -> None:
    config = TLSConfig(ca_file=tmp_path / "ca.pem")
    with pytest.raises(FileNotFoundError):
        config.make_context()
    (tmp_path / "ca.pem").write_bytes((files / "ca.pem").read_bytes())
    assert len(config.make_context().get_ca_certs()) == 1


def test_a_client_certificate_is_loaded(files: Path) -> None:
    TLSConfig(cert_file=files / "cert.pem", key_file=files / "key.pem", alpn_protocols=("mqtt",)).make_context()
    TLSConfig(cert_file=files / "cert.pem", key_file=files / "locked.pem", key_password="geheim").make_context()


@pytest.mark.parametrize("password", [None, "wrong"])
def test_an_encrypted_key_without_its_password_is_an_error_and_nobody_is_asked(
    files: Path, password: str | None
) -> None:
    """OpenSSL would ask on the terminal, in a thread that nothing can cancel."""
    config = TLSConfig(cert_file=files / "cert.pem", key_file=files / "locked.pem", key_password=password)
    with pytest.raises(ssl.SSLError):
        config.make_context()
