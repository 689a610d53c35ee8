"""Connection options from a URL or from environment variables.

A URL that is wrong may hold a password at any place: ``mqtt://user:12/34@host`` has, by the rules of URLs, the port 12
and the path ``/34@host``. So error messages name the part and quote next to nothing of it, and have no exception that
quotes more for their context.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

_DEFAULT_PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
_PROTOCOLS: Final = ("auto", "5", "3.1.1")
_MAXIMUM_PASSWORD: Final = 65535
# A DNS name has at most 253 characters. What has a meaning in URLs is none of a host.
_REFERENCE: Final = re.compile(r"(?:\[([^\[\]]{1,253})\]|([^\[\]:/?#@\\%]{1,253}))(?::([0-9]{1,5}))?")
_HINT: Final = "; percent-encode '/', '?', '#', '%', '[' and ']' in user name and password"


def parse_url(url: str, field: str = "url") -> dict[str, object]:
    """Return the options that a URL names.

    ``mqtt://host:1883``, ``mqtts://host:8883`` (the ports are the defaults; IPv6 addresses in brackets) and
    ``unix:///run/mqtt.sock``, each with ``user:password@`` before the host, percent-encoded, and with any of
    ``client_id``, ``keep_alive`` (seconds) and ``protocol`` (auto, 5, 3.1.1) in the query.

    :param field: what error messages call it.
    :returns: of ``scheme``, ``host``, ``port``, ``path`` (unix), ``username``, ``password``, ``client_id``,
        ``keep_alive`` and ``protocol`` those that the URL gives.
    :raises TypeError: not a str.
    :raises ValueError: names the part of the URL that is wrong.
    """
    return _parse(url, field)


def from_env(environ: Mapping[str, str], prefix: str = "MQTT_") -> dict[str, object]:
    """Return the options that environment variables name; empty ones count as unset, unknown ones are ignored.

    ``MQTT_URL`` (needed; see `parse_url`), ``MQTT_USERNAME``, ``MQTT_PASSWORD`` or ``MQTT_PASSWORD_FILE`` (a file with
    the password; a line end after it is left out), ``MQTT_CLIENT_ID``, ``MQTT_KEEP_ALIVE`` (seconds),
    ``MQTT_CA_FILE``, ``MQTT_CERT_FILE`` and ``MQTT_KEY_FILE``. They win over what the URL says.

    Reads the password file at once, so it blocks like any file.

    :param prefix: what the variables' names start with.
    :returns: what `parse_url` returns, and ``ca_file``, ``cert_file`` and ``key_file``.
    :raises ValueError: names the variable that is wrong or missing.
    """
    set_ = {name.removeprefix(prefix): value for name, value in environ.items() if value and name.startswith(prefix)}
    if "URL" not in set_:
        raise ValueError(f"{prefix}URL: is not set; it must be like mqtt://host:1883")
    if "PASSWORD" in set_ and "PASSWORD_FILE" in set_:
        raise ValueError(f"{prefix}PASSWORD and {prefix}PASSWORD_FILE: only one of them may be set")
    options = _parse(set_["URL"], f"{prefix}URL")
    for name in ("USERNAME", "PASSWORD", "CLIENT_ID", "CA_FILE", "CERT_FILE", "KEY_FILE"):
        if name in set_:
            options[name.lower()] = set_[name]
    if "KEEP_ALIVE" in set_:
        options["keep_alive"] = _keep_alive(set_["KEEP_ALIVE"], f"{prefix}KEEP_ALIVE")
    if "PASSWORD_FILE" in set_:
        options["password"] = _password_from(set_["PASSWORD_FILE"], f"{prefix}PASSWORD_FILE")
    return options


def parse_reference(reference: str, default_port: int) -> list[tuple[str, int]]:
    """Return the (host, port) pairs that a Server Reference names [MQTT-4.13], in its order.

    MQTT recommends ``host``, ``host:port`` or ``[IPv6 address]:port``, separated by spaces. What is not of that form
    is left out: it comes from the network, and the driver goes on without.

    :param default_port: for those without a port.
    """
    places: list[tuple[str, int]] = []
    for part in reference.split(" "):
        found = _REFERENCE.fullmatch(part)
        if found is None:
            continue
        literal, name, digits = found.groups()
        host, port = literal or name, int(digits or default_port)
        if host.isprintable() and 1 <= port <= 65535 and (not literal or _is_ipv6(literal)):
            places.append((host, port))
    return places


def _parse(url: str, field: str) -> dict[str, object]:
    parts = _split(url, field)
    options: dict[str, object] = {"scheme": parts.scheme}
    options.update(_place(parts, field))
    options.update(_credentials(parts, field))
    options.update(_query(parts.query, field))
    return options


def _split(url: str, field: str) -> SplitResult:
    # A caller without a type checker passes bytes or None sooner or later, hence the test of an annotated type.
    if not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{field}: must be a str, got {type(url).__name__}")
    # urlsplit() removes tabs and line ends silently.
    if re.search(r"[\x00-\x20\x7f\ud800-\udfff]", url):
        raise ValueError(f"{field}: must not contain spaces, control characters or surrogates; percent-encode them")
    scheme, separator, _ = url.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ValueError(f"{field}: must start with mqtt://, mqtts:// or unix://")
    if scheme.lower() in ("ws", "wss"):
        raise ValueError(f"{field}: scheme {scheme!r}: WebSocket is not supported yet; use mqtt, mqtts or unix")
    if scheme.lower() not in (*_DEFAULT_PORTS, "unix"):
        raise ValueError(f"{field}: scheme must be mqtt, mqtts or unix, got {scheme!r:.60}")
    if re.search(r"%(?![0-9A-Fa-f]{2})", url):
        raise ValueError(f"{field}: '%' must be followed by two hexadecimal digits (write %25 for a '%')")
    try:
        parts = urlsplit(url)
    except ValueError:  # its text quotes the user info
        parts = None
    if parts is None:
        raise ValueError(f"{field}: the host is not valid{_HINT}")
    if "#" in url:
        raise ValueError(f"{field}: must not have a fragment{_HINT}")
    return parts


def _place(parts: SplitResult, field: str) -> dict[str, object]:
    address = parts.netloc.rpartition("@")[2]
    if parts.scheme == "unix":
        if address:
            raise ValueError(f"{field}: unix takes no host; write unix:///path/of/the.sock")
        path = _decoded(parts.path, f"{field}: the path")
        if len(path) < 2 or "\0" in path:
            raise ValueError(f"{field}: the path must name a socket, like unix:///run/mqtt.sock")
        return {"path": path}
    if parts.path not in ("", "/"):
        raise ValueError(f"{field}: {parts.scheme} takes no path{_HINT}")
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::(\d{1,5}))?", address)
    if found is None:
        raise ValueError(
            f"{field}: host and port must be like example.org, 192.0.2.1:1883 or [2001:db8::1]:1883, "
            f"the port from 1 to 65535{_HINT}"
        )
    literal, name, digits = found.groups()
    port = _DEFAULT_PORTS[parts.scheme] if digits is None else int(digits)
    if not 1 <= port <= 65535:
        raise ValueError(f"{field}: the port must be from 1 to 65535{_HINT}")
    host = _decoded(literal or name, f"{field}: the host")
    if literal and not _is_ipv6(host):
        raise ValueError(f"{field}: the host in brackets must be an IPv6 address{_HINT}")
    return {"host": host, "port": port}


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _credentials(parts: SplitResult, field: str) -> dict[str, object]:
    user_info = parts.netloc.rpartition("@")[0]
    if not user_info:
        return {}
    username, separator, password = user_info.partition(":")
    credentials: dict[str, object] = {"username": _decoded(username, f"{field}: the user name")}
    if separator:
        credentials["password"] = _decoded(password, f"{field}: the password")
    return credentials


def _query(query: str, field: str) -> dict[str, object]:
    options: dict[str, object] = {}
    for part in query.split("&") if query else ():
        name, _, raw = part.partition("=")
        if name not in ("client_id", "keep_alive", "protocol"):
            raise ValueError(
                f"{field}: the query may hold client_id, keep_alive and protocol, and nothing else{_HINT}"
            )
        if name in options:
            raise ValueError(f"{field}: {name} is in the query twice")
        value = _decoded(raw, f"{field}: {name}")
        if not value:
            raise ValueError(f"{field}: {name} is empty")
        if name == "protocol" and value not in _PROTOCOLS:
            raise ValueError(f"{field}: protocol must be one of {', '.join(_PROTOCOLS)}, got {value!r:.60}")
        options[name] = _keep_alive(value, f"{field}: keep_alive") if name == "keep_alive" else value
    return options


def _decoded(text: str, field: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:  # it holds the text
        pass
    raise ValueError(f"{field} must be UTF-8, percent-encoded")


def _keep_alive(text: str, field: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{field} must be a whole number of seconds from 0 to 65535, got {text!r:.60}")
    return int(text)


def _password_from(path: str, field: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAXIMUM_PASSWORD + 3)
    except (OSError, ValueError) as exc:
        raise ValueError(f"{field}: cannot read {path!r:.200}: {exc}") from exc
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    if not 1 <= len(data) <= _MAXIMUM_PASSWORD:
        raise ValueError(f"{field}: {path!r:.200} must hold a password of 1..{_MAXIMUM_PASSWORD} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:  # it holds the text
        pass
    raise ValueError(f"{field}: {path!r:.200} must hold text in UTF-8")
