"""Where the attempts go: the memory of `Endpoints`, what errors mean to it, and test connections to better ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ._attempts import Attempts
from ._config import Attempt, DriverConfig, Endpoint
from ._connection import Connection
from ._endpoints import EndpointHealth, Endpoints
from ._errors import MQTTDriverError, OptionsError, RefusedError, ServerDisconnectedError
from ._handshake import handshake_by
from ._history import Counters, describe
from ._outbox import Outbox
from ._probe import probe
from ._session import Session
from ._transport import open_stream_by
from ._types import Message, ReasonCode
from ._url import parse_reference
from ._versions import Versions

_REDIRECTS = (ReasonCode.USE_ANOTHER_SERVER, ReasonCode.SERVER_MOVED)


class Failover:
    """Chooses the endpoint of each attempt; is told what became of it.

    ``on_news`` is called with words when an endpoint that is tested begins to pass or to fail.
    """

    def __init__(self, attempts: Attempts, versions: Versions, on_news: Callable[[str], object]) -> None:
        self._attempts = attempts
        self._versions = versions
        self._on_news = on_news
        self._endpoints: Endpoints[Endpoint]
        self.for_primary = True
        """Whether the present or last attempt was made for the first of the configured endpoints."""
        self.configure()

    def configure(self) -> None:
        """The settings have changed: what was learnt of the old endpoints is forgotten."""
        config = self._attempts.config
        self._endpoints = Endpoints(config.endpoint, config.fallbacks, config.failover)

    def aim(self) -> DriverConfig:
        """The settings, with the endpoint of the attempt that begins now."""
        endpoint = self.next
        self.for_primary = endpoint == self._attempts.config.endpoint
        return self._at(endpoint)

    @property
    def next(self) -> Endpoint:
        """Where the present attempt goes, or the next one would now."""
        return self._endpoints.choose(trio.current_time())

    def _at(self, endpoint: Endpoint) -> DriverConfig:
        config = self._attempts.config
        if endpoint == config.endpoint:
            return config
        # No TLS options for a plain endpoint: a config would not take both.
        return config.evolve(endpoint=endpoint, tls=config.tls if endpoint.scheme == "mqtts" else None)

    def live(self, endpoint: Endpoint) -> None:
        self._endpoints.live(endpoint, trio.current_time())

    def stable(self) -> None:
        self._endpoints.stable()

    def reset(self) -> None:
        self._endpoints.reset()

    def ended(self, endpoint: Endpoint, error: MQTTDriverError | None) -> bool:
        """An attempt or a link ended; True if the next one goes to an endpoint that has not had its turn.

        An ``OptionsError`` is a failure of the endpoint, too: the application may fetch what it needs from that very
        machine, or have nothing for it. Were it none, the driver would ask for the same options for ever.
        """
        return self._endpoints.ended(endpoint, trio.current_time(), None if error is None else describe(error))

    def refer(self, endpoint: Endpoint, error: MQTTDriverError | None) -> bool:
        """Whether ``error`` is a Server Reference that is followed [MQTT-4.13]."""
        if not isinstance(error, RefusedError | ServerDisconnectedError) or error.reason_code not in _REDIRECTS:
            return False
        if endpoint.scheme == "unix" or not error.server_reference:
            return False
        targets = [
            Endpoint(scheme=endpoint.scheme, host=host, port=port)
            for host, port in parse_reference(error.server_reference, endpoint.port)
        ]
        permanent = error.reason_code == ReasonCode.SERVER_MOVED
        return self._endpoints.redirect(endpoint, targets, trio.current_time(), permanent=permanent)

    def health(self) -> tuple[EndpointHealth, ...]:
        return self._endpoints.health(trio.current_time())

    # -- the way back -------------------------------------------------------------------------------------------------

    @property
    def compares(self) -> bool:
        """Whether something is preferred to the live endpoint, and shall be tested."""
        return self._endpoints.next_check() is not None

    async def wait_better(self, generation: int) -> Endpoint | None:
        """Test what is preferred to the live endpoint, from time to time, until the driver should go there.

        None if the live link is where it should be.
        """
        passing: set[Endpoint] = set()
        while True:
            check = self._endpoints.next_check()
            if check is None:
                await trio.lowlevel.checkpoint()
                return None
            endpoint, at = check
            await trio.sleep_until(at)
            error: MQTTDriverError | None = None
            try:
                await self._test(endpoint, generation)
            except MQTTDriverError as exc:
                error = exc
            if self.refer(endpoint, error):
                continue
            text = None if error is None else describe(error)
            self._tell(endpoint, text, passing)
            if self._endpoints.tested(endpoint, trio.current_time(), text):
                return endpoint

    def _tell(self, endpoint: Endpoint, error: str | None, passing: set[Endpoint]) -> None:
        """Changes only: a test every half minute would push all else out of the history."""
        if error is None and endpoint not in passing:
            passing.add(endpoint)
            self._on_news(f"{endpoint} begins to pass its tests")
        elif error is not None and endpoint in passing:
            passing.discard(endpoint)
            self._on_news(f"{endpoint} begins to fail its tests: {error}")

    async def _test(self, endpoint: Endpoint, generation: int) -> None:
        """A connection of its own beside the live one, as far as the test publish; with no will, and another ID."""
        attempt = Attempt(config=self._at(endpoint), number=1, generation=generation, last_error=None)
        made = await self._attempts.options(attempt)
        if made.endpoint != endpoint:  # A test of that one would bring us back there again and again.
            raise OptionsError(f"options_factory answered with {made.endpoint} when asked for {endpoint}")
        config = made.evolve(stable_id=False, will=None, availability=None)
        client_id = self._attempts.client_id(config, generation)
        version = self._versions.first(config)
        try:
            await self._try(config, version, client_id, generation)
        except MQTTDriverError as exc:
            if version != 5 or not self._versions.may_be_3_1_1(config, exc):
                raise
            await self._try(config, 4, client_id, generation)

    async def _try(self, config: DriverConfig, version: int, client_id: str, generation: int) -> None:
        deadline = trio.current_time() + config.connect_timeout
        counters = Counters()
        connection = Connection(
            await open_stream_by(config, deadline),
            config,
            version=version,
            client_id=client_id,
            generation=generation,
            session=Session(),
            inbox=_Nobody(),
            outbox=Outbox(max_messages=1, max_bytes=1, counters=counters),
            counters=counters,
            on_remark=lambda _: None,
        )

        async def life(connection: Connection) -> None:
            await handshake_by(connection, deadline)
            self._versions.spoke(config, version)
            await probe(connection)
            with trio.move_on_after(config.disconnect_timeout):
                await connection.disconnect(end_session=True)

        await connection.run(life)
        if connection.cause is not None:
            raise connection.cause


class _Nobody:
    """The inbox of a connection that subscribes to nothing."""

    retired = crowded = full = False

    def deliver(self, messages: list[Message[Any]], *, copies: bool, plain_size: int | None) -> None: ...

    async def give_way(self) -> None: ...

    async def wait_room(self) -> None: ...
