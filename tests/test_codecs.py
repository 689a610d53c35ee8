from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import attrs
import cattrs
import pytest
from hypothesis import given, strategies as st

from trio_mqtt_driver._codecs import decoder, encode_payload, json_converter
from trio_mqtt_driver._errors import PayloadError


class Unit(enum.Enum):
    CELSIUS = "C"
    KELVIN = "K"


class Level(enum.IntEnum):
    LOW = 1


@attrs.frozen
class Reading:
    value: float
    count: int = 1
    unit: Unit = Unit.CELSIUS
    tags: list[str] = attrs.field(factory=list[str])
    extra: dict[str, int] = attrs.field(factory=dict[str, int])
    previous: Reading | None = None
    either: int | str | None = None


@attrs.frozen
class AllDefaults:
    x: int = attrs.field(default=1, validator=attrs.validators.ge(0))
    y: int = attrs.field(default=1, validator=attrs.validators.instance_of(int))


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Movie(TypedDict, total=False):
    title: str


class Plain:
    pass


@attrs.frozen
class HasPlain:
    plain: Plain


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


# --- encoding


@pytest.mark.parametrize(
    "payload, expected",
    [
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcd")[::2], b"ac"),
        ("grün", "grün".encode()),
        (None, b""),
        ({"a": [1, None, "é"]}, '{"a":[1,null,"é"]}'.encode()),
        ([1.5, True], b"[1.5,true]"),
        (Point(1, 2), b'{"x":1,"y":2}'),
        (AllDefaults(), b'{"x":1,"y":1}'),
        ([AllDefaults(2, 3)], b'[{"x":2,"y":3}]'),
    ],
)
def test_encode_payload(payload: object, expected: bytes) -> None:
    data = encode_payload(payload)
    assert type(data) is bytes
    assert data == expected


@pytest.mark.parametrize("payload", [1, 1.5, True, Level.LOW])
def test_a_number_is_refused_with_advice(payload: object) -> None:
    with pytest.raises(TypeError, match=rf"^payload: must be .*, got {type(payload).__name__}; pass str\(value\)$"):
        encode_payload(payload)


@pytest.mark.parametrize("payload", [object(), {1}, (1,), Plain(), Reading, lambda: None])
def test_another_type_is_refused_by_name(payload: object) -> None:
    with pytest.raises(TypeError, match=rf"^payload: must be bytes-like, str, .*, got {type(payload).__name__}$"):
        encode_payload(payload)


