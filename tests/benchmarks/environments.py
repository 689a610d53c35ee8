"""An environment for each peer, made on demand: some need versions of the same package that exclude each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .catalogue import Client

DEFAULT = Path(__file__).parent / ".venvs"


class NotInstalledError(Exception):
    """Why a client cannot be measured."""


def python_of(client: Client, folder: Path) -> str:
    """The interpreter that has the client; installs it if need be. Raises `NotInstalledError`."""
    if not client.requirements:
        return sys.executable
    # One for each Python that the suite is run with.
    place = folder / f"{client.module}-{sys.version_info.major}.{sys.version_info.minor}"
    python = place / "bin" / "python"
    stamp = place / "installed.json"
    wanted = json.dumps([*client.requirements, *client.pip_options])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        _run([sys.executable, "-m", "venv", "--clear", str(place)])
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        _run([*pip, *client.pip_options, *client.requirements])
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalledError(errors[0] if errors else f"{' '.join(command)} failed")


def versions_of(client: Client, python: str) -> dict[str, str]:
    """Of the packages that the client is made of."""
    names = [requirement.split("=")[0].split(">")[0] for requirement in client.requirements]
    names = names or (["trio-mqtt-driver", "trio", "paho-mqtt"] if client.module == "ours" else [])
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
