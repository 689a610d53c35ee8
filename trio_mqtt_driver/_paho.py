"""paho as a codec for control packets: trio-paho-mqtt's ``AsyncClient`` over a pipe in memory.

This is the only module that knows paho. The arrangement is that of Trio's own ``_ssl.py``: a borrowed engine that
believes it has a socket, while the bytes are ours to move. ``AsyncClient`` gives the shape (three loops in the
caller's nursery); its loops are replaced, because 0.3.1 waits on sockets with ``trio.hazmat``, which Trio has no
longer.

Rules that keep paho harmless here, each pinned by ``tests/test_paho_contract.py``:

- Callbacks only append to a list. One that raised would leave its packet in paho's buffer, to be run again by every
  later ``loop_read()``.
- CONNACK is never shown to paho: for two refusals it would open a new connection by itself, and it would read the
  properties once more, by narrower rules. It unsubscribes and disconnects as well without.
- ``loop_misc()`` is never called: it keeps time by ``time.monotonic()``, and closes the socket behind our back.
- One whole packet is fed at a time, since ``loop_read()`` handles only one packet a call.
- Whatever paho raises on a packet is the packet's fault: paho checks lengths by letting ``struct`` fail.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, cast

import attrs
import paho.mqtt.client as mqtt
import trio
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from trio_paho_mqtt import AsyncClient  # type: ignore[import-untyped]  # it has no annotations

from ._config import DriverConfig, Will
from ._errors import ProtocolError
from ._packets import AUTH, CONNACK, DISCONNECT, SUBACK, UNSUBACK, packet_name
from ._properties import encode_varint
from ._subscribing import SubAck, decode_suback, encode_subscribe
from ._types import NO_LIMITS, ReasonCode, ServerLimits, UserProperties

_PropertiesOf: Callable[[int], Any] = Properties  # paho leaves this class without annotations
_PAHO_2 = hasattr(mqtt, "CallbackAPIVersion")

_LARGEST_PACKET = 268_435_455  # the most that paho lets Maximum Packet Size be
_AUTHENTICATION_DATA = b"\x16"
_REMEMBERED = 16
"""Property blocks that are known by heart. paho makes tables for each; on a reconnect they are what they were."""

# CONNACK return codes of 3.1.1 [MQTT-3.2.2.3] as MQTT 5 says them.
_RETURN_CODES = {
    0: ReasonCode.SUCCESS,
    1: ReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
    2: ReasonCode.CLIENT_IDENTIFIER_NOT_VALID,
    3: ReasonCode.SERVER_UNAVAILABLE,
    4: ReasonCode.BAD_USER_NAME_OR_PASSWORD,
    5: ReasonCode.NOT_AUTHORIZED,
}


@attrs.frozen
class ConnAck:
    session_present: bool
    reason_code: ReasonCode
    limits: ServerLimits = NO_LIMITS
    authentication_data: bytes | None = None


@attrs.frozen
class ServerDisconnect:
    reason_code: ReasonCode
    reason_string: str | None
    server_reference: str | None


@attrs.frozen
class AuthPacket:
    reason_code: ReasonCode
    method: str | None
    data: bytes | None


ControlEvent = ConnAck | SubAck | ServerDisconnect | AuthPacket


class _Pipe:
    """What paho takes for its socket. Nothing blocks: an empty pipe says so, and sending always takes everything."""

    def __init__(self) -> None:
        self.incoming = bytearray()
        self.outgoing = bytearray()

    def recv(self, size: int) -> bytes:
        if not self.incoming:
            raise BlockingIOError
        data = bytes(self.incoming[:size])
        del self.incoming[:size]
        return data

    def send(self, data: bytes) -> int:
        self.outgoing += data
        return len(data)

    def close(self) -> None: ...

    def fileno(self) -> int:
        return -1

    def setblocking(self, flag: bool) -> None: ...

    def setsockopt(self, *args: object) -> None: ...


class _Client(mqtt.Client):
    """paho's client with a pipe for a socket and our packet identifiers."""

    pipe: _Pipe
    next_packet_id: Callable[[], int]

    def _create_socket_connection(self) -> Any:
        return self.pipe

    def _mid_generate(self) -> int:
        return self.next_packet_id()