def circle() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    "payload, error, text",
    [
        ("\ud800", ValueError, r"must be encodable as UTF-8: surrogates not allowed"),
        ({"a": "\ud800"}, ValueError, r"must be encodable as UTF-8: surrogates not allowed"),
        ([math.nan], ValueError, r"cannot be written as JSON: Out of range float values"),
        (Reading(math.inf), ValueError, r"cannot be written as JSON: Out of range float values"),
        ({"a": Plain()}, TypeError, r"cannot be written as JSON: .*Plain"),
        (circle(), ValueError, r"nested too deeply, or contains itself$"),
    ],
)
def test_what_json_has_no_form_for_is_refused(payload: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^payload: {text}"):
        encode_payload(payload)


# --- decoding


def decode_or_catch(decode: Callable[[bytes], Any], payload: bytes) -> Any:
    try:
        return decode(payload)
    except PayloadError as exc:
        return exc


@pytest.mark.parametrize("message_class", [None, bytes])
def test_bytes_stay_as_they_are(message_class: Any) -> None:
    payload = b"\xff\x00"
    assert decoder(message_class)(payload) is payload


def test_str_is_strict_utf8() -> None:
    assert decoder(str)("grün".encode()) == "grün"
    assert decoder(str)(b"") == ""
    with pytest.raises(PayloadError, match=r"^payload is not a valid str: not UTF-8 at byte 2$"):
        decoder(str)(b"ab\xff")


@pytest.mark.parametrize(
    "message_class, payload, expected",
    [
        (dict, b'{"a":[1,null]}', {"a": [1, None]}),
        (list, b"[1,[2]]", [1, [2]]),
        (int, b"42", 42),
        (float, b" 21.5 ", 21.5),
        (float, b"21", 21.0),
        (bool, b"true", True),
        (Any, b"null", None),
        (Level, b"1", Level.LOW),
        (Unit, b'"K"', Unit.KELVIN),
        (Point, b'{"x":1}', Point(1)),
        (Movie, b'{"title":"Brazil"}', {"title": "Brazil"}),
        (dict[str, float], b'{"a":1}', {"a": 1.0}),
        (list[Point], b'[{"x":1},{"x":2,"y":3}]', [Point(1), Point(2, 3)]),
        (Point | None, b"null", None),
        (int | str, b'"x"', "x"),
        (float | None, b"1", 1.0),
        (Annotated[int, "metres"], b"5", 5),
        (Reading, b'{"value":1}', Reading(1.0)),
        (Reading, b'{"value":1.5,"unit":"K","tags":["a"],"unknown":0}', Reading(1.5, unit=Unit.KELVIN, tags=["a"])),
        (Reading, b'{"value":1,"previous":{"value":2}}', Reading(1.0, previous=Reading(2.0))),
    ],
)
def test_json_becomes_an_object(message_class: Any, payload: bytes, expected: object) -> None:
    value = decoder(message_class)(payload)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "message_class, payload, reason",
    [
        (Reading, b"{}", r"Reading: required field missing @ \$\.value"),
        (Reading, b'{"value":"5"}', r"Reading: expected float, got str @ \$\.value"),
        (Reading, b'{"value":true}', r"Reading: expected float, got bool @ \$\.value"),
        (Reading, b'{"value":null}', r"Reading: expected float, got null @ \$\.value"),
        (Reading, b'{"value":1,"count":true}', r"Reading: expected int, got bool @ \$\.count"),
        (Reading, b'{"value":1,"count":1.0}', r"Reading: expected int, got float @ \$\.count"),
        (Reading, b'{"value":1,"unit":"F"}', r"Reading: 'F' is not a valid Unit @ \$\.unit"),
        (Reading, b'{"value":1,"tags":"ab"}', r"Reading: expected a JSON array, got str @ \$\.tags"),
        (Reading, b'{"value":1,"tags":["a",2]}', r"Reading: expected str, got int @ \$\.tags\[1\]"),
        (Reading, b'{"value":1,"extra":[]}', r"Reading: expected a JSON object, got list @ \$\.extra"),
        (Reading, b'{"value":1,"extra":{"a":"1"}}', r"Reading: expected int, got str @ \$\.extra\['a'\]"),
        (Reading, b'{"value":1,"previous":{"value":""}}', r"Reading: expected float, got str @ \$\.previous\.value"),
        (Reading, b'{"value":1,"either":true}', r"Reading: expected int \| str \| null, got bool @ \$\.either"),
        (AllDefaults, b"[]", r"AllDefaults: expected a JSON object, got list"),
        (AllDefaults, b'""', r"AllDefaults: expected a JSON object, got str"),
        (AllDefaults, b"null", r"AllDefaults: expected a JSON object, got null"),
        (AllDefaults, b'{"x":-1}', r"AllDefaults: 'x' must be >= 0: -1 @ \$"),
        (Point, b'{"x":1,"y":[]}', r"Point: expected int, got list @ \$\.y"),
        (Movie, b"[]", r"Movie: expected a JSON object, got list"),
        (dict, b"[]", r"dict: expected a JSON object, got list"),
        (list, b"{}", r"list: expected a JSON array, got dict"),
        (set[int], b'"12"', r"set\[int\]: expected a JSON array, got str"),
        (dict[str, int], b"[]", r"dict\[str, int\]: expected a JSON object, got list"),
        (Level, b"2", r"Level: 2 is not a valid Level"),
        (Level, b"true", r"Level: expected int, got bool"),
        (int, b"", r"int: not JSON: Expecting value: line 1 column 1 \(char 0\)"),
        (int, b"\xff", r"int: not UTF-8 at byte 0"),
        (dict, '{"a":1}'.encode("utf-16"), r"dict: not UTF-8 at byte 0"),
        (dict, b'{"a":NaN}', r"dict: NaN is not JSON"),
        (float, b"-Infinity", r"float: -Infinity is not JSON"),
        (list, b"[1e999]", r"list: 1e999 is out of the range of a float"),
        (float, b"1" + b"0" * 400, r"float: OverflowError: int too large to convert to float"),
        (list, b"[" * 100_000, r"list: nested too deeply"),
        (Reading, b'{"value":1,"previous":' * 100_000, r"Reading: nested too deeply"),
    ],
)
def test_a_payload_that_does_not_fit_is_a_payload_error(message_class: Any, payload: bytes, reason: str) -> None:
    decode = decoder(message_class)
    with pytest.raises(PayloadError, match=f"^payload is not a valid {reason}$") as caught:
        decode(payload)
    assert caught.value.__cause__ is not None


