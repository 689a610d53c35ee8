"""When a message of QoS 1 or 2 is acknowledged, and how: by itself, on receipt, by hand, with a refusal."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.peers import memory_config
from tests.stable import stable_config
from trio_mqtt_driver import Acknowledge, Message, MQTTDriver, Overflow, PayloadError, ReasonCode, State
from trio_mqtt_driver.testing import Ack, Kind, MemoryBroker

settled = trio.testing.wait_all_tasks_blocked
KINDS = [(1, Kind.PUBACK), (2, Kind.PUBREC)]


@attrs.frozen
class Reading:
    celsius: float


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def answers(broker: MemoryBroker) -> list[tuple[Kind, int]]:
    """Each PUBACK and PUBREC so far, with its reason code."""
    return [
        (packet.kind, packet.reason_code)
        for _, packet in broker.received
        if isinstance(packet, Ack) and packet.kind in (Kind.PUBACK, Kind.PUBREC)
    ]


async def sleep_for_ever(_message: Message[Any]) -> None:
    await trio.sleep_forever()


# -- by itself --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos, kind", KINDS)
async def test_on_receipt_a_message_is_acknowledged_before_its_handler_is_done(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    async with MQTTDriver(memory_config(broker, drain_timeout=0.1)) as driver:
        await driver.subscribe("a", sleep_for_ever, qos=qos, acknowledge=Acknowledge.RECEIVED)
        for _ in range(3):
            broker.publish("a", qos=qos)
        await settled()
        assert answers(broker) == [(kind, 0)] * 3
        assert driver.status().unacknowledged == 0
    assert driver.status().counters["stale_acknowledgements"] == 0


async def test_with_several_subscriptions_the_last_one_s_word_counts(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    kept: list[Message[bytes]] = []
    done = trio.Event()

    async def processed(_message: Message[bytes]) -> None:
        await done.wait()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("#", sleep_for_ever, qos=1, acknowledge=Acknowledge.RECEIVED)
        await driver.subscribe("+", kept.append, qos=1, acknowledge=Acknowledge.MANUAL)
        await driver.subscribe("a", processed, qos=1)
        broker.publish("a", qos=1)
        await settled()
        assert kept[0].ack() is True
        assert answers(broker) == []
        done.set()
        await settled()
        assert answers(broker) == [(Kind.PUBACK, 0)]


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.DROP_NEWEST])
async def test_what_is_acknowledged_on_receipt_may_be_dropped_like_qos_0(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, overflow: Overflow
) -> None:
    async with MQTTDriver(memory_config(broker, drain_timeout=0.1)) as driver:
        subscription = await driver.subscribe(
            "a", sleep_for_ever, qos=1, acknowledge=Acknowledge.RECEIVED, overflow=overflow, queue_messages=3
        )
        for _ in range(10):
            broker.publish("a", qos=1)
        await settled()
        assert (subscription.statistics().queued, subscription.statistics().dropped) == (3, 6)
        assert len(answers(broker)) == 10


@pytest.mark.parametrize("qos", [1, 2])
async def test_block_lets_what_was_acknowledged_on_receipt_go_only_when_its_connection_is_over(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int
) -> None:
    async with MQTTDriver(memory_config(broker, drain_timeout=0.1)) as driver:
        subscription = await driver.subscribe(
            "a", sleep_for_ever, qos=qos, acknowledge=Acknowledge.RECEIVED, overflow=Overflow.BLOCK, queue_messages=3
        )
        for _ in range(10):
            broker.publish("a", qos=qos)
        await settled()
        assert subscription.statistics().dropped == 0
        for _ in range(20):
            driver.force_reconnect(even_if_live=True)
            await driver.wait_live()
            for _ in range(10):
                broker.publish("a", qos=qos)
            await settled()
            assert subscription.statistics().queued <= 2 * 3 + 10
        assert subscription.statistics().dropped > 0


# -- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos, kind", KINDS)
async def test_by_hand_only_ack_acknowledges(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        kept: list[Message[bytes]] = []
        await driver.subscribe("a", kept.append, qos=qos, acknowledge=Acknowledge.MANUAL)
        async with driver.subscription("b", qos=qos, acknowledge=Acknowledge.MANUAL) as messages:
            broker.publish("a", qos=qos)
            broker.publish("b", b"1", qos=qos)
            broker.publish("b", b"2", qos=qos)
            kept += [await messages.receive(), await messages.receive()]
            await settled()
            assert answers(broker) == []
        await driver.unsubscribe("a")
        assert driver.status().unacknowledged == 3
        assert [message.ack() for message in kept] == [True] * 3
        assert [message.ack() for message in kept] == [False] * 3
        await settled()
        assert answers(broker) == [(kind, 0)] * 3
        assert driver.status().unacknowledged == 0
        assert driver.status().counters["stale_acknowledgements"] == 0
        assert not broker.violations


async def test_leaving_does_not_wait_for_what_its_reader_has_kept(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    kept: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, drain_timeout=1000)) as driver:
        await driver.subscribe("a", kept.append, qos=1, acknowledge=Acknowledge.MANUAL)
        broker.publish("a", qos=1)
        await settled()
        start = trio.current_time()
    assert trio.current_time() < start + 1
    assert kept[0].ack() is False
    assert driver.status().counters["stale_acknowledgements"] == 1
    assert not any(event.kind == "left behind" for event in driver.status().history)


async def test_ending_a_subscription_by_hand_acknowledges_what_is_queued_and_not_what_was_handed_out(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        async with driver.subscription("a", qos=1, acknowledge=Acknowledge.MANUAL) as messages:
            for _ in range(3):
                broker.publish("a", qos=1)
            message = await messages.receive()
        await trio.sleep(2)
        assert len(answers(broker)) == 2
        assert message.ack()
        await settled()
        assert len(answers(broker)) == 3


async def test_ack_in_a_handler_acknowledges_at_once_and_its_return_does_nothing(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    seen: list[tuple[bool, bool]] = []
    go_on = trio.Event()

    async def handle(message: Message[bytes]) -> None:
        seen.append((message.ack(), message.ack()))
        await go_on.wait()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handle, qos=1)
        broker.publish("a", qos=1)
        await settled()
        assert seen == [(True, False)]
        assert answers(broker) == [(Kind.PUBACK, 0)]
        go_on.set()
        await settled()
        assert answers(broker) == [(Kind.PUBACK, 0)]


async def test_qos_0_needs_no_ack_and_cannot_be_refused(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a") as messages:
        broker.publish("a")
        message = await messages.receive()
        assert message.ack()
        assert message.ack()
        assert message.refuse(ReasonCode.QUOTA_EXCEEDED) is False
        assert messages.statistics().refused == 0


@pytest.mark.parametrize("copies", [1, 2])
async def test_a_stale_ack_says_so_and_is_counted_once(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, copies: int
) -> None:
    kept: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        for _ in range(copies):
            await driver.subscribe("a", kept.append, qos=1, acknowledge=Acknowledge.MANUAL)
        broker.publish("a", qos=1)
        await settled()
        driver.force_reconnect(even_if_live=True)
        await driver.wait_live()
        broker.forget()
        assert [message.ack() for message in kept * 2] == [False] * 2 * copies
        assert kept[0].refuse(ReasonCode.QUOTA_EXCEEDED) is False
        await settled()
        assert answers(broker) == []
        counters = driver.status().counters
        assert (counters["stale_acknowledgements"], counters["refused_messages"]) == (1, 0)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_qos_2_message_that_was_kept_is_acknowledged_on_the_next_connection_of_its_session(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, protocol: str
) -> None:
    kept: list[Message[bytes]] = []
    async with MQTTDriver(stable_config(broker, protocol)) as driver:
        await driver.subscribe("a", kept.append, qos=2, acknowledge=Acknowledge.MANUAL)
        broker.publish("a", qos=2)
        await settled()
        broker.stop(keep_sessions=True)
        await driver.wait_state(State.BACKING_OFF)
        assert kept[0].ack() is True
        broker.start()
        await driver.wait_live()
        await settled()
        assert answers(broker) == [(Kind.PUBREC, 0)]
        assert len(kept) == 1
        assert broker.sessions["driver"].in_flight == 0


# -- with a refusal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos, kind", KINDS)
async def test_a_refusal_says_why(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    said: list[bool] = []
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        subscription = await driver.subscribe(
            "a", lambda message: said.append(message.refuse(ReasonCode.QUOTA_EXCEEDED)), qos=qos
        )
        broker.publish("a", qos=qos)
        broker.publish("a", qos=qos)
        await settled()
        assert said == [True, True]
        assert answers(broker) == [(kind, 0x97)] * 2
        assert subscription.statistics().refused == driver.status().counters["refused_messages"] == 2
        assert driver.status().unacknowledged == 0
        # Refused is refused: no PUBREL came, and the identifiers are free.
        assert not any(isinstance(packet, Ack) and packet.kind is Kind.PUBCOMP for _, packet in broker.received)
        assert not broker.violations


async def test_of_several_the_first_refusal_is_sent_when_the_last_one_is_done(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker
) -> None:
    kept: list[Message[bytes]] = []
    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        for _ in range(3):
            await driver.subscribe("a", kept.append, qos=1, acknowledge=Acknowledge.MANUAL)
        broker.publish("a", qos=1)
        await settled()
        assert kept[0].refuse(ReasonCode.NOT_AUTHORIZED)
        assert kept[1].refuse(ReasonCode.QUOTA_EXCEEDED)
        assert kept[1].refuse(ReasonCode.QUOTA_EXCEEDED) is False
        await settled()
        assert answers(broker) == []
        assert kept[2].ack()
        await settled()
        assert answers(broker) == [(Kind.PUBACK, 0x87)]
        assert driver.status().counters["refused_messages"] == 2


async def test_with_3_1_1_a_refusal_is_an_acknowledgement_and_a_warning(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with MQTTDriver(memory_config(broker, protocol="3.1.1")) as driver:
        subscription = await driver.subscribe("a", lambda one: one.refuse(ReasonCode.QUOTA_EXCEEDED), qos=2)
        for _ in range(2):
            for qos in (1, 2):
                broker.publish("a", qos=qos)
            await settled()
        assert sorted(answers(broker)) == [(Kind.PUBACK, 0), (Kind.PUBACK, 0), (Kind.PUBREC, 0), (Kind.PUBREC, 0)]
        assert subscription.statistics().refused == 4
        assert driver.generation == 1
    assert caplog.text.count("the broker speaks 3.1.1: a refusal of a message needs MQTT 5") == 1


@pytest.mark.parametrize("code", [0, 0x10, 0x81, 0x92, 0xA2, True, "quota exceeded"])
async def test_only_what_puback_may_say_is_a_refusal(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, code: Any
) -> None:
    async with MQTTDriver(memory_config(broker)) as driver, driver.subscription("a", qos=1) as messages:
        broker.publish("a", qos=1)
        message = await messages.receive()
        with pytest.raises(
            ValueError, match=r"reason_code is .*, allowed are 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99"
        ):
            message.refuse(code)
        assert message.ack()


@pytest.mark.parametrize("acknowledge", [Acknowledge.PROCESSED, Acknowledge.MANUAL])
async def test_a_dead_letter_is_acknowledged_by_itself_or_refused_by_its_handler(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, acknowledge: Acknowledge
) -> None:
    def bury(message: Message[Any], _error: PayloadError) -> None:
        if message.payload == b"refuse":
            message.refuse(ReasonCode.PAYLOAD_FORMAT_INVALID)

    async with MQTTDriver(memory_config(broker, protocol="5")) as driver:
        subscription = await driver.subscribe("a", print, Reading, qos=1, acknowledge=acknowledge, on_dead_letter=bury)
        for payload in (b"let it be", b"refuse"):
            broker.publish("a", payload, qos=1)
        await settled()
        assert answers(broker) == [(Kind.PUBACK, 0), (Kind.PUBACK, 0x99)]
        assert subscription.statistics().refused == 1


# -- a refusal, while others are done with ----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("qos, kind", KINDS)
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_refusal_while_messages_behind_it_are_processed_and_not_acknowledged(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, protocol: str, qos: int, kind: Kind, more: int
) -> None:
    """Their acknowledgements are asked for together with its own, and it must not be taken for one of them."""
    kept: list[Message[bytes]] = []

    def refuse(message: Message[bytes]) -> None:
        if message.topic == "x/refuse":
            assert kept[0].refuse(ReasonCode.QUOTA_EXCEEDED)

    async with MQTTDriver(memory_config(broker, protocol=protocol)) as driver:
        await driver.subscribe("a", kept.append, qos=qos, acknowledge=Acknowledge.MANUAL)
        await driver.subscribe("x/#", refuse, qos=1)
        broker.publish("a", qos=qos)
        await settled()
        broker.publish("x/b", qos=1)
        broker.publish("x/refuse")  # of the same read
        for _ in range(more):
            broker.publish("x/c", qos=1)
        await trio.sleep(1)
        assert driver.status().unacknowledged == 0
        assert driver.status().counters["handler_errors"] == 0
        assert driver.generation == 1
    code = ReasonCode.QUOTA_EXCEEDED if protocol == "5" else 0
    assert answers(broker) == [(kind, code), *[(Kind.PUBACK, 0)] * (1 + more)]
    assert not broker.violations


@pytest.mark.parametrize("qos, kind", KINDS)
async def test_a_refusal_by_one_of_two_while_a_message_behind_it_is_processed(
    autojump_clock: trio.testing.MockClock, broker: MemoryBroker, qos: int, kind: Kind
) -> None:
    """The other one's handler ends later, and with it the message is done with, in a task of the driver's."""
    go = trio.Event()

    async def wait(_message: Message[bytes]) -> None:
        await go.wait()

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", lambda message: message.refuse(ReasonCode.QUOTA_EXCEEDED), qos=qos)
        await driver.subscribe("+", wait, qos=qos)
        await driver.subscribe("x/b", lambda _: go.set(), qos=1)
        broker.publish("a", qos=qos)
        await settled()
        broker.publish("x/b", qos=1)
        await trio.sleep(1)
        assert driver.state is State.LIVE
    assert answers(broker) == [(kind, ReasonCode.QUOTA_EXCEEDED), (Kind.PUBACK, 0)]
