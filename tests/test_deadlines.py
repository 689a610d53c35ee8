"""When PINGREQ goes out and when an answer is overdue, in plain numbers."""

from __future__ import annotations

import math

import pytest

from trio_mqtt_driver import AckTimeoutError, DriverConfig, Endpoint, KeepAliveError
from trio_mqtt_driver._deadlines import Deadlines
from trio_mqtt_driver._replies import Ping, Reply

NOTHING_SENT = math.inf


@pytest.fixture
def deadlines() -> Deadlines:
    config = DriverConfig(endpoint=Endpoint(host="h", port=1), ping_timeout=10, ack_timeout=5)
    made = Deadlines(config, now=100.0)
    made.keep_alive = 30.0
    made.live = True
    return made


def ping(deadlines: Deadlines, now: float) -> None:
    deadlines.pings.append(Ping(now, Reply[float]()))
    deadlines.sent_at = now


def test_a_quiet_link_is_pinged_after_the_keep_alive(deadlines: Deadlines) -> None:
    assert not deadlines.ping_due(129.9)
    assert deadlines.ping_due(130.0)
    assert deadlines.look_at(100.0, NOTHING_SENT) == 130.0


def test_sending_alone_does_not_hide_that_nothing_arrives(deadlines: Deadlines) -> None:
    deadlines.sent_at = 129.0  # QoS 0 publishes need no answer
    assert deadlines.ping_due(130.0)


def test_receiving_alone_does_not_excuse_us_from_sending(deadlines: Deadlines) -> None:
    deadlines.heard_at = 129.0
    assert deadlines.ping_due(130.0)


def test_one_open_ping_is_enough_until_we_must_send_again(deadlines: Deadlines) -> None:
    ping(deadlines, 130.0)
    assert not deadlines.ping_due(139.0)
    deadlines.heard_at = 159.0
    assert deadlines.ping_due(160.0)


def test_an_unanswered_ping_is_overdue_after_the_ping_timeout(deadlines: Deadlines) -> None:
    ping(deadlines, 130.0)
    assert deadlines.overdue(139.9, NOTHING_SENT) is None
    assert deadlines.look_at(130.0, NOTHING_SENT) == 140.0
    error = deadlines.overdue(140.0, NOTHING_SENT)
    assert isinstance(error, KeepAliveError)
    assert "ping_timeout=10 s" in str(error)
    assert "40.0 s" in str(error)


def test_bytes_that_arrive_extend_the_wait_for_a_pong(deadlines: Deadlines) -> None:
    ping(deadlines, 130.0)
    deadlines.heard_at = 138.0  # a large message is still coming in, the PINGRESP is behind it
    assert deadlines.overdue(147.9, NOTHING_SENT) is None
    assert isinstance(deadlines.overdue(148.0, NOTHING_SENT), KeepAliveError)


def test_a_broker_that_sends_and_never_answers_is_given_up(deadlines: Deadlines) -> None:
    ping(deadlines, 130.0)
    deadlines.heard_at = 159.9
    assert deadlines.overdue(159.9, NOTHING_SENT) is None
    assert isinstance(deadlines.overdue(160.0, NOTHING_SENT), KeepAliveError)
    deadlines.mid_packet = True  # the PINGRESP cannot come before the end of a packet that takes minutes
    assert deadlines.overdue(160.0, NOTHING_SENT) is None
    deadlines.sent_at = 160.0
    assert deadlines.look_at(160.0, NOTHING_SENT) == pytest.approx(169.9)


def test_a_publish_is_overdue_after_the_ack_timeout(deadlines: Deadlines) -> None:
    assert deadlines.overdue(114.9, 110.0) is None
    assert deadlines.look_at(110.0, 110.0) == 115.0
    error = deadlines.overdue(115.0, 110.0)
    assert isinstance(error, AckTimeoutError)
    assert "ack_timeout=5 s" in str(error)


def test_what_is_not_on_the_wire_yet_cannot_be_overdue(deadlines: Deadlines) -> None:
    assert deadlines.overdue(10_000.0, NOTHING_SENT) is None


def test_while_reading_is_paused_nothing_is_overdue_but_pings_go_out(deadlines: Deadlines) -> None:
    ping(deadlines, 110.0)
    deadlines.paused = True
    assert deadlines.overdue(500.0, 110.0) is None
    assert deadlines.ping_due(140.0)
    assert not deadlines.ping_due(139.0)
    assert deadlines.look_at(139.0, 110.0) == 140.0
    assert deadlines.look_at(120.0, 110.0) == 125.0


def test_after_a_pause_all_waiting_begins_anew(deadlines: Deadlines) -> None:
    ping(deadlines, 110.0)
    deadlines.paused = True
    deadlines.resume(500.0)
    assert deadlines.overdue(504.9, 110.0) is None
    assert isinstance(deadlines.overdue(505.0, 110.0), AckTimeoutError)
    assert isinstance(deadlines.overdue(510.0, NOTHING_SENT), KeepAliveError)


def test_without_keep_alive_nothing_is_due(deadlines: Deadlines) -> None:
    deadlines.keep_alive = math.inf
    assert not deadlines.ping_due(1e9)
    assert deadlines.look_at(100.0, NOTHING_SENT) == math.inf


def test_before_the_link_is_live_only_the_brokers_clock_runs(deadlines: Deadlines) -> None:
    """Each step towards a live link has a deadline and an error of its own."""
    deadlines.live = False
    deadlines.pings.append(Ping(100.0, Reply()))
    assert deadlines.overdue(1000.0, oldest_sent_at=100.0) is None
    assert deadlines.look_at(100.0, oldest_sent_at=100.0) == 130.0
    assert deadlines.ping_due(130.0)
    deadlines.sent_at = 130.0
    assert not deadlines.ping_due(131.0)
    deadlines.live = True
    assert isinstance(deadlines.overdue(131.0, oldest_sent_at=math.inf), KeepAliveError)


def test_before_the_link_is_live_nothing_is_overdue_but_the_broker_hears_from_us(deadlines: Deadlines) -> None:
    deadlines.live = False
    ping(deadlines, 110.0)
    assert deadlines.overdue(1000.0, 110.0) is None
    assert not deadlines.ping_due(139.0)
    assert deadlines.ping_due(140.0)
    assert deadlines.look_at(110.0, 110.0) == 140.0
