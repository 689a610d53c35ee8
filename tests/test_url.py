from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver._url import from_env, parse_url

# --- URLs


@pytest.mark.parametrize(
    "url, options",
    [
        ("mqtt://localhost", {"scheme": "mqtt", "host": "localhost", "port": 1883}),
        ("mqtt://localhost/", {"scheme": "mqtt", "host": "localhost", "port": 1883}),
        ("mqtts://example.org", {"scheme": "mqtts", "host": "example.org", "port": 8883}),
        ("MQTT://h:1", {"scheme": "mqtt", "host": "h", "port": 1}),
        ("mqtt://192.0.2.1:65535", {"scheme": "mqtt", "host": "192.0.2.1", "port": 65535}),
        ("mqtt://[::1]", {"scheme": "mqtt", "host": "::1", "port": 1883}),
        ("mqtts://[2001:db8::1]:8884", {"scheme": "mqtts", "host": "2001:db8::1", "port": 8884}),
        ("mqtt://[fe80::1%25eth0]", {"scheme": "mqtt", "host": "fe80::1%eth0", "port": 1883}),
        ("mqtt://u@h", {"scheme": "mqtt", "host": "h", "port": 1883, "username": "u"}),
        ("mqtt://@h", {"scheme": "mqtt", "host": "h", "port": 1883}),
        ("mqtt://u:@h", {"scheme": "mqtt", "host": "h", "port": 1883, "username": "u", "password": ""}),
        (
            "mqtt://us%40er:p%3Aa%2Fs%25s%20%C3%BC@h:2",
            {"scheme": "mqtt", "host": "h", "port": 2, "username": "us@er", "password": "p:a/s%s ü"},
        ),
        ("mqtt://u:a:b@c@h", {"scheme": "mqtt", "host": "h", "port": 1883, "username": "u", "password": "a:b@c"}),
        ("unix:///run/mqtt.sock", {"scheme": "unix", "path": "/run/mqtt.sock"}),
        ("unix:///run/my%20mqtt.sock", {"scheme": "unix", "path": "/run/my mqtt.sock"}),
        ("unix://u:p@/s", {"scheme": "unix", "path": "/s", "username": "u", "password": "p"}),
        (
            "mqtt://h?client_id=a%2Bb+c&keep_alive=0&protocol=3.1.1",
            {"scheme": "mqtt", "host": "h", "port": 1883, "client_id": "a+b+c", "keep_alive": 0, "protocol": "3.1.1"},
        ),
        ("unix:///s?keep_alive=65535", {"scheme": "unix", "path": "/s", "keep_alive": 65535}),
    ],
)
def test_parse_url(url: str, options: dict[str, object]) -> None:
    assert parse_url(url) == options


HOST = "host and port must be like example.org, "