def _make_client(client_id: str, version: int, clean_start: bool) -> _Client:
    protocol = mqtt.MQTTv5 if version == 5 else mqtt.MQTTv311
    arguments: dict[str, Any] = {"client_id": client_id, "protocol": protocol, "reconnect_on_failure": False}
    if version != 5:
        arguments["clean_session"] = clean_start
    if _PAHO_2:
        arguments["callback_api_version"] = cast(Any, mqtt).CallbackAPIVersion.VERSION2
    return _Client(**arguments)


def _properties(kind: int, values: dict[str, Any], user_properties: UserProperties = ()) -> Any:
    properties = _PropertiesOf(kind)
    for name, value in values.items():
        if value is not None:
            setattr(properties, name, value)
    for pair in user_properties:
        properties.UserProperty = pair  # each assignment appends
    return properties


class _Packed:
    """Properties that are packed already."""

    def __init__(self, properties: Any) -> None:
        self._packed = bytes(properties.pack())

    def pack(self) -> bytes:
        return self._packed


@lru_cache(_REMEMBERED)
def _connect_properties(values: tuple[tuple[str, int | None], ...]) -> Any:
    """The same for each connection. What may be a secret does not stay here: authentication data, User Properties."""
    return _Packed(_properties(PacketTypes.CONNECT, dict(values)))


