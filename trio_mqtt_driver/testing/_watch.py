"""What arrives at a real broker, as a client sees it that is subscribed there."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from ._broker_errors import BrokerFailedError
from ._filters import matches, require_filter
from ._journal import Journal
from ._packets import Ack, Connack, Connect, Disconnect, Packet, Publish, Suback, Subscribe, SubscriptionRequest
from ._properties import Kind, WireError
from ._raw_client import RawClient
from ._session import Published, expires_at

_PATIENCE = 30.0
_FAREWELL = 1.0


class Watch:
    """The messages that a broker passes on while it is watched: see :meth:`BrokerProcess.watch`."""

    def __init__(self, client: RawClient, name: str, topic_filter: str, history: int, *, options: bool) -> None:
        self._client = client
        self._name = name
        self._topic_filter = topic_filter
        self._options = options
        """Whether the broker heeds Retain Handling and Retain As Published."""
        self._journal = Journal(history)
        self._receiving: set[int] = set()
        """Packet identifiers of QoS 2 messages that wait for PUBREL."""
        self._over: Callable[[], Exception] | None = None

    @property
    def published(self) -> Sequence[Published]:
        """The messages that came, the oldest first; as many as ``history``."""
        return self._journal.published

    async def wait_for_publish(self, topic_filter: str, *, timeout: float = _PATIENCE) -> Published:
        """Wait until a message for ``topic_filter`` has come, earlier ones included; returns the first.

        After ``timeout`` seconds on Trio's clock: ``AssertionError`` with the last packets. When the watch is over and
        there is no such message: ``RuntimeError``, or :class:`BrokerFailedError` if the broker ended it.
        """
        require_filter(topic_filter)

        def find() -> Published | None:
            for message in self._journal.published:
                if matches(topic_filter, message.topic):
                    return message
            if self._over is not None:
                raise self._over()
            return None

        what = f"PUBLISH for {topic_filter!r} in the watch of {self._topic_filter!r}"
        found = await self._journal.wait_for(find, what, timeout)
        assert found is not None
        return found

    def forget(self) -> None:
        """Clear what has come so far."""
        self._journal.clear()

    def tail(self) -> str:
        """The last packets, in words, for a failure message."""
        return self._journal.tail()


class Watcher(Watch):
    """The watch from the inside: what its task does."""

    def end(self, over: Callable[[], Exception]) -> None:
        """Nothing more will come; ``over`` makes the error for those who wait."""
        if self._over is None:
            self._over = over
        self._journal.note()

    async def subscribe(self, connect: Connect) -> str | None:
        """Connect and subscribe; what was the matter."""
        await trio.lowlevel.checkpoint()
        request = SubscriptionRequest(
            topic_filter=self._topic_filter,
            qos=2,
            # What was retained before is no news.
            retain_handling=2 if self._options else 0,
            retain_as_published=self._options,
        )
        try:
            for packet in (connect, Subscribe(packet_id=1, requests=(request,))):
                await self._client.send(packet)
                answer = await self._client.receive()
                refused = (
                    answer.reason_code != 0
                    if isinstance(answer, Connack)
                    else not isinstance(answer, Suback) or answer.reason_codes[0] >= 0x80
                )
                if refused:
                    return f"{packet.kind.name} was answered with {answer}"
        except (trio.BrokenResourceError, WireError) as exc:
            return str(exc)
        return None

    async def read(self) -> str:
        """Take and acknowledge what comes, until the connection ends; returns how it ended."""
        await trio.lowlevel.checkpoint()
        try:
            while True:
                packet = await self._client.receive()
                if packet is None:
                    return "end of file"
                self._journal.note_sent(self._name, packet)
                if isinstance(packet, Disconnect):
                    return f"DISCONNECT 0x{packet.reason_code:02x}"
                answer = self._take(packet)
                if answer is not None:
                    self._journal.note_received(self._name, answer)
                    await self._client.send(answer)
        except (trio.BrokenResourceError, WireError) as exc:
            return str(exc)

    def _take(self, packet: Packet) -> Packet | None:
        """Write a message down; what is to be answered."""
        if isinstance(packet, Ack) and packet.kind is Kind.PUBREL:
            self._receiving.discard(packet.packet_id)
            return Ack(kind=Kind.PUBCOMP, packet_id=packet.packet_id)
        if not isinstance(packet, Publish):
            return None
        if packet.qos < 2 or packet.packet_id not in self._receiving:
            self._note(packet)
        if packet.qos == 0:
            return None
        if packet.qos == 1:
            return Ack(kind=Kind.PUBACK, packet_id=packet.packet_id)
        self._receiving.add(packet.packet_id)
        return Ack(kind=Kind.PUBREC, packet_id=packet.packet_id)

    def _note(self, packet: Publish) -> None:
        if packet.retain and not self._options:
            return  # Then the flag says that the message is older than the subscription.
        self._journal.published.append(
            Published(
                topic=packet.topic,
                payload=packet.payload,
                qos=packet.qos,
                retain=packet.retain,
                properties=packet.properties,
                expires_at=expires_at(packet.properties) if packet.properties else math.inf,
            )
        )
        self._journal.note()


@asynccontextmanager
async def watching(
    client: RawClient,
    connect: Connect,
    topic_filter: str,
    history: int,
    explain: Callable[[str], str],
    *,
    options: bool,
) -> AsyncGenerator[Watch, None]:
    """A watch over a connection that is up; ``explain`` puts into words how the broker ended it, and ``options`` tells
    whether it heeds the retain options of MQTT 5.

    The exception of the body leaves as itself, not in a group: no exception reaches the nursery.
    """
    watch = Watcher(client, connect.client_id, topic_filter, history, options=options)
    refusal = await watch.subscribe(connect)
    if refusal is not None:
        raise BrokerFailedError(explain(refusal))
    body, service = trio.CancelScope(), trio.CancelScope(shield=True)
    body_error: BaseException | None = None
    service_error: BaseException | None = None

    async def serve() -> None:  # noqa: ASYNC910  # read() is a checkpoint
        nonlocal service_error
        try:
            with service:
                error = partial(BrokerFailedError, explain(await watch.read()))
                watch.end(error)
                service_error = error()
        except BaseException as exc:  # noqa: BLE001, ASYNC103  # raised again below: Ctrl-C, or a fault of ours
            service_error = exc
        body.cancel(reason="the watch is over")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)  # noqa: ASYNC113  # it is subscribed already; what comes meanwhile waits in the socket
        try:
            with body:
                yield watch
        except BaseException as exc:  # noqa: BLE001, ASYNC103  # raised again below, when the reader has ended
            body_error = exc
        finally:
            # Whatever happens, Ctrl-C too: nothing else would end what is shielded.
            service.cancel(reason="the watch is left")
    watch.end(partial(RuntimeError, f"the watch of {topic_filter!r} is over"))
    if body_error is not None and not isinstance(service_error, KeyboardInterrupt):
        raise body_error
    if service_error is not None:
        raise service_error
    with trio.move_on_after(_FAREWELL, shield=True):
        try:
            await client.send(Disconnect())
        except trio.BrokenResourceError:
            return
