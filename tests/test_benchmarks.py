"""The benchmark suite itself, with few messages and no peers: that it runs and counts, not what it measures."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest

from tests.benchmarks import pages, wire
from tests.benchmarks.__main__ import main
from tests.benchmarks.catalogue import CLIENTS, FLOOR, OURS, Client
from tests.benchmarks.job import Job
from tests.benchmarks.report import table
from tests.benchmarks.results import References, Results, Run
from tests.benchmarks.suite import measure
from tests.benchmarks.workloads import WORKLOADS
from tests.benchmarks.workloads.base import Workload
from tests.brokers.grounds import require
from trio_mqtt_driver.testing import Mosquitto

BENCHMARKS = Path(__file__).parent / "benchmarks"
OWN = [client for client in CLIENTS if not client.requirements]
WORKS = {workload.job.work for workload in WORKLOADS}


def workloads(*names: str) -> list[Workload]:
    return [workload for workload in WORKLOADS if workload.name in names]


def test_a_quick_run_measures_this_driver_and_the_bare_loop(tmp_path: Path) -> None:
    chosen = workloads("receive-1-feeder", "publish-1-sink", "reconnect-1000", "memory-drivers", "payload-64")
    progress = io.StringIO()
    output = tmp_path / "out.json"
    measure(OWN, chosen, rounds=1, quick=True, environments=tmp_path, output=output, progress=progress)
    results = Results.read(output)
    assert [missing for missing in results.missing if missing.reason.startswith("failed")] == []
    assert {(run.workload, run.client, run.api) for run in results.runs} == {
        ("receive-1-feeder", FLOOR, ""),
        ("receive-1-feeder", OURS, "handler"),
        ("receive-1-feeder", OURS, "iterator"),
        ("publish-1-sink", FLOOR, ""),
        ("publish-1-sink", OURS, "nowait"),
        ("publish-1-sink", OURS, "receipts"),
        ("publish-1-sink", OURS, "await"),
        ("reconnect-1000", FLOOR, ""),
        ("reconnect-1000", OURS, ""),
        ("memory-drivers", OURS, ""),
        ("payload-64", OURS, "handler"),
    }
    assert all(row.value > 0 for workload in chosen for row in results.rows(workload))
    assert {missing.client for missing in results.reasons(chosen[-2])} == {FLOOR}, "what is left out is named"
    (tmp_path / "performance.md").write_text(f"# Performance\n\n{pages.BEGIN}\nold\n{pages.END}\n\nNotes\n")
    pages.main([str(output), "--docs", str(tmp_path)])
    page = (tmp_path / "performance.md").read_text()
    assert "**trio-mqtt-driver, handler**" in page
    assert "old" not in page
    assert page.endswith("Notes\n")
    assert (tmp_path / "performance_payload_bytes.svg").read_text().startswith("<svg")


@pytest.mark.broker
def test_the_bare_loop_goes_through_a_real_broker(tmp_path: Path) -> None:
    require(Mosquitto())
    chosen = workloads(
        "receive-0-mosquitto", "receive-1-mosquitto", "publish-1-mosquitto", "round-trip-1", "reconnect-1000-mosquitto"
    )
    floor = [client for client in CLIENTS if client.name == FLOOR]
    output = tmp_path / "out.json"
    measure(floor, chosen, rounds=1, quick=True, environments=tmp_path, output=output, progress=io.StringIO())
    results = Results.read(output)
    assert results.missing == []
    assert len(results.runs) == 5


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.module)
def test_a_client_has_what_the_catalogue_says(client: Client) -> None:
    """Peers are not installed here, so their modules are read and not imported."""
    source = (BENCHMARKS / "clients" / f"{client.module}.py").read_text(encoding="utf-8")
    nodes = ast.parse(source).body
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    refused = {workload.job.work for workload in WORKLOADS if client.reason(workload) is not None}
    assert WORKS - refused <= functions
    assert {name.partition("-")[0] for name in client.apis} <= WORKS


def run(client: str, cpu: float, api: str = "", number: int = 0) -> Run:
    return Run("receive-0-feeder", client, api, number, {"cpu": cpu, "wall": 1.0, "count": 1000})


def test_a_row_is_the_median_of_the_rounds_and_compared_with_the_best_peer() -> None:
    (workload,) = workloads("receive-0-feeder")
    runs = [run(OURS, cpu, "handler", number) for number, cpu in enumerate((0.009, 0.002, 0.004))]
    runs += [run("gmqtt", 0.008), run("zmqtt", 0.080), run(FLOOR, 0.001), run("paho as trio-paho-mqtt", 0.040)]
    results = Results(runs=runs)
    rows = results.rows(workload)
    assert [row.client for row in rows] == [FLOOR, OURS, "gmqtt", "paho as trio-paho-mqtt", "zmqtt"]
    ours = rows[1]
    assert (ours.value, ours.least, ours.most, ours.rounds) == pytest.approx((4.0, 2.0, 9.0, 3))
    assert ours.extras == {"messages/s": 1000.0}
    assert References.of(rows).ratios(ours) == ("4.00", "0.50", "0.10")
    assert any("* trio-mqtt-driver, handler" in line for line in table(results, workload))


def test_without_a_peer_there_is_no_ratio_to_one() -> None:
    (workload,) = workloads("receive-0-feeder")
    rows = Results(runs=[run(OURS, 0.002)]).rows(workload)
    assert References.of(rows).ratios(rows[0]) == ("-", "-", "-")


@pytest.mark.parametrize("filters, topics", [(1, 50), (10, 1000), (1000, 50), (100_000, 1000)])
def test_each_topic_matches_one_filter_and_all_are_of_one_length(filters: int, topics: int) -> None:
    job = Job("receive", "", filters=filters, topics=topics)
    names = job.topic_names()
    assert len(set(names)) == topics
    assert len({len(name) for name in names}) == 1
    assert len(job.topic_filters()) == filters
    if filters > 1:
        wanted = set(job.topic_filters())
        assert all(name.rpartition("/")[0] + "/+" in wanted for name in names)


def test_the_receive_maximum_is_found_among_other_properties() -> None:
    properties = b"\x11\x00\x00\x00\x05" + b"\x26" + wire.string("a") + wire.string("b") + b"\x21\x00\x64"
    body = wire.string("MQTT") + b"\x05\x02\x00\x3c" + bytes((len(properties),)) + properties + wire.string("id")
    assert wire.receive_maximum(body) == ("5", 100)
    assert wire.receive_maximum(wire.string("MQTT") + b"\x04\x02\x00\x3c" + wire.string("id")) == ("3.1.1", 65535)


def test_an_unknown_name_ends_with_a_word_about_it() -> None:
    with pytest.raises(SystemExit, match="no workload is called nothing"):
        main(["--workloads", "nothing"])
    with pytest.raises(SystemExit, match="no client is called nobody"):
        main(["--clients", "nobody"])


def test_a_list_of_names_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(CLIENTS) + len(WORKLOADS)
