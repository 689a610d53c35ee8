"""SUBSCRIBE and SUBACK as bytes: a replay may have thousands of filters, and paho takes eight times as long."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ._errors import ProtocolError
from ._properties import decode_reason_string, encode_text, encode_varint
from ._types import ReasonCode, RetainHandling, UserProperties

_SUBSCRIBE = b"\x82"
_CODES = {
    code: ReasonCode(code)
    for code in (0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)  # [MQTT-3.9.3]
}
_CODES_3_1_1 = {code: ReasonCode(code) for code in (0x00, 0x01, 0x02, 0x80)}


def pack_filter(
    topic_filter: str,
    qos: int,
    *,
    no_local: bool = False,
    retain_as_published: bool = False,
    retain_handling: RetainHandling = RetainHandling.SEND,
) -> bytes:
    """A Topic Filter with its options, as a SUBSCRIBE packet of MQTT 5 has them [MQTT-3.8.3.1]."""
    options = qos | no_local << 2 | retain_as_published << 3 | retain_handling << 4
    return encode_text(topic_filter, "topic_filter") + bytes((options,))


def unpack_filter(packed: bytes) -> str:
    """The Topic Filter that was packed."""
    return packed[2:-1].decode()


def needs_5(packed: bytes) -> bool:
    """Whether a packed Topic Filter asks for what MQTT 3.1.1 cannot say."""
    return packed[-1] > 2


@attrs.frozen
class SubAck:
    """Answers SUBSCRIBE and, with ``unsubscribe``, UNSUBSCRIBE."""

    packet_id: int
    reason_codes: tuple[ReasonCode, ...]
    unsubscribe: bool = False


def encode_subscribe(
    packet_id: int,
    filters: Sequence[bytes],
    *,
    version5: bool,
    identifier: int | None = None,
    user_properties: UserProperties = (),
) -> bytes:
    """A SUBSCRIBE packet with filters that are packed; identifier and properties, of MQTT 5 only, are for all."""
    if version5:
        block = b"" if identifier is None else b"\x0b" + encode_varint(identifier)
        for name, value in user_properties:
            block += b"\x26" + encode_text(name, "user_properties") + encode_text(value, "user_properties")
        body = packet_id.to_bytes(2, "big") + encode_varint(len(block)) + block + b"".join(filters)
    else:
        body = packet_id.to_bytes(2, "big") + b"".join([packed[:-1] + bytes((packed[-1] & 3,)) for packed in filters])
    return _SUBSCRIBE + encode_varint(len(body)) + body


def decode_suback(body: bytes, *, version5: bool) -> SubAck:
    """The body of a SUBACK. Raises ``ProtocolError``."""
    start = 2
    if version5 and len(body) > 2:
        length = shift = 0
        more = True
        while more:
            if start >= len(body) or shift > 21:
                raise ProtocolError("malformed packet: the property length of SUBACK [MQTT-2.2.2.1]")
            length |= (body[start] & 127) << shift
            more = body[start] > 127
            shift += 7
            start += 1
        end = start + length
        if end > len(body):
            raise ProtocolError("malformed packet: the properties of SUBACK are longer than it [MQTT-2.2.2.1]")
        if length:
            decode_reason_string(body, 2, end)  # only to see that they are some
        start = end
    if len(body) <= start:
        raise ProtocolError(f"malformed packet: SUBACK of {len(body)} bytes after its header [MQTT-3.9]")
    codes = _CODES if version5 else _CODES_3_1_1
    try:
        reason_codes = tuple(map(codes.__getitem__, body[start:]))
    except KeyError as exc:
        raise ProtocolError(f"malformed packet: SUBACK with reason code 0x{exc.args[0]:02x} [MQTT-3.9.3]") from None
    return SubAck(body[0] << 8 | body[1], reason_codes)
