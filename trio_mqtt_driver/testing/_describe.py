"""Packets in words for whoever reads a failed test: the fields that say something, payloads shortened."""

from __future__ import annotations

import attrs

from ._packets import Packet, SubscriptionRequest, Will

_SHOWN = 40


def describe(packet: Packet) -> str:
    """One line, such as ``PUBLISH 'a/b' b'21.5' qos=1 packet_id=3``."""
    return " ".join([packet.kind.name, *_fields(packet)])


def _fields(value: Packet | SubscriptionRequest | Will) -> list[str]:
    """The fields that differ from what they are by default; a reason code always, where there is one."""
    words: list[str] = []
    for field in attrs.fields(type(value)):
        content = getattr(value, field.name)
        if field.name == "kind" or not field.repr:
            continue
        if field.name == "properties":
            words += [f"{name}={_short(entry)}" for name, entry in content.items()]
        elif field.name == "reason_code":
            words += [f"0x{content:02x}"]
        elif field.name == "reason_codes":
            words += [" ".join(f"0x{code:02x}" for code in content)]
        elif content == field.default:
            continue
        elif isinstance(content, Will):
            words += [f"will=({' '.join(_fields(content))})"]
        elif field.name in ("topic", "topic_filter", "payload"):
            words += [_short(content)]
        elif field.name == "topic_filters":
            words += [_short(entry) for entry in content]
        elif field.name == "requests":
            words += [_request(entry) for entry in content]
        else:
            words += [f"{field.name}={_short(content)}"]
    return words


def _request(request: SubscriptionRequest) -> str:
    topic_filter, *options = _fields(request)
    return f"{topic_filter} ({' '.join(options)})" if options else topic_filter


def _short(value: object) -> str:
    """``repr(value)``, cut in the middle of nowhere, with the size of the whole."""
    if isinstance(value, (str, bytes)) and len(value) > _SHOWN:
        unit = "bytes" if isinstance(value, bytes) else "characters"
        return f"{value[:_SHOWN]!r}... ({len(value):,} {unit})"
    return repr(value)
