"""When PINGREQ goes out and when an answer is overdue, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from trio_mqtt_driver import (
    AckTimeoutError,
    ConnectionLostError,
    DriverConfig,
    Endpoint,
    KeepAliveError,
    MQTTDriverError,
    ProtocolError,
    ReasonCode,
    ServerDisconnectedError,
    SuspendedError,
    TLSError,
)
from trio_mqtt_driver._deadlines import Deadlines
from trio_mqtt_driver._replies import Ping, Reply

NOTHING_SENT = math.inf
EPOCH = 1_700_000_000.0


class Driven(Deadlines):
    """Looked at as the timer of a connection does, with a wall clock that goes with the other one."""

    slept = 0.0

    def look(self, now: float, oldest_sent_at: float) -> str | None:
        return self.observe(now, EPOCH + self.slept + now, oldest_sent_at)

    def asks(self, now: float, oldest_sent_at: float = NOTHING_SENT) -> bool:
        self.look(now, oldest_sent_at)
        return self.ping_due(now)

    def error(self, now: float, oldest_sent_at: float = NOTHING_SENT) -> MQTTDriverError | None:
        self.look(now, oldest_sent_at)
        return self.overdue(now)

    def wakes(self, now: float, oldest_sent_at: float = NOTHING_SENT) -> float:
        self.look(now, oldest_sent_at)
        return self.look_at(now)


def made(**options: Any) -> Driven:
    timeouts: dict[str, Any] = {"ping_timeout": 10, "ack_timeout": 5, **options}
    config = DriverConfig(endpoint=Endpoint(host="h", port=1), **timeouts)
    deadlines = Driven(config, 100.0, EPOCH + 100.0)
    deadlines.agree(30.0)
    deadlines.live = True
    return deadlines


@pytest.fixture
def deadlines() -> Driven:
    return made()


def ping(deadlines: Driven, now: float) -> None:
    deadlines.pings.append(Ping(now, Reply[float]()))
    deadlines.sent_at = now


@pytest.mark.parametrize("keep_alive, after", [(1, 0.75), (2, 1.5), (4, 3), (5, 4), (30, 29), (65535, 65534)])
def test_a_quiet_link_is_pinged_before_the_keep_alive_is_over(
    deadlines: Driven, keep_alive: float, after: float
) -> None:
    deadlines.agree(keep_alive)
    assert not deadlines.asks(100.0)
    assert deadlines.wakes(100.0) == 100.0 + after
    assert not deadlines.asks(99.9 + after)
    assert deadlines.asks(100.0 + after)


def test_sending_alone_does_not_hide_that_nothing_arrives(deadlines: Driven) -> None:
    deadlines.sent_at = 129.0  # QoS 0 publishes need no answer
    assert deadlines.asks(130.0)


def test_receiving_alone_does_not_excuse_us_from_sending(deadlines: Driven) -> None:
    deadlines.heard_at = 129.0
    assert deadlines.asks(130.0)


def test_one_open_ping_is_enough_until_we_must_send_again(deadlines: Driven) -> None:
    ping(deadlines, 130.0)
    assert not deadlines.asks(139.0)
    deadlines.heard_at = 159.0
    assert deadlines.asks(160.0)


def test_an_unanswered_ping_is_overdue_after_the_ping_timeout(deadlines: Driven) -> None:
    ping(deadlines, 130.0)
    assert deadlines.error(139.9) is None
    assert deadlines.wakes(130.0) == 140.0
    error = deadlines.error(140.0)
    assert isinstance(error, KeepAliveError)
    assert "ping_timeout=10 s" in str(error)
    assert "40.0 s" in str(error)


def test_bytes_that_arrive_extend_the_wait_for_a_pong(deadlines: Driven) -> None:
    ping(deadlines, 130.0)
    deadlines.heard_at = 138.0  # a large message is still coming in, the PINGRESP is behind it
    assert deadlines.error(147.9) is None
    assert isinstance(deadlines.error(148.0), KeepAliveError)


def test_a_broker_that_sends_and_never_answers_is_given_up(deadlines: Driven) -> None:
    ping(deadlines, 130.0)
    deadlines.heard_at = 159.9
    assert deadlines.error(159.9) is None
    assert isinstance(deadlines.error(160.0), KeepAliveError)
    deadlines.heard(159.9, 50_000, 50_000, more=False)  # a packet that takes minutes, with the PINGRESP behind it
    assert deadlines.error(160.0) is None
    deadlines.sent_at = 160.0
    assert deadlines.wakes(160.0) == pytest.approx(169.9)


@pytest.mark.parametrize("rate, accepted", [(99, False), (100, True)])
def test_a_packet_that_trickles_in_is_no_excuse(deadlines: Driven, rate: int, accepted: bool) -> None:
    """It could take years."""
    ping(deadlines, 130.0)
    deadlines.heard(130.0, 700, 1, more=False)
    deadlines.heard(160.0, 30 * rate - 1, 30 * rate, more=False)
    assert (deadlines.error(160.0) is None) is accepted
    deadlines.heard(160.0, 700, 1, more=False)  # of another packet
    assert deadlines.error(160.0) is None


def test_what_lies_unread_may_be_the_answer(deadlines: Driven) -> None:
    """The program was busy for longer than any answer may take, and the read has brought as much as it could."""
    ping(deadlines, 130.0)
    deadlines.heard(165.0, 65536, 0, more=True)
    assert deadlines.error(165.0) is None
    deadlines.heard(165.0, 100, 0, more=False)
    assert isinstance(deadlines.error(165.0), KeepAliveError)


def test_a_ping_behind_other_bytes_is_not_asked_yet(deadlines: Driven) -> None:
    deadlines.pings.append(Ping(130.0, Reply[float](), 1000))
    deadlines.flushed(139.0, 400)
    assert deadlines.error(148.9) is None
    deadlines.flushed(148.0, 1000)
    assert deadlines.error(157.9) is None
    deadlines.flushed(157.9, 1500)  # these were behind it
    assert isinstance(deadlines.error(158.0), KeepAliveError)


def test_a_doubt_waits_for_its_ping_to_leave(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    deadlines.pings.append(Ping(115.0, Reply[float](), 1000))
    deadlines.flushed(119.0, 1000)
    assert deadlines.error(123.9, 110.0) is None
    assert deadlines.wakes(119.0, 110.0) == 124.0
    assert isinstance(deadlines.error(124.0, 110.0), AckTimeoutError)


def test_a_publish_is_late_after_the_ack_timeout_and_the_broker_is_asked(deadlines: Driven) -> None:
    assert deadlines.error(114.9, 110.0) is None
    assert not deadlines.asks(114.9, 110.0)
    assert deadlines.wakes(110.0, 110.0) == 115.0
    assert deadlines.asks(115.0, 110.0)
    assert deadlines.error(115.0, 110.0) is None


def test_what_is_not_on_the_wire_yet_cannot_be_overdue(deadlines: Driven) -> None:
    assert deadlines.error(10_000.0) is None


def test_while_reading_is_paused_nothing_is_overdue_but_pings_go_out(deadlines: Driven) -> None:
    ping(deadlines, 110.0)
    deadlines.paused = True
    assert deadlines.error(500.0, 110.0) is None
    assert deadlines.asks(139.0)
    assert not deadlines.asks(138.0)
    assert deadlines.wakes(138.0, 110.0) == 139.0
    assert deadlines.wakes(120.0, 110.0) == 125.0


def test_after_a_pause_all_waiting_begins_anew(deadlines: Driven) -> None:
    ping(deadlines, 110.0)
    deadlines.paused = True
    assert not deadlines.asks(120.0, 110.0)
    deadlines.resume(500.0)
    assert deadlines.error(509.9, 110.0) is None
    assert isinstance(deadlines.error(510.0), KeepAliveError)
    assert isinstance(deadlines.error(510.0, 110.0), KeepAliveError)


def test_without_keep_alive_nothing_is_due(deadlines: Driven) -> None:
    deadlines.agree(math.inf)
    assert not deadlines.asks(1e9)
    assert deadlines.wakes(100.0) == math.inf


def test_before_the_link_is_live_only_the_brokers_clock_runs(deadlines: Driven) -> None:
    """Each step towards a live link has a deadline and an error of its own."""
    deadlines.live = False
    deadlines.pings.append(Ping(100.0, Reply()))
    assert deadlines.error(1000.0, 100.0) is None
    assert deadlines.wakes(100.0, 100.0) == 129.0
    assert deadlines.asks(129.0)
    deadlines.sent_at = 130.0
    assert not deadlines.asks(131.0)
    deadlines.live = True
    assert isinstance(deadlines.error(131.0), KeepAliveError)


def test_before_the_link_is_live_nothing_is_overdue_but_the_broker_hears_from_us(deadlines: Driven) -> None:
    deadlines.live = False
    ping(deadlines, 110.0)
    assert deadlines.error(1000.0, 110.0) is None
    assert not deadlines.asks(138.9)
    assert deadlines.asks(139.0)
    assert deadlines.wakes(110.0, 110.0) == 139.0


# -- a late acknowledgement -------------------------------------------------------------------------------------------


def test_a_link_without_any_answer_is_half_open(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    assert not deadlines.asks(115.0, 110.0)
    assert deadlines.wakes(115.0, 110.0) == 120.0
    assert deadlines.error(119.9, 110.0) is None
    error = deadlines.error(120.0, 110.0)
    assert isinstance(error, AckTimeoutError)
    assert "no acknowledgement within ack_timeout=5 s and no answer to PINGREQ, nothing received for 20.0 s" in str(
        error
    )
    assert "half-open" in str(error)


def test_a_broker_that_answers_pings_but_does_not_acknowledge_is_given_up(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    deadlines.heard_at = 115.1
    deadlines.pong()
    error = deadlines.error(115.1, 110.0)
    assert isinstance(error, AckTimeoutError)
    assert str(error) == "no acknowledgement within ack_timeout=5 s, although the broker answers PINGREQ"


def test_an_acknowledgement_that_comes_after_all_ends_the_doubt(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    deadlines.heard_at = 115.1
    deadlines.pong()
    assert deadlines.error(115.1, 115.1) is None  # the next one in line waits since the first was acknowledged
    assert deadlines.error(120.0, 115.1) is None
    assert deadlines.wakes(115.1, 115.1) == pytest.approx(120.1)
    assert deadlines.asks(120.1, 115.1)
    assert deadlines.error(120.1, 115.1) is None


def test_an_answer_for_one_late_publish_says_nothing_of_the_next(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    deadlines.pong()
    assert deadlines.error(115.5, 110.5) is None
    assert deadlines.asks(115.5, 110.5)


def test_a_ping_that_is_out_already_will_do_if_it_went_out_behind_the_publish(deadlines: Driven) -> None:
    ping(deadlines, 112.0)
    assert not deadlines.asks(115.0, 110.0)
    assert deadlines.wakes(115.0, 110.0) == 120.0
    deadlines.pong()
    assert isinstance(deadlines.error(115.1, 110.0), AckTimeoutError)


def test_a_ping_that_went_out_before_the_publish_is_answered_before_it_and_says_nothing(deadlines: Driven) -> None:
    ping(deadlines, 109.0)
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    deadlines.heard_at = 116.0
    deadlines.pong()
    assert deadlines.error(116.0, 110.0) is None
    deadlines.pong()
    assert isinstance(deadlines.error(116.0, 110.0), AckTimeoutError)


def test_a_ping_that_was_answered_before_the_acknowledgement_was_late_says_nothing(deadlines: Driven) -> None:
    ping(deadlines, 112.0)
    deadlines.pong()
    assert deadlines.error(115.0, 110.0) is None
    assert deadlines.asks(115.0, 110.0)


def test_bytes_that_arrive_extend_the_doubt_but_not_for_ever(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    deadlines.heard_at = 129.0
    assert deadlines.error(129.9, 110.0) is None
    error = deadlines.error(130.0, 110.0)
    assert isinstance(error, AckTimeoutError)
    assert "although other packets arrive" in str(error)
    deadlines.heard(129.0, 50_000, 50_000, more=False)  # the PINGRESP is behind a packet that takes long
    assert deadlines.error(130.0, 110.0) is None
    assert deadlines.error(134.0, 110.0) is not None


def test_the_doubt_begins_when_it_is_noticed(deadlines: Driven) -> None:
    """An event loop that was blocked for a minute has not read what came meanwhile."""
    assert deadlines.asks(180.0, 110.0)
    ping(deadlines, 180.0)
    assert deadlines.error(184.9, 110.0) is None
    assert isinstance(deadlines.error(185.0, 110.0), AckTimeoutError)


def test_a_pause_of_reading_ends_the_doubt(deadlines: Driven) -> None:
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    deadlines.paused = True
    assert deadlines.error(125.0, 110.0) is None
    deadlines.resume(130.0)
    deadlines.pong()
    assert deadlines.error(134.9, 110.0) is None
    assert deadlines.asks(135.0, 110.0)
    assert deadlines.error(139.0, 110.0) is None


@pytest.mark.parametrize("ping_timeout, ends", [(2, 117.0), (10, 120.0), (math.inf, 120.0)])
def test_the_shorter_timeout_bounds_the_doubt(ping_timeout: float, ends: float) -> None:
    deadlines = made(ping_timeout=ping_timeout)
    assert deadlines.asks(115.0, 110.0)
    ping(deadlines, 115.0)
    assert deadlines.wakes(115.0, 110.0) == ends
    assert deadlines.error(ends - 0.1, 110.0) is None
    assert isinstance(deadlines.error(ends, 110.0), AckTimeoutError)


def test_without_an_ack_timeout_no_acknowledgement_is_late() -> None:
    deadlines = made(ack_timeout=math.inf)
    deadlines.agree(math.inf)
    assert not deadlines.asks(1e6, 110.0)
    assert deadlines.error(1e6, 110.0) is None
    assert deadlines.wakes(1e6, 110.0) == math.inf


# -- a machine that was suspended -------------------------------------------------------------------------------------


def test_a_jump_of_the_wall_clock_puts_the_link_in_doubt(deadlines: Driven) -> None:
    assert not deadlines.asks(105.0)
    deadlines.slept = 600
    assert deadlines.asks(106.0)
    ping(deadlines, 106.0)
    assert not deadlines.asks(106.0)
    assert deadlines.wakes(106.0) == 111.0
    assert deadlines.error(110.9) is None
    error = deadlines.error(111.0)
    assert isinstance(error, KeepAliveError)
    assert "no answer to PINGREQ within 5 s" in str(error)


def test_a_link_that_answers_stays_and_the_jump_is_told_once(deadlines: Driven) -> None:
    deadlines.slept = 600
    assert deadlines.asks(106.0)
    ping(deadlines, 106.0)
    deadlines.heard_at = 106.2
    deadlines.pong()
    eof = ConnectionLostError("the broker closed the connection")
    assert deadlines.explain(eof, 106.2, EPOCH + 706.2) is eof
    assert deadlines.look(106.2, NOTHING_SENT) == (
        "the wall clock jumped ahead by 600 s: the machine was suspended, or the clock was set; the broker answers, "
        "so the link stays"
    )
    assert deadlines.look(106.2, NOTHING_SENT) is None
    assert deadlines.error(130.0) is None
    assert deadlines.explain(eof, 130.0, EPOCH + 730.0) is eof


def test_an_answer_to_an_older_ping_may_be_older_than_the_suspension(deadlines: Driven) -> None:
    ping(deadlines, 104.0)
    deadlines.slept = 600
    assert deadlines.asks(106.0)
    ping(deadlines, 106.0)
    deadlines.pong()
    assert deadlines.look(106.2, NOTHING_SENT) is None
    assert deadlines.error(111.0) is not None


@pytest.mark.parametrize("keep_alive, most", [(30, 45), (2, 3), (math.inf, 60)])
def test_the_jump_must_be_longer_than_the_broker_waits(deadlines: Driven, keep_alive: float, most: float) -> None:
    deadlines.agree(keep_alive)
    deadlines.sent_at = deadlines.heard_at = 101.0
    deadlines.slept = most
    assert not deadlines.asks(101.0)
    deadlines.slept += most + 0.1
    assert deadlines.asks(101.0)


def test_small_differences_do_not_add_up(deadlines: Driven) -> None:
    for _ in range(100):
        deadlines.slept += 2
        assert not deadlines.asks(105.0)


def test_a_clock_that_is_set_back_is_ignored_and_then_watched_from_there(deadlines: Driven) -> None:
    deadlines.slept = -86_400
    assert not deadlines.asks(101.0)
    deadlines.slept = -86_300
    assert deadlines.asks(102.0)


@pytest.mark.parametrize(
    "seen",
    [
        ConnectionLostError("the broker closed the connection"),
        ServerDisconnectedError("keep alive timeout", ReasonCode.KEEP_ALIVE_TIMEOUT),
        AckTimeoutError("no acknowledgement"),
    ],
)
def test_the_end_of_a_link_in_doubt_is_named_after_the_suspension(deadlines: Driven, seen: MQTTDriverError) -> None:
    """The reader may see the end before the timer has looked at the clocks."""
    explained = deadlines.explain(seen, 101.0, EPOCH + 701.0)
    assert isinstance(explained, SuspendedError)
    assert str(explained) == f"the machine was suspended for about 600 s: {seen}"
    assert explained.__cause__ is seen


@pytest.mark.parametrize(
    "seen",
    [
        ServerDisconnectedError("somebody else", ReasonCode.SESSION_TAKEN_OVER),
        ProtocolError("malformed packet"),
        TLSError("certificate expired"),
    ],
)
def test_what_has_a_reason_of_its_own_keeps_it(deadlines: Driven, seen: MQTTDriverError) -> None:
    assert deadlines.explain(seen, 101.0, EPOCH + 701.0) is seen


def test_two_suspensions_without_an_answer_in_between_add_up(deadlines: Driven) -> None:
    deadlines.slept = 600
    deadlines.look(101.0, NOTHING_SENT)
    deadlines.slept = 1000
    deadlines.look(102.0, NOTHING_SENT)
    assert "about 1000 s" in str(deadlines.explain(ConnectionLostError("EOF"), 103.0, EPOCH + 1103.0))


def test_the_broker_is_not_asked_before_the_link_is_live_nor_while_reading_is_paused(deadlines: Driven) -> None:
    deadlines.slept = 600
    deadlines.live = False
    assert not deadlines.asks(101.0)
    deadlines.live, deadlines.paused = True, True
    assert not deadlines.asks(102.0)
    deadlines.resume(103.0)
    assert deadlines.asks(103.0)
    assert deadlines.error(107.9) is None
    assert deadlines.error(108.0) is not None


def test_a_pingresp_that_nobody_asked_for_is_nothing(deadlines: Driven) -> None:
    assert deadlines.pong() is None


class Calls(list[str]):
    """What was called for being late."""

    def named(self, name: str) -> Callable[[], None]:
        return lambda: self.append(name)

    def at(self, deadlines: Deadlines, now: float) -> list[str]:
        self.clear()
        for late in deadlines.missed(now):
            late()
        return sorted(self)


@pytest.mark.parametrize("live", [False, True])
def test_whoever_waits_for_an_answer_is_late_once_and_at_its_time(deadlines: Driven, live: bool) -> None:
    deadlines.live = live
    called = Calls()
    deadlines.begin(100, 7, 0, called.named("first"))
    deadlines.begin(101, 8, 0, called.named("second"))
    assert deadlines.wakes(101) == 107
    assert called.at(deadlines, 106.9) == []
    assert called.at(deadlines, 107) == ["first"]
    assert deadlines.wakes(107) == 109
    assert called.at(deadlines, 110) == ["second"]
    assert called.at(deadlines, 111) == []
    assert deadlines.wakes(111) == 129


def test_a_request_behind_other_bytes_is_not_asked_yet(deadlines: Driven) -> None:
    called = Calls()
    deadlines.begin(100, 7, 1000, called.named("late"))
    deadlines.flushed(106, 999)
    assert called.at(deadlines, 107) == []
    deadlines.flushed(112, 1000)
    deadlines.flushed(118, 1100)
    assert deadlines.wakes(118) == 119
    assert called.at(deadlines, 119) == ["late"]


def test_while_other_packets_arrive_an_answer_has_three_times_as_long(deadlines: Driven) -> None:
    called = Calls()
    deadlines.begin(100, 7, 0, called.named("late"))
    for now in (106, 112, 118):
        deadlines.heard(now, 100, 0, more=False)
        assert called.at(deadlines, now + 2) == []
    deadlines.heard(120, 100, 0, more=False)
    assert called.at(deadlines, 120.9) == []
    assert called.at(deadlines, 121) == ["late"]


def test_an_answer_that_came_is_not_late(deadlines: Driven) -> None:
    called = Calls()
    answer = deadlines.begin(100, 7, 0, called.named("answered"))
    deadlines.end(answer)
    assert deadlines.wakes(100) == 129
    assert called.at(deadlines, 107) == []
    overdue = deadlines.begin(110, 7, 0, called.named("late"))
    assert called.at(deadlines, 117) == ["late"]
    deadlines.end(overdue)  # whoever waited for it says so then


def test_while_reading_is_paused_no_answer_is_late_and_then_it_has_all_its_time(deadlines: Driven) -> None:
    called = Calls()
    deadlines.agree(math.inf)
    deadlines.begin(100, 7, 0, called.named("before"))
    deadlines.paused = True
    deadlines.begin(102, 3, 0, called.named("meanwhile"))
    assert called.at(deadlines, 1000) == []
    assert deadlines.wakes(101) == 106  # only for the ack_timeout
    deadlines.resume(1000)
    assert called.at(deadlines, 1002.9) == []
    assert deadlines.wakes(1000) == 1003
    assert called.at(deadlines, 1003) == ["meanwhile"]
    assert called.at(deadlines, 1007) == ["before"]


def test_without_a_timeout_an_answer_is_never_late(deadlines: Driven) -> None:
    called = Calls()
    deadlines.begin(100, math.inf, 0, called.named("late"))
    assert deadlines.wakes(100) == 129
    assert called.at(deadlines, 1e9) == []
