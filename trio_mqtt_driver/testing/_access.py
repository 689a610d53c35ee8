"""Topic ACLs: what a client asks to do with a topic, and who decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import attrs


@attrs.frozen(kw_only=True)
class Access:
    """What a client wants to do; shown to the ACL of a :class:`MemoryBroker`."""

    action: Literal["publish", "subscribe"]
    topic: str
    """A Topic Name, or the Topic Filter to subscribe to, without ``$share`` and the group's name."""
    client_id: str
    username: str | None = None


ACL: TypeAlias = Callable[[Access], bool]

Denied: TypeAlias = Literal["refuse", "close"]
