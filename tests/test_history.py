from __future__ import annotations

import gc
import itertools
import json
import ssl
import sys
import weakref
from typing import Any

import attrs
import pytest

from trio_mqtt_driver._errors import ConnectionLostError, PublishError, TLSError
from trio_mqtt_driver._history import Counters, Event, History, describe

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def chained(*errors: Exception) -> Exception:
    """``raise errors[0] from errors[1]``, which came from errors[2], …"""
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


def record(history: History, number: int, error: BaseException | None = None) -> Event:
    return history.record(at=number, wall=1e9 + number, kind="live", generation=number, text=f"t{number}", error=error)


# --- describe


@pytest.mark.parametrize(
    "error, text",
    [
        (TLSError("certificate expired"), "TLSError: certificate expired"),
        (ConnectionLostError(), "ConnectionLostError"),
        (PublishError("not sent", None), "PublishError: not sent"),
        (KeyError("x"), "KeyError: 'x'"),
        (
            chained(TLSError("handshake failed"), ssl.SSLError(1, "bad record")),
            "TLSError: handshake failed [SSLError: bad record]",
        ),
        (chained(TLSError("no: bad record"), ValueError("bad record")), "TLSError: no: bad record"),
        (chained(TLSError("a"), ValueError("b"), OSError("c")), "TLSError: a [OSError: c]"),
        (chained(TLSError("a"), EOFError()), "TLSError: a [EOFError]"),
        (chained(EOFError(), EOFError()), "EOFError"),
        (ValueError("two\n  lines\r\n"), "ValueError: two lines"),
        (
            ExceptionGroup("many", [ValueError("refused"), ValueError("late")]),
            "ExceptionGroup: many (2 sub-exceptions) [ValueError: refused]",
        ),
        (
            chained(TLSError("a"), OSError("all failed"), ExceptionGroup("g", [chained(OSError("b"), OSError("c"))])),
            "TLSError: a [OSError: c]",
        ),
    ],
)
def test_describe(error: BaseException, text: str) -> None:
    assert describe(error) == text


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert describe(first) == "ValueError: first [ValueError: second]"


def test_a_long_message_is_cut() -> None:
    text = describe(ConnectionLostError("x" * 100_000))
    assert len(text) == 500
    assert text.endswith("x…")


# --- the ring


def test_events_are_kept_in_order_and_the_oldest_is_forgotten() -> None:
    history = History(capacity=3)
    events = [record(history, number) for number in range(5)]
    assert list(history) == events[2:]
    assert len(history) == 3
    assert history.as_dict()["forgotten"] == 2


def test_the_last_error_outlives_its_event() -> None:
    history = History(capacity=2)
    assert history.last_error is None
    record(history, 1, TLSError("first"))
    record(history, 2, TLSError("second"))
    for number in range(10):
        record(history, number)
    assert history.last_error == "TLSError: second"


def test_recording_while_iterating_is_allowed() -> None:
    history = History(capacity=2)
    record(history, 1)
    record(history, 2)
    for event in history:
        record(history, event.generation + 2)
    assert [event.generation for event in history] == [3, 4]


def test_events_are_values() -> None:
    event = record(History(), 1)
    assert event == record(History(), 1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.text = "other"  # type: ignore[misc]  # what is tested


def test_an_error_is_not_kept_alive() -> None:
    class Buffer:
        pass

    history = History()

    def fail() -> weakref.ref[Buffer]:
        buffer = Buffer()
        reference = weakref.ref(buffer)
        try:
            raise TLSError("gone")
        except TLSError as exc:
            record(history, 1, exc)
        return reference

    reference = fail()
    gc.collect()
    assert reference() is None
    assert history.last_error == "TLSError: gone"


def test_as_dict_is_json_with_everything_in_it() -> None:
    history = History()
    record(history, 1, ConnectionLostError("end of file"))
    history.counters.messages_in += 7
    history.counters.losses += 1
    assert json.loads(json.dumps(history.as_dict(), allow_nan=False)) == {
        "counters": {
            **dict.fromkeys((field.name for field in attrs.fields(Counters)), 0),
            "messages_in": 7,
            "losses": 1,
        },
        "last_error": "ConnectionLostError: end of file",
        "forgotten": 0,
        "events": [
            {
                "at": 1,
                "wall": 1e9 + 1,
                "kind": "live",
                "generation": 1,
                "text": "t1",
                "error": "ConnectionLostError: end of file",
            }
        ],
    }


def test_a_long_text_is_cut() -> None:
    event = History().record(at=0, wall=0, kind="live", generation=0, text="x" * 10_000)
    assert len(event.text) == 500


def test_a_misspelt_counter_is_an_error() -> None:
    counters: Any = Counters()
    with pytest.raises(AttributeError):
        counters.mesages_in = 1


@pytest.mark.parametrize(
    "capacity, error", [(0, ValueError), (-1, ValueError), ("5", TypeError), (True, TypeError), (1.5, TypeError)]
)
def test_a_wrong_capacity_is_refused(capacity: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^capacity: must be an int >= 1, got "):
        History(capacity)
