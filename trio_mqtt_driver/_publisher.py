"""The way of a message from ``publish()`` to the connection that takes it at once, or to the outbox."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from ._errors import DriverClosedError, NotConnectedError, PublishTimeoutError
from ._limits import publish_error
from ._outbox import Outbox
from ._outgoing import Outgoing, Receipt
from ._supervisor import Supervisor
from ._types import OfflinePolicy, PublishResult, State


class Publisher:
    """Hands messages over, and waits for what becomes of them. ``check_open`` raises ``DriverClosedError``."""

    def __init__(self, supervisor: Supervisor, outbox: Outbox, check_open: Callable[[], None]) -> None:
        self._supervisor = supervisor
        self._outbox = outbox
        self._check_open = check_open

    async def publish(self, outgoing: Outgoing, policy: OfflinePolicy) -> PublishResult:
        """Until the guarantee of its QoS is met, or for ``publish_timeout``. ``MQTTDriver.publish`` says the rest."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        if policy is OfflinePolicy.FAIL and self._supervisor.state is not State.LIVE:
            raise NotConnectedError(
                f"publish to {outgoing.topic!r}: the link is down ({self._supervisor.diagnosis()})"
            )
        timeout = self._supervisor.config.publish_timeout
        if timeout == math.inf:
            return await self._publish(outgoing)
        with trio.move_on_after(timeout):
            return await self._publish(outgoing)
        error = PublishTimeoutError(
            f"{outgoing.topic!r} was not acknowledged within publish_timeout={timeout:g} s",
            self._supervisor.diagnosis(),
        )
        outgoing.settle(error)
        raise error

    async def _publish(self, outgoing: Outgoing) -> PublishResult:
        await self._outbox.wait_room(outgoing.size)
        self._check_open()
        self._submit(outgoing)
        return await outgoing.wait()

    def publish_nowait(self, outgoing: Outgoing) -> Receipt:
        """Raises ``OutboxFullError``, ``ServerLimitError`` or ``DriverClosedError``."""
        self._check_open()
        self._submit(outgoing)
        return Receipt(outgoing)

    def _submit(self, outgoing: Outgoing) -> None:
        supervisor = self._supervisor
        if supervisor.state is State.CLOSED:
            raise DriverClosedError("the driver has stopped for good") from supervisor.terminal
        connection = supervisor.connection if supervisor.state is State.LIVE else None
        if connection is not None:
            error = publish_error(connection.limits, outgoing)
            if error is not None:
                raise error
            if not outgoing.qos and connection.sender.has_room and not self._outbox.holds_qos0:
                connection.sender.send(outgoing)
                return
        self._outbox.accept(outgoing)
        if connection is not None:
            connection.sender.refill()
