"""Which version of MQTT an endpoint is asked with, and what was learnt of it."""

from __future__ import annotations

from ._config import DriverConfig, Endpoint
from ._errors import ConnectionLostError, MQTTDriverError, ProtocolVersionError

_MOST = 1000
"""Endpoints to know of: an options_factory or a broker may name ever new ones."""


class Versions:
    """The memory of ``protocol="auto"``."""

    def __init__(self) -> None:
        self._only_3_1_1: set[Endpoint] = set()
        self._spoke_5: set[Endpoint] = set()

    def first(self, config: DriverConfig) -> int:
        """The protocol level to begin with, 4 or 5."""
        if config.protocol == "5" or config.authenticator is not None:  # 3.1.1 would go in without it
            return 5
        return 4 if config.protocol == "3.1.1" or config.endpoint in self._only_3_1_1 else 5

    def may_be_3_1_1(self, config: DriverConfig, error: MQTTDriverError | None) -> bool:
        """Whether an attempt with MQTT 5 that ended so is worth one with 3.1.1.

        Some 3.1.1 brokers just close. A broker that is going down does so, too: only the plain answer is remembered,
        and one that has spoken MQTT 5 must not end up with 3.1.1 since it came back between the two tries.
        """
        if config.protocol != "auto" or config.authenticator is not None:
            return False
        if isinstance(error, ProtocolVersionError):
            _remember(self._only_3_1_1, config.endpoint)
            return True
        return type(error) is ConnectionLostError and config.endpoint not in self._spoke_5

    def spoke(self, config: DriverConfig, version: int) -> None:
        """The endpoint accepted a connection with this version."""
        if version == 5:
            _remember(self._spoke_5, config.endpoint)
        elif config.stable_id:  # To ask with MQTT 5 again would give up the session.
            _remember(self._only_3_1_1, config.endpoint)

    def forget(self, *, but: Endpoint | None) -> None:
        """All that was learnt, but that an endpoint is to be asked with 3.1.1."""
        self._only_3_1_1 &= {but}
        self._spoke_5.clear()


def _remember(endpoints: set[Endpoint], endpoint: Endpoint) -> None:
    if len(endpoints) >= _MOST:
        endpoints.clear()
    endpoints.add(endpoint)
