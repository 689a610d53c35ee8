"""The test of a fresh connection: CONNACK says that a broker answers, an acknowledged publish says that it works."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import trio

from ._connection import Connection
from ._errors import ProbeError, PublishRefusedError
from ._limits import publish_error
from ._outgoing import Outgoing
from ._replies import Reply
from ._subscribing import pack_filter
from ._topics import MAXIMUM_LENGTH, check_topic
from ._types import Message, ReasonCode

T = TypeVar("T")

_ADVICE = "allow it in the broker's access list, or set probe_topic or probe='ping'"


async def probe(connection: Connection) -> str:
    """Validate the link as ``config.probe`` says; returns how it went in words.

    Raises ``ProbeError``; without an answer in ``probe_timeout`` the connection ends with one.
    """
    config = connection.config
    if config.probe == "ping" or connection.limits.maximum_qos == 0:
        round_trip = await _in_time(connection, connection.ping().wait, "PINGREQ was not answered")
        return f"PINGREQ answered in {round_trip:.3f} s"
    topic = config.probe_topic_for(connection.client_id)
    try:
        check_topic(topic, "probe_topic")
    except ValueError as exc:
        raise ProbeError(f"the client ID {connection.client_id[:60]!r} makes no probe topic: {exc}") from exc
    test = _echo if config.probe == "echo" else _publish
    connection.hint = f" before the test publish to {topic!r} was through; if it always does, {_ADVICE}"
    # No fixed deadline: a session that goes on may have a backlog first, and reading may pause over it.
    await _in_time(connection, partial(test, connection, topic), f"the test publish to {topic!r} was not acknowledged")
    connection.hint = ""
    return f"test publish to {topic!r} acknowledged in {connection.round_trip or 0:.3f} s"


async def _in_time(connection: Connection, wait: Callable[[], Awaitable[T]], failure: str) -> T:
    timeout = connection.config.probe_timeout

    def late() -> None:
        connection.fail(ProbeError(f"{failure} within probe_timeout={timeout:g} s"))

    return await connection.within(timeout, wait, late)


async def _publish(connection: Connection, topic: str) -> None:
    if not connection.sender.ready:
        await connection.sender.wait_room()
    now = trio.current_time()
    outgoing = Outgoing(topic, check_topic(topic, "probe_topic"), connection.client_id.encode(), 1, False, b"\0", now)
    error = publish_error(connection.limits, outgoing)
    if error is not None:
        raise ProbeError(f"the test publish to {topic!r} is not possible: {error}") from error
    connection.sender.send(outgoing)
    try:
        result = await outgoing.wait()
    except PublishRefusedError as exc:
        raise ProbeError(f"the test publish was refused: {exc}; {_ADVICE}") from exc
    connection.round_trip = result.latency


async def _echo(connection: Connection, topic: str) -> None:
    echoed = Reply[None]()
    connection.receiver.intercept = (topic, lambda _: echoed.set(None))
    (code,) = await connection.subscribe([pack_filter(topic, 1)], None).wait()
    if code.is_failure:
        raise ProbeError(f"the broker refused to subscribe to the probe topic {topic!r}: {code}; {_ADVICE}")
    await _publish(connection, topic)
    await echoed.wait()
    # The echo may come again until UNSUBACK: with a subscription of QoS 1 a broker may repeat it.
    (code,) = await connection.unsubscribe([topic]).wait()
    connection.receiver.intercept = None
    if code.is_failure and code != ReasonCode.NO_SUBSCRIPTION_EXISTED:
        raise ProbeError(f"the broker refused to unsubscribe from the probe topic {topic!r}: {code}")


async def sends_copies(connection: Connection) -> bool:
    """Ask the broker with a message on two overlapping filters; a second one ends the wait for copies of the first.

    A broker that lets us not subscribe there, or does not answer in ``probe_timeout``, is taken to send one copy.
    """
    timeout = connection.config.probe_timeout
    base = connection.config.probe_topic_for(connection.client_id)
    topic = f"{base}/copies"
    if len(topic.encode()) > MAXIMUM_LENGTH:
        return False
    filters = [topic, f"{base}/+"]
    seen: list[bytes] = []
    both = Reply[None]()

    def count(message: Message[Any]) -> None:
        seen.append(message.payload)
        if message.payload == b"2":
            both.set(None)

    connection.receiver.intercept = (topic, count)

    async def within(reply: Reply[T]) -> T:
        return await connection.within(timeout, reply.wait, lambda: reply.fail(trio.TooSlowError()))

    # A packet for each: there are brokers that take only one filter in it.
    asked = [connection.subscribe([pack_filter(one, 0)], None) for one in filters]
    try:
        codes = [await within(reply) for reply in asked]
        if not any(code.is_failure for (code,) in codes):
            for payload in (b"1", b"2"):
                now = trio.current_time()
                connection.sender.send(Outgoing(topic, check_topic(topic), payload, 0, False, b"\0", now))
            await within(both)
        asked += [connection.unsubscribe([one]) for one in filters]
        for reply in asked[len(filters) :]:
            await within(reply)
    except trio.TooSlowError as exc:
        asked += [connection.unsubscribe([one]) for one in filters]
        for reply in asked:  # nobody waits for them any more, nor is a later end of the connection their doing
            if not reply.settled:
                reply.fail(exc)
    finally:
        connection.receiver.intercept = None
    return seen.count(b"1") > 1
