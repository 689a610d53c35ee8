"""What the driver's methods take: their keywords, the checks of them, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import trio

from ._codecs import decoder, encode_payload
from ._config import DriverConfig
from ._dispatch import Dispatcher
from ._history import Counters
from ._outgoing import Outgoing
from ._properties import encode_publish_properties
from ._registry import SubscriptionOptions
from ._subscription import DeadLetterHandler, Handler, Subscription
from ._topics import check_filter, check_topic, split_share
from ._types import (
    NO_PROPERTIES,
    OfflinePolicy,
    Overflow,
    PayloadFormat,
    PublishProperties,
    RetainHandling,
    State,
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


def make_config(config: DriverConfig | str, options: dict[str, Any]) -> DriverConfig:
    """The config that a driver is made with: as it is, or of a URL. Raises ``ValueError`` or ``TypeError``."""
    if isinstance(config, str):
        return DriverConfig.from_url(config, **options)
    if not isinstance(config, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"config must be a DriverConfig or a URL, not {type(config).__name__}")
    if options:
        raise TypeError(f"{', '.join(options)}: give options to the DriverConfig, or a URL with options")
    return config


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


def make_subscription(
    topic_filter: str,
    handler: Handler[Any] | None,
    message_class: Any,
    given: SubscribeArguments,
    config: DriverConfig,
    dispatcher: Dispatcher,
    counters: Counters,
) -> tuple[Subscription[Any], SubscriptionOptions]:
    """What a call of ``subscribe()`` asks for, and how the broker is asked. Raises ``ValueError`` or ``TypeError``."""
    check_filter(topic_filter)
    check_names("subscribe", given, SubscribeArguments)
    arguments: dict[str, Any] = dict(given)
    overflow = Overflow(arguments.pop("overflow", Overflow.DROP_OLDEST))
    queue_messages = arguments.pop("queue_messages", None)
    # The config's own rule is the rule here.
    bound = config if queue_messages is None else config.evolve(queue_messages=queue_messages)
    on_dead_letter = arguments.pop("on_dead_letter", None)
    if on_dead_letter is not None and not callable(on_dead_letter):
        raise TypeError(f"on_dead_letter must be callable, not {type(on_dead_letter).__name__}")
    subscription: Subscription[Any] = Subscription(
        topic_filter,
        decode=decoder(message_class),
        typed=message_class is not bytes and message_class is not None,
        handler=handler,
        on_dead_letter=on_dead_letter,
        overflow=overflow,
        queue_messages=bound.queue_messages,
        counters=counters,
        changed=dispatcher.changed,
        failed=dispatcher.failed,
    )
    options = SubscriptionOptions(**arguments)
    if options.no_local and split_share(topic_filter)[0] is not None:
        raise ValueError(f"no_local is True, which a shared subscription may not be: {topic_filter!r} [MQTT-3.8.3-4]")
    return subscription, options


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


def check_states(states: tuple[State, ...]) -> frozenset[State]:
    """The states as a set; ``TypeError`` if there is none, or one that is no state."""
    if not states:
        raise TypeError("wait_state needs at least one State")
    for state in states:
        if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"states: must be of {State}, not {state!r}")
    return frozenset(states)


def _frozen(properties: PublishArguments) -> dict[str, Any]:
    """User properties may come as any sequence; the value keeps a tuple."""
    values: dict[str, Any] = dict(properties)
    if "user_properties" in values:
        values["user_properties"] = tuple(values["user_properties"])
    return values
