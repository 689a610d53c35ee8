"""What the broker keeps for one client identifier: the Session State [MQTT-4.1], and the messages on their way."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import attrs
import trio

from ._access import Access
from ._packets import Ack, Packet, Publish, SubscriptionRequest, Will
from ._properties import Kind, Properties, PropertyValue, integer

NEVER = 0xFFFFFFFF
"""The Session Expiry Interval that never ends."""

_ROUTED_PROPERTIES = (
    "payload_format",
    "content_type",
    "response_topic",
    "correlation_data",
    "user_properties",
)


@attrs.frozen(kw_only=True)
class Published:
    """An application message that the broker took, from a client, a will or the test itself."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = attrs.field(factory=dict[str, PropertyValue])
    publisher: str | None = None
    """Client identifier of the sender; None for a message of the test's own."""
    expires_at: float = math.inf
    """On Trio's clock."""

    def outgoing_properties(self, identifiers: tuple[int, ...]) -> Properties:
        """The properties that travel on to a subscriber, the expiry as what is left of it [MQTT-3.3.2-6]."""
        if not self.properties and not identifiers:
            return self.properties
        values = {name: self.properties[name] for name in _ROUTED_PROPERTIES if name in self.properties}
        if self.expires_at < math.inf:
            values["message_expiry"] = max(0, math.ceil(self.expires_at - trio.current_time()))
        if identifiers:
            values["subscription_identifiers"] = identifiers
        return values


@attrs.frozen(kw_only=True)
class Subscription:
    """A granted subscription."""

    topic_filter: str
    qos: int
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0
    identifier: int | None = None

    @classmethod
    def granted(cls, request: SubscriptionRequest, qos: int, properties: Properties) -> Subscription:
        identifiers = properties.get("subscription_identifiers")
        first = identifiers[0] if isinstance(identifiers, tuple) else None
        return cls(
            topic_filter=request.topic_filter,
            qos=qos,
            no_local=request.no_local,
            retain_as_published=request.retain_as_published,
            retain_handling=request.retain_handling,
            identifier=first if isinstance(first, int) else None,
        )


class Outlet(Protocol):
    """The network connection that a session is using now."""

    version: int

    def send(self, packet: Packet) -> bool: ...


@attrs.define
class _Delivery:
    """A QoS 1 or 2 message that was sent and is not done."""

    message: Published
    qos: int
    retain: bool
    identifiers: tuple[int, ...]
    released: bool = False
    """PUBREC came, so PUBREL is what is sent again."""


