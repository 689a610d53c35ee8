"""Which PUBLISH of QoS 2 is a new message, whatever a broker has lost track of."""

from __future__ import annotations

import pytest

from trio_mqtt_driver import Endpoint, Message
from trio_mqtt_driver._exchanges import Exchanges
from trio_mqtt_driver._session import Session, SessionKey


def incoming(packet_id: int = 1, payload: bytes = b"x", *, dup: bool = False, topic: str = "a") -> Message[bytes]:
    return Message(topic, payload, 2, dup=dup, packet_id=packet_id)


def complete(exchanges: Exchanges, packet_id: int = 1, payload: bytes = b"x") -> None:
    assert exchanges.find(incoming(packet_id, payload), here=False) is None
    exchanges.release(packet_id)


def reconnect(exchanges: Exchanges) -> None:
    """After an attempt that was in vain."""
    exchanges.connect()
    exchanges.connect()


def is_new(exchanges: Exchanges, message: Message[bytes], *, here: bool = False) -> bool:
    return exchanges.find(message, here=here) is None


@pytest.mark.parametrize(
    "message, here, new",
    [
        (incoming(dup=True), False, False),
        (incoming(), True, False),
        (incoming(payload=b"other"), True, False),  # by the rules; nobody is to say two things in one exchange
        (incoming(), False, True),  # without DUP it is the first transmission
        (incoming(payload=b"other", dup=True), False, True),
        (incoming(topic="other", dup=True), False, True),
        (incoming(2, dup=True), False, True),
    ],
)
def test_while_an_exchange_is_open(message: Message[bytes], here: bool, new: bool) -> None:
    exchanges = Exchanges()
    first = incoming()
    assert is_new(exchanges, first)
    assert is_new(exchanges, message, here=here) == new
    expected = message if new else first
    assert exchanges.open[message.packet_id].message is expected


@pytest.mark.parametrize(
    "message, new",
    [
        (incoming(dup=True), False),
        (incoming(payload=b"other", dup=True), True),
        (incoming(2, dup=True), True),
        (incoming(), True),
    ],
)
def test_when_it_was_released(message: Message[bytes], new: bool) -> None:
    exchanges = Exchanges()
    complete(exchanges)
    reconnect(exchanges)
    assert is_new(exchanges, message) == new
    assert exchanges.open[message.packet_id].message is (message if new else None)


def test_a_broker_that_uses_identifiers_again_at_once_is_taken_at_its_word() -> None:
    exchanges = Exchanges()
    complete(exchanges, 1)
    complete(exchanges, 2)
    complete(exchanges, 1)
    reconnect(exchanges)
    for packet_id in (1, 2):
        assert is_new(exchanges, incoming(packet_id, dup=True))


def test_the_last_thousand_are_remembered() -> None:
    exchanges = Exchanges()
    for packet_id in range(1, 1002):
        complete(exchanges, packet_id)
    reconnect(exchanges)
    assert is_new(exchanges, incoming(1, dup=True))
    assert not is_new(exchanges, incoming(2, dup=True))
    assert not is_new(exchanges, incoming(1001, dup=True))


def test_a_session_that_the_broker_has_forgotten_begins_from_nothing() -> None:
    exchanges = Exchanges()
    complete(exchanges)
    complete(exchanges)  # from now on nothing is remembered
    assert is_new(exchanges, incoming(2))
    exchanges.clear()
    assert not exchanges.open
    assert is_new(exchanges, incoming(2, dup=True))
    exchanges.clear()
    complete(exchanges)
    reconnect(exchanges)
    assert not is_new(exchanges, incoming(dup=True))


def test_on_the_next_connection_it_is_a_new_message() -> None:
    """nats-server numbers anew on each."""
    exchanges = Exchanges()
    complete(exchanges)
    exchanges.connect()
    assert is_new(exchanges, incoming(dup=True))


def test_a_session_that_ends_with_its_connection_remembers_nothing() -> None:
    """It would be for nobody; and where it begins anew, that stays so."""
    exchanges = Session().exchanges
    for _ in range(2):
        complete(exchanges)
        reconnect(exchanges)
        assert is_new(exchanges, incoming(dup=True))
        exchanges.clear()
    lasting = Session(SessionKey("me", Endpoint(host="broker", port=1883), 5)).exchanges
    complete(lasting)
    reconnect(lasting)
    assert not is_new(lasting, incoming(dup=True))


@pytest.mark.parametrize("dup", [True, False])
def test_one_that_was_refused_is_known_on_the_next_connection_with_its_code(dup: bool) -> None:
    """The refusal may have been lost with the link; without DUP it is another message."""
    exchanges = Exchanges()
    assert is_new(exchanges, incoming())
    exchanges.refuse(1, 0x97)
    exchanges.connect()
    found = exchanges.find(incoming(dup=dup), here=False)
    if dup:
        assert found is not None
        assert (found.message, found.code) == (None, 0x97)
    else:
        assert found is None


def test_one_that_was_refused_is_over_on_the_connection_that_refused_it() -> None:
    exchanges = Exchanges()
    assert is_new(exchanges, incoming())
    exchanges.refuse(1, 0x97)
    assert is_new(exchanges, incoming(dup=True))