class ControlPackets(AsyncClient):  # type: ignore[misc]  # untyped base
    """The control packets of one connection, and its three loops, which ``start()`` puts in its nursery."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        client_id: str,
        version: int,
        clean_start: bool,
        next_packet_id: Callable[[], int],
        loops: tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]],
    ) -> None:
        self._version5 = version == 5
        self._clean_start = clean_start
        self._pipe = _Pipe()
        self._events: list[ControlEvent] = []
        self._read, self._write, self._misc = loops
        client = _make_client(client_id, version, clean_start)
        client.pipe = self._pipe
        client.next_packet_id = self._next_packet_id = next_packet_id
        super().__init__(client, nursery, max_buffer=0)
        client.on_unsubscribe = self._on_unsubscribe  # pyright: ignore[reportAttributeAccessIssue]

    def start(self) -> None:
        self._start_all_loop()

    @trio.lowlevel.enable_ki_protection
    async def _loop_read(self) -> None:
        await self._read()

    @trio.lowlevel.enable_ki_protection
    async def _loop_write(self) -> None:
        await self._write()

    @trio.lowlevel.enable_ki_protection
    async def _loop_misc(self) -> None:
        await self._misc()

    # -- callbacks: append, never raise ---------------------------------------------------------------------------

    # CONNACK is read by ``feed`` itself, DISCONNECT is not shown to paho, and PUBLISH takes the express lane.
    def _on_connect(self, client: object, userdata: object, flags: object, rc: object, *rest: object) -> None: ...

    def _on_disconnect(self, client: object, userdata: object, rc: object, *rest: object) -> None: ...

    def _on_message(self, client: object, userdata: object, msg: object) -> None: ...

    def _on_unsubscribe(self, *args: Any) -> None:
        # (client, userdata, packet identifier), then paho 1: properties, code or codes; paho 2: codes, properties.
        # With paho 1 and 3.1.1 there is nothing more.
        codes = () if len(args) == 3 else args[3] if _PAHO_2 else args[4]
        self._events.append(SubAck(args[2], _codes(codes), unsubscribe=True))

    # -- outgoing -------------------------------------------------------------------------------------------------

    def take_output(self) -> bytes:
        self._client.loop_write()
        data = bytes(self._pipe.outgoing)
        self._pipe.outgoing.clear()
        return data

    def connect_packet(self, config: DriverConfig, authentication: tuple[str, bytes | None] | None) -> bytes:
        """CONNECT [MQTT-3.1]."""
        if config.username is not None:
            self._client.username_pw_set(config.username, cast(str, config.password))
        if config.last_will is not None:
            self._set_will(config.last_will)
        if not self._version5:
            self._client.connect("memory", 1883, config.keep_alive)
            return self.take_output()
        values = (
            ("SessionExpiryInterval", config.session_expiry if config.stable_id else None),
            ("ReceiveMaximum", config.receive_maximum),
            ("MaximumPacketSize", config.maximum_packet_size),
            ("TopicAliasMaximum", config.topic_alias_maximum or None),
            ("RequestResponseInformation", 1 if config.request_response_information else None),
            ("RequestProblemInformation", None if config.request_problem_information else 0),
        )
        if authentication is None and not config.connect_user_properties:
            properties = _connect_properties(values)
        else:
            method, data = authentication or (None, None)
            properties = _properties(
                PacketTypes.CONNECT,
                {**dict(values), "AuthenticationMethod": method, "AuthenticationData": data},
                config.connect_user_properties,
            )
        self._client.connect("memory", 1883, config.keep_alive, clean_start=self._clean_start, properties=properties)
        return self.take_output()

    def _set_will(self, will: Will) -> None:
        if not self._version5:
            self._client.will_set(will.topic, will.payload, will.qos, will.retain)
            return
        properties = _properties(
            PacketTypes.WILLMESSAGE,
            {
                "WillDelayInterval": will.delay or None,
                "PayloadFormatIndicator": will.payload_format,
                "MessageExpiryInterval": will.message_expiry,
                "ContentType": will.content_type,
                "ResponseTopic": will.response_topic,
                "CorrelationData": will.correlation_data,
            },
            will.user_properties,
        )
        self._client.will_set(will.topic, will.payload, will.qos, will.retain, properties)

    def subscribe_packet(
        self, filters: Sequence[bytes], identifier: int | None, user_properties: UserProperties
    ) -> tuple[int, bytes]:
        """Returns the Packet Identifier and the SUBSCRIBE packet; identifier and properties are for all filters."""
        packet_id = self._next_packet_id()
        return packet_id, encode_subscribe(
            packet_id, filters, version5=self._version5, identifier=identifier, user_properties=user_properties
        )

    def unsubscribe_packet(self, filters: Sequence[str]) -> tuple[int, bytes]:
        _, packet_id = self._client.unsubscribe(list(filters))
        return cast(int, packet_id), self.take_output()

    def disconnect_packet(self, *, end_session: bool) -> bytes:
        """DISCONNECT; the broker discards the will [MQTT-3.14.4-3]."""
        if self._version5 and end_session:
            self._client.disconnect(properties=_properties(PacketTypes.DISCONNECT, {"SessionExpiryInterval": 0}))
        else:
            self._client.disconnect()
        return self.take_output()

    def auth_packet(self, method: str, data: bytes | None) -> bytes:
        """AUTH with Continue Authentication; paho has no code for it beyond the properties [MQTT-3.15]."""
        properties = _properties(PacketTypes.AUTH, {"AuthenticationMethod": method, "AuthenticationData": data})
        body = bytes((ReasonCode.CONTINUE_AUTHENTICATION,)) + bytes(properties.pack())
        return bytes((AUTH,)) + encode_varint(len(body)) + body

    # -- incoming -------------------------------------------------------------------------------------------------

    def feed(self, packet: bytes) -> ControlEvent:
        """Decode one whole control packet. Raises ``ProtocolError`` for one that MQTT does not allow."""
        first = packet[0]
        start = 1
        while packet[start] > 127:
            start += 1
        body = packet[start + 1 :]
        try:
            if first == CONNACK:
                return self._connack(body)
            if first == DISCONNECT:
                return _server_disconnect(body)
            if first == AUTH:
                return _auth(body)
            if first == SUBACK:
                return decode_suback(body, version5=self._version5)
            self._pipe.incoming += packet
            self._client.loop_read()
        except ProtocolError:
            raise
        except Exception as exc:
            raise ProtocolError(f"malformed packet: {packet_name(first)}{_shown(packet)}: {exc!r}") from exc
        if first != UNSUBACK or len(self._events) != 1:
            raise ProtocolError(f"malformed packet: {packet_name(first)}{_shown(packet)}")
        return self._events.pop()

    def _connack(self, body: bytes) -> ConnAck:
        if len(body) == 2 and (not self._version5 or body[1] == 1):
            # A 3.1.1 broker answers a version 5 CONNECT like this, too; paho in version 5 mode cannot read it.
            code = _RETURN_CODES.get(body[1])
            if code is None:
                raise ProtocolError(f"malformed packet: CONNACK with return code {body[1]} [MQTT-3.2.2-6]")
            limits, data = NO_LIMITS, None
        elif not self._version5 or len(body) < 3:
            raise ProtocolError(f"malformed packet: CONNACK of {len(body)} bytes after its header")
        else:
            code = _code(body[1])
            limits, data = _said(body[2:])
        if body[0] > 1:
            raise ProtocolError(f"malformed packet: CONNACK with flags 0x{body[0]:02x} [MQTT-3.2.2-1]")
        return ConnAck(bool(body[0]), code, limits, data)


def _shown(packet: bytes) -> str:
    """The beginning of a packet, unless it may hold authentication data."""
    return "" if packet[0] in (AUTH, CONNACK) else f" {packet[:40]!r}"


def _code(value: int) -> ReasonCode:
    try:
        return ReasonCode(value)
    except ValueError:
        raise ProtocolError(f"malformed packet: unknown reason code 0x{value:02x} [MQTT-2.4]") from None


def _codes(codes: Any) -> tuple[ReasonCode, ...]:
    # paho 1 gives a bare object for a single code; a 3.1.1 broker's refusal is the number 128.
    many: Iterable[Any] = cast("Iterable[Any]", codes) if isinstance(codes, list | tuple) else (codes,)
    return tuple(ReasonCode(getattr(code, "value", code)) for code in many)


class _Received(Properties):
    """paho refuses a Maximum Packet Size beyond what any packet can have; MQTT does not [MQTT-3.2.2.3.6]."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name.replace(" ", "") == "MaximumPacketSize" and value > _LARGEST_PACKET:
            value = _LARGEST_PACKET
        super().__setattr__(name, value)  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]


