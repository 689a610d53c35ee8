"""Payload to object and back: bytes, text, and JSON through cattrs.

cattrs coerces by default (``int("5")``, ``list("abc")``, a class of defaults made from ``[]``). What arrives over MQTT
was made by somebody else, so here a value must have the JSON type that its annotation asks for; only an integer may
stand for a float.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Any, Final, NoReturn, Union, cast, get_args, get_origin, is_typeddict

import attrs
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError, IterableValidationError, transform_error
from cattrs.preconf.json import make_converter
from cattrs.v import format_exception

from ._errors import PayloadError

_SHOWN_ERRORS: Final = 3
_SHOWN_LENGTH: Final = 200


def json_converter() -> Converter:
    """Return a new converter with the strict rules of this module, to register further hooks on."""
    converter = make_converter(structure_fallback_factory=_unsupported)
    for primitive in (str, int, bool, float):
        converter.register_structure_hook(primitive, _strict(primitive))

    converter.register_structure_hook_factory(_is_union_of_primitives, _strict_union)

    # To wrap the hook that cattrs would make for a container, our factory asks cattrs again, standing aside meanwhile.
    wrapping: list[Any] = []

    def checked(cls: Any) -> Callable[[Any, Any], Any]:
        wrapping.append(cls)
        try:
            inner = converter.get_structure_hook(cls, cache_result=False)
        finally:
            wrapping.remove(cls)
        wanted = _json_container(cls)

        def structure(value: Any, target: Any) -> Any:
            if type(value) is not wanted:
                raise _mismatch("a JSON object" if wanted is dict else "a JSON array", value)
            return inner(value, target)

        # cattrs has just noted `inner` as the hook of this type, if it is a mapping: ours must win.
        converter.register_structure_hook_func(lambda other: other is cls or other == cls, structure)
        return structure

    converter.register_structure_hook_factory(
        lambda cls: _json_container(cls) is not None and cls not in wrapping, checked
    )
    return converter


def encode_payload(payload: object, converter: Converter | None = None) -> bytes:
    """Return the bytes of a payload.

    bytes-like objects are taken as they are, a str becomes UTF-8, None is empty; an instance of an attrs class or a
    dataclass, a dict or a list becomes JSON.

    :param converter: a cattrs converter for what becomes JSON, instead of the default one.
    :raises TypeError: another type, or one inside of it that JSON has no form for.
    :raises ValueError: text that is not encodable as UTF-8; NaN, infinity or a circle in what becomes JSON.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, (bytearray, memoryview)):
        return bytes(cast("bytearray | memoryview[int]", payload))
    if payload is None:
        return b""
    try:
        if isinstance(payload, str):
            return payload.encode()
        if isinstance(payload, (dict, list)) or attrs.has(type(payload)) or dataclasses.is_dataclass(type(payload)):
            plain = (converter or _CONVERTER).unstructure(payload)
            return json.dumps(plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"payload: must be encodable as UTF-8: {exc.reason}") from exc
    except RecursionError as exc:
        raise ValueError("payload: nested too deeply, or contains itself") from exc
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"payload: cannot be written as JSON: {exc}") from exc
    advice = "; pass str(value)" if isinstance(payload, (int, float)) else ""
    raise TypeError(
        "payload: must be bytes-like, str, None, a dict, a list, or an instance of an attrs class or dataclass, "
        f"got {type(payload).__name__}{advice}"
    )


def decoder(message_class: Any, converter: Converter | None = None) -> Callable[[bytes], Any]:
    """Return the function that turns a payload into an object of ``message_class``.

    None and ``bytes`` leave the payload as it is; ``str`` is strict UTF-8; everything else is JSON in UTF-8 (``dict``,
    ``list``, attrs classes, dataclasses, typed dicts, ``float``, unions, …: what cattrs structures). Keys of JSON
    objects that no field has are ignored. The function raises `PayloadError` for whatever it cannot turn.

    :param converter: a cattrs converter with rules of its own, instead of the strict default one.
    :raises TypeError: cattrs cannot make a ``message_class``.
    """
    if message_class is None or message_class is bytes:
        return _identity
    plain = isinstance(message_class, type) and get_origin(message_class) is None
    name = message_class.__name__ if plain else f"{message_class!r:.60}"
    if message_class is str:
        structure = _text
    else:
        try:
            hook = (converter or _CONVERTER).get_structure_hook(message_class)
        except Exception as exc:  # whatever resolving annotations may raise: NameError, recursion, cattrs' own
            raise TypeError(
                f"message_class: must be None, bytes, str, dict, list or a class that cattrs can structure, "
                f"got {name}: {_text_of(exc)}"
            ) from exc

        def structure(payload: bytes) -> Any:
            return hook(_loads(payload), message_class)

    def decode(payload: bytes) -> Any:
        try:
            return structure(payload)
        except Exception as exc:  # hooks, validators and __init__ of the user's class raise what they like
            raise PayloadError(f"payload is not a valid {name}: {_reason(exc)}") from exc

    return decode