def test_the_message_of_a_payload_error_is_short() -> None:
    with pytest.raises(PayloadError, match=r"; and 49997 more$") as caught:
        decoder(list[int])(json.dumps(["x"] * 50_000).encode())
    assert len(str(caught.value)) < 300
    with pytest.raises(PayloadError) as caught:
        decoder(Unit)(json.dumps("x" * 100_000).encode())
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("depth", [1, 30, 60, 90, 120, 150, 300, 900, 3000])
@pytest.mark.parametrize("bottom", [b"null", b'"x"'])
def test_no_depth_gets_past_payload_error(depth: int, bottom: bytes) -> None:
    decode = decoder(Reading)
    payload = b'{"value":1,"previous":' * depth + bottom + b"}" * depth
    outcome = decode_or_catch(decode, payload)
    if isinstance(outcome, PayloadError):
        assert bottom == b'"x"' or depth > 60
        assert len(str(outcome)) < 300
    else:
        assert bottom == b"null"
        assert isinstance(outcome, Reading)


@given(st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_give_a_value_or_a_payload_error(payload: bytes) -> None:
    for message_class in (
        Reading,
        AllDefaults,
        Point,
        Movie,
        dict,
        list,
        dict[str, int],
        Level,
        float,
        int | None,
        str,
    ):
        outcome = decode_or_catch(decoder(message_class), payload)
        assert not isinstance(outcome, PayloadError) or len(str(outcome)) < 400


@given(st.dictionaries(st.text(), JSON_VALUES) | st.lists(JSON_VALUES))
def test_json_goes_out_and_comes_back(value: Any) -> None:
    assert decoder(type(value))(encode_payload(value)) == value


READINGS = st.builds(
    Reading,
    value=st.floats(allow_nan=False, allow_infinity=False),
    count=st.integers(),
    unit=st.sampled_from(Unit),
    tags=st.lists(st.text()),
    extra=st.dictionaries(st.text(), st.integers()),
    either=st.none() | st.integers() | st.text(),
)


@given(READINGS, READINGS)
def test_objects_go_out_and_come_back(reading: Reading, previous: Reading) -> None:
    reading = attrs.evolve(reading, previous=previous)
    assert decoder(Reading)(encode_payload(reading)) == reading


def test_it_does_not_matter_which_class_was_seen_first() -> None:
    # cattrs notes the hook of a mapping under its type while it makes the class's: that must not undo the check.
    for message_classes in ((Reading, dict[str, int]), (dict[str, int], Reading)):
        converter = json_converter()
        for message_class in (*message_classes, *message_classes):
            with pytest.raises(PayloadError, match="expected a JSON object, got list"):
                decoder(message_class, converter)(b"[]")


# --- message classes that cannot be


@pytest.mark.parametrize("message_class", [Plain, HasPlain, object, 5, "Reading", len, Plain(), Point | AllDefaults])
def test_an_unsupported_class_is_refused_at_once(message_class: Any) -> None:
    with pytest.raises(TypeError, match=r"^message_class: must be None, bytes, str, .* can structure, got "):
        decoder(message_class)


def test_a_class_with_an_unknown_annotation_is_refused_at_once() -> None:
    name: Any = "NoSuchClass"
    unknown = attrs.make_class("unknown", {"x": attrs.field(type=name)})
    with pytest.raises(TypeError, match=r"got unknown: .*'NoSuchClass'"):
        decoder(unknown)


# --- converters of the user's own


def test_an_injected_converter_makes_its_own_rules() -> None:
    assert decoder(AllDefaults, cattrs.Converter())(b'{"x":"5"}') == AllDefaults(5)
    with pytest.raises(PayloadError, match=r"AllDefaults: extra fields found \(z\) @ \$$"):
        decoder(AllDefaults, cattrs.Converter(forbid_extra_keys=True))(b'{"z":5}')


def test_hooks_can_be_added_to_a_strict_converter() -> None:
    converter = json_converter()
    converter.register_structure_hook(Plain, lambda _value, _cls: Plain())
    converter.register_unstructure_hook(Plain, lambda _value: "plain")
    assert isinstance(decoder(HasPlain, converter)(b'{"plain":1}').plain, Plain)
    assert encode_payload(HasPlain(Plain()), converter) == b'{"plain":"plain"}'
    with pytest.raises(PayloadError, match="expected a JSON object, got list"):
        decoder(HasPlain, converter)(b"[]")