_ReceivedOf: Callable[[int], Any] = _Received


def _unpack(kind: int, data: bytes) -> Any:
    properties = _ReceivedOf(kind)
    _, length = properties.unpack(data)
    if length != len(data):
        raise ProtocolError(f"malformed packet: {len(data) - length} bytes behind the properties [MQTT-2.2.2.1]")
    secret = getattr(properties, "AuthenticationData", None)
    if secret is not None and _AUTHENTICATION_DATA + len(secret).to_bytes(2, "big") + secret not in data:
        # paho 1 takes a value that is cut short for a shorter one.
        raise ProtocolError("malformed packet: Authentication Data longer than their packet [MQTT-2.2.2]")
    return properties


def _said(data: bytes) -> tuple[ServerLimits, bytes | None]:
    """What the properties of a CONNACK say; authentication data are not remembered."""
    return _server_limits.__wrapped__(data) if _AUTHENTICATION_DATA in data else _server_limits(data)


@lru_cache(_REMEMBERED)
def _server_limits(data: bytes) -> tuple[ServerLimits, bytes | None]:
    properties = _unpack(PacketTypes.CONNACK, data)

    def get(name: str, default: Any = None) -> Any:
        return getattr(properties, name, default)

    limits = ServerLimits(
        receive_maximum=get("ReceiveMaximum", 65535),
        maximum_qos=get("MaximumQoS", 2),
        retain_available=bool(get("RetainAvailable", 1)),
        maximum_packet_size=get("MaximumPacketSize"),
        topic_alias_maximum=get("TopicAliasMaximum", 0),
        wildcard_available=bool(get("WildcardSubscriptionAvailable", 1)),
        identifiers_available=bool(get("SubscriptionIdentifierAvailable", 1)),
        shared_available=bool(get("SharedSubscriptionAvailable", 1)),
        server_keep_alive=get("ServerKeepAlive"),
        assigned_client_id=get("AssignedClientIdentifier"),
        server_reference=get("ServerReference"),
        reason_string=get("ReasonString"),
        response_information=get("ResponseInformation"),
        session_expiry=get("SessionExpiryInterval"),
    )
    if not limits.receive_maximum or limits.maximum_packet_size == 0:
        raise ProtocolError("protocol error: CONNACK with a Receive Maximum or packet size of 0 [MQTT-3.2.2.3]")
    return limits, get("AuthenticationData")


def _server_disconnect(body: bytes) -> ServerDisconnect:
    code = _code(body[0]) if body else ReasonCode.SUCCESS
    properties = _unpack(PacketTypes.DISCONNECT, body[1:]) if len(body) > 1 else None
    return ServerDisconnect(
        code, getattr(properties, "ReasonString", None), getattr(properties, "ServerReference", None)
    )


def _auth(body: bytes) -> AuthPacket:
    code = _code(body[0]) if body else ReasonCode.SUCCESS
    properties = _unpack(PacketTypes.AUTH, body[1:]) if len(body) > 1 else None
    return AuthPacket(
        code, getattr(properties, "AuthenticationMethod", None), getattr(properties, "AuthenticationData", None)
    )
