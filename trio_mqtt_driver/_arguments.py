"""What the driver's methods take: their keywords, the checks of them, and what is made of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, TypeVar

import trio

from ._codecs import decoder, encode_payload
from ._config import DriverArguments, DriverConfig
from ._dispatch import Dispatcher
from ._history import Counters
from ._outgoing import Outgoing
from ._properties import check_message_expiry, check_utf8, encode_publish_properties
from ._queue import MessageQueue
from ._registration import SubscriptionOptions
from ._subscription import DeadLetterHandler, Handler, Subscription
from ._topics import check_filter, check_topic, split_share
from ._types import (
    Acknowledge,
    OfflinePolicy,
    Overflow,
    PayloadFormat,
    PublishProperties,
    RetainHandling,
    State,
    UserProperties,
)

W = TypeVar("W", Acknowledge, Overflow)

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

    ``queue_messages`` and ``queue_bytes`` bound the queue between network and handler (default: those of
    ``DriverConfig``), and ``overflow`` says what happens when it is full: to messages of QoS 0 in most cases, see
    `Overflow`, and after each read of up to 64 KiB. ``acknowledge`` says when a message of QoS 1
    or 2 is acknowledged. ``on_dead_letter(message, error)`` gets payloads that do not fit
    the message class; without it they are logged. The others are those of `SubscriptionOptions`.
    """

    qos: int
    no_local: bool
    retain_as_published: bool
    retain_handling: RetainHandling
    identifier: int | None
    user_properties: UserProperties
    acknowledge: Acknowledge | Literal["processed", "received", "manual"]
    overflow: Overflow | Literal["drop_oldest", "drop_newest", "latest", "block"]
    queue_messages: int | None
    queue_bytes: int | None
    on_dead_letter: DeadLetterHandler | None


def make_config(config: DriverConfig | str, options: DriverArguments) -> DriverConfig:
    """The config that a driver is made with: as it is, or of a URL. Raises ``ValueError`` or ``TypeError``."""
    if isinstance(config, str):
        check_names("MQTTDriver", options, DriverConfig)
        return DriverConfig.from_url(config, **options)
    if not isinstance(config, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"config must be a DriverConfig or a URL, not {type(config).__name__}")
    if options:
        raise TypeError(f"{', '.join(options)}: give options to the DriverConfig, or a URL with options")
    return config


def make_outgoing(
    topic: str,
    payload: object,
    qos: int,
    retain: bool,
    priority: int,
    offline: OfflinePolicy,
    properties: PublishArguments,
) -> Outgoing:
    """The message that a call of ``publish()`` asks for. Raises ``ValueError`` or ``TypeError``."""
    if qos not in (0, 1, 2) or isinstance(qos, bool):
        raise ValueError(f"qos is {qos!r}, allowed are 0, 1, 2")
    if not isinstance(retain, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"retain must be bool, not {type(retain).__name__}")
    if priority != 0 and (
        not isinstance(priority, int)  # pyright: ignore[reportUnnecessaryIsInstance]
        or isinstance(priority, bool)
        or not -10 <= priority <= 10
    ):
        raise ValueError(f"priority is {priority!r}, allowed are whole numbers from -10 to 10")
    raw_topic = check_topic(topic)
    raw_payload = encode_payload(payload)
    expiry = None
    block = b"\0"
    if properties:
        check_names("publish", properties, PublishArguments)
        values = _frozen(properties)
        expiry = values.pop("message_expiry", None)
        if expiry is not None:
            check_message_expiry(expiry)
        block = encode_publish_properties(PublishProperties(**values))
        if values.get("payload_format") == PayloadFormat.UTF8:
            check_utf8(raw_payload)
    if len(raw_topic) + len(raw_payload) + len(block) + 12 > MAXIMUM_MESSAGE:
        size = len(raw_topic) + len(raw_payload) + len(block)
        raise ValueError(
            f"topic, payload and properties have {size} bytes, allowed are about {MAXIMUM_MESSAGE} [MQTT-1.5.5]"
        )
    return Outgoing(
        topic, raw_topic, raw_payload, int(qos), retain, block, trio.current_time(), expiry, int(priority), offline
    )


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
    overflow = _word(Overflow, "overflow", arguments.pop("overflow", Overflow.DROP_OLDEST))
    acknowledge = _word(Acknowledge, "acknowledge", arguments.pop("acknowledge", Acknowledge.PROCESSED))
    # The config's own rules are the rules here.
    own = {name: arguments.pop(name, None) for name in ("queue_messages", "queue_bytes")}
    own = {name: value for name, value in own.items() if value is not None}
    bounds = config.evolve(**own) if own else config
    on_dead_letter = arguments.pop("on_dead_letter", None)
    if on_dead_letter is not None and not callable(on_dead_letter):
        raise TypeError(f"on_dead_letter must be callable, not {type(on_dead_letter).__name__}")
    subscription: Subscription[Any] = Subscription(
        topic_filter,
        decode=decoder(message_class),
        typed=message_class is not bytes and message_class is not None,
        handler=handler,
        on_dead_letter=on_dead_letter,
        acknowledge=acknowledge,
        queue=MessageQueue(overflow, bounds.queue_messages, bounds.queue_bytes, counters),
        counters=counters,
        changed=dispatcher.changed,
        failed=dispatcher.failed,
    )
    options = SubscriptionOptions(**arguments)
    if options.no_local and split_share(topic_filter)[0] is not None:
        raise ValueError(f"no_local is True, which a shared subscription may not be: {topic_filter!r} [MQTT-3.8.3-4]")
    return subscription, options


def _word(words: type[W], name: str, value: W | str) -> W:
    """The member of ``words``, by its text too."""
    try:
        return words(value)
    except ValueError:
        allowed = ", ".join(repr(str(word)) for word in words)
        raise ValueError(f"{name} is {value!r}, allowed are {allowed}") from None


def check_names(call: str, given: Mapping[str, Any], known: type) -> None:
    """``TypeError`` for a keyword that is none of ``known``, as for any other call."""
    for name in given:
        if name not in known.__annotations__:
            close = difflib.get_close_matches(name, known.__annotations__, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")


def check_handler(handler: object) -> None:
    """``TypeError`` for what cannot be called, and for a generator function: a call of it runs nothing."""
    if not callable(handler):
        raise TypeError(f"handler must be callable, not {type(handler).__name__}")
    if inspect.isasyncgenfunction(handler) or inspect.isgeneratorfunction(handler):
        raise TypeError(
            "handler has a 'yield' in it: a call of it would run nothing; write a plain or an async function"
        )


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
