"""TLS that fails and heals, in virtual time: when the next attempt is made, and which error is told of a lost link."""

from __future__ import annotations

import ssl
from itertools import pairwise

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.dialing import Dialer
from tests.peers import memory_config
from trio_mqtt_driver import Attempt, BackoffConfig, DriverConfig, MQTTDriver
from trio_mqtt_driver.testing import MemoryBroker

settled = trio.testing.wait_all_tasks_blocked

DAY = 24 * 3600
FACTORY_TIMEOUT = 7


@pytest.fixture
def broker(nursery: trio.Nursery) -> MemoryBroker:
    return MemoryBroker(nursery)


@pytest.fixture
def dialer(broker: MemoryBroker) -> Dialer:
    return Dialer(broker)


def failures(driver: MQTTDriver) -> list[str]:
    """The kinds of the errors of attempts and links, in order."""
    return [str(event.error).partition(":")[0] for event in driver.status().history if event.error is not None]


def tls_error() -> Exception:
    """What a Trio stream raises when a handshake fails: the SSLError hides behind another."""
    error = trio.BrokenResourceError()
    error.__cause__ = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
    return error


class Factory:
    """An ``options_factory`` that goes wrong as told, one word for each attempt, and is right when none is left."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        self.called: list[float] = []
        self.ended: list[float] = []

    async def __call__(self, attempt: Attempt) -> DriverConfig:
        self.called.append(trio.current_time())
        try:
            await trio.lowlevel.checkpoint()
            match self.plan.pop(0) if self.plan else "right":
                case "502":
                    raise RuntimeError("HTTP 502")
                case "hang":
                    await trio.sleep_forever()
                case "nonsense":
                    return None  # type: ignore[return-value]  # what a factory without types may do
                case _:
                    pass
            return attempt.config
        finally:
            self.ended.append(trio.current_time())

    def pauses(self) -> list[float]:
        """How long the driver waited after each attempt but the last."""
        return [after - ended for ended, after in zip(self.ended, self.called[1:], strict=False)]


async def test_attempts_keep_their_cadence_however_the_factory_fails_and_in_the_next_outage_too(
    broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    factory = Factory()
    backoff = BackoffConfig(start=10, factor=3, maximum=1000, pause_after=100, stable_after=30, min_interval=0)
    config = memory_config(broker, options_factory=factory, factory_timeout=FACTORY_TIMEOUT, backoff=backoff)
    async with MQTTDriver(config) as driver:
        for outage in (1, 2):
            await trio.sleep(100)
            factory.plan = ["502", "hang", "nonsense"]
            factory.called.clear()
            factory.ended.clear()
            lost_at = trio.current_time()
            broker.drop()
            await settled()
            await driver.wait_live()
            assert factory.called[0] == lost_at
            assert factory.ended[1] - factory.called[1] == pytest.approx(FACTORY_TIMEOUT)
            # Random between a tenth of the bound and the bound, which starts again from 10 s in each outage.
            for wait, bound in zip(factory.pauses(), (10, 30, 90), strict=True):
                assert bound / 10 <= wait <= bound
            counters = driver.status().counters
            assert (counters["failures"], counters["losses"], driver.generation) == (3 * outage, outage, outage + 1)
            assert driver.status().failures == 3  # forgotten when the link is stable
        await trio.sleep(31)
        assert driver.status().failures == 0
        assert failures(driver) == 2 * ["ConnectionLostError", "OptionsError", "OptionsError", "OptionsError"]


async def test_a_tls_error_is_followed_by_fresh_options_at_once_each_time_that_the_factory_failed_before(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    factory = Factory()
    factory.plan = ["right", "502", "right", "502"]
    dialer.errors = [tls_error() for _ in range(2)]
    config = memory_config(broker, options_factory=factory, open_stream=dialer)
    async with MQTTDriver(config) as driver:
        assert failures(driver) == ["TLSError", "OptionsError", "TLSError", "OptionsError"]
        waits = factory.pauses()
        assert waits[0] == waits[2] == 0
        assert min(waits[1], waits[3]) > 0


async def test_tls_that_fails_for_a_day_is_tried_at_the_pace_of_the_pause(
    broker: MemoryBroker, dialer: Dialer, autojump_clock: MockClock
) -> None:
    factory = Factory()

    async def open_stream(endpoint: object) -> trio.abc.Stream:
        dialer.attempts.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        raise tls_error()

    config = memory_config(broker, options_factory=factory, open_stream=open_stream)
    async with MQTTDriver(config, start="background") as driver:
        await trio.sleep(DAY)
        assert set(failures(driver)) == {"TLSError"}
        late = [after - before for before, after in pairwise(dialer.attempts[10:])]
        assert late == pytest.approx([30] * len(late))
        assert len(factory.called) == len(dialer.attempts)  # material anew for each
        driver.apply_settings(memory_config(broker))
        with trio.fail_after(1):
            await driver.wait_live()


class RejectingStream(trio.abc.Stream):
    """A broker that has rejected our certificate and closed: writing fails, and the alert that says why is there."""

    def __init__(self, *, alert_after: float) -> None:
        self._alert_after = alert_after
        self._written = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:  # noqa: ARG002  # Trio's name
        await trio.lowlevel.checkpoint()
        self._written.set()
        raise trio.BrokenResourceError from ConnectionResetError(104, "Connection reset by peer")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:  # noqa: ARG002  # Trio's name
        await self._written.wait()
        await trio.sleep(self._alert_after)
        raise trio.BrokenResourceError from ssl.SSLError(1, "[SSL] TLSV1_ALERT_UNKNOWN_CA")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("alert_after, kind", [(0, "TLSError"), (60, "ConnectionLostError")])
async def test_why_the_broker_has_closed_is_told_and_not_that_writing_failed(
    broker: MemoryBroker, alert_after: float, kind: str, autojump_clock: MockClock
) -> None:
    """With TLS 1.3 a client certificate is rejected after the handshake, while CONNECT is on its way."""
    streams: list[trio.abc.Stream] = [RejectingStream(alert_after=alert_after)]

    async def open_stream(endpoint: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return streams.pop() if streams else await broker.connect_stream()

    async with MQTTDriver(memory_config(broker, open_stream=open_stream, protocol="5")) as driver:
        assert failures(driver) == [kind]
        (failed,) = (event.text for event in driver.status().history if event.error is not None)
        assert failed.endswith("at once") is (kind == "TLSError")
        assert trio.current_time() < 2
