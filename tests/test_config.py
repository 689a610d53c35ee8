"""Options are checked where they are written; the message names the field, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from trio_mqtt_driver import DriverArguments, DriverConfig, Endpoint, OfflinePolicy, ReasonCode, TLSConfig, Will
from trio_mqtt_driver._properties import encode_publish_properties
from trio_mqtt_driver._types import PublishProperties

ENDPOINT = Endpoint(host="broker", port=1883)
SECURE = Endpoint(scheme="mqtts", host="broker", port=8883)
SECONDS = "allowed are seconds > 0 (math.inf: no limit)"
LONE_SURROGATE = "\ud800"


def whole(low: int, high: int) -> str:
    return f"allowed are whole numbers from {low} to {high}"


# -- DriverConfig ---------------------------------------------------------------------------------------------------

SECONDS_FIELDS = (
    "factory_timeout",
    "ping_timeout",
    "connect_timeout",
    "probe_timeout",
    "ack_timeout",
    "subscribe_timeout",
    "publish_timeout",
    "disconnect_timeout",
    "drain_timeout",
    "ack_patience",
)
NUMBERS = {
    "keep_alive": (0, 65535),
    "session_expiry": (1, 4_294_967_295),
    "receive_maximum": (1, 65535),
    "receive_bytes": (1024, 2**40),
    "maximum_packet_size": (1024, 268_435_455),
    "topic_alias_maximum": (0, 65535),
    "topic_aliases": (0, 65535),
    "in_flight": (1, 32767),
    "outbox_messages": (1, 10_000_000),
    "outbox_bytes": (1024, 2**40),
    "quarantine_after": (0, 1000),
    "write_buffer": (1024, 2**32),
    "queue_messages": (1, 10_000_000),
    "queue_bytes": (1024, 2**40),
    "replay_batch": (1, 10_000),
    "history_events": (1, 1_000_000),
}
CHOICES = {
    "protocol": ("auto", "5", "3.1.1"),
    "probe": ("publish", "echo", "ping"),
    "on_handler_error": ("log", "raise"),
    "outbox_full": ("wait", "fail", "drop_oldest"),
}
BOOLEANS = (
    "request_response_information",
    "request_problem_information",
    "subscription_identifiers",
    "stable_id",
)
CALLABLES = ("client_id_factory", "authenticator", "options_factory", "open_stream", "wall_clock")
TEXTS = ("client_id", "username", "probe_topic")


@pytest.mark.parametrize("field", SECONDS_FIELDS)
@pytest.mark.parametrize("value", [0, -1, math.nan, "5", None, True])
def test_a_time_that_is_no_time_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        DriverConfig(endpoint=ENDPOINT, **{field: value})  # type: ignore[arg-type]  # that is the point
    assert str(caught.value) == f"{field} is {value!r}, {SECONDS}"
    longest: dict[str, Any] = {field: math.inf}
    assert getattr(DriverConfig(endpoint=ENDPOINT).evolve(**longest), field) == math.inf


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_out_of_its_range_is_refused(field: str) -> None:
    low, high = NUMBERS[field]
    for value in (low - 1, high + 1, 5000.0, "5", None, True):
        with pytest.raises(ValueError, match=field) as caught:
            DriverConfig(endpoint=ENDPOINT, **{field: value})  # type: ignore[arg-type]  # that is the point
        assert str(caught.value) == f"{field} is {value!r}, {whole(low, high)}"
    for value in (low, high):
        change: dict[str, Any] = {field: value}
        assert getattr(DriverConfig(endpoint=ENDPOINT).evolve(**change), field) == value


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_that_does_not_exist_is_refused(field: str) -> None:
    for value in ("", "other", None, 5, True):
        with pytest.raises(ValueError, match=field) as caught:
            DriverConfig(endpoint=ENDPOINT, **{field: value})  # type: ignore[arg-type]  # that is the point
        assert str(caught.value) == f"{field} is {value!r}, allowed are {', '.join(map(repr, CHOICES[field]))}"


@pytest.mark.parametrize(
    "field, value",
    [(field, value) for field in BOOLEANS for value in (1, None, "yes")]
    + [(field, 5) for field in CALLABLES]
    + [(field, value) for field in TEXTS for value in (5, b"x")]
    + [("client_id", None), ("probe_topic", None), ("wall_clock", None)]
    + [(field, value) for field in ("endpoint", "backoff") for value in (None, "mqtt://broker")]
    + [(field, "x") for field in ("tls", "will")]
    + [("password", 5), ("password", ["secret"])]
    + [("retry_refusals", value) for value in (5, {5}, ["x"], None)]
    + [("connect_user_properties", value) for value in (5, None, {"a": "b"}, ["ab"], [("a",)], [("a", 5)])],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{field} "):
        DriverConfig(**{"endpoint": ENDPOINT, "username": "user", field: value})  # type: ignore[arg-type]  # so it is


@pytest.mark.parametrize(
    "options, words",
    [
        ({"client_id": ""}, "client_id is empty; leave it out for the default, or give a base of 1 to 65000 bytes"),
        ({"client_id": "ä" * 32501}, "client_id has 65002 bytes, allowed are 1 to 65000"),
        ({"client_id": "a\0"}, "client_id contains U+0000"),
        ({"client_id": LONE_SURROGATE}, "client_id cannot be encoded as UTF-8"),
        ({"username": "a\0"}, "username contains U+0000"),
        ({"username": "ä" * 40_000}, "username has 80000 bytes, allowed are 0 to 65535"),
        ({"password": "x"}, "password needs a username"),
        ({"username": "u", "password": "ä" * 40_000}, "password has 80000 bytes, allowed are 0 to 65535"),
        ({"username": "u", "password": b"x" * 65_536}, "password has 65536 bytes, allowed are 0 to 65535"),
        ({"username": "u", "password": LONE_SURROGATE}, "password cannot be encoded as UTF-8"),
        ({"tls": TLSConfig()}, "tls is set but the endpoint is mqtt://broker:1883: use mqtts://"),
        ({"authenticator": object, "protocol": "3.1.1"}, "authenticator needs MQTT 5, but protocol is '3.1.1'"),
        ({"probe_topic": "a/#"}, "probe_topic: a Topic Name has no wildcard"),
        ({"probe_topic": ""}, "probe_topic: a Topic Name has 1..65535 bytes"),
        ({"connect_user_properties": [("a", "\0")]}, "connect_user_properties contains U+0000"),
    ],
)
def test_values_that_mqtt_cannot_carry_or_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are below, without a pattern's escapes
        DriverConfig(endpoint=ENDPOINT, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", ["never", None, 5, True])
def test_an_offline_policy_that_does_not_exist_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="allowed are 'wait', 'queue', 'latest', 'fail'") as caught:
        DriverConfig(endpoint=ENDPOINT, offline=value)
    assert str(caught.value).startswith(f"offline is {value!r}, ")


def test_an_offline_policy_may_be_given_by_its_name() -> None:
    assert DriverConfig(endpoint=ENDPOINT, offline="latest").offline is OfflinePolicy.LATEST


@pytest.mark.parametrize("value", [0, -1, math.nan, "5", None, True])
def test_a_rate_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="refill_rate") as caught:
        DriverConfig(endpoint=ENDPOINT, refill_rate=value)
    assert str(caught.value) == f"refill_rate is {value!r}, allowed are numbers > 0 (math.inf: no limit)"


@pytest.mark.parametrize("value", [-0.001, 0.021, math.nan, math.inf])
def test_a_read_delay_out_of_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="read_delay") as caught:
        DriverConfig(endpoint=ENDPOINT, read_delay=value)
    assert str(caught.value) == f"read_delay: must be a finite number >= 0 and <= 0.02, got {value!r}"
    assert [DriverConfig(endpoint=ENDPOINT, read_delay=delay).read_delay for delay in (0, 0.02)] == [0, 0.02]


@pytest.mark.parametrize("value", ["0.001", None, True])
def test_a_read_delay_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"read_delay: must be a finite number >= 0 and <= 0\.02"):
        DriverConfig(endpoint=ENDPOINT, read_delay=value)


def test_the_path_of_the_outbox_is_kept_as_text_and_checked(tmp_path: Path) -> None:
    assert DriverConfig(endpoint=ENDPOINT, outbox_path=tmp_path / "outbox").outbox_path == str(tmp_path / "outbox")
    for text in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"outbox_path is .* allowed are paths of files"):
            DriverConfig(endpoint=ENDPOINT, outbox_path=text)
    for other in (5, b"x"):
        with pytest.raises(TypeError, match="outbox_path must be a str or a path"):
            DriverConfig(endpoint=ENDPOINT, outbox_path=other)  # type: ignore[arg-type]  # that is the point


def test_a_probe_topic_that_is_not_used_is_not_checked() -> None:
    assert DriverConfig(endpoint=ENDPOINT, probe="ping", probe_topic="a/#").probe == "ping"


def test_the_probe_topic_names_the_client_in_characters_that_a_topic_can_hold() -> None:
    config = DriverConfig(endpoint=ENDPOINT, client_id="plant/+#1", probe_topic="p/{base}/{client_id}")
    assert config.probe_topic_for("plant/+#1_7") == "p/plant___1/plant___1_7"


def test_evolve_checks_again_and_leaves_the_original_alone() -> None:
    config = DriverConfig(endpoint=ENDPOINT)
    assert config.evolve(keep_alive=7).keep_alive == 7
    assert config.keep_alive == 30
    with pytest.raises(ValueError, match="keep_alive is -1"):
        config.evolve(keep_alive=-1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.keep_alive = 5  # type: ignore[misc]  # that is the point


def test_every_field_is_validated_somewhere() -> None:
    """A field that is new is entered above, so that its bad values are tested."""
    known = {*SECONDS_FIELDS, *NUMBERS, *CHOICES, *BOOLEANS, *CALLABLES, *TEXTS}
    known |= {"endpoint", "backoff", "tls", "will", "password", "retry_refusals", "connect_user_properties"}
    known |= {"fallbacks", "failover", "availability", "offline", "outbox_path", "refill_rate", "read_delay"}
    assert {field.name for field in attrs.fields(DriverConfig)} == known


def test_every_field_is_a_keyword_that_type_checkers_know() -> None:
    """That its type is one that the field takes, mypy sees in ``evolve``."""
    assert set(DriverArguments.__annotations__) == {field.name for field in attrs.fields(DriverConfig)}


def test_refusals_to_retry_may_be_any_collection_of_reason_codes() -> None:
    config = DriverConfig(endpoint=ENDPOINT, retry_refusals=[ReasonCode.BANNED])
    assert config.retry_refusals == frozenset({ReasonCode.BANNED})


# -- secrets --------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_a_repr() -> None:
    class Authenticator:
        def __repr__(self) -> str:
            return "geheim"

        def __call__(self) -> Any: ...

    config = DriverConfig(
        endpoint=SECURE,
        username="user",
        password="geheim",
        authenticator=Authenticator(),
        tls=TLSConfig(cert_file="cert", key_password="geheim", ca_data="geheim"),
    )
    assert "geheim" not in repr(config) + str(config) + repr(config.tls)


@pytest.mark.parametrize(
    "options",
    [
        {"password": "geheim"},
        {"username": "u", "password": "geheim" + LONE_SURROGATE},
        {"username": "u", "password": "geheim" * 20_000},
        {"username": "u", "password": ["geheim"]},
    ],
)
def test_no_error_quotes_the_password(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        DriverConfig(endpoint=ENDPOINT, **options)
    shown = caught.value
    assert "geheim" not in str(shown)
    assert shown.__cause__ is None
    assert shown.__context__ is None


# -- Endpoint and Will ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "endpoint: scheme 'mqtt' takes a host and a port"),
        ({"host": "a"}, "endpoint: scheme 'mqtt' takes a host and a port"),
        ({"port": 1}, "endpoint: scheme 'mqtt' takes a host and a port"),
        ({"host": "a", "port": 1, "path": "/x"}, "endpoint: scheme 'mqtt' takes a host and a port"),
        ({"scheme": "unix"}, "endpoint: scheme 'unix' takes a path"),
        ({"scheme": "unix", "path": "/x", "port": 1}, "endpoint: scheme 'unix' takes a path"),
        ({"scheme": "http", "host": "a", "port": 1}, "scheme is 'http', allowed are 'mqtt', 'mqtts', 'unix'"),
        ({"host": "a", "port": 65536}, "port is 65536, allowed are whole numbers from 0 to 65535"),
        ({"host": "a", "port": "1"}, "port is '1', allowed are"),
        ({"host": 5, "port": 1}, "host must be str, not int"),
        ({"scheme": "unix", "path": 5}, "path must be str, not int"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        Endpoint(**options)
    assert words in str(caught.value)


def test_an_endpoint_is_written_as_a_url() -> None:
    assert str(ENDPOINT) == "mqtt://broker:1883"
    assert str(Endpoint(scheme="mqtts", host="::1", port=1)) == "mqtts://[::1]:1"
    assert str(Endpoint(scheme="unix", path="/run/x")) == "unix:///run/x"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"topic": ""}, "will.topic: a Topic Name has 1..65535 bytes"),
        ({"topic": "a/+"}, "will.topic: a Topic Name has no wildcard"),
        ({"topic": 5}, "will.topic: a Topic Name is a str, got int"),
        ({"payload": 5}, "will.payload must be bytes or str, not int"),
        ({"payload": None}, "will.payload must be bytes or str, not NoneType"),
        ({"payload": bytes(65_536)}, "will.payload has 65536 bytes, allowed are 0 to 65535"),
        ({"payload": b"\xff", "payload_format": 1}, "payload_format is 1 (UTF-8), but payload is not UTF-8: b'\\xff'"),
        ({"qos": 3}, "qos is 3, allowed are 0, 1, 2"),
        ({"retain": 1}, "retain must be bool, not int"),
        ({"delay": -1}, "delay is -1, allowed are whole numbers from 0 to 4294967295"),
        ({"payload_format": 2}, "payload_format is 2, allowed are None, 0, 1"),
        ({"message_expiry": 2**32}, "message_expiry is 4294967296, allowed are whole numbers from 0 to 4294967295"),
        ({"content_type": "\0"}, "content_type contains U+0000"),
        ({"content_type": 5}, "content_type must be str, not int"),
        ({"response_topic": "#"}, "will.response_topic: a Topic Name has no wildcard"),
        ({"correlation_data": "x"}, "will.correlation_data must be bytes, not str"),
        ({"correlation_data": bytes(65_536)}, "will.correlation_data has 65536 bytes, allowed are 0 to 65535"),
        ({"user_properties": [5]}, "user_properties must hold (name, value) pairs, not 5"),
    ],
)
def test_a_will_that_mqtt_cannot_carry_is_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        attrs.evolve(Will(topic="a"), **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"payload_format": 2}, "payload_format is 2, allowed are 0 (bytes) and 1 (UTF-8)"),
        ({"payload_format": True}, "payload_format is True, allowed are"),
        ({"message_expiry": 1.5}, "message_expiry is 1.5, allowed are whole numbers from 0 to 4294967295"),
        ({"message_expiry": "5"}, "message_expiry is '5', allowed are"),
        ({"content_type": 5}, "content_type must be str, not int"),
        ({"content_type": "x" * 65_536}, "content_type has 65536 bytes, allowed are 0 to 65535"),
        ({"response_topic": "+"}, "response_topic: a Topic Name has no wildcard"),
        ({"correlation_data": 5}, "correlation_data must be bytes, not int"),
        ({"correlation_data": bytes(65_536)}, "correlation_data has 65536 bytes"),
        ({"topic_alias": 0}, "topic_alias is 0, allowed are whole numbers from 1 to 65535"),
        ({"user_properties": ("ab",)}, "user_properties must hold (name, value) pairs, not 'ab'"),
        ({"user_properties": (("a", "b", "c"),)}, "user_properties must hold (name, value) pairs"),
        ({"user_properties": (("a", "\0"),)}, "user_properties contains U+0000"),
    ],
)
def test_properties_that_mqtt_cannot_carry_are_refused_at_the_call(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        encode_publish_properties(PublishProperties(**options))
    assert words in str(caught.value)


# -- from a URL and from the environment ----------------------------------------------------------------------------


def test_a_url_gives_endpoint_and_credentials_and_options_win() -> None:
    config = DriverConfig.from_url("mqtts://us%40er:pa%2Fss@broker?client_id=me&keep_alive=7&protocol=5", keep_alive=9)
    assert config.endpoint == SECURE
    assert (config.username, config.password, config.client_id) == ("us@er", "pa/ss", "me")
    assert (config.keep_alive, config.protocol) == (9, "5")
    assert DriverConfig.from_url("unix:///run/x").endpoint == Endpoint(scheme="unix", path="/run/x")


def test_the_environment_gives_everything_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("geheim\n")
    environ = {
        "MQTT_URL": "mqtts://broker",
        "MQTT_USERNAME": "user",
        "MQTT_PASSWORD_FILE": str(tmp_path / "password"),
        "MQTT_CA_FILE": "ca.pem",
        "MQTT_CERT_FILE": "cert.pem",
        "MQTT_KEY_FILE": "key.pem",
        "MQTT_KEEP_ALIVE": "11",
    }
    config = DriverConfig.from_env(environ, client_id="me")
    assert config.endpoint == SECURE
    assert (config.username, config.password, config.client_id, config.keep_alive) == ("user", "geheim", "me", 11)
    assert config.tls == TLSConfig(ca_file="ca.pem", cert_file="cert.pem", key_file="key.pem")
    assert DriverConfig.from_env({"X_URL": "mqtt://broker"}, prefix="X_").endpoint == ENDPOINT


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQTT_URL", "mqtt://broker")
    assert DriverConfig.from_env(client_id="me").endpoint == ENDPOINT


def test_tls_files_for_a_link_without_tls_are_refused() -> None:
    with pytest.raises(ValueError, match="tls is set but the endpoint is mqtt://broker:1883"):
        DriverConfig.from_env({"MQTT_URL": "mqtt://broker", "MQTT_CA_FILE": "ca.pem"})
