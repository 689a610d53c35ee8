"""Two drivers with one client ID: each takes the session of the other over. They must not fight for ever."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import MQTTDriver, State
from trio_mqtt_driver.testing import MemoryBroker

HOUR = 3600


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.mark.parametrize(
    "protocol, words, seconds_per_attempt",
    [
        # Each is alone while the other pauses, and pauses while the other is alone.
        ("5", "ServerDisconnectedError: the broker disconnected us: session taken over (0x8e)", 60),
        # 3.1.1 cannot say what happened: the one that was alone for stable_after is forgiven, the other is not.
        ("3.1.1", "ConnectionLostError: the broker closed the connection", 30),
    ],
    ids=["5", "3.1.1"],
)
async def test_two_drivers_with_one_id_come_down_to_an_attempt_per_pause(
    broker: MemoryBroker, protocol: str, words: str, seconds_per_attempt: float, autojump_clock: MockClock
) -> None:
    config = memory_config(broker, client_id="both", stable_id=True, protocol=protocol)
    async with MQTTDriver(config, start="background") as one:
        async with MQTTDriver(config, start="background") as other:
            await trio.sleep(HOUR)
            before = [driver.status().counters["attempts"] for driver in (one, other)]
            await trio.sleep(HOUR)
            for driver, attempts in zip((one, other), before, strict=True):
                status = driver.status()
                assert 30 <= status.counters["attempts"] - attempts <= HOUR / seconds_per_attempt + 2
                assert status.last_error == words
            events = [*one.status().history, *other.status().history]
            pauses = [event.text for event in events if event.kind == State.PAUSED.value]
            assert any(words in text for text in pauses)
            assert all(text.endswith("; is there another client with the ID 'both'?") for text in pauses)
        with trio.fail_after(60):
            await one.wait_live()
        await trio.sleep(61)
        assert one.state is State.LIVE
        assert one.status().failures == 0
        assert not broker.violations


async def test_a_single_takeover_costs_one_quick_attempt(broker: MemoryBroker, autojump_clock: MockClock) -> None:
    """An old process that still runs when the new one starts, and is then stopped."""
    config = memory_config(broker, client_id="both", stable_id=True, protocol="5")
    async with MQTTDriver(config) as new:
        await trio.sleep(100)
        with trio.CancelScope() as old:
            async with MQTTDriver(config):
                old.cancel()
        await trio.sleep(6)
        assert new.state is State.LIVE
        assert new.generation == 2
        assert new.status().failures == 1


async def test_who_was_thrown_out_comes_back_with_its_subscriptions(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    """What the broker has under the client ID then is the other one's session."""
    got: list[bytes] = []
    config = memory_config(broker, client_id="both", stable_id=True, protocol="5")
    async with MQTTDriver(config) as one:
        await one.subscribe("in", lambda message: got.append(message.payload), qos=1)
        other = MQTTDriver(config)
        async with other:
            assert one.state is not State.LIVE
            other.pause("it has done enough")
            await one.wait_live()
            broker.publish("in", b"1", qos=1)
            await trio.sleep(1)
            assert got == [b"1"]
    assert not broker.violations


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_late_connect_of_our_own_is_nobody_else(
    broker: MemoryBroker, qos: int, autojump_clock: MockClock
) -> None:
    """A broker that hung has two CONNECTs of ours before it when it goes on, and may take the later one first."""
    config = memory_config(broker, client_id="dut", stable_id=True, protocol="5", receive_maximum=5)
    taken_over = 0
    for _ in range(30):
        got: list[bytes] = []
        async with MQTTDriver(config) as driver:
            await driver.subscribe("in", lambda message: got.append(message.payload), qos=qos)  # noqa: B023  # awaited in here
            await trio.sleep(60)
            with broker.faults.stop_reading():
                broker.drop("dut")
                sent = [b"%d" % number for number in range(100)]
                for payload in sent:
                    broker.publish("in", payload, qos=qos)
                await trio.sleep(15)  # the first attempt is given up after connect_timeout, 10 s
            await trio.sleep(100)
            taken_over += "taken over" in "".join(str(event.error) for event in driver.status().history)
        if qos == 2:
            assert got == sent
        else:
            assert list(dict.fromkeys(got)) == sent
    assert taken_over  # in some of them, as the tasks of the broker came to have their turns
