"""What ``_paho.py`` relies on, and what it guards against, in whichever paho is installed: an upgrade fails loudly.

The gate runs this file with 1.6.1 and with 2.x. A test here that fails is no fault of paho's: it says that the comment
in ``_paho.py`` which explains an arrangement is no longer true, and that the arrangement must be looked at again.
"""

from __future__ import annotations

import inspect
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from trio_paho_mqtt import AsyncClient  # type: ignore[import-untyped]  # it has no annotations

from trio_mqtt_driver._paho import _PAHO_2, _Client, _make_client, _Pipe

both_versions = pytest.mark.parametrize("version", [4, 5])


def new(version: int) -> _Client:
    """A client that has written its CONNECT, and is shown no CONNACK, as in the driver."""
    client = _make_client("contract", version, True)
    client.pipe = _Pipe()
    client.next_packet_id = lambda: 77
    client.connect("memory", 1883, 30)
    client.loop_write()
    client.pipe.outgoing.clear()
    return client


class Calls:
    """A callback that notes its arguments, without the client and the user data."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.made.append(args[2:])


# -- the hooks ------------------------------------------------------------------------------------------------------


@both_versions
def test_the_socket_comes_from_our_hook_and_nothing_else_is_opened(version: int) -> None:
    assert callable(getattr(mqtt.Client, "_create_socket_connection", None))
    client = _make_client("contract", version, True)
    client.pipe = _Pipe()
    client.next_packet_id = lambda: 1
    assert client.connect("no.such.host.invalid", 1883, 30) == mqtt.MQTT_ERR_SUCCESS
    socket: Any = client.socket()
    assert socket is client.pipe
    assert client.loop_write() == mqtt.MQTT_ERR_SUCCESS
    assert client.pipe.outgoing[0] == 0x10
    assert client.pipe.outgoing[2:9] == b"\x00\x04MQTT" + bytes((version,))


@both_versions
def test_packet_identifiers_come_from_our_hook(version: int) -> None:
    assert callable(getattr(mqtt.Client, "_mid_generate", None))
    client = new(version)
    pipe = client.pipe
    assert client.subscribe([("a", 0)])[1] == 77
    assert client.unsubscribe(["a"])[1] == 77
    client.loop_write()
    assert b"\x82" in pipe.outgoing
    assert pipe.outgoing.count(b"\x00\x4d") == 2


@both_versions
def test_output_is_complete_after_loop_write(version: int) -> None:
    client = new(version)
    pipe = client.pipe
    filters = [(f"topic/{number}", 0) for number in range(5000)]
    client.subscribe(filters)
    client.loop_write()
    length = sum((byte & 127) << 7 * index for index, byte in enumerate(pipe.outgoing[1:4]))
    assert len(pipe.outgoing) == 4 + length
    assert not client.want_write()


@both_versions
def test_after_disconnect_was_written_the_pipe_is_closed_but_the_bytes_are_there(version: int) -> None:
    client = new(version)
    pipe = client.pipe
    client.disconnect()
    client.loop_write()
    assert pipe.outgoing[0] == 0xE0
    assert client.socket() is None


def test_the_three_loops_of_trio_paho_mqtt_are_those_that_are_overridden() -> None:
    for name in ("_loop_read", "_loop_write", "_loop_misc"):
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name))
    assert list(inspect.signature(AsyncClient.__init__).parameters) == [
        "self",
        "sync_client",
        "parent_nursery",
        "max_buffer",
    ]
    assert "start_soon(self._loop_read)" in inspect.getsource(AsyncClient._start_all_loop)


def test_the_original_loops_of_trio_paho_mqtt_cannot_run_on_a_trio_of_today() -> None:
    assert "trio.hazmat" in inspect.getsource(AsyncClient._loop_read)


# -- loop_read ------------------------------------------------------------------------------------------------------


@both_versions
def test_loop_read_handles_one_packet_a_call(version: int) -> None:
    client = new(version)
    pipe = client.pipe
    calls = Calls()
    client.on_subscribe = calls
    suback = b"\x90\x04\x00\x01\x00\x00" if version == 5 else b"\x90\x03\x00\x01\x00"
    pipe.incoming += suback + suback
    client.loop_read()
    assert len(calls.made) == 1
    assert pipe.incoming == suback
    client.loop_read()
    assert len(calls.made) == 2


@both_versions
def test_a_callback_that_raises_poisons_the_buffer(version: int) -> None:
    """The packet stays, and every later call runs it again: hence callbacks that only append."""
    client = new(version)
    pipe = client.pipe
    calls: list[int] = []

    def on_subscribe(*args: Any) -> None:
        calls.append(args[2])
        raise RuntimeError("bug")

    client.on_subscribe = on_subscribe
    pipe.incoming += b"\x90\x04\x00\x05\x00\x00" if version == 5 else b"\x90\x03\x00\x05\x00"
    with pytest.raises(RuntimeError, match="bug"):
        client.loop_read()
    with pytest.raises(RuntimeError, match="bug"):
        client.loop_read()
    assert calls == [5, 5]


@both_versions
def test_an_empty_pipe_is_no_error(version: int) -> None:
    client = new(version)
    assert client.loop_read() == mqtt.MQTT_ERR_SUCCESS
    assert client.socket() is not None


def test_an_auth_packet_is_an_error_to_paho() -> None:
    """Hence enhanced authentication is ours to put together."""
    client = new(5)
    pipe = client.pipe
    pipe.incoming += b"\xf0\x00"
    assert client.loop_read() == mqtt.MQTT_ERR_PROTOCOL


@both_versions
def test_there_is_no_limit_to_an_incoming_packet(version: int) -> None:
    """Hence the packet reader has one."""
    client = new(version)
    pipe = client.pipe
    pipe.incoming += b"\x30\xff\xff\xff\x7f"
    assert client.loop_read() == mqtt.MQTT_ERR_SUCCESS


# -- CONNACK --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_id, code", [("contract", 1), ("", 2)])
def test_a_refusal_that_3_1_1_knows_is_answered_by_paho_as_it_pleases(client_id: str, code: int) -> None:
    """By a new connection, or by closing the one that there is: hence a refusal is never shown to it."""
    client = _make_client(client_id, 4, True)
    first = client.pipe = _Pipe()
    client.next_packet_id = lambda: 1
    client.connect("memory", 1883, 30)
    client.loop_write()
    second = client.pipe = _Pipe()
    first.incoming += bytes((0x20, 2, 0, code))
    client.loop_read()
    assert client.socket() is None or second.outgoing[:1] == b"\x10"


def test_reconnect_on_failure_is_an_argument_of_the_client() -> None:
    assert "reconnect_on_failure" in inspect.signature(mqtt.Client.__init__).parameters


def test_a_connack_of_3_1_1_cannot_be_read_in_version_5() -> None:
    """nats-server answers a CONNECT of version 5 so: hence ``feed`` reads CONNACK itself."""
    client = new(5)
    calls = Calls()
    client.on_connect = calls
    client.pipe.incoming += b"\x20\x02\x00\x01"
    try:
        result = client.loop_read()
    except Exception:  # noqa: BLE001  # which one is paho's secret
        result = mqtt.MQTT_ERR_PROTOCOL
    assert result != mqtt.MQTT_ERR_SUCCESS or calls.made[0][1] != 0x84


def test_session_present_after_a_clean_start_is_accepted_by_paho() -> None:
    """Hence the handshake refuses it."""
    client = new(5)
    calls = Calls()
    client.on_connect = calls
    client.pipe.incoming += b"\x20\x03\x01\x00\x00"
    assert client.loop_read() == mqtt.MQTT_ERR_SUCCESS
    assert len(calls.made) == 1
    assert client.is_connected()


def test_receive_maximum_is_not_obeyed_by_paho() -> None:
    """Hence the window is ours."""
    client = new(5)
    client.pipe.incoming += b"\x20\x06\x00\x00\x03\x21\x00\x01"
    client.loop_read()
    numbers = iter(range(1, 11))
    client.next_packet_id = lambda: next(numbers)
    for _ in range(10):
        client.publish("a", b"x", qos=1)
    client.loop_write()
    assert client.pipe.outgoing.count(b"\x32\x07") == 10


@pytest.mark.parametrize("size", [268_435_456, 0xFFFFFFFF])
def test_paho_takes_no_maximum_packet_size_beyond_the_largest_packet(size: int) -> None:
    """MQTT allows it, and a broker may mean "no limit" by it: hence ``_Received``."""
    properties: Any = Properties(PacketTypes.CONNACK)  # type: ignore[no-untyped-call]  # paho has no annotations there
    with pytest.raises(Exception, match="MaximumPacketSize property value must be in the range"):
        properties.unpack(b"\x05\x27" + size.to_bytes(4, "big"))


# -- what callbacks are given ---------------------------------------------------------------------------------------


def test_on_subscribe_is_given_identifier_and_codes() -> None:
    client = new(5)
    pipe = client.pipe
    calls = Calls()
    client.on_subscribe = calls
    pipe.incoming += b"\x90\x06\x00\x01\x00\x00\x02\x87"
    client.loop_read()
    ((packet_id, codes, *_),) = calls.made
    assert packet_id == 1
    assert [code.value for code in codes] == [0, 2, 0x87]


def test_on_subscribe_is_given_identifier_and_codes_with_3_1_1() -> None:
    client = new(4)
    pipe = client.pipe
    calls = Calls()
    client.on_subscribe = calls
    pipe.incoming += b"\x90\x05\x00\x01\x00\x02\x80"
    client.loop_read()
    ((packet_id, codes, *_),) = calls.made
    assert packet_id == 1
    assert [getattr(code, "value", code) for code in codes] == [0, 2, 0x80]


@pytest.mark.parametrize("count", [1, 2])
def test_on_unsubscribe_is_given_codes_at_another_place_by_each_generation_of_paho(count: int) -> None:
    client = new(5)
    pipe = client.pipe
    calls = Calls()
    client.on_unsubscribe = calls
    pipe.incoming += bytes((0xB0, 3 + count, 0, 1, 0)) + bytes((0x11,)) * count
    client.loop_read()
    ((packet_id, *rest),) = calls.made
    assert packet_id == 1
    if _PAHO_2:
        codes, _properties = rest
    else:
        _properties, codes = rest
        assert isinstance(codes, list) is (count > 1)  # a bare one if there is only one
    many = [codes] if count == 1 and not _PAHO_2 else codes
    assert [code.value for code in many] == [0x11] * count


def test_on_unsubscribe_is_given_no_codes_with_3_1_1() -> None:
    client = new(4)
    pipe = client.pipe
    calls = Calls()
    client.on_unsubscribe = calls
    pipe.incoming += b"\xb0\x02\x00\x01"
    client.loop_read()
    assert calls.made[0][0] == 1
    assert not (calls.made[0][1] if _PAHO_2 else calls.made[0][1:])


@both_versions
def test_a_suback_with_fewer_codes_than_filters_is_accepted_by_paho(version: int) -> None:
    """Hence the connection counts them."""
    client = new(version)
    pipe = client.pipe
    calls = Calls()
    client.on_subscribe = calls
    client.subscribe([("a", 0), ("b", 0)])
    pipe.incoming += b"\x90\x04\x00\x4d\x00\x00" if version == 5 else b"\x90\x03\x00\x4d\x00"
    assert client.loop_read() == mqtt.MQTT_ERR_SUCCESS
    assert len(calls.made[0][1]) == 1


def test_a_topic_that_is_not_utf_8_is_handed_out_and_raises_later() -> None:
    """Hence our own decoder refuses it where it is read."""
    client = new(4)
    pipe = client.pipe
    messages: list[Any] = []
    client.on_message = lambda _client, _userdata, message: messages.append(message)
    pipe.incoming += b"\x30\x03\x00\x01\xff"
    assert client.loop_read() == mqtt.MQTT_ERR_SUCCESS
    with pytest.raises(UnicodeDecodeError):
        messages[0].topic  # noqa: B018  # reading it is what raises


# -- properties -----------------------------------------------------------------------------------------------------


def test_a_repeatable_property_is_appended_by_each_assignment() -> None:
    properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho has no annotations there
    properties.UserProperty = ("a", "b")
    properties.UserProperty = ("a", "c")
    assert properties.UserProperty == [("a", "b"), ("a", "c")]


def test_properties_tell_their_own_length() -> None:
    properties: Any = Properties(PacketTypes.AUTH)  # type: ignore[no-untyped-call]  # paho has no annotations there
    properties.AuthenticationMethod = "m"
    packed = properties.pack()
    assert packed == b"\x04\x15\x00\x01m"
    again: Any = Properties(PacketTypes.AUTH)  # type: ignore[no-untyped-call]  # paho has no annotations there
    assert again.unpack(packed + b"rest")[1] == len(packed)
    assert again.AuthenticationMethod == "m"
    assert not hasattr(again, "AuthenticationData")
