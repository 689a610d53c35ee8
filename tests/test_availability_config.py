"""The options of availability are checked where they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from trio_mqtt_driver import Availability, DriverConfig, Endpoint, Will

ENDPOINT = Endpoint(host="broker", port=1883)
HERE = Availability(topic="state")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"topic": ""}, "availability.topic: a Topic Name has 1..65535 bytes"),
        ({"topic": "a" * 65_536}, "availability.topic: a Topic Name has 1..65535 bytes"),
        ({"topic": "a/+"}, "availability.topic: a Topic Name has no wildcard"),
        ({"topic": "#"}, "availability.topic: a Topic Name has no wildcard"),
        ({"topic": None}, "availability.topic: a Topic Name is a str, got NoneType"),
        ({"online": 5}, "availability.online must be bytes or str, not int"),
        ({"online": None}, "availability.online must be bytes or str, not NoneType"),
        ({"online": ""}, "availability.online has 0 bytes, allowed are 1 to 65535"),
        ({"online": bytes(65_536)}, "availability.online has 65536 bytes, allowed are 1 to 65535"),
        ({"offline": 5}, "availability.offline must be bytes or str, not int"),
        ({"offline": b""}, "availability.offline has 0 bytes, allowed are 1 to 65535"),
        ({"offline": bytes(65_536)}, "availability.offline has 65536 bytes, allowed are 1 to 65535"),
        ({"offline": "online"}, "availability.online and offline are both b'online'; they must differ"),
        ({"online": b"x", "offline": "x"}, "availability.online and offline are both b'x'; they must differ"),
        ({"qos": 2}, "qos is 2, allowed are 0, 1"),
        ({"qos": True}, "qos is True, allowed are 0, 1"),
        ({"qos": -1}, "qos is -1, allowed are 0, 1"),
        ({"retain": 1}, "retain must be bool, not int"),
        ({"retain": None}, "retain must be bool, not NoneType"),
        ({"delay": -1}, "delay is -1, allowed are whole numbers from 0 to 4294967295"),
        ({"delay": 2**32}, "delay is 4294967296, allowed are whole numbers from 0 to 4294967295"),
        ({"delay": 1.5}, "delay is 1.5, allowed are whole numbers from 0 to 4294967295"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        attrs.evolve(HERE, **options)
    assert words in str(caught.value)


def test_the_limits_themselves_are_allowed() -> None:
    one = Availability(topic="a" * 65_535, online=bytes(65_535), offline="x", qos=0, retain=False, delay=0xFFFFFFFF)
    assert (len(one.online), one.offline) == (65_535, b"x")


def test_topic_has_no_default() -> None:
    with pytest.raises(TypeError, match="topic"):
        Availability()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # that is what is tested


def test_the_will_is_what_availability_says() -> None:
    assert DriverConfig(endpoint=ENDPOINT).last_will is None
    will = Will(topic="a")
    assert DriverConfig(endpoint=ENDPOINT, will=will).last_will is will
    told = Availability(topic="a/b", offline="gone", qos=0, retain=False, delay=7)
    assert DriverConfig(endpoint=ENDPOINT, availability=told).last_will == Will(
        topic="a/b", payload="gone", qos=0, retain=False, delay=7
    )


def test_there_is_one_will() -> None:
    config = DriverConfig(endpoint=ENDPOINT, availability=HERE)
    with pytest.raises(
        ValueError, match=r"^will and availability are both set; availability brings a will of its own$"
    ):
        config.evolve(will=Will(topic="a"))
    assert config.evolve(will=Will(topic="a"), availability=None).will


@pytest.mark.parametrize("value", ["state", Will(topic="state"), {"topic": "state"}, True])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^availability must be Availability or None, not {type(value).__name__}$"):
        DriverConfig(endpoint=ENDPOINT, availability=value)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # that is what is tested
