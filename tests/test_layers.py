"""The house has storeys, and imports run downwards only: the table below is the architecture, and this file checks it.

A new module must be entered in the table, so that somebody decides where it belongs. An import under
``if TYPE_CHECKING`` or inside a function counts like any other: the table says who may *know* whom.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = "trio_mqtt_driver"
PACKAGES = (PACKAGE, f"{PACKAGE}.testing")
ROOT = Path(__file__).parent.parent / PACKAGE


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYERS = (
    names("_errors _types _topics"),
    names(
        "_config _validators _properties _url _tls _client_id _backoff _endpoints _codecs _callbacks _edges _history"
        " _events _states _status _turns _cancelled"
    ),
    names("_packets _subscribing _paho _transport _direct"),
    names(
        "_connection _handshake _probe _replay _replies _inflight _incoming _exchanges _limits _registry"
        " _registration _plan _outgoing _outbox _inbox _writer _deadlines _copies _session _sender _receiver _express"
        " _attempts _versions _batch_sizes _suspects _requests _store _outbox_file _aliases _gathering"
    ),
    names("_dispatch _subscription _queue _arguments _failover _availability _dialer"),
    names("_supervisor"),
    names("_lifespan _publisher _driver"),
    names("_state_view"),
    names("__init__ __main__ _cli"),
)
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}

# Rules beside the storeys: module -> modules that it must not know although they are below it.
STRANGERS = {
    "_dispatch": names("_paho _connection"),
    "_subscription": names("_paho _connection"),
    "_supervisor": names("_paho"),
}
# Modules that are functions of their arguments: no clock, no tasks.
WITHOUT_TRIO = names(
    "_topics _types _properties _url _client_id _backoff _endpoints _codecs _edges _history _status"
    " _packets _subscribing _aliases _gathering",
)
PAHO = names("paho trio_paho_mqtt")
MOST_LINES = 500

# A module's name ("_driver", "testing._wire") -> what it imports: "._types" for one of ours, "trio" for others.
Imports = Mapping[str, frozenset[str]]


def imports_of(source: str, module: str) -> frozenset[str]:
    """Everything that the source of ``module`` imports: ours as ``.name``, others by their top-level name."""
    here = [PACKAGE, *module.split(".")]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            full = ".".join(base)
            # `from . import _x` imports the module _x, `from ._x import Y` the module _x as well.
            found.update(
                f"{full}.{alias.name}" if full in PACKAGES and alias.name[0] == "_" else full for alias in node.names
            )
    return frozenset(shortened(name) for name in found)


def shortened(name: str) -> str:
    top, _, rest = (f"{name}.__init__" if name in PACKAGES else name).partition(".")
    return f".{rest}" if top == PACKAGE else top


def broken_rules(imports: Imports) -> list[str]:
    """One sentence for each import that the architecture does not allow, and for each module that it does not know."""
    wrong: list[str] = []
    for module, imported in sorted(imports.items()):
        ours = {name[1:] for name in imported if name[0] == "."}
        if module.partition(".")[0] == "testing":
            allowed = LAYERS[0] | {"__init__"}
            wrong += [
                f"{module} imports {name}: testing knows public names, {', '.join(sorted(LAYERS[0]))} and its own"
                for name in sorted(ours)
                if name not in allowed and name.partition(".")[0] != "testing"
            ]
        elif module not in LAYER:
            wrong.append(f"{module} is not in the table of layers: decide where it belongs")
        else:
            wrong += [
                f"{module} (layer {LAYER[module]}) imports {name} (layer {LAYER.get(name, 'unknown')})"
                for name in sorted(ours)
                if name not in LAYER or LAYER[name] > LAYER[module] or name in STRANGERS.get(module, ())
            ]
        if module != "_paho":
            wrong += [f"{module} imports {name}: only _paho knows paho" for name in sorted(imported & PAHO)]
        if module in WITHOUT_TRIO and "trio" in imported:
            wrong.append(f"{module} imports trio, but takes its time as an argument")
    wrong += [f"{' -> '.join(cycle)}: imports go round in a circle" for cycle in cycles(imports)]
    return wrong


def cycles(imports: Imports) -> Iterable[tuple[str, ...]]:
    """Each circle of imports once, found by depth-first search."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
        if module in path:
            yield (*path[path.index(module) :], module)
        elif module not in done:
            for name in sorted(imports.get(module, ())):
                yield from visit(name[1:], (*path, module)) if name[0] == "." else ()
            done.add(module)

    for module in sorted(imports):
        yield from visit(module, ())


SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*.py"))
}


def test_imports_run_downwards() -> None:
    assert broken_rules({module: imports_of(source, module) for module, source in SOURCES.items()}) == []


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_no_longer_than_one_concept(module: str) -> None:
    assert len(SOURCES[module].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", ["__init__", "testing.__init__"])
def test_an_init_holds_public_names_only(module: str) -> None:
    def is_public_name(node: ast.stmt) -> bool:
        return isinstance(node, ast.ImportFrom) and (
            node.module == "__future__" or all(alias.name == alias.asname for alias in node.names)
        )

    docstring, *rest = ast.parse(SOURCES[module]).body
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(node) for node in rest if not is_public_name(node)] == []


# The checker is checked: each of these must be found.
@pytest.mark.parametrize(
    "module, source, complaint",
    [
        ("_types", "from ._config import DriverConfig", "imports _config (layer 1)"),
        ("_types", "def f():\n    from . import _config", "imports _config (layer 1)"),
        ("_connection", "import trio_mqtt_driver._driver", "imports _driver (layer 6)"),
        ("_driver", "from trio_mqtt_driver import MQTTDriver", "imports __init__ (layer 8)"),
        ("_driver", "from .testing import MemoryBroker", "imports testing.__init__ (layer unknown)"),
        ("_supervisor", "if TYPE_CHECKING:\n    from ._paho import Client", "imports _paho (layer 2)"),
        ("_connection", "import paho.mqtt.client as mqtt", "only _paho knows paho"),
        ("testing._wire", "from trio_paho_mqtt import AsyncClient", "only _paho knows paho"),
        ("testing._wire", "from .._packets import split", "testing._wire imports _packets"),
        ("testing._wire", "from .. import _packets", "testing._wire imports _packets"),
        ("_history", "import trio", "takes its time as an argument"),
        ("_helpers", "", "not in the table"),
        ("_types", "from ._errors import MQTTDriverError", "_errors -> _types -> _errors"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str, complaint: str) -> None:
    imports = {"_errors": frozenset({"._types"}), module: imports_of(source, module)}
    assert complaint in "\n".join(broken_rules(imports))


@pytest.mark.parametrize(
    "module, source",
    [
        ("_driver", "import trio\nfrom ._supervisor import Supervisor\nfrom ._types import QoS"),
        ("_paho", "import paho.mqtt.client\nfrom trio_paho_mqtt import AsyncClient"),
        ("__init__", "from ._driver import MQTTDriver as MQTTDriver"),
        ("testing._wire", "from .. import QoS\nfrom .._errors import ProtocolError\nfrom ._pipe import Pipe"),
    ],
)
def test_what_the_rules_allow_is_not_complained_of(module: str, source: str) -> None:
    assert broken_rules({module: imports_of(source, module)}) == []
