"""What CONNECT and DISCONNECT say of a session that is to outlive its connection."""

from __future__ import annotations

from tests.test_paho import both_versions, connected, control_packets, decoded
from trio_mqtt_driver import DriverConfig, Endpoint
from trio_mqtt_driver.testing import Connect, Disconnect


@both_versions
async def test_disconnect_may_end_the_session_with_mqtt_5(version: int) -> None:
    expected = Disconnect(properties={"session_expiry": 0}) if version == 5 else Disconnect()
    async with connected(version) as control:
        assert decoded(control.disconnect_packet(end_session=True), version=version) == [expected]


@both_versions
async def test_a_session_that_is_to_last_is_asked_for(version: int) -> None:
    config = DriverConfig(endpoint=Endpoint(host="memory", port=1883), stable_id=True, session_expiry=77)
    for clean_start in (True, False):
        async with control_packets(version, clean_start=clean_start) as control:
            (packet,) = decoded(control.connect_packet(config, None))
            assert isinstance(packet, Connect)
            assert packet.clean_start is clean_start
            assert packet.properties.get("session_expiry") == (77 if version == 5 else None)
