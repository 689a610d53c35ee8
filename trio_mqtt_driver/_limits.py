"""What the broker ruled out in CONNACK, held against what the application asks for [MQTT-3.2.2.3]."""

from __future__ import annotations

from ._errors import ServerLimitError
from ._outgoing import Outgoing
from ._topics import split_share
from ._types import ReasonCode, ServerLimits, UserProperties


def publish_error(limits: ServerLimits, outgoing: Outgoing) -> ServerLimitError | None:
    """Why the broker would end the connection over this message; None if it would not."""
    if outgoing.qos > limits.maximum_qos:
        return ServerLimitError(
            f"qos is {outgoing.qos}, but the broker's Maximum QoS is {limits.maximum_qos} [MQTT-3.2.2-11]"
        )
    if outgoing.retain and not limits.retain_available:
        return ServerLimitError("retain is True, but the broker does not keep retained messages [MQTT-3.2.2-14]")
    if limits.maximum_packet_size is not None:
        size = packet_size(outgoing)
        if size > limits.maximum_packet_size:
            return ServerLimitError(
                f"the message needs up to {size} bytes, but the broker's Maximum Packet Size is "
                f"{limits.maximum_packet_size} [MQTT-3.2.2-15]"
            )
    return None


def takes_all(limits: ServerLimits) -> bool:
    """Whether ``publish_error`` and ``subscribe_refusal`` are None for whatever it is."""
    return (
        limits.maximum_qos == 2
        and limits.retain_available
        and limits.maximum_packet_size is None
        and limits.shared_available
        and limits.wildcard_available
    )


def packet_size(outgoing: Outgoing) -> int:
    """The most bytes that its PUBLISH can have, without a Topic Alias."""
    # At most 5 bytes of fixed header, 2 of topic length, 2 of packet identifier.
    size = len(outgoing.raw_topic) + len(outgoing.payload) + len(outgoing.properties) + 9
    return size if outgoing.expiry is None else size + 5


def subscribe_refusal(
    limits: ServerLimits, topic_filter: str, user_properties: UserProperties = ()
) -> ReasonCode | None:
    """The code with which the broker would refuse this Topic Filter; None if it announced nothing of the kind."""
    group, plain = split_share(topic_filter)
    if group is not None and not limits.shared_available:
        return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
    if not limits.wildcard_available and ("#" in plain or "+" in plain):
        return ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
    if limits.maximum_packet_size is not None:
        # Fixed header 5, packet identifier 2, property length 4, identifier 5, filter length 2, options 1.
        size = 19 + len(topic_filter.encode())
        size += sum(5 + len(name.encode()) + len(value.encode()) for name, value in user_properties)
        if size > limits.maximum_packet_size:
            return ReasonCode.PACKET_TOO_LARGE
    return None
