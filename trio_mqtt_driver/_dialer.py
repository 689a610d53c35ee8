"""From an attempt to a connection: options, version of MQTT, client ID, session, stream; one connection at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import trio

from ._attempts import Attempts
from ._batch_sizes import BatchSizes
from ._config import Attempt, DriverConfig, Endpoint
from ._connection import Connection
from ._errors import AckTimeoutError, MQTTDriverError, ServerDisconnectedError
from ._handshake import handshake_by
from ._history import Counters
from ._inbox import Inbox
from ._outbox import Outbox
from ._sender import blames_us
from ._session import Session, SessionKey
from ._suspects import COPIES, EndpointSuspects
from ._transport import open_stream_by
from ._versions import Versions

Life = Callable[[Connection, float], Awaitable[None]]
"""What happens on a connection, given when it must have had its CONNACK."""


class Dialer:
    """Makes the connections of a driver, and knows the session that they go on with if the client ID is stable."""

    def __init__(
        self,
        attempts: Attempts,
        versions: Versions,
        *,
        inbox: Inbox,
        outbox: Outbox,
        counters: Counters,
        on_downgrade: Callable[[str], object],
        on_suspect: Callable[..., object],
        on_remark: Callable[[str], object],
        rng: random.Random,
    ) -> None:
        self._attempts = attempts
        self._versions = versions
        self._batch_sizes = BatchSizes()
        self._suspects = EndpointSuspects(on_suspect)
        self._inbox = inbox
        self._outbox = outbox
        self._counters = counters
        self._on_downgrade = on_downgrade
        self._on_suspect = on_suspect
        self._on_remark = on_remark
        self._rng = rng
        self.connection: Connection | None = None
        """The one that is being made or is live."""
        self.endpoint: Endpoint = attempts.config.endpoint
        """Where the present or last attempt went."""
        self.session = Session()

    async def dial(self, attempt: Attempt, life: Life, *, still_connecting: Callable[[], bool]) -> None:
        """One attempt, and the ``life`` of the connection that it becomes; returns when that was ended on purpose.

        Raises ``MQTTDriverError``, why the attempt failed or the connection was lost.
        """
        self.endpoint = attempt.config.endpoint
        config = await self._attempts.options(attempt)
        self.endpoint = config.endpoint
        version = self._versions.first(config)
        try:
            await self._connect(config, version, attempt.generation, life)
        except MQTTDriverError as exc:
            if version != 5 or not still_connecting() or not self._versions.may_be_3_1_1(config, exc):
                raise
            self._on_downgrade(f"{config.endpoint} does not take MQTT 5 ({exc}), trying 3.1.1")
            await self._connect(config, 4, attempt.generation, life)

    async def _connect(self, config: DriverConfig, version: int, generation: int, life: Life) -> None:
        client_id = self._attempts.client_id(config, generation)
        session = self._session_for(client_id, config, version)
        if session.key is not None and not session.established:
            # An older session of this name goes first. 3.1.1 has no clean start for one that is to last, and mosquitto
            # (2.0.11) does not save an MQTT 5 session whose last CONNECT had it: a restart would lose it.
            brief = config.evolve(stable_id=False, will=None, availability=None)
            await self._run(brief, version, client_id, generation, Session(), _wipe)
            session.wiped = True
        await self._run(config, version, client_id, generation, session, life)

    def _session_for(self, client_id: str, config: DriverConfig, version: int) -> Session:
        """The session that there is, or a new one that takes its place when the broker has accepted it (``adopt``):
        what another broker keeps for us is still there when this one cannot be had."""
        if not config.stable_id:
            return Session()
        key = SessionKey(client_id, config.endpoint, version)
        present = self.session
        if present.key == key and not present.is_over(trio.current_time()):
            return present
        session = Session(key)
        if present.key is not None and present.key.same_name(key):
            self.adopt(session)  # At once: from its CONNECT on the broker has it in the place of the other one.
        return session

    async def _run(
        self, config: DriverConfig, version: int, client_id: str, generation: int, session: Session, life: Life
    ) -> None:
        now = trio.current_time()
        deadline = now + config.connect_timeout
        lasting = session.established or session.wiped
        config, batch = self._batch_sizes.applied(config, now)
        self.connection = connection = Connection(
            await open_stream_by(config, deadline, self._rng if self._attempts.number > 1 else None),
            config,
            version=version,
            client_id=client_id,
            generation=generation,
            session=session,
            inbox=self._inbox,
            outbox=self._outbox,
            counters=self._counters,
            on_remark=self._on_remark,
        )
        connection.batch = batch
        if config.quarantine_after:
            connection.suspects, connection.questions = self._suspects.of(config.endpoint)
        try:
            await connection.run(lambda made: life(made, deadline))
        finally:
            self.connection = None
            if session.key is None:
                self._outbox.put_back(session.end())
        cause = connection.cause
        self._judge(connection, cause)
        if isinstance(cause, ServerDisconnectedError) and cause.taken_over:
            if connection.in_doubt and lasting:
                # A CONNECT of ours that nobody had answered, most likely, read late: the session is as it was.
                session.unanswered += 1
            else:
                # Whoever took the session over has wiped it or uses its identifiers: what the broker has is not ours.
                self.adopt(Session())
        if cause is not None:
            raise cause

    def _judge(self, connection: Connection, cause: MQTTDriverError | None) -> None:
        """Find out what a broker that ends connections over a request has against it."""
        config, requests = connection.config, connection.requests
        now = trio.current_time()
        by_broker = blames_us(cause) or isinstance(cause, AckTimeoutError)
        unanswered, answered = requests.unanswered, requests.answered
        accused = connection.accused if by_broker and config.quarantine_after else []
        said = ""
        if accused == [COPIES]:
            said = connection.questions.blame(COPIES, now, limit=config.quarantine_after, others=True)
        elif len(accused) == 1:
            said = connection.suspects.blame(accused[0], now, limit=config.quarantine_after, others=answered > 0)
        elif 1 < len(accused) <= answered:  # else their number may be the reason
            said = connection.suspects.blame_one_of(accused, now)
        if said:
            self._on_suspect(f"a connection to {config.endpoint} ended {said}", logging.WARNING)
            unanswered = 0
        fewer = self._batch_sizes.ended(config, now, unanswered, answered, by_broker=by_broker)
        if fewer is not None:
            self._on_downgrade(
                f"{config.endpoint} left a SUBSCRIBE or UNSUBSCRIBE of {unanswered} filters "
                f"unanswered, and not for the first time: for now they have {fewer}"
            )

    def forget(self) -> None:
        """The settings have changed: what was learnt of the endpoints may be true no more."""
        # A session that there is goes on with other settings; to ask with MQTT 5 again would give it up.
        key = self.session.key if self.session.established else None
        self._versions.forget(but=key.endpoint if key is not None and key.version != 5 else None)
        self._batch_sizes.forget()
        self._suspects.forget()

    def adopt(self, session: Session) -> None:
        """A broker has accepted a connection of this session."""
        if session is not self.session:
            self.end_session()
            self.session = session

    def end_session(self) -> None:
        """What is open in the session, if anything is, must be published anew."""
        self._outbox.put_back(self.session.end())


async def _wipe(connection: Connection, deadline: float) -> None:
    await handshake_by(connection, deadline)
    with trio.move_on_after(connection.config.disconnect_timeout):
        await connection.disconnect(end_session=True)
