"""Credentials and enhanced authentication [MQTT-3.1.3.5], [MQTT-4.12]."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Generator

import pytest
import trio
import trio.testing

from tests.peers import memory_config
from trio_mqtt_driver import Message, MQTTDriver, Overflow, ReasonCode, RefusedError, State
from trio_mqtt_driver.testing import Auth, AuthenticationRefusedError, Kind, MemoryBroker

KEY = b"the key"
PROOF = b"the broker's proof"


def challenge(method: str, name: bytes) -> Generator[bytes, bytes, bytes]:
    """The broker's side: two rounds, then a proof of its own."""
    if method != "HMAC":
        raise AuthenticationRefusedError(0x8C)
    for number in (b"1", b"2"):
        answer = yield name + number
        if answer != hmac.digest(KEY, name + number, hashlib.sha256):
            raise AuthenticationRefusedError(0x87)
    return PROOF


class Hmac:
    method = "HMAC"

    def __init__(self, key: bytes = KEY, fault: Exception | None = None) -> None:
        self._key = key
        self._fault = fault
        self.proof: bytes | None = None

    async def start(self) -> bytes | None:
        await trio.sleep(1)
        return b"kitchen"

    async def answer(self, challenge: bytes | None) -> bytes | None:
        await trio.lowlevel.checkpoint()
        assert challenge is not None
        return hmac.digest(self._key, challenge, hashlib.sha256)

    async def finish(self, data: bytes | None) -> None:
        await trio.lowlevel.checkpoint()
        self.proof = data
        if self._fault is not None:
            raise self._fault


async def test_a_dialogue_of_auth_packets_for_each_connection(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, authenticate=challenge)
    made: list[Hmac] = []

    def make() -> Hmac:
        made.append(Hmac())
        return made[-1]

    async with MQTTDriver(memory_config(broker, authenticator=make)) as driver:
        await driver.publish("a", b"x", qos=1)
        broker.drop()
        await trio.sleep(60)
        assert (driver.state, driver.generation) == (State.LIVE, 2)
    assert [one.proof for one in made] == [PROOF, PROOF]
    assert sum(packet.kind is Kind.AUTH for _, packet in broker.received) == 4


async def test_a_wrong_answer_is_refused_for_good(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, authenticate=challenge)
    with pytest.raises(RefusedError, match="not authorized") as caught:
        async with MQTTDriver(memory_config(broker, authenticator=lambda: Hmac(b"wrong"))):
            raise AssertionError("entered")
    assert caught.value.reason_code is ReasonCode.NOT_AUTHORIZED


async def test_an_exception_in_the_authenticator_is_a_failed_attempt(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, authenticate=challenge)
    faults: list[Exception | None] = [ValueError("the broker did not prove itself"), None]
    config = memory_config(broker, authenticator=lambda: Hmac(fault=faults.pop(0)))
    async with MQTTDriver(config) as driver:
        errors = [event.error for event in driver.status().history if event.error]
    assert len(errors) == 1
    assert "OptionsError: the authenticator failed: ValueError('the broker did not prove itself')" in str(errors[0])


async def test_the_exchange_is_bounded_by_the_connect_timeout(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, authenticate=challenge)
    with broker.faults.hold(Kind.AUTH):
        async with MQTTDriver(
            memory_config(broker, authenticator=Hmac, connect_timeout=7), start="background"
        ) as driver:
            await trio.sleep(7.01)
            assert driver.state is State.BACKING_OFF
            assert "connect_timeout=7" in str(driver.status().last_error)


class Slow(Hmac):
    """Its last word on the ``number``-th connection takes a while."""

    connections = 0
    number = 1
    seconds = math.inf
    shield = False

    @classmethod
    def begins(cls) -> None: ...

    async def finish(self, data: bytes | None) -> None:
        type(self).connections += 1
        with trio.CancelScope(shield=self.shield):
            if self.connections == self.number:
                self.begins()
                await trio.sleep(self.seconds)
            await super().finish(data)


async def test_the_exchange_is_bounded_also_while_there_is_no_room_for_the_messages_that_came_with_its_end(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    stuck = trio.Event()

    class Stuck(Slow):
        number = 3  # after the one that wipes the session, and the first that is live

        @classmethod
        def begins(cls) -> None:
            stuck.set()

    async def slow(message: Message[bytes]) -> None:
        await trio.sleep(300)

    broker = MemoryBroker(nursery, authenticate=challenge)
    config = memory_config(broker, authenticator=Stuck, stable_id=True, connect_timeout=7)
    async with MQTTDriver(config) as driver:
        await driver.subscribe("in", slow, qos=1, overflow=Overflow.BLOCK, queue_messages=1)
        await trio.sleep(100)
        broker.stop()
        for _ in range(5):
            broker.publish("in", b"", qos=1)
        broker.start()
        await stuck.wait()
        began = trio.current_time()
        await driver.wait_state(State.BACKING_OFF)
        assert began + 5 < trio.current_time() <= began + 7
        assert "no CONNACK" in str(driver.status().last_error)


async def test_an_authenticator_that_cannot_be_cancelled_may_take_longer(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """As one that waits for a thread: else no attempt would ever succeed."""

    class Stubborn(Slow):
        seconds = 9.0
        shield = True

    broker = MemoryBroker(nursery, authenticate=challenge)
    async with MQTTDriver(memory_config(broker, authenticator=Stubborn, connect_timeout=7)) as driver:
        assert driver.status().counters["failures"] == 0
        assert trio.current_time() == 10


async def test_another_method_or_an_unexpected_auth_is_a_protocol_error(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery)
    async with MQTTDriver(memory_config(broker)) as driver:
        assert driver.client_id is not None
        broker.send(driver.client_id, Auth(reason_code=0x18, properties={"authentication_method": "HMAC"}))
        await trio.sleep(0.01)
        assert "ProtocolError: protocol error: unexpected AUTH" in str(driver.status().last_error)
        await driver.wait_live()


async def test_an_authenticator_rules_out_the_downgrade_to_3_1_1(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    broker = MemoryBroker(nursery, versions=(4,))
    async with MQTTDriver(memory_config(broker, authenticator=Hmac), start="background") as driver:
        await trio.sleep(100)
        assert driver.generation == 0
        assert "does not speak MQTT 5" in str(driver.status().last_error)
    assert {connect.version for connect in broker.connects} == {5}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_user_name_and_password(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, protocol: str
) -> None:
    broker = MemoryBroker(nursery, users={"u": "p"})
    async with MQTTDriver(memory_config(broker, protocol=protocol, username="u", password="p")) as driver:
        await driver.publish("a", b"x", qos=1)
        assert "'p'" not in repr(driver.config)
    with pytest.raises(RefusedError, match=r"check username and password|not authorized"):
        async with MQTTDriver(memory_config(broker, protocol=protocol, username="u", password="wrong")):
            raise AssertionError("entered")
