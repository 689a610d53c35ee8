"""iotcore, a real MQTT 5 broker that comes with pip: what it needs to be told."""

from __future__ import annotations

import importlib.util
import json
import site
import ssl
import sys
from pathlib import Path
from typing import ClassVar

from ._broker_errors import BrokerFailedError, BrokerNotInstalledError
from ._broker_process import BrokerProcess
from ._ports import HOST

# Broker.start() would make a child of its own; run_forever() serves in this process, which is then the one that is
# killed and suspended. The router logs every packet as an error, for which a long test has no disk.
_SERVE = """
import logging, sys
logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
for noisy in ("rumqttd.router", "tracing.span"):
    logging.getLogger(noisy).setLevel("CRITICAL")
from iotcore import Broker
Broker(config_path=sys.argv[1]).run_forever()
"""
_CONFIG = """
id = 0
[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5"
listen = {listen}
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 268435455
max_inflight_count = 100
dynamic_filters = true
"""


class Iotcore(BrokerProcess):
    """rumqttd from the wheel ``iotcore``: MQTT 5, QoS 0 to 2, shared subscriptions, ready in 0.2 s.

    For valid traffic: a malformed packet can make it refuse everybody. It departs from MQTT 5 in many ways. Messages
    come with the QoS of the subscription, also if they were published with less; Session Expiry Interval, Receive
    Maximum, Maximum Packet Size, No Local, Retain As Published and Retain Handling are not heeded; a Keep Alive of 0
    and a wrong password end the connection without a CONNACK, and so do acknowledgements in another order than that of
    the messages, QoS 1 and 2 together: with slow handlers, set ``ack_patience=math.inf``. All of its state
    is in memory. It does not enforce client certificates, and one TLS handshake that is not finished holds up all that
    come after.
    """

    name = "iotcore"
    versions: ClassVar[tuple[int, ...]] = (5,)
    keeps_sessions = False
    shares = True
    checks_client_certs = False
    _retain_options = False

    def _find(self) -> list[str]:
        if importlib.util.find_spec("iotcore") is None:
            raise BrokerNotInstalledError("iotcore was not found: pip install iotcore==0.4.0")
        return [sys.executable, "-c", _SERVE]

    def _environment(self, directory: Path) -> dict[str, str]:
        # Python looks under HOME for what was installed for the user alone.
        return {**super()._environment(directory), "PYTHONUSERBASE": site.getuserbase()}

    def _arguments(self, directory: Path, port: int) -> list[str]:
        # A listener of each version would be too much: messages between the two can wedge it.
        text = _CONFIG.format(listen=_quoted(f"{HOST}:{port}"))
        if self.users is not None:
            text += "[v5.1.connections.auth]\n"
            text += "".join(f"{_quoted(user)} = {_quoted(password)}\n" for user, password in self.users.items())
        if self.tls is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls.cert, self.tls.key)
            except ssl.SSLError as exc:
                # It would go on running, and reset every connection.
                raise BrokerFailedError(f"iotcore: the certificate and key cannot be used: {exc}") from exc
            text += f"[v5.1.tls]\ncertpath = {_quoted(self.tls.cert)}\nkeypath = {_quoted(self.tls.key)}\n"
        path = directory / "iotcore.toml"
        path.write_text(text, encoding="utf-8")
        return [str(path)]


def _quoted(value: object) -> str:
    """A JSON string is one of TOML, but for surrogates and DEL."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
