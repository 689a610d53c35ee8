"""The server's side of the protocol for one network connection: what each packet of the client does."""

from __future__ import annotations

import math
from collections.abc import Generator

import trio

from ._filters import has_wildcard, split_share
from ._link import Link
from ._packets import (
    Ack,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Publish,
    Suback,
    Subscribe,
    SubscriptionRequest,
    Unsuback,
    Unsubscribe,
)
from ._properties import PROTOCOL_ERROR, Kind, Properties, PropertyValue, WireError, binary, integer, text
from ._session import NEVER, Published, Session, Subscription, expires_at
from ._state import AuthenticationRefusedError, BrokerState
from ._wire import CLIENT_IDENTIFIER_NOT_VALID, UNSUPPORTED_PROTOCOL_VERSION

NOT_AUTHORIZED = 0x87

_RETURN_CODES = {0x84: 1, 0x85: 2, 0x88: 3, 0x89: 3, 0x86: 4, 0x87: 5, 0x8A: 5, 0x8C: 5}
"""MQTT 5 reason code → return code of 3.1.1; others become 3, server unavailable."""


class ServerConnection:
    """One network connection; after CONNACK it is the outlet of a session."""

    def __init__(self, state: BrokerState, stream: trio.abc.Stream) -> None:
        self._state = state
        self._options = state.options
        limit = state.options.maximum_packet_size
        size = limit if limit is not None else 268_435_460
        self.link = Link(stream, self, state.faults, size, state.options.buffer_bytes)
        self.version = 5
        self._connect: Connect | None = None
        self._session: Session | None = None
        self._assigned: str | None = None
        self._exchange: Generator[bytes, bytes, bytes | None] | None = None
        self._aliases: dict[int, str] = {}
        self._unacknowledged: set[int] = set()
        """Packet identifiers that the client may not use again yet: its PUBLISHes, not fully answered."""

    @property
    def client_id(self) -> str:
        return self.link.client_id

    def send(self, packet: Packet) -> bool:
        return self.link.send(packet)

    def disconnect(self, reason_code: int) -> None:
        """Send DISCONNECT, which only MQTT 5 has, and close."""
        if self.version == 5 and self._connect is not None:
            self.link.send(Disconnect(reason_code=reason_code, properties=self._reference(reason_code)))
        self.link.close()

    def close(self, *, reset: bool = False, flush: bool = True) -> None:
        self.link.close(reset=reset, flush=flush)

    # -- what the link tells --

    def arrived(self, packet: Packet) -> None:
        if isinstance(packet, Connect):
            self._state.journal.connects.append(packet)
        self._state.journal.note_received(self.client_id, packet)

    def sent(self, packet: Packet) -> None:
        self._state.journal.note_sent(self.client_id, packet)
        if isinstance(packet, Ack) and (
            packet.kind in (Kind.PUBACK, Kind.PUBCOMP) or (packet.kind is Kind.PUBREC and packet.reason_code >= 0x80)
        ):
            self._unacknowledged.discard(packet.packet_id)

    def violated(self, error: WireError) -> None:
        self._state.journal.violations.append((self.client_id, str(error)))
        self._state.journal.note()
        if self._connect is None:
            if error.reason_code == UNSUPPORTED_PROTOCOL_VERSION:
                # The version is unknown, so the answer is the one of 3.1.1, as real brokers do.
                self.link.send_raw(b"\x20\x02\x00\x01")
            self.link.close()
        else:
            self.disconnect(error.reason_code)

    def timed_out(self) -> None:
        if self.version == 5 and self._session is not None:
            self.link.send(Disconnect(reason_code=0x8D))

    def closed(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._state.connection_lost(session, self)

    def received(self, packet: Packet) -> None:
        if isinstance(packet, Connect):
            self._on_connect(packet)
        elif isinstance(packet, Auth):
            self._on_auth(packet)
        elif self._session is None:
            # CONNECT was lost to a fault, or authentication still goes on.
            raise WireError(f"{packet.kind.name} before CONNACK", PROTOCOL_ERROR)
        elif isinstance(packet, Publish):
            self._on_publish(packet, self._session)
        elif isinstance(packet, Ack):
            self._on_ack(packet, self._session)
        elif isinstance(packet, Pingreq):
            self.send(Pingresp())
        elif isinstance(packet, Subscribe):
            if not self._too_many(len(packet.requests)):
                self._on_subscribe(packet, self._session)
        elif isinstance(packet, Unsubscribe):
            if not self._too_many(len(packet.topic_filters)):
                self._on_unsubscribe(packet, self._session)
        elif isinstance(packet, Disconnect):
            self._on_disconnect(packet, self._session)

    # -- CONNECT and AUTH --

    def _on_connect(self, connect: Connect) -> None:
        self._connect, self.version = connect, connect.version
        options = self._options
        if connect.version not in options.versions:
            if 5 not in options.versions:
                self.link.version = self.version = 4  # A server that knows only 3.1.1 answers in it.
            self._refuse(UNSUPPORTED_PROTOCOL_VERSION)
            return
        code = self._state.faults.connect_refusal(connect.client_id)
        if code is None:
            code = self._connect_error(connect)
        if code is not None:
            self._refuse(code)
            return
        if not connect.client_id:
            self._assigned = self.link.client_id = self._state.assign_client_id()
        self.link.maximum_packet_size = integer(connect.properties, "maximum_packet_size", NEVER)
        if options.use_topic_aliases:
            self.link.topic_alias_maximum = integer(connect.properties, "topic_alias_maximum", 0)
        method = text(connect.properties, "authentication_method")
        if method is None:
            self._accept({})
            return
        assert options.authenticate is not None
        self._exchange = options.authenticate(method, binary(connect.properties, "authentication_data") or b"")
        self._advance(None, method)

    def _connect_error(self, connect: Connect) -> int | None:
        options = self._options
        if not connect.client_id and connect.version == 4 and not connect.clean_start:
            return CLIENT_IDENTIFIER_NOT_VALID
        if connect.will is not None and connect.will.qos > options.maximum_qos:
            return 0x9B
        if connect.will is not None and connect.will.retain and not options.retain_available:
            return 0x9A
        if options.users is not None:
            password = options.users.get(connect.username or "")
            if password is None or connect.password != password.encode():
                return 0x86
        if "authentication_method" in connect.properties:
            return 0x8C if options.authenticate is None else None
        return NOT_AUTHORIZED if options.authenticate is not None else None

    def _refuse(self, reason_code: int) -> None:
        if self.version == 4:
            reason_code = _RETURN_CODES.get(reason_code, 3)
        self.send(Connack(reason_code=reason_code, properties=self._reference(reason_code)))
        self.link.close()

    def _reference(self, reason_code: int) -> Properties:
        """Where else to go, with the reason codes that say so [MQTT-4.11]."""
        reference = self._options.server_reference
        return {} if reference is None or reason_code not in (0x9C, 0x9D) else {"server_reference": reference}

    def _accept(self, extra: dict[str, PropertyValue]) -> None:
        connect = self._connect
        assert connect is not None
        session, present = self._state.open_session(connect, self.client_id, self)
        self._session = session
        keep_alive = connect.keep_alive
        if connect.version == 5 and self._options.server_keep_alive is not None:
            keep_alive = self._options.server_keep_alive
        properties = {**self._limits(session, connect), **extra} if connect.version == 5 else {}
        self.send(Connack(session_present=present, properties=properties))
        if self.link.is_closed:
            return
        self.link.enforce_keep_alive(keep_alive)
        session.attach(self, integer(connect.properties, "receive_maximum", 65535))

    def _limits(self, session: Session, connect: Connect) -> dict[str, PropertyValue]:
        """The CONNACK properties: those that differ from what MQTT takes for granted."""
        options = self._options
        properties: dict[str, PropertyValue] = {}
        if session.expiry != integer(connect.properties, "session_expiry", 0):
            properties["session_expiry"] = session.expiry
        if options.receive_maximum != 65535:
            properties["receive_maximum"] = options.receive_maximum
        if options.maximum_qos < 2:
            properties["maximum_qos"] = options.maximum_qos
        if options.maximum_packet_size is not None:
            properties["maximum_packet_size"] = options.maximum_packet_size
        if options.topic_alias_maximum:
            properties["topic_alias_maximum"] = options.topic_alias_maximum
        if options.server_keep_alive is not None:
            properties["server_keep_alive"] = options.server_keep_alive
        for name in ("retain_available", "wildcard_available", "identifiers_available", "shared_available"):
            if not getattr(options, name):
                properties[name] = 0
        if self._assigned is not None:
            properties["assigned_client_id"] = self._assigned
        if options.response_information is not None and connect.properties.get("request_response_information"):
            properties["response_information"] = options.response_information
        return properties

    def _on_auth(self, packet: Auth) -> None:
        connect, authenticate = self._connect, self._options.authenticate
        method = text(packet.properties, "authentication_method")
        if connect is None or method != text(connect.properties, "authentication_method") or method is None:
            raise WireError("AUTH with another Authentication Method than CONNECT", PROTOCOL_ERROR)
        data = binary(packet.properties, "authentication_data") or b""
        if packet.reason_code == 0x19 and self._session is not None and authenticate is not None:
            self._exchange = authenticate(method, data)
            self._advance(None, method)
        elif packet.reason_code == 0x18 and self._exchange is not None:
            self._advance(data, method)
        else:
            raise WireError(f"unexpected AUTH with reason code 0x{packet.reason_code:02x}", PROTOCOL_ERROR)

    def _advance(self, data: bytes | None, method: str) -> None:
        """One step of the authentication exchange: a challenge, success or refusal [MQTT-4.12]."""
        exchange = self._exchange
        assert exchange is not None
        proof: bytes | None = None
        try:
            challenge = next(exchange) if data is None else exchange.send(data)
        except StopIteration as stop:
            self._exchange = None
            proof = stop.value
        except AuthenticationRefusedError as refusal:
            self._exchange = None
            if self._session is None:
                self._refuse(refusal.reason_code)
            else:
                self.disconnect(refusal.reason_code)
            return
        else:
            self.send(
                Auth(
                    reason_code=0x18,
                    properties={"authentication_method": method, "authentication_data": challenge},
                )
            )
            return
        final: dict[str, PropertyValue] = {"authentication_method": method}
        if proof is not None:
            final["authentication_data"] = proof
        if self._session is None:
            self._accept(final)
        else:
            self.send(Auth(reason_code=0, properties=final))

    # -- PUBLISH --

    def _on_publish(self, packet: Publish, session: Session) -> None:
        options = self._options
        topic = packet.topic
        properties = packet.properties
        if "topic_alias" in properties:
            topic = self._resolve_alias(topic, integer(properties, "topic_alias", 0))
        if packet.qos > options.maximum_qos:
            raise WireError(f"PUBLISH with QoS {packet.qos}; the maximum is {options.maximum_qos}", 0x9B)
        if packet.retain and not options.retain_available:
            raise WireError("PUBLISH with RETAIN, which is not available", 0x9A)
        if packet.qos:
            self._check_in_use(packet, session)
        refusal = self._state.faults.publish_refusal(topic, session.client_id)
        if packet.qos == 2 and packet.packet_id in session.receiving:
            self.send(Ack(kind=Kind.PUBREC, packet_id=packet.packet_id))
            return
        code = refusal or 0
        if not code and not self._state.allows(session.access("publish", topic)):
            if options.denied == "close":
                self.close()
                return
            code = NOT_AUTHORIZED
        if not code:
            message = Published(
                topic=topic,
                payload=packet.payload,
                qos=packet.qos,
                retain=packet.retain,
                properties=properties,
                publisher=session.client_id,
                expires_at=expires_at(properties) if properties else math.inf,
            )
            if packet.qos == 2:
                session.receiving.add(packet.packet_id)
            if not self._state.publish(message):
                code = 0x10
        if packet.qos:
            kind = Kind.PUBACK if packet.qos == 1 else Kind.PUBREC
            self.send(Ack(kind=kind, packet_id=packet.packet_id, reason_code=code if self.version == 5 else 0))

    def _resolve_alias(self, topic: str, alias: int) -> str:
        if alias > self._options.topic_alias_maximum:
            raise WireError(f"Topic Alias {alias}; the maximum is {self._options.topic_alias_maximum}", 0x94)
        if topic:
            self._aliases[alias] = topic
        elif alias not in self._aliases:
            raise WireError(f"Topic Alias {alias} was never set", PROTOCOL_ERROR)
        return self._aliases[alias]

    def _check_free(self, packet_id: int, session: Session) -> None:
        # What an older connection of the session left open counts, too [MQTT-2.2.1-3].
        if packet_id in self._unacknowledged or packet_id in session.receiving:
            raise WireError(f"Packet Identifier {packet_id} is still in use", PROTOCOL_ERROR)

    def _check_in_use(self, packet: Publish, session: Session) -> None:
        if not packet.dup:
            self._check_free(packet.packet_id, session)
        self._unacknowledged.add(packet.packet_id)
        if self.version == 5 and len(self._unacknowledged) > self._options.receive_maximum:
            raise WireError(f"more than {self._options.receive_maximum} PUBLISHes in flight", 0x93)

    def _on_ack(self, packet: Ack, session: Session) -> None:
        if packet.kind is not Kind.PUBREL:
            session.acknowledged(packet)
            return
        known = packet.packet_id in session.receiving
        session.receiving.discard(packet.packet_id)
        code = 0x92 if not known and self.version == 5 else 0
        self.send(Ack(kind=Kind.PUBCOMP, packet_id=packet.packet_id, reason_code=code))

    # -- SUBSCRIBE, UNSUBSCRIBE, DISCONNECT --

    def _too_many(self, filters: int) -> bool:
        """Whether the client's packet has more filters than are taken; then the connection is ended."""
        limit = self._options.maximum_filters
        if limit is None or filters <= limit:
            return False
        self.close()
        return True

    def _on_subscribe(self, packet: Subscribe, session: Session) -> None:
        self._check_free(packet.packet_id, session)
        if self._options.denied == "close" and not self._allows_all(packet, session):
            self.close()
            return
        codes: list[int] = []
        granted: list[tuple[Subscription, bool]] = []
        for request in packet.requests:
            code = self._subscribe_error(request, packet, session)
            if code is not None:
                codes.append(code if self.version == 5 else 0x80)
                continue
            qos = min(request.qos, self._options.maximum_qos)
            subscription = Subscription.granted(request, qos, packet.properties)
            new = request.topic_filter not in session.subscriptions
            session.subscriptions[request.topic_filter] = subscription
            self._state.router.add(session, subscription)
            granted.append((subscription, new))
            codes.append(qos)
        self.send(Suback(packet_id=packet.packet_id, reason_codes=tuple(codes)))
        for subscription, new in granted:
            handling = subscription.retain_handling
            shared = split_share(subscription.topic_filter)[0] is not None
            if not shared and (handling == 0 or (handling == 1 and new)):
                self._state.router.send_retained(session, subscription)
        self._state.journal.note()

    def _allows_all(self, packet: Subscribe, session: Session) -> bool:
        filters = [split_share(request.topic_filter)[1] for request in packet.requests]
        return all(self._state.allows(session.access("subscribe", plain)) for plain in filters)

    def _subscribe_error(self, request: SubscriptionRequest, packet: Subscribe, session: Session) -> int | None:
        options = self._options
        refusal = self._state.faults.subscribe_refusal(request.topic_filter, self.client_id)
        if refusal is not None:
            return refusal
        share, plain = split_share(request.topic_filter)
        if share is not None and not options.shared_available:
            return 0x9E
        if has_wildcard(plain) and not options.wildcard_available:
            return 0xA2
        if "subscription_identifiers" in packet.properties and not options.identifiers_available:
            return 0xA1
        if not self._state.allows(session.access("subscribe", plain)):
            return NOT_AUTHORIZED
        return None

    def _on_unsubscribe(self, packet: Unsubscribe, session: Session) -> None:
        self._check_free(packet.packet_id, session)
        codes: list[int] = []
        for topic_filter in packet.topic_filters:
            known = session.subscriptions.pop(topic_filter, None)
            if known is not None:
                self._state.router.remove(session, topic_filter)
            codes.append(0 if known is not None else 0x11)
        self.send(Unsuback(packet_id=packet.packet_id, reason_codes=tuple(codes)))
        self._state.journal.note()

    def _on_disconnect(self, packet: Disconnect, session: Session) -> None:
        expiry = integer(packet.properties, "session_expiry", session.expiry)
        if expiry and not session.expiry:
            raise WireError("DISCONNECT sets a Session Expiry Interval that CONNECT set to 0", PROTOCOL_ERROR)
        session.expiry = expiry
        if packet.reason_code != 0x04:
            session.will = None
        self.link.close()
