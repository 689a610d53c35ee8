"""A message that comes alone is handed to the handler by the reader, and all else is as if its task had done it.

The quickest way of a message needs a topic that is known by heart, so most tests begin with a few (``WARM``).
"""

from __future__ import annotations

import contextvars
import functools
import gc
import sys
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any, Literal

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.peers import memory_config
from trio_mqtt_driver import Acknowledge, DriverConfig, Message, MQTTDriver, PayloadError, Receipt, State
from trio_mqtt_driver.testing import Kind, MemoryBroker, Publish

# pyright: reportPrivateUsage=false

settled = trio.testing.wait_all_tasks_blocked

WARM = [b"0"] * 4
SITE = contextvars.ContextVar("SITE", default="nowhere")


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


def by_reader() -> bool:
    return "_loop_read" in trio.lowlevel.current_task().name


def pubacks(broker: MemoryBroker) -> int:
    return sum(packet.kind is Kind.PUBACK for _, packet in broker.received)


async def one_by_one(broker: MemoryBroker, *payloads: bytes, qos: int = 0) -> None:
    for payload in payloads:
        broker.publish("a", payload, qos=qos)
        await settled()


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_message_that_comes_alone_needs_no_turn_of_the_handlers_task(
    qos: int, autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    seen: list[tuple[bytes, bool]] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", lambda message: seen.append((message.value, by_reader())), qos=qos)
        await one_by_one(broker, *WARM, b"1", b"2", qos=qos)
        assert seen == [(payload, True) for payload in (*WARM, b"1", b"2")]
        statistics = subscription.statistics()
        assert (statistics.received, statistics.delivered, statistics.queued) == (6, 6, 0)
        assert driver.status().unacknowledged == 0
        assert pubacks(broker) == (6 if qos == 1 else 0)


async def test_a_retained_message_that_comes_with_the_suback_does_not_either(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    seen: list[tuple[bytes, bool, bool]] = []
    broker.publish("a", b"1", retain=True)
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", lambda message: seen.append((message.value, message.replayed, by_reader())))
        await settled()
        broker.drop()
        await driver.wait_state(State.BACKING_OFF)
        await driver.wait_live()
        await settled()
        assert seen == [(b"1", False, True), (b"1", True, True)]


async def test_one_for_two_subscriptions_is_their_tasks(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    """The reader is to be held up by one handler at most."""
    seen: list[bool] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        for topic_filter in ("a", "+"):
            await driver.subscribe(topic_filter, lambda _: seen.append(by_reader()))
        await one_by_one(broker, b"1", b"2")
        assert seen == [False] * 4


async def test_of_several_that_come_together_none_is_the_readers(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """Or it would handle a whole read without a turn for anybody else."""
    seen: list[bool] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", lambda _: seen.append(by_reader()))
        await driver.subscribe("b", lambda _: seen.append(by_reader()))
        for topic in "abababab":
            broker.publish(topic, b"1")
            await settled()
        assert seen[-2:] == [True, True]
        seen.clear()
        for _ in range(5):
            broker.publish("a", b"2")
        await settled()
        assert seen == [False] * 5
        seen.clear()
        for _ in range(5):  # to one after the other, so that each is alone for its subscription
            broker.publish("a", b"3")
            broker.publish("b", b"4")
        await settled()
        assert seen == [False] * 10


@pytest.mark.parametrize("retain", [False, True])
async def test_nor_of_several_of_new_topics(autojump_clock: MockClock, broker: MemoryBroker, retain: bool) -> None:
    seen: list[bool] = []
    topics = [f"a/{number}" for number in range(5)]
    if retain:
        for topic in topics:
            broker.publish(topic, b"1", retain=True)
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a/+", lambda _: seen.append(by_reader()))
        if not retain:
            for topic in topics:
                broker.publish(topic, b"1")
        await settled()
        assert seen == [False] * 5
        seen.clear()
        await driver.subscribe("b", print)  # the way of each topic is looked up again
        for topic in topics:
            broker.publish(topic, b"2")
        await settled()
        assert seen == [False] * 5


@pytest.mark.parametrize("portal", [False, True])
async def test_a_plain_function_that_could_wait_is_not_called_by_the_reader(
    autojump_clock: MockClock, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch, portal: bool
) -> None:
    """As with greenback, where it has a portal to the handler's task."""
    greenback = ModuleType("greenback")
    greenback.has_portal = lambda: portal  # type: ignore[attr-defined]  # a module made here has no attributes yet
    monkeypatch.setitem(sys.modules, "greenback", greenback)
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", lambda _: None)
        await one_by_one(broker, *WARM)
        assert subscription._handle_now(Message("a", b"1")) is not portal


async def test_it_waits_until_the_handler_is_done(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    """With what it has, and with what is queued before: also if it is the task that has just been woken."""
    seen: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", lambda message: seen.append(message.payload))
        await one_by_one(broker, *WARM)
        subscription._put([Message("a", b"1")], 1)
        assert not subscription._handle_now(Message("a", b"2"))
        subscription._put([Message("a", b"2")], 1)
        await settled()
        assert seen[4:] == [b"1", b"2"]

        def wrong(message: Message[bytes]) -> None:
            seen.append(message.payload)
            raise ValueError("of the application's")

        subscription._handler = wrong
        assert subscription._handle_now(Message("a", b"3"))
        assert not subscription._handle_now(Message("a", b"4"))
        subscription._put([Message("a", b"4")], 1)
        await settled()
        assert seen[6:] == [b"3", b"4"]


async def test_it_waits_behind_those_that_are_queued(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    seen: list[bytes] = []
    go = trio.Event()

    async def slow(message: Message[bytes]) -> None:
        if message.payload == b"2":
            await go.wait()
        seen.append(message.payload)

    def handler(message: Message[bytes]) -> Awaitable[None]:
        return slow(message)

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1)
        await one_by_one(broker, b"1", b"2", b"3", b"4", qos=1)
        assert seen == [b"1"]
        assert pubacks(broker) == 1
        go.set()
        await settled()
        assert seen == [b"1", b"2", b"3", b"4"]
        assert pubacks(broker) == 4


async def test_what_a_handler_wants_awaited_is_awaited_by_its_task(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    """Also if that comes as a surprise, from what was a plain function so far; it never is one again."""
    calls: list[tuple[bytes, bool]] = []
    awaited: list[tuple[bytes, bool]] = []

    async def rest(payload: bytes) -> None:
        await trio.sleep(1)
        awaited.append((payload, by_reader()))

    def handler(message: Message[bytes]) -> Awaitable[None] | None:
        calls.append((message.payload, by_reader()))
        return rest(message.payload) if message.payload == b"3" else None

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1)
        await one_by_one(broker, *WARM, b"2", b"3", b"4", qos=1)
        assert (calls[4:], awaited) == ([(b"2", True), (b"3", True)], [])
        assert pubacks(broker) == 5
        await trio.sleep(2)
        assert awaited == [(b"3", False)]
        await one_by_one(broker, b"5", qos=1)
        assert calls[6:] == [(b"4", False), (b"5", False)]
        assert pubacks(broker) == 8


@attrs.frozen
class Reading:
    celsius: float


async def test_a_message_class_is_structured_and_what_does_not_fit_is_a_dead_letter(
    autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    seen: list[tuple[float, bool]] = []
    letters: list[bytes] = []

    def handler(message: Message[Reading]) -> None:
        seen.append((message.value.celsius, by_reader()))

    def dead_letter(message: Message[Any], _error: PayloadError) -> None:
        letters.append(message.payload)

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, Reading, qos=1, on_dead_letter=dead_letter)
        await one_by_one(broker, *[b'{"celsius": 1}'] * 4, qos=1)
        await one_by_one(broker, b'{"celsius": 2}', b"[]", b'{"celsius": 3}', qos=1)
        assert seen[4:] == [(2.0, True), (3.0, True)]
        assert letters == [b"[]"]
        assert pubacks(broker) == 7


async def test_an_exception_is_logged_by_the_task_and_the_next_message_is_handled(
    autojump_clock: MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []

    def handler(message: Message[bytes]) -> None:
        seen.append(message.payload)
        if message.payload == b"2":
            assert by_reader()
            raise ValueError("of the application's")

    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", handler, qos=1)
        await one_by_one(broker, *WARM, b"1", b"2", b"3", qos=1)
        assert seen[4:] == [b"1", b"2", b"3"]
        assert subscription.statistics().handler_errors == 1
        assert pubacks(broker) == 7
        assert driver.state is State.LIVE
    (record,) = [record for record in caplog.records if "handler of 'a' failed" in record.message]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "of the application's"


@pytest.mark.parametrize("wrong", [ValueError("of the application's"), SystemExit(3)])
async def test_an_exception_ends_the_driver_if_it_is_to(
    wrong: BaseException, autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    policy: Literal["raise", "log"] = "raise" if isinstance(wrong, Exception) else "log"
    seen: list[bytes] = []

    def handler(message: Message[bytes]) -> None:
        seen.append(message.payload)
        if message.payload == b"2":
            assert by_reader()
            raise wrong

    with pytest.raises(BaseException) as caught:  # noqa: PT011, PT012  # it may come in a group; the end is under test
        async with MQTTDriver(memory_config(broker, on_handler_error=policy)) as driver:
            await driver.subscribe("a", handler, qos=1)
            await one_by_one(broker, *WARM, b"1", b"2", qos=1)
            await trio.sleep_forever()
    error: BaseException = caught.value
    while isinstance(inner := getattr(error, "exceptions", None), tuple):
        (error,) = inner
    assert (type(error), error.args) == (type(wrong), wrong.args)
    assert seen[4:] == [b"1", b"2"]
    assert pubacks(broker) == 5


async def test_it_runs_in_the_context_of_the_handlers_task(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    seen: list[str] = []

    def handler(_message: Message[bytes]) -> None:
        seen.append(SITE.get())
        SITE.set(f"{SITE.get()}+")

    token = SITE.set("north")
    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler)
        SITE.reset(token)
        await one_by_one(broker, *WARM, b"1")
    assert seen == ["north", "north+", "north++", "north+++", "north++++"]
    assert SITE.get() == "nowhere"


@pytest.mark.parametrize("acknowledge", [Acknowledge.MANUAL, Acknowledge.RECEIVED])
async def test_other_ways_to_acknowledge_are_the_tasks(
    acknowledge: Acknowledge, autojump_clock: MockClock, broker: MemoryBroker
) -> None:
    seen: list[Message[bytes]] = []

    def handler(message: Message[bytes]) -> None:
        assert not by_reader()
        seen.append(message)

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", handler, qos=1, acknowledge=acknowledge)
        await one_by_one(broker, *WARM, b"1", b"2", qos=1)
        assert len(seen) == 6
        assert pubacks(broker) == (0 if acknowledge is Acknowledge.MANUAL else 6)
        for message in seen:
            message.ack()
        await settled()
        assert pubacks(broker) == 6


async def test_a_handler_may_do_with_the_driver_what_it_likes(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    async with MQTTDriver(memory_config(broker)) as driver:
        acts: dict[bytes, Callable[[], object]] = {
            b"publish": lambda: driver.publish_nowait("answer", b"!", qos=1),
            b"reconnect": lambda: driver.force_reconnect("asked for", even_if_live=True),
            b"pause": lambda: driver.pause("asked for"),
        }
        done: list[bytes] = []

        def handler(message: Message[bytes]) -> None:
            if act := acts.get(message.payload):
                assert by_reader()
                act()
            if message.payload != b"0":
                done.append(message.payload)

        await driver.subscribe("a", handler, qos=1)
        await one_by_one(broker, *WARM, b"publish", qos=1)
        (answer,) = [one for _, one in broker.received if isinstance(one, Publish) and one.topic == "answer"]
        assert answer.payload == b"!"
        generation = driver.generation
        await one_by_one(broker, *WARM, b"reconnect", qos=1)
        await driver.wait_live()
        assert driver.generation == generation + 1
        await one_by_one(broker, *WARM, b"pause", qos=1)
        assert driver.state is State.PAUSED
        driver.resume()
        await driver.wait_live()
        await one_by_one(broker, b"last", qos=1)
        assert [*dict.fromkeys(done)] == [b"publish", b"reconnect", b"pause", b"last"]


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("way", ["pause", "reconnect", "settings"])
async def test_what_a_handler_publishes_after_it_gave_the_link_up_is_for_the_next_one(
    way: str, qos: int, autojump_clock: MockClock, nursery: trio.Nursery, broker: MemoryBroker
) -> None:
    other = MemoryBroker(nursery)
    config = memory_config(broker)
    receipts: list[Receipt] = []
    async with MQTTDriver(config) as driver:

        def handler(message: Message[bytes]) -> None:
            if message.payload != b"go":
                return
            assert by_reader()
            if way == "pause":
                driver.pause("asked for")
            elif way == "reconnect":
                driver.force_reconnect("asked for", even_if_live=True)
            else:
                driver.apply_settings(config.evolve(open_stream=lambda _endpoint: other.connect_stream()))
            receipts.append(driver.publish_nowait("answer", b"!", qos=qos))

        await driver.subscribe("a", handler, qos=1)
        await one_by_one(broker, *WARM, qos=1)
        broker.publish("a", b"go", qos=1)
        await settled()
        if way == "pause":
            assert not receipts[0].done
            driver.resume()
        result = await receipts[0].wait()
        assert (result.generation, result.attempts) == (2, 1)
    took = other if way == "settings" else broker
    answers = [one for one in (*broker.published, *other.published) if one.topic == "answer"]
    assert answers == [one for one in took.published if one.topic == "answer"]
    assert len(answers) == 1


async def test_what_a_handler_publishes_leaves_in_the_call(nursery: trio.Nursery) -> None:
    """On a quiet link of a real socket, as from anywhere else: the handler may take its time, or end the process."""
    broker = MemoryBroker(nursery)
    port = await broker.listen()
    sent: list[int] = []
    done = trio.Event()

    async with MQTTDriver(DriverConfig.from_url(f"mqtt://127.0.0.1:{port}", client_id="driver")) as driver:
        live = driver._supervisor.live
        assert live is not None

        def handler(message: Message[bytes]) -> None:
            before = live._writer.flushed
            if message.payload == b"go":
                assert by_reader()
                driver.publish_nowait("answer", b"!", qos=1)
                sent.append(live._writer.flushed - before)
            done.set()

        await driver.subscribe("a", handler)
        for payload in (*WARM, b"go"):
            done = trio.Event()
            await trio.sleep(0.01)  # so that the link is quiet
            broker.publish("a", payload)
            await done.wait()
        assert sent[0] > 0
    nursery.cancel_scope.cancel()


async def test_an_ended_subscription_is_handed_nothing(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    seen: list[bytes] = []
    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", lambda message: seen.append(message.payload))
        await one_by_one(broker, b"1", b"2")
        subscription._close()  # the task has had no turn yet
        assert not subscription._handle_now(Message("a", b"3"))
        await driver.unsubscribe(subscription)
        broker.publish("a", b"4")
        await settled()
        assert not subscription._handle_now(Message("a", b"5"))
    assert seen == [b"1", b"2"]


@pytest.mark.parametrize("begun", ["an exception", "an awaitable", "a coroutine"])
async def test_what_was_begun_when_the_handlers_task_is_cancelled_is_not_forgotten(
    begun: str, autojump_clock: MockClock, broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception is told of; a coroutine is closed, or Python would say that it was never awaited."""

    class Odd:
        def __await__(self) -> Any:
            raise AssertionError

    async def rest() -> None:
        raise AssertionError

    def handler(_message: Message[bytes]) -> object:
        if begun == "an exception":
            raise ValueError("of the application's")
        return Odd() if begun == "an awaitable" else rest()

    async with MQTTDriver(memory_config(broker)) as driver:
        subscription = await driver.subscribe("a", handler)
        await settled()
        assert driver._dispatcher._nursery is not None
        driver._dispatcher._nursery.cancel_scope.cancel()
        assert subscription._handle_now(Message("a", b"1"))
        await settled()
    gc.collect()
    failed = "handler of 'a' failed" in caplog.text
    assert failed == (begun == "an exception")
    assert subscription.statistics().handler_errors == failed


async def test_a_partial_of_an_async_function_is_awaited(autojump_clock: MockClock, broker: MemoryBroker) -> None:
    seen: list[tuple[str, bytes]] = []

    async def handler(name: str, message: Message[bytes]) -> None:
        await trio.sleep(1)
        seen.append((name, message.payload))

    async with MQTTDriver(memory_config(broker)) as driver:
        await driver.subscribe("a", functools.partial(handler, "x"), qos=1)
        await one_by_one(broker, b"1", b"2", b"3", qos=1)
        await trio.sleep(10)
    assert seen == [("x", b"1"), ("x", b"2"), ("x", b"3")]
