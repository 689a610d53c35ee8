"""What CONNACK ruled out is a clear error at the call, not a disconnect."""

from __future__ import annotations

import pytest

from trio_mqtt_driver import ReasonCode, ServerLimitError
from trio_mqtt_driver._limits import publish_error, subscribe_refusal
from trio_mqtt_driver._outgoing import Outgoing
from trio_mqtt_driver._packets import encode_publish
from trio_mqtt_driver._types import ServerLimits


def outgoing(*, qos: int = 0, retain: bool = False, payload: bytes = b"") -> Outgoing:
    return Outgoing("a", b"a", payload, qos, retain, b"\0", 0.0)


def test_nothing_is_ruled_out_by_default() -> None:
    limits = ServerLimits()
    assert publish_error(limits, outgoing(qos=2, retain=True, payload=bytes(1_000_000))) is None
    assert subscribe_refusal(limits, "$share/g/+/#") is None


@pytest.mark.parametrize(
    "limits, message, words",
    [
        (ServerLimits(maximum_qos=1), outgoing(qos=2), "qos is 2, but the broker's Maximum QoS is 1"),
        (ServerLimits(maximum_qos=0), outgoing(qos=1), "qos is 1, but the broker's Maximum QoS is 0"),
        (ServerLimits(retain_available=False), outgoing(retain=True), "retain is True"),
        (
            ServerLimits(maximum_packet_size=20),
            outgoing(payload=bytes(10)),
            "21 bytes, but .* Maximum Packet Size is 20",
        ),
    ],
)
def test_a_message_that_the_broker_would_not_take_is_named(
    limits: ServerLimits, message: Outgoing, words: str
) -> None:
    error = publish_error(limits, message)
    assert isinstance(error, ServerLimitError)
    with pytest.raises(ValueError, match=words):
        raise error


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("length", [0, 100, 120, 127, 200, 16_300, 16_400])
def test_what_passes_is_never_larger_than_the_broker_takes(qos: int, length: int) -> None:
    message = outgoing(qos=qos, payload=bytes(length))
    size = len(encode_publish(b"a", message.payload, qos=qos, packet_id=1, properties=b"\0"))
    assert publish_error(ServerLimits(maximum_packet_size=size + 8), message) is None
    assert publish_error(ServerLimits(maximum_packet_size=size - 1), message) is not None


@pytest.mark.parametrize(
    "limits, topic_filter, code",
    [
        (ServerLimits(shared_available=False), "$share/g/a", ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED),
        (ServerLimits(shared_available=False), "a", None),
        (ServerLimits(wildcard_available=False), "a/#", ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED),
        (ServerLimits(wildcard_available=False), "+", ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED),
        (ServerLimits(wildcard_available=False), "$share/g/+", ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED),
        (ServerLimits(wildcard_available=False), "$share/g/a", None),
    ],
)
def test_a_filter_that_the_broker_would_not_take_is_refused_for_it(
    limits: ServerLimits, topic_filter: str, code: ReasonCode | None
) -> None:
    assert subscribe_refusal(limits, topic_filter) == code
