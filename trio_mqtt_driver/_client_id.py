"""A fresh client ID for each connection, so that nothing on the broker ties it to the connection that died."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

_MAXIMUM_LENGTH: Final = 65535
"""Bytes in a UTF-8 Encoded String [MQTT-1.5.4]; many brokers allow less."""

_SUFFIX_LENGTH: Final = len("_reconnect_") + 15
"""What the default scheme appends, with milliseconds enough for 30,000 years."""

_REMEMBERED: Final = 100
"""Only the latest connections can still be alive on the broker; to remember all would be a leak."""


def default_base(rng: random.Random) -> str:
    """Return a base for a user who names none: ``trio`` and five random characters.

    The first ID then has 23 characters, which is what a server of MQTT 3.1.1 must at least allow [MQTT-3.1.3-5].
    """
    return "trio" + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=5))


class ClientIds:
    """Makes the client IDs of one driver.

    The default is ``{base}_{ms}`` for generation 1 and ``{base}_reconnect_{ms}`` from the second on. ``ms`` is the
    wall clock in milliseconds, or one more than the last if the clock stands still or went backwards.

    :param base: what the user calls this client.
    :param clock: the wall clock, in seconds since the epoch.
    :param scheme: replaces the default; called with the base, the generation and the time in seconds, which rises
        with each call. It must return another ID each time.
    :param previous: whose work this one carries on, after the base or the scheme has changed.
    :raises TypeError: ``base`` is not a str.
    :raises ValueError: ``base`` cannot be in a client ID.
    """

    def __init__(
        self,
        base: str,
        clock: Callable[[], float],
        scheme: Callable[[str, int, float], str] | None = None,
        *,
        previous: ClientIds | None = None,
    ) -> None:
        _check(base, "client_id", _MAXIMUM_LENGTH - (_SUFFIX_LENGTH if scheme is None else 0))
        self._base = base
        self._clock = clock
        self._scheme = scheme
        self._last_ms: int = 0 if previous is None else previous._last_ms
        self._recent: deque[str] = deque(() if previous is None else previous._recent, maxlen=_REMEMBERED)

    def make(self, generation: int) -> str:
        """Return a new client ID for the connection number ``generation`` (1 is the first).

        :raises TypeError: the scheme returned something else than a str.
        :raises ValueError: what the scheme returned is no client ID, or is one of the last 100 again.
        """
        self._last_ms = max(int(self._clock() * 1000), self._last_ms + 1)
        if self._scheme is None:
            return f"{self._base}_{'reconnect_' if generation > 1 else ''}{self._last_ms}"
        client_id = self._scheme(self._base, generation, self._last_ms / 1000)
        field = f"client ID that the function returned for generation {generation}"
        _check(client_id, field, _MAXIMUM_LENGTH)
        if client_id in self._recent:
            raise ValueError(f"{field}: must differ from those before, got {client_id!r:.60} again")
        self._recent.append(client_id)
        return client_id


def _check(text: str, field: str, maximum: int) -> None:
    # What a user's function returns is not what its annotation says, hence the test of an annotated type.
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{field}: must be a str, got {type(text).__name__}")
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{field}: must be encodable as UTF-8, got {text!r:.60}") from None
    if not 1 <= length <= maximum:
        raise ValueError(f"{field}: must have 1..{maximum} bytes of UTF-8, got {length}")
    if "\0" in text:
        raise ValueError(f"{field}: must not contain U+0000, got {text!r:.60}")
