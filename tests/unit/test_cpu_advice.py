"""Advice and its evidence, published facts, and what a person and a page are shown."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from flatmount.cli.main import main
from flatmount.cpu.advise import (
    Evidence,
    Gain,
    Question,
    advise,
    drop_in,
    gain_of,
    kubernetes,
    node_labels,
    pin_process,
    rank,
)
from flatmount.cpu.model import fit
from flatmount.cpu.published import LOCK_TABLES, Verdict, facts, fit_table, machines
from flatmount.cpu.results import SCHEMA, BenchResult, Burst, Cell, Kind
from flatmount.cpu.validate import simulated_points
from flatmount.cpu.validation import SCHEMA as VALIDATION_SCHEMA
from flatmount.cpu.validation import Point, Validation, interpolate, load_validation
from flatmount.errors import UsageError
from flatmount.report.cpu import page
from flatmount.report.cpu_text import advice_text, bench_text, figure, validation_text
from flatmount.store import Store
from tests.unit import cpu_samples as samples
from tests.unit.sysfs_trees import recorded


@pytest.fixture
def vm_bench() -> BenchResult:
    slow, fast = Burst("per-layer", 100, 50, 2), Burst("flat", 100, 50, 2)
    bursts = [
        *samples.calibrated(2),
        *(samples.burst(Burst("per-layer", c, 50), 0.0004 * c * c) for c in (1, 10, 100)),
        *(samples.burst(Burst("flat", c, 50), 0.0001 * c) for c in (1, 10, 100)),
        *(samples.burst(Burst("flat", 20, 20, background=m), 0.002) for m in (0, 500, 1000)),
        samples.burst(slow, 1.5),
        samples.burst(fast, 0.05),
        samples.burst(Burst("per-layer", 100, 50), 4.0),
        samples.burst(Burst("per-layer", 100, 50, admit=4), 1.0),
        samples.burst(Burst("per-layer", 100, 50, admit=8), 1.2),
    ]
    locks = [
        samples.lock(kind, "one-l3", n, 10.0 * n, 0.01 if kind is Kind.TAS else 0.98)
        for kind in (Kind.TAS, Kind.TICKET)
        for n in (1, 2)
    ]
    cells = [Cell(0, 1, samples.spread(28), 0, 0)]
    return samples.bench(recorded("vm"), locks=locks, bursts=bursts, matrix=cells)


def validation_of(bench: BenchResult) -> Validation:
    model = fit(bench)
    points = tuple(
        Point(b, samples.spread(seconds), seconds * 1.1, seconds, seconds * 1.2, seconds * 2, 0.05)
        for b, seconds in ((Burst("per-layer", 5, 5), 0.01), (Burst("flat", 200, 100), 0.04))
    )
    calibrated = tuple(f for f in bench.bursts[:6])
    simulated = tuple(itertools.islice(simulated_points(model), 2))
    return Validation(bench.version, bench.topology, model, calibrated, points, simulated, (), 1.0, samples.QUIET)


def test_advice_is_ordered_and_says_how_it_is_known(vm_bench: BenchResult) -> None:
    found = advise(Question(), vm_bench.topology, vm_bench, fit(vm_bench))
    assert [one.name for one in found] == ["constant-mounts", "cap", "pin", "smt", "machine"]
    evidence = [one.evidence for one in found]
    assert evidence == [Evidence.MEASURED, Evidence.MEASURED, Evidence.NONE, Evidence.NONE, Evidence.PUBLISHED]
    fix, cap, pin, smt, _ = found
    assert fix.gain is not None and fix.gain.factor == pytest.approx(30) and any("2.0.7" in how for how in fix.how)
    assert cap.title.endswith(": 4") and cap.gain is not None and cap.gain.factor == pytest.approx(4)
    assert not pin.worth_it and not smt.worth_it and "hypervisor may hide it" in smt.why


def test_advice_without_measurements_is_published_or_predicted(vm_bench: BenchResult) -> None:
    nothing = advise(Question(), vm_bench.topology, None, None)
    assert {one.evidence for one in nothing} == {Evidence.PUBLISHED, Evidence.NONE}
    only_model = dataclasses.replace(vm_bench, bursts=vm_bench.bursts[:6])
    predicted = advise(Question(), vm_bench.topology, only_model, fit(only_model))
    assert predicted[1].evidence is Evidence.PREDICTED and "cliff" in predicted[1].why


def test_advice_on_two_sockets_pins_and_talks_of_smt() -> None:
    bench = samples.two_sockets()
    by_name = {one.name: one for one in advise(Question(), bench.topology, bench, fit(bench))}
    assert by_name["pin"].evidence is Evidence.MEASURED and by_name["pin"].worth_it
    assert "AllowedCPUs=0-23" in by_name["pin"].how[-1]
    assert by_name["smt"].evidence is Evidence.PUBLISHED and by_name["smt"].gain is None
    assert drop_in((0, 1, 2, 8))[-1] == "AllowedCPUs=0-2,8"


def test_what_has_the_fix_is_not_told_to_get_it(vm_bench: BenchResult) -> None:
    first = advise(Question(strategy="flat"), vm_bench.topology, vm_bench, None)[0]
    assert not first.worth_it and first.gain is None


def test_overlapping_gains_are_indistinguishable() -> None:
    assert gain_of(samples.spread(1.0, 0.1), samples.spread(0.95, 0.1)).indistinguishable
    assert not gain_of(samples.spread(1.0), samples.spread(0.5)).indistinguishable
    assert "indistinguishable" in str(Gain(1.01, 0.9, 1.1))


def test_machines_are_ranked_by_what_was_measured(vm_bench: BenchResult) -> None:
    genoa = recorded("genoa")
    slow = Burst("per-layer", 100, 50, 2)
    close = samples.bench(genoa, bursts=[samples.burst(slow, 1.48)])
    assert [overlaps for _, _, overlaps in rank([vm_bench, close])] == [False, True]
    with pytest.raises(UsageError, match="no burst in common"):
        rank([vm_bench, samples.bench(genoa)])
    with pytest.raises(UsageError, match="versions"):
        rank([vm_bench, dataclasses.replace(close, version="9.9")])


def test_node_labels_and_affinity(vm_bench: BenchResult) -> None:
    labels = node_labels(vm_bench.topology, fit(vm_bench), Question(limit_s=0.5))
    assert labels["flatmount.io/cpu-sockets"] == "1" and labels["flatmount.io/cpu-smt"] == "false"
    assert 1 < int(labels["flatmount.io/burst-cliff"]) < 100
    feature_file, affinity = kubernetes(labels)
    assert "flatmount.io/cpu-l3-caches=1\n" in feature_file
    assert "preferredDuringSchedulingIgnoredDuringExecution" in affinity


def test_a_running_process_is_pinned_with_its_threads() -> None:
    program = "import threading, time; [threading.Thread(target=time.sleep, args=(30,)).start() for _ in range(3)]"
    daemon = subprocess.Popen([sys.executable, "-c", f"{program}; print('up', flush=True)"], stdout=subprocess.PIPE)
    try:
        assert daemon.stdout is not None and daemon.stdout.readline() == b"up\n"
        cpus = sorted(os.sched_getaffinity(0))
        before = pin_process(daemon.pid, cpus[:1])
        assert before == tuple(cpus)
        tasks = [int(task) for task in os.listdir(f"/proc/{daemon.pid}/task")]
        assert len(tasks) == 4 and all(os.sched_getaffinity(task) == {cpus[0]} for task in tasks)
    finally:
        daemon.kill()
        daemon.wait()
        assert daemon.stdout is not None
        daemon.stdout.close()
    with pytest.raises(UsageError, match="there is no process"):
        pin_process(daemon.pid, cpus)


def test_apply_pins_and_says_how_to_undo_it(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = subprocess.Popen(["sleep", "30"])
    try:
        cpus = sorted(os.sched_getaffinity(0))
        pid = str(daemon.pid)
        assert main(["cpu", "advise", "--apply", "--pid", pid, "--placement", str(cpus[0])]) == 0
        assert os.sched_getaffinity(daemon.pid) == {cpus[0]}
        undo = capsys.readouterr().out.partition("undo: flatmount ")[2].splitlines()[0].split()
        assert main(undo) == 0
        assert os.sched_getaffinity(daemon.pid) == set(cpus)
    finally:
        daemon.kill()
        daemon.wait()


def test_published_facts_and_their_verdicts() -> None:
    found = {(f.subject, f.statement.split(":")[0]): f.verdict for f in facts()}
    assert sum(verdict is Verdict.CALIBRATED for verdict in found.values()) == 3
    assert found["all three", "m7a the most even, r5.metal the worst"] is Verdict.FITS
    assert found["r5.metal", "one NUMA node instead of two"] is Verdict.FITS
    assert found["all", "100 containers of 50 layers make 20,200 mount operations"] is Verdict.FITS
    assert found["AMD, 32 CPUs", "two threads"] is Verdict.MISSES


def test_latencies_alone_would_rank_machines_wrongly_so_hand_offs_are_taken() -> None:
    there = machines()
    assert there["m7a.24xlarge"].hand_off_ns < there["m7i.metal-24xl"].hand_off_ns < there["r5.metal"].hand_off_ns


@pytest.mark.parametrize("table", LOCK_TABLES, ids=lambda table: table.name)
def test_the_public_lock_table_has_its_slope_and_saturation(table: object) -> None:
    found = next(fit_table(t) for t in LOCK_TABLES if t is table)
    assert found.free_parameters <= 3
    assert found.slope == pytest.approx(found.published_slope, rel=0.15)
    assert max(abs(found.error(n)) for n, _ in found.table.ns if n >= 4) < 0.25


class Balance(HTMLParser):
    """Counts what is opened and closed, and what would be loaded."""

    VOID = ("meta", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "onclick")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(vm_bench: BenchResult) -> None:
    html = page(vm_bench, validation_of(vm_bench))
    reader = Balance()
    reader.feed(html)
    assert reader.open == [] and reader.loads == []
    for title in (
        "A burst of containers",
        "Against the length of the mount table",
        "The model against measurement",
        "Latency of a lock",
        "Throughput and its peak",
        "Throughput beside hand-offs",
        "Core to core",
    ):
        assert f"<h2>{title}</h2>" in html
    assert html.count('class="calibrated"') >= 6
    assert "health checks time out" in html and "nan" not in html


def test_the_page_of_two_sockets_and_of_nothing() -> None:
    two = samples.two_sockets()
    html = page(two)
    assert "one level-3 cache, a thread for each core" in html and "socket 1" in html
    assert "<h2>Topology</h2>" in page(samples.bench(two.topology))


def test_text_warns_of_locks_that_hide_hand_offs(vm_bench: BenchResult) -> None:
    text = bench_text(vm_bench)
    assert "have no rank beside fair locks" in " ".join(text.split())
    disturbed = dataclasses.replace(vm_bench, disturbance=dataclasses.replace(samples.QUIET, others_s=10.0))
    assert "disturbed: other processes used 50%" in bench_text(disturbed)
    assert "4. SMT off - not here" in advice_text(advise(Question(), vm_bench.topology, vm_bench, None))


def test_a_validation_survives_json_and_names_its_worst(vm_bench: BenchResult, tmp_path: Path) -> None:
    made = validation_of(vm_bench)
    path = tmp_path / "validation.json"
    path.write_text(json.dumps({"schema": VALIDATION_SCHEMA, **made.to_json()}))
    assert load_validation(str(path)) == made
    assert made.median_error == pytest.approx(0.1) and made.interpolation_error == pytest.approx(1.0)
    text = validation_text(made)
    assert "worst: " in text and "median error 10.0%" in text and "formula against simulation" in text
    assert made.repeatability == 0.05 and "two halves of the same repeats differ by 5.0%" in " ".join(text.split())


def test_interpolation_meets_its_corners_and_goes_on_straight(vm_bench: BenchResult) -> None:
    corners = {
        Burst("flat", c, layers): samples.burst(Burst("flat", c, layers), 1e-4 * c * layers)
        for c in (10, 50)
        for layers in (10, 100)
    }
    for what in (Burst("flat", 10, 100), Burst("flat", 20, 30), Burst("flat", 200, 5)):
        assert interpolate(what, corners) == pytest.approx(1e-4 * what.containers * what.layers)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")],
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def written(bench: BenchResult, path: Path) -> str:
    path.write_text(json.dumps({"schema": SCHEMA, **bench.to_json()}))
    return str(path)


def test_the_command_line_on_a_written_bench(
    vm_bench: BenchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = written(vm_bench, tmp_path / "bench.json")
    for command, schema in (
        (["topology"], "flatmount.cpu-topology/1"),
        (["bench", "--bench", bench, "--compare", bench], SCHEMA),
        (["model", "--bench", bench], "flatmount.cpu-model/1"),
        (["model", "published"], "flatmount.cpu-published/1"),
        (["advise", "--bench", bench, "--kubernetes", "--rank", bench], "flatmount.cpu-advice/1"),
    ):
        assert main(["cpu", *command]) == 0
        assert capsys.readouterr().out.strip()
        assert main(["cpu", *command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["schema"] == schema


def test_pages_from_the_command_line(vm_bench: BenchResult, tmp_path: Path) -> None:
    bench = written(vm_bench, tmp_path / "bench.json")
    validation = tmp_path / "validation.json"
    validation.write_text(json.dumps({"schema": VALIDATION_SCHEMA, **validation_of(vm_bench).to_json()}))
    out = tmp_path / "page.html"
    assert main(["cpu", "bench", "--bench", bench, "--validation", str(validation), "--html", str(out)]) == 0
    assert "held out" in out.read_text()
    assert main(["cpu", "topology", "--html", str(out)]) == 0
    assert "What this machine is made of" in out.read_text()


def test_layers_come_from_the_stores_images(
    vm_bench: BenchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = written(vm_bench, tmp_path / "bench.json")
    Store.open(str(tmp_path / "store"), create=True).close()
    arguments = ["cpu", "model", "--bench", bench, "--image", "any", "--root", str(tmp_path / "store")]
    assert main(arguments) == 2
    assert "no image to take layers from" in capsys.readouterr().err
    images = tuple(SimpleNamespace(layers=(None,) * layers) for layers in (7, 23))
    monkeypatch.setattr(Store, "images", lambda store: images)
    assert main(arguments) == 0
    assert "L=23" in capsys.readouterr().out
    assert main([*arguments, "--layers", "9"]) == 0
    assert "L=9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--budget", "fast"], "--budget 'fas"),
        (["bench", "--budget", "1s", "--no-bursts"], "too small"),
        (["bench", "--bench", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["model", "--bench", "/nowhere.json"], "cannot be read"),
        (["advise", "--apply"], "--apply needs --pid"),
        (["advise", "--apply", "--pid", "1", "--placement", "900"], "not all processors are online"),
        (["advise", "--apply", "--pid", "1", "--placement", "0-x"], "is no list of processors"),
        (["burst", "--strategies", "magic"], "no burst of strategy 'magic'"),
        (["burst", "--admit", "0"], "--admit '0'"),
        (["topology", "--sysroot", "/nonexistent"], "tells of no processor"),
    ],
)
def test_bad_calls_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
