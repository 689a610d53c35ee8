"""What a connection needs of whoever takes its messages."""

from __future__ import annotations

from typing import Any, Protocol

from ._types import Message


class Inbox(Protocol):
    """Where messages go; the dispatcher, as far as a connection knows it."""

    def deliver(self, messages: list[Message[Any]], *, copies: bool, plain_size: int | None) -> None: ...

    @property
    def retired(self) -> bool:
        """Whether it drops what comes, so that nothing has to wait for room."""
        ...

    @property
    def crowded(self) -> bool: ...

    async def give_way(self) -> None: ...

    @property
    def full(self) -> bool: ...

    async def wait_room(self) -> None: ...
