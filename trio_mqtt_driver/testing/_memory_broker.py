"""A complete little MQTT broker in memory, on Trio's clock: for tests of time, faults and order."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import trio

from ._access import ACL, Access, Denied
from ._faults import Faults
from ._filters import matches, require_filter, require_topic, split_share
from ._packets import Connect, Packet
from ._pipe import open_pipe, reset_stream
from ._properties import Properties
from ._router import Overlapping
from ._serving import ServerConnection
from ._session import Published, Session, Subscription, expires_at
from ._state import Authenticator, BrokerOptions, BrokerState

T = TypeVar("T")

_PATIENCE = 30.0


class MemoryBroker:
    """An MQTT 3.1.1 and 5 broker without a socket: QoS 0 to 2, retained messages, wills, shared subscriptions,
    sessions with expiry, and faults on request.

    ::

        broker = MemoryBroker(nursery)
        stream = await broker.connect_stream()      # what a client uses in place of a TCP connection

    Its tasks live in ``nursery`` until that is cancelled. All time is Trio's, so that a test on a ``MockClock`` runs
    through hours in milliseconds. It is strict: whatever MQTT forbids a client to do ends the connection and is
    written down in :attr:`violations`.

    What CONNACK can announce is announced and enforced: ``receive_maximum``, ``maximum_qos``, ``retain_available``,
    ``maximum_packet_size``, ``topic_alias_maximum``, ``wildcard_available``, ``identifiers_available``,
    ``shared_available``, ``server_keep_alive`` and ``session_expiry_maximum`` (seconds), ``response_information`` and
    ``server_reference`` (told with the reason codes 0x9C and 0x9D, in DISCONNECT too).

    :param nursery: where the connections are served.
    :param versions: protocol versions that are accepted: 4 is MQTT 3.1.1. Others are refused in CONNACK.
    :param users: user name → password; None lets everybody in.
    :param authenticate: enhanced authentication [MQTT-4.12]: a generator function of the method and the client's first
        data; it yields challenges, is sent the client's answers, returns the final data (or None) and refuses by
        raising :class:`AuthenticationRefusedError`. Clients without a method are then refused.
    :param acl: a function that is shown every :class:`Access` and says whether it is allowed; None allows all. What a
        client may not publish, its will included, is forgotten: with QoS 1 and 2 MQTT 5 gets reason code 0x87,
        and 3.1.1, which has none, an ordinary acknowledgement. A subscription is refused with 0x87 or 0x80.
    :param denied: ``"refuse"`` does that with what the ACL does not allow; ``"close"`` closes the client's connection
        without a word instead, as AWS IoT Core does.
    :param overlapping: ``"once"`` sends a client one copy of a message that matches several of its subscriptions,
        ``"copies"`` one for each; MQTT allows both.
    :param use_topic_aliases: send Topic Aliases to clients that announce a Topic Alias Maximum. ``sent`` then shows
        what goes over the wire: an empty topic.
    :param maximum_filters: Topic Filters in one SUBSCRIBE or UNSUBSCRIBE. The connection of a client that sends more
        is closed without a word, as by AWS IoT Core, which takes 8. It is no violation: MQTT cannot announce a limit.
    :param queue_limit: QoS 1 and 2 messages that wait for one client; more are dropped and counted.
    :param buffer_bytes: bytes that wait to be sent to one client; QoS 0 messages beyond are dropped and counted.
    :param history: how many packets, messages and CONNECTs are remembered.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        versions: Sequence[int] = (4, 5),
        users: Mapping[str, str] | None = None,
        authenticate: Authenticator | None = None,
        acl: ACL | None = None,
        denied: Denied = "refuse",
        overlapping: Overlapping = "once",
        receive_maximum: int = 65535,
        maximum_qos: int = 2,
        retain_available: bool = True,
        maximum_packet_size: int | None = None,
        topic_alias_maximum: int = 100,
        wildcard_available: bool = True,
        identifiers_available: bool = True,
        shared_available: bool = True,
        server_keep_alive: int | None = None,
        session_expiry_maximum: int | None = None,
        use_topic_aliases: bool = False,
        response_information: str | None = None,
        server_reference: str | None = None,
        maximum_filters: int | None = None,
        queue_limit: int = 200_000,
        buffer_bytes: int = 64 * 2**20,
        history: int = 10_000,
    ) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1, not {history}")
        self.options: BrokerOptions = BrokerOptions(
            versions=tuple(versions),
            users=users,
            authenticate=authenticate,
            acl=acl,
            denied=denied,
            overlapping=overlapping,
            receive_maximum=receive_maximum,
            maximum_qos=maximum_qos,
            retain_available=retain_available,
            maximum_packet_size=maximum_packet_size,
            topic_alias_maximum=topic_alias_maximum,
            wildcard_available=wildcard_available,
            identifiers_available=identifiers_available,
            shared_available=shared_available,
            server_keep_alive=server_keep_alive,
            session_expiry_maximum=session_expiry_maximum,
            use_topic_aliases=use_topic_aliases,
            response_information=response_information,
            server_reference=server_reference,
            maximum_filters=maximum_filters,
            queue_limit=queue_limit,
            buffer_bytes=buffer_bytes,
        )
        """May be changed while the broker runs; the next CONNECT sees it, a new ``acl`` the next packet."""
        self.down: bool = False
        """While True, new connections are refused. Those that are up stay up: see :meth:`stop`."""
        self._nursery = nursery
        self._state = BrokerState(nursery, self.options, history)
        self._journal = self._state.journal
        self._open: set[ServerConnection] = set()

    # -- connecting --

    async def connect_stream(self) -> trio.abc.Stream:
        """A new network connection: the client's end.

        A checkpoint, and never blocks. Raises ``ConnectionRefusedError`` while the broker is down.
        """
        await trio.lowlevel.checkpoint()
        if self.down:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused: the memory broker is down")
        client, server = open_pipe()
        self._nursery.start_soon(self._serve, self._accept(server))
        return client

    async def listen(self) -> int:
        """Serve this broker on a free TCP port of 127.0.0.1 as well, and return the port.

        While the broker is down, connections to it are reset.
        """
        serve = partial(trio.serve_tcp, self._serve_socket, 0, host="127.0.0.1")
        listeners: list[trio.SocketListener] = await self._nursery.start(serve)
        return int(listeners[0].socket.getsockname()[1])

    async def _serve_socket(self, stream: trio.SocketStream) -> None:
        if self.down:
            reset_stream(stream)
            await trio.lowlevel.checkpoint()
        else:
            await self._serve(self._accept(stream))

    def _accept(self, stream: trio.abc.Stream) -> ServerConnection:
        # Known from now on, so that stop() ends it even before its task has run.
        connection = ServerConnection(self._state, stream)
        self._open.add(connection)
        return connection

    async def _serve(self, connection: ServerConnection) -> None:
        try:
            await connection.link.run()
        finally:
            self._open.discard(connection)

    # -- what it does wrong --

    @property
    def faults(self) -> Faults:
        """Packets to hold, drop, refuse or die after; see :class:`Faults`."""
        return self._state.faults

    def drop(self, client_id: str | None = None, *, reset: bool = False) -> None:
        """End the connection of one client, or all connections, by EOF or a reset. Wills are published."""
        for connection in self._chosen(client_id):
            connection.close(reset=reset, flush=not reset)

    def silence(self, client_id: str | None = None, *, deaf: bool = False) -> None:
        """Make one client's connection, or all that are up now, half-open for good. New connections work.

        The broker accepts their bytes, answers nothing and closes nothing. With ``deaf=True`` it is as if the cable
        were cut: neither end hears of the other's end, so that the will of a client that has long gone is published
        when its keep alive is over, or at :meth:`drop`; only ``drop(reset=True)`` still reaches the client.
        """
        for connection in self._chosen(client_id):
            connection.link.silence(deaf=deaf)

    def disconnect(self, client_id: str | None = None, *, reason_code: int = 0x8B) -> None:
        """Send DISCONNECT (only MQTT 5 has it) to one client or all, and close. Wills are published."""
        for connection in self._chosen(client_id):
            connection.disconnect(reason_code)

    def send(self, client_id: str, packet: Packet | bytes) -> None:
        """Send a client a packet of your making, or raw bytes, whatever MQTT says about it."""
        for connection in self._chosen(client_id):
            if isinstance(packet, bytes):
                connection.link.send_raw(packet)
            else:
                connection.send(packet)

    def stop(self, *, reset: bool = False, keep_sessions: bool = True) -> None:
        """Go down as a killed process does: connections end, no will is published, new connections are refused.

        ``keep_sessions=False`` forgets sessions and retained messages too.
        """
        self.down = True
        self._state.stop(reset=reset, keep_sessions=keep_sessions)
        self.drop(reset=reset)

    def start(self) -> None:
        """Accept connections again."""
        self.down = False

    def restart(self, *, reset: bool = False, keep_sessions: bool = True) -> None:
        """:meth:`stop` and :meth:`start`."""
        self.stop(reset=reset, keep_sessions=keep_sessions)
        self.start()

    def _chosen(self, client_id: str | None) -> list[ServerConnection]:
        if client_id is None:
            return list(self._open)
        chosen = [entry for entry in self._open if entry.client_id == client_id and not entry.link.is_closed]
        if not chosen:
            raise LookupError(f"{client_id!r} is not connected; connected are {self.clients}")
        return chosen

    # -- messages of the test's own --

    def publish(
        self,
        topic: str,
        payload: bytes | str = b"",
        *,
        qos: int = 0,
        retain: bool = False,
        properties: Properties | None = None,
    ) -> int:
        """Publish as if by some client; returns how many sessions the message went to. Never blocks."""
        if qos not in (0, 1, 2):
            raise ValueError(f"qos must be 0, 1 or 2, not {qos}")
        properties = properties or {}
        return self._state.publish(
            Published(
                topic=require_topic(topic),
                payload=payload.encode() if isinstance(payload, str) else payload,
                qos=qos,
                retain=retain,
                properties=properties,
                expires_at=expires_at(properties),
            )
        )

    # -- what it saw --

    @property
    def received(self) -> Sequence[tuple[str, Packet]]:
        """(client identifier, packet), the oldest first: what clients sent, as it arrived."""
        return self._journal.received

    @property
    def sent(self) -> Sequence[tuple[str, Packet]]:
        """(client identifier, packet), the oldest first: what went out to clients."""
        return self._journal.sent

    @property
    def published(self) -> Sequence[Published]:
        """The messages that were taken, from clients, wills and :meth:`publish`, each once."""
        return self._journal.published

    @property
    def connects(self) -> Sequence[Connect]:
        """Every CONNECT that came."""
        return self._journal.connects

    @property
    def violations(self) -> Sequence[tuple[str, str]]:
        """(client identifier, rule): what clients did that MQTT forbids."""
        return self._journal.violations

    @property
    def denied(self) -> Sequence[Access]:
        """What clients wanted and the ACL did not allow."""
        return self._journal.denied

    @property
    def dropped(self) -> int:
        """Messages that a client did not get: its queue or buffer was full, or its Maximum Packet Size too small."""
        return self._state.dropped

    @property
    def clients(self) -> list[str]:
        """Client identifiers that are connected, by the broker's lights."""
        return list(self._state.connections)

    @property
    def sessions(self) -> Mapping[str, Session]:
        """Client identifier → session, connected or not."""
        return self._state.sessions

    @property
    def retained(self) -> Mapping[str, Published]:
        """Topic → retained message."""
        return self._state.router.retained

    def subscriptions(self, client_id: str) -> Mapping[str, Subscription]:
        """Topic filter → subscription of a client; empty if it has no session."""
        session = self._state.sessions.get(client_id)
        return {} if session is None else dict(session.subscriptions)

    def forget(self) -> None:
        """Clear the records; sessions and retained messages stay."""
        self._journal.clear()

    async def wait_for(self, predicate: Callable[[], T], what: str = "such state", *, timeout: float = _PATIENCE) -> T:
        """Wait until ``predicate()`` is true, and return its value; it is asked whenever the broker did something.

        After ``timeout`` seconds on Trio's clock: ``AssertionError``, with ``what`` and the last packets.
        """
        return await self._journal.wait_for(predicate, what, timeout)

    async def wait_for_publish(self, topic_filter: str, *, timeout: float = _PATIENCE) -> Published:
        """Wait until a message for ``topic_filter`` has been taken, earlier ones included; returns the first."""
        if split_share(require_filter(topic_filter))[0] is not None:
            raise ValueError(f"topic_filter: {topic_filter!r} is shared, and matches no Topic Name; leave out $share")

        def find() -> Published | None:
            return next((entry for entry in self._journal.published if matches(topic_filter, entry.topic)), None)

        found = await self.wait_for(find, f"PUBLISH for {topic_filter!r}", timeout=timeout)
        assert found is not None
        return found

    async def wait_for_subscription(self, topic_filter: str, *, timeout: float = _PATIENCE) -> str:
        """Wait until a connected client is subscribed to exactly this filter; returns its client identifier."""
        require_filter(topic_filter)

        def find() -> str:
            for session in self._state.sessions.values():
                if session.connected and topic_filter in session.subscriptions:
                    return session.client_id
            return ""

        return await self.wait_for(find, f"subscription to {topic_filter!r}", timeout=timeout)

    async def wait_for_client(self, client_id: str | None = None, *, timeout: float = _PATIENCE) -> str:
        """Wait until this client, or any, is connected; returns the client identifier of the latest."""

        def find() -> str:
            return next((name for name in reversed(self.clients) if client_id in (None, name)), "")

        return await self.wait_for(find, f"connection of {client_id or 'a client'}", timeout=timeout)

    def tail(self) -> str:
        """The last packets, in words, for a failure message."""
        return self._journal.tail()
