"""What ``publish()`` and ``subscribe()`` take as keywords, and the checks that they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import trio

from ._codecs import encode_payload
from ._outbox import Outgoing
from ._properties import encode_publish_properties
from ._subscription import DeadLetterHandler
from ._topics import check_topic
from ._types import (
    NO_PROPERTIES,
    OfflinePolicy,
    Overflow,
    PayloadFormat,
    PublishProperties,
    RetainHandling,
    UserProperties,
)

MAXIMUM_MESSAGE = 268_435_455
"""The greatest Remaining Length [MQTT-1.5.5]."""


class PublishArguments(TypedDict, total=False):
    """The MQTT 5 properties that ``publish()`` takes as keywords [MQTT-3.3.2.3]; 3.1.1 has none and drops them.

    A Topic Alias is none of them: it belongs to a connection, and a message may outlive several.
    """

    payload_format: PayloadFormat | None
    message_expiry: int | None
    content_type: str | None
    response_topic: str | None
    correlation_data: bytes | None
    user_properties: UserProperties


class SubscribeArguments(TypedDict, total=False):
    """The options that ``subscribe()`` and ``subscription()`` take as keywords.

    ``queue_messages`` bounds the queue between network and handler (default: ``DriverConfig.queue_messages``), and
    ``overflow`` says what happens when it is full. ``on_dead_letter(message, error)`` gets payloads that do not fit
    the message class; without it they are logged. The others are those of `SubscriptionOptions`.
    """

    qos: int
    no_local: bool
    retain_as_published: bool
    retain_handling: RetainHandling
    identifier: int | None
    user_properties: UserProperties
    overflow: Overflow
    queue_messages: int | None
    on_dead_letter: DeadLetterHandler | None


def make_outgoing(topic: str, payload: object, qos: int, retain: bool, properties: PublishArguments) -> Outgoing:
    """The message that a call of ``publish()`` asks for. Raises ``ValueError`` or ``TypeError``."""
    if isinstance(qos, bool) or qos not in (0, 1, 2):
        raise ValueError(f"qos is {qos!r}, allowed are 0, 1, 2")
    if not isinstance(retain, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"retain must be bool, not {type(retain).__name__}")
    check_names("publish", properties, PublishArguments)
    raw_topic = check_topic(topic)
    raw_payload = encode_payload(payload)
    if properties:
        block = encode_publish_properties(PublishProperties(**_frozen(properties)))
    else:
        block = encode_publish_properties(NO_PROPERTIES)
    if len(raw_topic) + len(raw_payload) + len(block) + 4 > MAXIMUM_MESSAGE:
        raise ValueError(f"payload has {len(raw_payload)} bytes, allowed are about {MAXIMUM_MESSAGE} [MQTT-1.5.5]")
    return Outgoing(topic, raw_topic, raw_payload, int(qos), retain, block, trio.current_time())


def check_names(call: str, given: Mapping[str, Any], known: type) -> None:
    """``TypeError`` for a keyword that is none of ``known``, as for any other call."""
    for name in given:
        if name not in known.__annotations__:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def offline_policy(value: OfflinePolicy | str) -> OfflinePolicy:
    """The policy, by its name too."""
    try:
        return OfflinePolicy(value)
    except ValueError:
        raise ValueError(f"offline is {value!r}, allowed are 'wait', 'fail'") from None


def _frozen(properties: PublishArguments) -> dict[str, Any]:
    """User properties may come as any sequence; the value keeps a tuple."""
    values: dict[str, Any] = dict(properties)
    if "user_properties" in values:
        values["user_properties"] = tuple(values["user_properties"])
    return values
