"""The states of a driver in one table, and waiting for them."""

from __future__ import annotations

import trio

from ._types import State

_ENDED = {State.BACKING_OFF, State.PAUSED, State.CLOSING}
TRANSITIONS: dict[State, set[State]] = {
    State.NEW: {State.CONNECTING, State.PAUSED, State.CLOSING},
    State.CONNECTING: {State.VALIDATING} | _ENDED,
    State.VALIDATING: {State.REPLAYING} | _ENDED,
    State.REPLAYING: {State.LIVE} | _ENDED,
    State.LIVE: _ENDED,
    State.BACKING_OFF: {State.CONNECTING, State.PAUSED, State.CLOSING},
    State.PAUSED: {State.CONNECTING, State.CLOSING},
    State.CLOSING: {State.CLOSED},
    State.CLOSED: set(),
}


class _Waiter:
    """Somebody who waits for one of several states; the first to come is kept, for it may pass before they run."""

    def __init__(self, wanted: frozenset[State]) -> None:
        self.wanted = wanted
        self.reached: State | None = None
        self.woken = trio.Event()


class States:
    """The state that a driver is in. A transition that is not in the table is a bug and raises ``RuntimeError``."""

    def __init__(self) -> None:
        self.current = State.NEW
        self.since = 0.0
        """On Trio's clock; 0 in NEW."""
        self._waiters: set[_Waiter] = set()

    def to(self, state: State) -> None:
        if state not in TRANSITIONS[self.current]:
            raise RuntimeError(f"illegal transition from {self.current} to {state}")
        self.current = state
        self.since = trio.current_time()
        for waiter in list(self._waiters):
            if state in waiter.wanted:
                waiter.reached = state
            elif not _ends_before(state, waiter.wanted):
                continue
            self._waiters.discard(waiter)
            waiter.woken.set()

    @trio.lowlevel.enable_ki_protection
    async def wait(self, wanted: frozenset[State]) -> State | None:
        """The first of ``wanted`` from now on, the present state included; None if none of them can come any more."""
        await trio.lowlevel.checkpoint()
        if self.current in wanted:
            return self.current
        if _ends_before(self.current, wanted):
            return None
        waiter = _Waiter(wanted)
        self._waiters.add(waiter)
        try:
            await waiter.woken.wait()
        finally:
            self._waiters.discard(waiter)
        return waiter.reached


def _ends_before(state: State, wanted: frozenset[State]) -> bool:
    """Whether a driver in ``state`` is ending, and will not come to any of ``wanted``."""
    return state in (State.CLOSING, State.CLOSED) and not TRANSITIONS[state] & wanted