@pytest.mark.parametrize(
    "url, text",
    [
        ("", "must start with mqtt://, mqtts:// or unix://"),
        ("localhost:1883", "must start with mqtt://"),
        ("mqtt:localhost", "must start with mqtt://"),
        ("//localhost", "must start with mqtt://"),
        ("http://h", "scheme must be mqtt, mqtts or unix, got 'http'"),
        ("ws://h", "scheme 'ws': WebSocket is not supported yet; use mqtt, mqtts or unix"),
        ("wss://h/mqtt", "scheme 'wss': WebSocket is not supported yet"),
        ("mqtt://h ", "must not contain spaces, control characters"),
        ("mqtt://h\n", "must not contain spaces, control characters"),
        ("mqtt://h\udc80", "must not contain spaces, control characters or surrogates"),
        ("mqtt://", HOST),
        ("mqtt://:1883", HOST),
        ("mqtt://u:p@", HOST),
        ("mqtt://h:", HOST),
        ("mqtt://h:port", HOST),
        ("mqtt://h:+1", HOST),
        ("mqtt://h:123456", HOST),
        ("mqtt://::1", HOST),
        ("mqtt://[::1]1883", HOST + "|the host is not valid"),
        ("mqtt://[::1", "the host is not valid"),
        ("mqtt://[localhost]", "the host in brackets must be an IPv6 address|the host is not valid"),
        ("mqtt://\u2100h", "the host is not valid"),
        ("mqtt://h:0", "the port must be from 1 to 65535"),
        ("mqtt://h:65536", "the port must be from 1 to 65535"),
        ("mqtt://h/topic", "mqtt takes no path"),
        ("mqtt://h#x", "must not have a fragment"),
        ("mqtt://h#", "must not have a fragment"),
        ("mqtt://u:50%@h", "'%' must be followed by two hexadecimal digits"),
        ("mqtt://%ff@h", "the user name must be UTF-8"),
        ("mqtt://u:%ff@h", "the password must be UTF-8"),
        ("mqtt://h%ff", "the host must be UTF-8"),
        ("unix://run/mqtt.sock", "unix takes no host; write unix:///path/of/the.sock"),
        ("unix://", "the path must name a socket"),
        ("unix:///", "the path must name a socket"),
        ("unix:///a%00", "the path must name a socket"),
        ("mqtt://h?clean=1", "the query may hold client_id, keep_alive and protocol, and nothing else"),
        ("mqtt://h?client_id", "client_id is empty"),
        ("mqtt://h?client_id=", "client_id is empty"),
        ("mqtt://h?client_id=%fe", "client_id must be UTF-8"),
        ("mqtt://h?client_id=a&client_id=b", "client_id is in the query twice"),
        ("mqtt://h?keep_alive=1.5", "keep_alive must be a whole number of seconds from 0 to 65535, got '1.5'"),
        ("mqtt://h?keep_alive=65536", "keep_alive must be a whole number of seconds from 0 to 65535, got '65536'"),
        ("mqtt://h?keep_alive=%D9%A3", "keep_alive must be a whole number"),
        ("mqtt://h?protocol=4", r"protocol must be one of auto, 5, 3\.1\.1, got '4'"),
    ],
)
def test_a_wrong_url_is_refused_by_its_part(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^url: ({text})"):
        parse_url(url)


@pytest.mark.parametrize("url", [b"mqtt://h", None, 5])
def test_a_url_that_is_no_str_is_a_type_error(url: Any) -> None:
    with pytest.raises(TypeError, match=f"^url: must be a str, got {type(url).__name__}$"):
        parse_url(url)


@given(username=st.text(min_size=1), password=st.text())
def test_percent_encoded_credentials_come_back(username: str, password: str) -> None:
    options = parse_url(f"mqtts://{quote(username, safe='')}:{quote(password, safe='')}@h")
    assert (options["username"], options["password"]) == (username, password)


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"mqtt://u:{SECRET}@h{rest}"
            for rest in (":0", ":x", "/path", "#f", "?x=1", "[", "\u2100", " ", "%", "%ff")
        ),
        *(f"mqtt://u:{SECRET}{char}{SECRET}@h" for char in "/?#[]% \n\u2100"),
        *(f"mqtt://u:1{char}{SECRET}@h" for char in "/?#"),
        *(f"mqtt://u:1?client_id=x&{SECRET}@h", f"mqtt://u:1/{SECRET}", f"mqtt://[{SECRET}]", f"mqtt://u:{SECRET}"),
        *(f"u:{SECRET}@h", f"ws://u:{SECRET}@h", f"http://u:{SECRET}@h", f"unix://u:{SECRET}@h/s", f"unix://{SECRET}"),
        *(f"mqtt://u:{SECRET}%ff@h", f"mqtt://u:{SECRET}@", f"mqtt://{SECRET}%ff@h"),
    ],
)
def test_no_error_tells_the_password(url: str) -> None:
    try:
        parse_url(url)
    except ValueError as exc:
        error: BaseException | None = exc
    else:
        pytest.fail("the URL is not wrong")
    while error is not None:  # a logger may print contexts that `from None` hides
        assert SECRET not in "".join(traceback.format_exception_only(type(error), error))
        error = error.__cause__ or error.__context__


@given(st.text() | st.text().map("mqtt://".__add__) | st.text(alphabet="mqtts:/@[]%?#&=.a1").map("mqtt://".__add__))
def test_any_text_gives_options_or_a_value_error(url: str) -> None:
    try:
        options = parse_url(url)
    except ValueError:
        return
    assert options["scheme"] in ("mqtt", "mqtts", "unix")