def _identity(payload: bytes) -> bytes:
    return payload


def _text(payload: bytes) -> str:
    return payload.decode()


def _loads(payload: bytes) -> Any:
    # Decoded here because json.loads() of bytes also guesses UTF-16 and UTF-32.
    return json.loads(payload.decode(), parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.20} is out of the range of a float")
    return value


def _unsupported(cls: Any) -> NoReturn:
    # The default of older cattrs complains only when the first value comes.
    raise TypeError(f"cattrs has no structure hook for {cls!r}")


def _strict(primitive: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, target: Any) -> Any:
        if type(value) is not primitive:
            if primitive is not float or type(value) is not int:
                raise _mismatch(primitive.__name__, value)
            value = float(value)
        # cattrs also comes here for subclasses: IntEnum, `class Celsius(float)`
        return target(value) if isinstance(target, type) and target is not primitive else value

    return structure


def _is_union_of_primitives(cls: Any) -> bool:
    return get_origin(cls) in (Union, UnionType) and set(get_args(cls)) <= {str, int, float, bool, type(None)}


def _strict_union(cls: Any) -> Callable[[Any, Any], Any]:
    # cattrs' own takes True for an int.
    members = get_args(cls)

    def structure(value: Any, _target: Any) -> Any:
        if type(value) in members:
            return value
        if float in members and type(value) is int:
            return float(value)
        raise _mismatch(" | ".join("null" if cls is type(None) else cls.__name__ for cls in members), value)

    return structure


def _mismatch(wanted: str, value: object) -> TypeError:
    return TypeError(f"expected {wanted}, got {'null' if value is None else type(value).__name__}")


def _json_container(cls: Any) -> type | None:
    """Which JSON container a type is made from: dict, list, or None for neither."""
    origin: Any = get_origin(cls) or cls
    if not inspect.isclass(origin) or issubclass(origin, (str, bytes)):
        return None
    if attrs.has(origin) or dataclasses.is_dataclass(origin) or is_typeddict(origin) or issubclass(origin, Mapping):
        return dict
    return list if issubclass(origin, Collection) else None


def _reason(exc: Exception) -> str:
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    if isinstance(exc, UnicodeDecodeError):
        return f"not UTF-8 at byte {exc.start}"
    if isinstance(exc, json.JSONDecodeError):
        return f"not JSON: {exc}"
    if not isinstance(exc, (ClassValidationError, IterableValidationError)):
        return _text_of(exc)
    errors = transform_error(exc, format_exception=_describe)
    more = len(errors) - _SHOWN_ERRORS
    text = "; ".join(errors[:_SHOWN_ERRORS])
    return f"{text[:_SHOWN_LENGTH]}{f'; and {more} more' if more > 0 else ''}"


def _describe(exc: BaseException, cls: type | None) -> str:
    # cattrs would replace the text of other exceptions, a validator's above all, by "invalid value".
    return format_exception(exc, cls) if isinstance(exc, (KeyError, ForbiddenExtraKeysError)) else _text_of(exc)


def _text_of(exc: BaseException) -> str:
    # attrs' validators raise with (message, attribute, …): str() of that is unreadable.
    text = str(exc.args[0]) if exc.args else ""
    name = type(exc).__name__
    if text and isinstance(exc, (TypeError, ValueError)):
        return text[:_SHOWN_LENGTH]
    return f"{name}: {text}"[:_SHOWN_LENGTH] if text else name


_CONVERTER: Final = json_converter()