@attrs.define(eq=False)
class Session:
    """A Session; it outlives its network connections until it expires."""

    client_id: str
    queue_limit: int
    on_drop: Callable[[], None] = attrs.field(repr=False)
    username: str | None = None
    """Of the last CONNECT."""
    expiry: int = 0
    will: Will | None = None
    """Set while a connection with a will is up, or lost and the Will Delay Interval still runs."""
    subscriptions: dict[str, Subscription] = attrs.field(factory=dict[str, Subscription])
    receiving: set[int] = attrs.field(factory=set[int])
    """Packet identifiers of QoS 2 messages from the client that wait for PUBREL."""
    outlet: Outlet | None = attrs.field(default=None, repr=False)
    timers: trio.CancelScope | None = attrs.field(default=None, repr=False)
    """Around the waits for will delay and expiry while the client is away."""
    _queue: deque[_Delivery] = attrs.field(factory=deque[_Delivery], repr=False)
    _flight: dict[int, _Delivery] = attrs.field(factory=dict[int, _Delivery], repr=False)
    _again: deque[int] = attrs.field(factory=deque[int], repr=False)
    """Packet identifiers in flight that were not sent on this connection yet."""
    _quota: int = attrs.field(default=0, repr=False)
    _receive_maximum: int = attrs.field(default=0, repr=False)
    _last_id: int = attrs.field(default=0, repr=False)

    @property
    def connected(self) -> bool:
        return self.outlet is not None

    @property
    def queued(self) -> int:
        """QoS 1 and 2 messages for the client that wait to be sent."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """QoS 1 and 2 messages for the client that were sent and not yet acknowledged in full."""
        return len(self._flight)

    def access(self, action: Literal["publish", "subscribe"], topic: str) -> Access:
        """What an ACL is asked when this client wants to do something."""
        return Access(action=action, topic=topic, client_id=self.client_id, username=self.username)

    def attach(self, outlet: Outlet, receive_maximum: int) -> None:
        """Use this connection, which has just answered CONNACK: what is in flight goes out again, then the queue."""
        self.outlet = outlet
        self._quota = self._receive_maximum = receive_maximum
        self._again = deque(self._flight)
        self._fill()

    def detach(self) -> None:
        self.outlet = None

    def deliver(self, message: Published, qos: int, retain: bool, identifiers: tuple[int, ...] = ()) -> None:
        """Send the message at ``qos``, or queue it. QoS 0 is for connected clients only."""
        if qos:
            if len(self._queue) >= self.queue_limit:
                self.on_drop()
                return
            self._queue.append(_Delivery(message, qos, retain, identifiers))
            self._fill()
        elif self.outlet is not None and not self.outlet.send(
            Publish(
                topic=message.topic,
                payload=message.payload,
                retain=retain,
                properties=message.outgoing_properties(identifiers),
            )
        ):
            self.on_drop()

    def acknowledged(self, ack: Ack) -> None:
        """PUBACK, PUBREC or PUBCOMP from the client."""
        delivery = self._flight.get(ack.packet_id)
        if ack.kind is Kind.PUBREC:
            if delivery is None or delivery.qos != 2:
                self._send(Ack(kind=Kind.PUBREL, packet_id=ack.packet_id, reason_code=0x92))
            elif ack.reason_code >= 0x80:
                self._done(ack.packet_id)
            else:
                delivery.released = True
                self._send(Ack(kind=Kind.PUBREL, packet_id=ack.packet_id))
        elif delivery is not None and delivery.qos == (1 if ack.kind is Kind.PUBACK else 2):
            self._done(ack.packet_id)

    def _done(self, packet_id: int) -> None:
        del self._flight[packet_id]
        self._quota = min(self._quota + 1, self._receive_maximum)
        self._fill()

    def _fill(self) -> None:
        """Send what the client's Receive Maximum allows, in order [MQTT-4.9]."""
        while self.outlet is not None and self._again:
            packet_id = self._again[0]
            delivery = self._flight.get(packet_id)
            if delivery is None:
                self._again.popleft()
            elif delivery.released:
                self._again.popleft()
                self._send(Ack(kind=Kind.PUBREL, packet_id=packet_id))
            elif self._quota:
                self._again.popleft()
                self._publish(packet_id, delivery, dup=True)
            else:
                return
        while self.outlet is not None and self._queue and self._quota and len(self._flight) < 65535:
            delivery = self._queue.popleft()
            if delivery.message.expires_at <= trio.current_time():
                continue
            packet_id = self._next_id()
            self._flight[packet_id] = delivery
            self._publish(packet_id, delivery, dup=False)

    def _publish(self, packet_id: int, delivery: _Delivery, *, dup: bool) -> None:
        assert self.outlet is not None
        self._quota -= 1
        message = delivery.message
        packet = Publish(
            topic=message.topic,
            payload=message.payload,
            qos=delivery.qos,
            retain=delivery.retain,
            dup=dup,
            packet_id=packet_id,
            properties=message.outgoing_properties(delivery.identifiers),
        )
        if not self.outlet.send(packet):
            # Larger than the client's Maximum Packet Size: behave as if it had been sent in full [MQTT-3.1.2-25].
            self._flight.pop(packet_id)
            self._quota += 1
            self.on_drop()

    def _send(self, packet: Packet) -> None:
        if self.outlet is not None:
            self.outlet.send(packet)

    def _next_id(self) -> int:
        while True:
            self._last_id = self._last_id % 65535 + 1
            if self._last_id not in self._flight:
                return self._last_id


def expires_at(properties: Mapping[str, PropertyValue]) -> float:
    """When a message with these PUBLISH properties expires, on Trio's clock."""
    seconds = integer(properties, "message_expiry", -1)
    return math.inf if seconds < 0 else trio.current_time() + seconds