# --- the environment


def test_all_variables() -> None:
    environ = {
        "MQTT_URL": "mqtts://url-user:url-password@h?client_id=url-id&keep_alive=1&protocol=5",
        "MQTT_USERNAME": "u",
        "MQTT_PASSWORD": "p%41",
        "MQTT_CLIENT_ID": "id",
        "MQTT_CA_FILE": "/ca.pem",
        "MQTT_CERT_FILE": "/cert.pem",
        "MQTT_KEY_FILE": "/key.pem",
        "MQTT_KEEP_ALIVE": "60",
        "MQTT_UNKNOWN": "x",
        "OTHER": "x",
    }
    assert from_env(environ) == {
        "scheme": "mqtts",
        "host": "h",
        "port": 8883,
        "username": "u",
        "password": "p%41",
        "client_id": "id",
        "protocol": "5",
        "keep_alive": 60,
        "ca_file": "/ca.pem",
        "cert_file": "/cert.pem",
        "key_file": "/key.pem",
    }


def test_the_url_is_enough_and_empty_variables_are_unset() -> None:
    assert from_env({"MQTT_URL": "mqtt://u:p@h", "MQTT_PASSWORD": "", "MQTT_KEEP_ALIVE": ""}) == {
        "scheme": "mqtt",
        "host": "h",
        "port": 1883,
        "username": "u",
        "password": "p",
    }


def test_another_prefix() -> None:
    environ = {"MQTT_URL": "mqtt://one", "HOME_BROKER_URL": "unix:///s", "HOME_BROKER_USERNAME": "u"}
    assert from_env(environ, "HOME_BROKER_") == {"scheme": "unix", "path": "/s", "username": "u"}


@pytest.mark.parametrize(
    "content, password", [("pässword", "pässword"), ("a b \n", "a b "), ("x\r\n", "x"), ("x\n\n", "x\n")]
)
def test_the_password_file(content: str, password: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(content.encode())
    options = from_env({"MQTT_URL": "mqtt://u:p@h", "MQTT_PASSWORD_FILE": str(file)})
    assert (options["username"], options["password"]) == ("u", password)
    assert "password_file" not in options


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 65536, b"x" * 100_000, b"s3cr3t\xff"])
def test_a_password_file_without_a_password_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^MQTT_PASSWORD_FILE: '.*' must hold ") as caught:
        from_env({"MQTT_URL": "mqtt://h", "MQTT_PASSWORD_FILE": str(file)})
    assert SECRET not in f"{caught.value}{caught.value.__context__}"


def test_the_longest_password_may_end_in_a_line_end(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"x" * 65535 + b"\r\n")
    assert from_env({"MQTT_URL": "mqtt://h", "MQTT_PASSWORD_FILE": str(file)})["password"] == "x" * 65535


@pytest.mark.parametrize(
    "environ, text",
    [
        ({}, "MQTT_URL: is not set"),
        ({"MQTT_URL": ""}, "MQTT_URL: is not set"),
        ({"MQTT_URL": "mqtt://h:0"}, "MQTT_URL: the port must be from 1 to 65535"),
        ({"MQTT_URL": "mqtt://h", "MQTT_KEEP_ALIVE": "-1"}, "MQTT_KEEP_ALIVE must be a whole number .*, got '-1'"),
        (
            {"MQTT_URL": "mqtt://h", "MQTT_PASSWORD": "a", "MQTT_PASSWORD_FILE": "b"},
            "MQTT_PASSWORD and MQTT_PASSWORD_FILE: only one of them may be set",
        ),
        (
            {"MQTT_URL": "mqtt://h", "MQTT_PASSWORD_FILE": "/does/not/exist"},
            "MQTT_PASSWORD_FILE: cannot read '/does/not/exist': .*No such file",
        ),
        ({"MQTT_URL": "mqtt://h", "MQTT_PASSWORD_FILE": "a\0"}, "MQTT_PASSWORD_FILE: cannot read"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        from_env(environ)
