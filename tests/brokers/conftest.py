"""A broker of its own for each test, on each ground in turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.brokers.certificates import Authority
from tests.brokers.grounds import GROUNDS, Ground, Protocol, require
from trio_mqtt_driver.testing import BrokerProcess


@pytest.fixture(params=GROUNDS)
def idle_ground(request: pytest.FixtureRequest) -> tuple[BrokerProcess, Protocol]:
    make, protocol = GROUNDS[request.param]
    return require(make()), protocol


@pytest.fixture
async def ground(idle_ground: tuple[BrokerProcess, Protocol]) -> AsyncGenerator[Ground, None]:
    broker, protocol = idle_ground
    async with broker:
        yield Ground(broker, protocol)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"))
