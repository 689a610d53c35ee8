"""What is delivered while mosquitto, with persistence on, is killed with ``kill -9`` and started again.

``Mosquitto`` of the test kit has ``autosave_on_changes true`` and ``autosave_interval 1``: it writes its whole state
whenever it has changed. What a crash leaves is then the state of a moment before, mostly of a few milliseconds. With
``autosave_on_changes false`` it is up to ``autosave_interval`` seconds old, and what was acknowledged since is gone.
"""

from __future__ import annotations

import random

import attrs
import pytest
import trio

from tests.brokers.grounds import Ground
from trio_mqtt_driver import Message, MQTTDriver, PublishRefusedError, ReasonCode, Receipt

pytestmark = pytest.mark.broker

TOPICS = ("out/x", "out/y")
CRASHES = 4
RECEIVE_MAXIMUM = 20
"""Mosquitto's, unless it is configured."""
UNWRITTEN = 1.4
"""Seconds for which what mosquitto has acknowledged may not be on its disk, on a busy machine."""


@attrs.define
class Record:
    """Of one topic: when what was acknowledged, and what arrived."""

    acknowledged: dict[int, float] = attrs.field(factory=dict[int, float])
    arrived: list[int] = attrs.field(factory=list[int])
    refused: set[int] = attrs.field(factory=set[int])
    published: int = 0
    ordered: int | None = None
    """How much of ``arrived`` came before mosquitto refused anything; None if it never did."""

    def assert_in_order(self) -> None:
        first = list(dict.fromkeys(self.arrived[: self.ordered]))
        assert first == sorted(first)


class Crashes:
    """A driver publishes, another one counts, both with sessions that their broker keeps; it is killed meanwhile."""

    def __init__(self, ground: Ground, qos: int, rng: random.Random) -> None:
        self.records = {topic: Record() for topic in TOPICS}
        self.at: list[float] = []
        self._ground = ground
        self._qos = qos
        self._rng = rng
        self._arrived = trio.Event()

    def _note(self, message: Message[bytes]) -> None:
        self.records[message.topic].arrived.append(int(message.payload))
        self._arrived.set()

    async def _publish(self, driver: MQTTDriver, nursery: trio.Nursery) -> None:
        while True:
            for topic in TOPICS:
                for _ in range(self._rng.randrange(4)):
                    nursery.start_soon(self._await_receipt, topic, *self._hand_over(driver, topic))
            await trio.sleep(self._rng.uniform(0, 0.02))

    def _hand_over(self, driver: MQTTDriver, topic: str) -> tuple[int, Receipt]:
        record = self.records[topic]
        record.published += 1
        return record.published, driver.publish_nowait(topic, str(record.published), qos=self._qos)

    async def _await_receipt(self, topic: str, number: int, receipt: Receipt) -> None:
        record = self.records[topic]
        try:
            await receipt.wait()
            record.acknowledged[number] = trio.current_time()
        except PublishRefusedError as error:
            if error.reason_code is not ReasonCode.QUOTA_EXCEEDED:
                raise
            self._note_refusal()
            record.refused.add(number)

    def _note_refusal(self) -> None:
        if not any(record.refused for record in self.records.values()):
            for record in self.records.values():
                record.ordered = len(record.arrived)

    async def _crash(self) -> None:
        for _ in range(CRASHES):
            await trio.sleep(self._rng.uniform(1, 2))
            await self._ground.broker.kill()
            self.at.append(trio.current_time())
            await trio.sleep(self._rng.choice((0, 0.3)))
            await self._ground.broker.start()

    async def run(self) -> None:
        """Return when all is acknowledged, and what was published last, long after the crashes, has arrived."""
        driver = MQTTDriver(self._ground.config(stable_id=True))
        witness = MQTTDriver(self._ground.config(client_id="witness", stable_id=True))
        async with driver, witness:
            await witness.subscribe("out/#", self._note, qos=self._qos)
            async with trio.open_nursery() as receipts:
                async with trio.open_nursery() as publishing:
                    publishing.start_soon(self._publish, driver, receipts)
                    await self._crash()
                    await driver.wait_live()
                    await witness.wait_live()
                    await trio.sleep(UNWRITTEN)
                    publishing.cancel_scope.cancel()
                for topic in TOPICS:
                    receipts.start_soon(self._await_receipt, topic, *self._hand_over(driver, topic))
            while any(record.published not in record.arrived for record in self.records.values()):
                self._arrived = trio.Event()
                await self._arrived.wait()


@pytest.mark.parametrize("idle_ground, seed", [("mosquitto-5", 1), ("mosquitto-3.1.1", 2)], indirect=["idle_ground"])
async def test_qos_1_arrives_but_for_what_was_acknowledged_and_not_written(ground: Ground, seed: int) -> None:
    """What was not acknowledged before a crash is never lost, and the order in each topic holds."""
    crashes = Crashes(ground, 1, random.Random(seed))
    with trio.fail_after(100):
        await crashes.run()
    for topic, record in crashes.records.items():
        assert len(record.acknowledged) == record.published > 50
        record.assert_in_order()
        for number in set(record.acknowledged).difference(record.arrived):
            at = record.acknowledged[number]
            assert any(0 <= crash - at < UNWRITTEN for crash in crashes.at), (topic, number, at, crashes.at)


@pytest.mark.parametrize("idle_ground, seed", [("mosquitto-5", 3)], indirect=["idle_ground"])
async def test_qos_2_arrives_but_for_what_was_under_way_and_not_written(ground: Ground, seed: int) -> None:
    """Its exchanges may be older at the broker than here. PUBREL for a message that a crash has made it forget is
    answered with PUBCOMP [MQTT-4.3.3-13]: the message is gone, although it was acknowledged after the crash. And those
    that it believes to be open still count against its Receive Maximum: it may refuse as many, and says so.

    Then there is no order any more. Each refusal makes it take one more than its maximum; a crash later those are in a
    queue that it knows, and acknowledges PUBREL for, but passes on only after newer messages: with a client that sends
    packets by hand, mosquitto 2.0.11 passed 22, 24, 26, 27, 28 on as 27, 22, 24, 28, 26."""
    crashes = Crashes(ground, 2, random.Random(seed))
    with trio.fail_after(100):
        await crashes.run()
    for topic, record in crashes.records.items():
        assert len(record.acknowledged) + len(record.refused) == record.published > 50
        assert len(record.refused) <= RECEIVE_MAXIMUM * CRASHES
        assert not record.refused.intersection(record.arrived)
        record.assert_in_order()
        for number in set(record.acknowledged).difference(record.arrived):
            at = record.acknowledged[number]
            assert any(abs(crash - at) < UNWRITTEN for crash in crashes.at), (topic, number, at, crashes.at)
