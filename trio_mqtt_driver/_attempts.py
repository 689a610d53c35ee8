"""What each attempt is made with: its number, the application's options for it, and a client ID."""

from __future__ import annotations

import sys
from collections.abc import Awaitable

import trio

from ._cancelled import without_errors
from ._client_id import ClientIds
from ._config import Attempt, DriverConfig
from ._errors import OptionsError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


class Attempts:
    """Counts attempts, and makes what they need. ``config`` is the one in force."""

    def __init__(self, config: DriverConfig) -> None:
        self.config = config
        self.number = 0
        """Of the present attempt since the link was last up."""
        self._ids = ClientIds(config.client_id, config.wall_clock, config.client_id_factory)
        self._ids_key = (config.client_id, config.client_id_factory)

    def next(self, config: DriverConfig, generation: int, last_error: str | None) -> Attempt:
        """Begin another one."""
        self.number += 1
        return Attempt(config=config, number=self.number, generation=generation, last_error=last_error)

    @trio.lowlevel.disable_ki_protection
    async def options(self, attempt: Attempt) -> DriverConfig:
        """Ask the application for its options. Raises ``OptionsError`` for whatever goes wrong there."""
        config = attempt.config
        if config.options_factory is None:
            return config
        with trio.move_on_after(config.factory_timeout):
            try:
                made = config.options_factory(attempt)
                if not isinstance(made, Awaitable):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise OptionsError(
                        f"options_factory must be an async function, but it returned a {type(made).__name__}"
                    )
                options = await made
            except OptionsError:
                raise
            except Exception as exc:  # whatever the application's code raises is one failed attempt
                raise OptionsError(f"options_factory failed: {exc!r}") from exc
            except BaseExceptionGroup as exc:
                raise without_errors(exc, "options_factory") from None
            if not isinstance(options, DriverConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionsError(f"options_factory must return a DriverConfig, not {type(options).__name__}")
            return options
        raise OptionsError(f"options_factory took longer than factory_timeout={config.factory_timeout:g} s")

    def client_id(self, config: DriverConfig, generation: int) -> str:
        """Another one each time, unless the ID is stable. Raises ``OptionsError``."""
        if config.stable_id:
            return config.client_id
        key = (config.client_id, config.client_id_factory)
        if key != self._ids_key:
            # A base may come back after another: the times go on, so that the IDs still do not repeat.
            self._ids = ClientIds(config.client_id, config.wall_clock, config.client_id_factory, previous=self._ids)
            self._ids_key = key
        try:
            return self._ids.make(generation)
        except Exception as exc:  # the application's client_id_factory
            raise OptionsError(f"client_id_factory failed: {exc}") from exc
