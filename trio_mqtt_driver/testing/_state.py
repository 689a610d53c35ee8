"""The broker behind the connections: options, sessions with their wills and expiry, and who gets a message."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Protocol, TypeAlias

import attrs
import trio

from ._access import ACL, Access, Denied
from ._faults import Faults
from ._journal import Journal
from ._packets import Connect, Packet
from ._properties import integer
from ._router import Overlapping, Router
from ._session import NEVER, Published, Session, expires_at

Authenticator: TypeAlias = Callable[[str, bytes], Generator[bytes, bytes, "bytes | None"]]


class AuthenticationRefusedError(Exception):
    """Raised by an ``authenticate`` generator to refuse the client with ``reason_code``."""

    def __init__(self, reason_code: int = 0x87) -> None:
        super().__init__(reason_code)
        self.reason_code = reason_code


def _within(low: int, high: int) -> Callable[[object, attrs.Attribute[int], int], None]:
    def check(instance: object, attribute: attrs.Attribute[int], value: int | None) -> None:
        if value is not None and not low <= value <= high:
            raise ValueError(f"{attribute.name} must be in {low} … {high}, not {value}")

    return check


def _check_versions(instance: object, attribute: attrs.Attribute[tuple[int, ...]], value: tuple[int, ...]) -> None:
    if not value or not set(value) <= {4, 5}:
        raise ValueError(f"versions must be one or both of 4 (MQTT 3.1.1) and 5, not {value}")


@attrs.define(kw_only=True)
class BrokerOptions:
    """What the broker offers; may be changed while it runs, and holds for the next CONNECT."""

    versions: tuple[int, ...] = attrs.field(default=(4, 5), validator=_check_versions)
    users: Mapping[str, str] | None = attrs.field(default=None, repr=False)
    authenticate: Authenticator | None = None
    acl: ACL | None = None
    denied: Denied = attrs.field(default="refuse", validator=attrs.validators.in_(("refuse", "close")))
    overlapping: Overlapping = attrs.field(default="once", validator=attrs.validators.in_(("once", "copies")))
    receive_maximum: int = attrs.field(default=65535, validator=_within(1, 65535))
    maximum_qos: int = attrs.field(default=2, validator=_within(0, 2))
    retain_available: bool = True
    maximum_packet_size: int | None = attrs.field(default=None, validator=_within(1, NEVER))
    topic_alias_maximum: int = attrs.field(default=100, validator=_within(0, 65535))
    wildcard_available: bool = True
    identifiers_available: bool = True
    shared_available: bool = True
    server_keep_alive: int | None = attrs.field(default=None, validator=_within(0, 65535))
    session_expiry_maximum: int | None = attrs.field(default=None, validator=_within(0, NEVER))
    use_topic_aliases: bool = False
    response_information: str | None = None
    server_reference: str | None = None
    maximum_filters: int | None = attrs.field(default=None, validator=_within(1, 65535))
    queue_limit: int = attrs.field(default=200_000, validator=_within(1, 10**9))
    buffer_bytes: int = attrs.field(default=64 * 2**20, validator=_within(1, 2**40))


class Connection(Protocol):
    """The server side of one network connection, as the broker knows it."""

    @property
    def client_id(self) -> str: ...

    def send(self, packet: Packet) -> bool: ...

    def disconnect(self, reason_code: int) -> None: ...

    def close(self, *, reset: bool = False, flush: bool = True) -> None: ...


class BrokerState:
    def __init__(self, nursery: trio.Nursery, options: BrokerOptions, history: int) -> None:
        self.nursery = nursery
        self.options = options
        self.faults = Faults()
        self.journal = Journal(history)
        self.router = Router()
        self.sessions: dict[str, Session] = {}
        self.connections: dict[str, Connection] = {}
        self.dropped = 0
        self._stopping = False
        self._assigned = 0

    # -- messages --

    def publish(self, message: Published) -> int:
        """Take a message and route it; how many sessions it went to."""
        self.journal.published.append(message)
        self.journal.note()
        return self.router.route(message, self.options.overlapping)

    def allows(self, access: Access) -> bool:
        """Whether the ACL, as it is now, lets a client do this; what it does not is written down."""
        acl = self.options.acl
        if acl is None or acl(access):
            return True
        self.journal.denied.append(access)
        self.journal.note()
        return False

    # -- sessions --

    def assign_client_id(self) -> str:
        self._assigned += 1
        return f"assigned-{self._assigned}"

    def open_session(self, connect: Connect, client_id: str, connection: Connection) -> tuple[Session, bool]:
        """The session for an accepted CONNECT, and whether it was present [MQTT-3.1.2.4, 3.1.4-3]."""
        other = self.connections.get(client_id)
        if other is not None:
            other.disconnect(0x8E)
        session = self.sessions.get(client_id)
        if session is not None and connect.clean_start:
            self.end_session(session)
            session = None
        present = session is not None
        if session is None:
            session = self.sessions[client_id] = Session(
                client_id=client_id, queue_limit=self.options.queue_limit, on_drop=self._count_drop
            )
        if session.timers is not None:
            session.timers.cancel(reason="the client is back")
            session.timers = None
        session.username = connect.username
        session.will = connect.will
        session.expiry = self._expiry(connect)
        self.connections[client_id] = connection
        return session, present

    def connection_lost(self, session: Session, connection: Connection) -> None:
        """The network connection of a session ended; its will is still in ``session`` unless it was a clean end."""
        if self.connections.get(session.client_id) is connection:
            del self.connections[session.client_id]
        session.detach()
        self.journal.note()
        if self._stopping:
            session.will = None
        will_delay = integer(session.will.properties, "will_delay", 0) if session.will is not None else 0
        if not session.expiry:
            self.end_session(session)
            return
        if not will_delay:
            self._publish_will(session)
        if session.will is not None or session.expiry != NEVER:
            session.timers = trio.CancelScope()
            self.nursery.start_soon(self._wait_away, session, session.timers, will_delay)

    def end_session(self, session: Session) -> None:
        if self.sessions.get(session.client_id) is session:
            del self.sessions[session.client_id]
        for topic_filter in session.subscriptions:
            self.router.remove(session, topic_filter)
        session.subscriptions.clear()
        if session.timers is not None:
            session.timers.cancel(reason="the session ended")
            session.timers = None
        # The end of the session ends the will delay too [MQTT-3.1.3-9].
        self._publish_will(session)
        self.journal.note()

    def stop(self, *, reset: bool, keep_sessions: bool) -> None:
        """All connections end at once, and no will is published: the process died."""
        self._stopping = True
        try:
            for connection in list(self.connections.values()):
                connection.close(reset=reset, flush=not reset)
            for session in list(self.sessions.values()):
                session.will = None
                if not keep_sessions:
                    self.end_session(session)
        finally:
            self._stopping = False
        if not keep_sessions:
            self.router.retained.clear()

    def _expiry(self, connect: Connect) -> int:
        if connect.version == 4:
            return 0 if connect.clean_start else NEVER
        asked = integer(connect.properties, "session_expiry", 0)
        limit = self.options.session_expiry_maximum
        return asked if limit is None else min(asked, limit)

    async def _wait_away(self, session: Session, timers: trio.CancelScope, will_delay: int) -> None:
        await trio.lowlevel.checkpoint()
        with timers:
            expiry = math.inf if session.expiry == NEVER else session.expiry
            end = trio.current_time() + expiry
            if session.will is not None and will_delay < expiry:
                await trio.sleep(will_delay)
                self._publish_will(session)
            if end < math.inf:
                await trio.sleep_until(end)
                self.end_session(session)

    def _publish_will(self, session: Session) -> None:
        will, session.will = session.will, None
        if will is not None and self.allows(session.access("publish", will.topic)):
            self.publish(
                Published(
                    topic=will.topic,
                    payload=will.payload,
                    qos=will.qos,
                    retain=will.retain,
                    properties={name: value for name, value in will.properties.items() if name != "will_delay"},
                    publisher=session.client_id,
                    expires_at=expires_at(will.properties),
                )
            )

    def _count_drop(self) -> None:
        self.dropped += 1
