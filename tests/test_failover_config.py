"""Fallbacks and ``FailoverConfig`` as options of a driver; the ranges of the latter are in ``test_endpoints.py``."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trio_mqtt_driver import DriverConfig, Endpoint, FailoverConfig, MQTTDriver, TLSConfig

A = Endpoint(host="a", port=1883)
B = Endpoint(host="b", port=1883)


def test_fallbacks_are_endpoints_or_urls() -> None:
    config = DriverConfig(endpoint=A, fallbacks=["mqtt://b", "mqtts://c:1", "unix:///run/d.sock", "mqtt://[::1]:5", B])
    assert config.fallbacks == (
        B,
        Endpoint(scheme="mqtts", host="c", port=1),
        Endpoint(scheme="unix", path="/run/d.sock"),
        Endpoint(host="::1", port=5),
        B,
    )
    assert config.evolve(keep_alive=5).fallbacks == config.fallbacks


def test_from_url_takes_them_as_options() -> None:
    config = DriverConfig.from_url("mqtt://me:secret@a", fallbacks=["mqtt://b"], failover=FailoverConfig(fail_after=5))
    assert (config.endpoint, config.fallbacks, config.failover.fail_after) == (A, (B,), 5)
    assert MQTTDriver("mqtt://a", fallbacks=(B,)).config.fallbacks == (B,)


@pytest.mark.parametrize(
    "fallbacks, words",
    [
        ("mqtt://b", "fallbacks must hold endpoints or URLs, not be one"),
        ("mqtt://me:secret@b", "fallbacks must hold endpoints or URLs, not be one"),
        (B, "fallbacks must hold endpoints or URLs, not be Endpoint"),
        (None, "fallbacks must hold endpoints or URLs, not be NoneType"),
        (5, "fallbacks must hold endpoints or URLs, not be int"),
        ([None], "fallbacks must hold endpoints or URLs, not NoneType"),
        ([B, 5], "fallbacks must hold endpoints or URLs, not int"),
        ([b"mqtt://me:secret@b"], "fallbacks must hold endpoints or URLs, not bytes"),
        ([("b", 1883)], "fallbacks must hold endpoints or URLs, not tuple"),
    ],
)
def test_what_is_no_endpoint_is_refused(fallbacks: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        DriverConfig(endpoint=A, fallbacks=fallbacks)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "url, words",
    [
        ("mqtt://me:secret@b", "fallbacks: password, username in a URL, which may say where only"),
        ("mqtt://me@b", "fallbacks: username in a URL, which may say where only"),
        ("mqtt://b?client_id=x", "fallbacks: client_id in a URL, which may say where only"),
        ("mqtt://b?keep_alive=5&protocol=5", "fallbacks: keep_alive, protocol in a URL, which may say where only"),
        ("b", "fallbacks: must start with mqtt://, mqtts:// or unix://"),
        ("", "fallbacks: must start with mqtt://, mqtts:// or unix://"),
        ("ws://b", "fallbacks: scheme 'ws': WebSocket is not supported yet; use mqtt, mqtts or unix"),
        ("mqtt://me:sec/ret@b", "fallbacks: mqtt takes no path"),
        ("mqtt://b:0", "fallbacks: the port must be from 1 to 65535"),
    ],
)
def test_a_url_that_says_more_or_nothing_is_refused_without_its_secrets(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        DriverConfig(endpoint=A, fallbacks=[B, url])
    assert "sec" not in str(caught.value).replace("'/', '?', '#'", "")


def test_failover_is_a_failover_config() -> None:
    for value in (None, {"fail_after": 1}, 2):
        with pytest.raises(TypeError, match=r"^failover must be FailoverConfig, not "):
            DriverConfig(endpoint=A, failover=value)  # type: ignore[arg-type]  # that is the point


def test_tls_needs_one_endpoint_that_has_it() -> None:
    secure = Endpoint(scheme="mqtts", host="c", port=8883)
    assert DriverConfig(endpoint=A, fallbacks=[secure], tls=TLSConfig()).tls == TLSConfig()
    with pytest.raises(ValueError, match="tls is set but the endpoint is mqtt://a:1883: use mqtts://"):
        DriverConfig(endpoint=A, fallbacks=[B], tls=TLSConfig())
