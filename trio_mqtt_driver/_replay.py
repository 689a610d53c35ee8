"""Bring the broker's subscriptions to what the registry wants: the replay of all, and every single change later."""

from __future__ import annotations

import logging
import math
from itertools import compress
from operator import not_
from typing import Any

import trio

from ._connection import Connection
from ._errors import AckTimeoutError
from ._limits import subscribe_refusal, takes_all
from ._probe import sends_copies
from ._registration import Batch, Terms
from ._registry import NOTHING, Registry
from ._replies import Reply
from ._suspects import COPIES
from ._types import ReasonCode

logger = logging.getLogger("trio_mqtt_driver")

_LEAST = 3
"""Connections on which an UNSUBSCRIBE is sent in vain before it is given up, if ``quarantine_after`` is less."""
_WAVE = 10_000
"""Packets that wait for their answers at a time: each takes a packet identifier, of which there are 65,535."""


async def synchronise(connection: Connection, registry: Registry[Any]) -> None:
    """Tell the broker everything that is due, in batches sent at once, and take in the answers.

    Returns when nothing is due any more. A batch that the broker leaves unanswered for ``subscribe_timeout`` ends the
    connection with an ``AckTimeoutError``; a refusal is an answer like any other. Cancelling may leave requests
    unanswered, so the connection must not be used afterwards.
    """
    limits = connection.limits
    while True:
        # UNSUBSCRIBE first, and answered: a filter that left and came back must end up subscribed.
        await _unsubscribe(connection, registry)
        # Also if nothing is due: a session that goes on may have been without an answer.
        if connection.session.copies is None and registry.overlapping and not connection.marks_copies:
            await _ask_for_copies(connection)
        suspects = connection.suspects
        apart = suspects.filters
        terms = Terms(
            connection.batch,
            limits.maximum_packet_size,
            shared=limits.shared_available,
            wildcards=limits.wildcard_available,
            apart=apart,
        )
        left_out = suspects.left_out(trio.current_time(), registry) if suspects else NOTHING
        batches = registry.take_due(terms, left_out, connection.generation)
        if not batches:
            if registry.leaving:
                continue
            return
        alone: list[Batch[Any]] = []
        if apart:
            which = [suspects.alone(batch.registrations[0].topic_filter) for batch in batches]
            alone = list(compress(batches, which))
            batches = list(compress(batches, map(not_, which)))
        for start in range(0, len(batches), _WAVE):
            await _subscribe(connection, registry, batches[start : start + _WAVE])
        for batch in alone:
            await _subscribe(connection, registry, [batch])
            # Also if it was not sent, because of what CONNACK says.
            suspects.answered(batch.registrations[0].topic_filter, trio.current_time())


async def _ask_for_copies(connection: Connection) -> None:
    now = trio.current_time()
    held = COPIES in connection.questions.left_out(now, {COPIES})
    if held or (connection.deadlines.live and COPIES in connection.questions.filters):
        return  # for now it is taken to send one, as a broker that lets us not subscribe there
    connection.asks_copies = True
    connection.session.copies = await sends_copies(connection)
    connection.asks_copies = False
    connection.questions.answered(COPIES, now)


async def _unsubscribe(connection: Connection, registry: Registry[Any]) -> None:
    largest = connection.limits.maximum_packet_size
    filters: list[str] = []
    leaving = registry.leaving
    if not leaving:
        return
    limit = connection.config.quarantine_after
    leaving, given_up = registry.take_leaving(max(limit, _LEAST) if limit else math.inf)
    for topic_filter in given_up:
        logger.warning(
            "%s: the broker does not answer UNSUBSCRIBE of %r, which is given up",
            connection.config.client_id,
            topic_filter,
        )
    for topic_filter in leaving:
        if subscribe_refusal(connection.limits, topic_filter) is ReasonCode.PACKET_TOO_LARGE:
            registry.left(topic_filter, ReasonCode.SUCCESS)  # it could not be subscribed here either
        else:
            filters.append(topic_filter)
    packets = _split(filters, connection.batch, largest)
    for start in range(0, len(packets), _WAVE):
        with connection.together:
            replies = [(packet, connection.unsubscribe(packet)) for packet in packets[start : start + _WAVE]]
        for packet, reply in replies:
            for topic_filter, code in zip(packet, await _answer(connection, reply, "UNSUBSCRIBE"), strict=True):
                registry.left(topic_filter, code)


def _split(filters: list[str], size: int, max_bytes: int | None) -> list[list[str]]:
    """UNSUBSCRIBE packets of at most ``size`` filters and ``max_bytes``."""
    packets: list[list[str]] = []
    room = 0
    for topic_filter in filters:
        length = 2 + len(topic_filter.encode())
        if not packets or len(packets[-1]) >= size or (max_bytes is not None and length > room):
            packets.append([])
            room = 0 if max_bytes is None else max_bytes - 16
        packets[-1].append(topic_filter)
        room -= length
    return packets


async def _subscribe(connection: Connection, registry: Registry[Any], batches: list[Batch[Any]]) -> None:
    requests: list[tuple[Batch[Any], Reply[tuple[ReasonCode, ...]]]] = []
    unlimited = takes_all(connection.limits)
    with connection.together:
        for batch in batches:
            # One that was granted on these terms is within them.
            sent = batch if unlimited or batch.codes is not None else _without_refused(connection, registry, batch)
            if sent.registrations:
                requests.append((sent, connection.subscribe(sent.filters, sent.identifier, sent.user_properties)))
    suspected = bool(connection.suspects)
    for sent, reply in requests:
        registry.answer(sent, await _answer(connection, reply, "SUBSCRIBE"), connection.generation)
        if suspected:
            for registration in sent.registrations:
                connection.suspects.answered(registration.topic_filter, trio.current_time())


def _without_refused(connection: Connection, registry: Registry[Any], batch: Batch[Any]) -> Batch[Any]:
    """Of a batch, what the broker has not said in CONNACK that it does not take; for the others that is the answer."""
    refusals = [
        subscribe_refusal(connection.limits, registration.topic_filter, batch.user_properties)
        for registration in batch.registrations
    ]
    if not any(refusals):
        return batch
    return registry.refuse(batch, refusals, connection.generation)


async def _answer(connection: Connection, reply: Reply[tuple[ReasonCode, ...]], what: str) -> tuple[ReasonCode, ...]:
    timeout = connection.config.subscribe_timeout

    def late() -> None:
        connection.fail(AckTimeoutError(f"{what} was not answered within subscribe_timeout={timeout:g} s"))

    return await connection.within(timeout, reply.wait, late)
