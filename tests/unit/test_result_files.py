"""Results of every kind out of their files, alone and side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_storm import sample_report

from flatmount.cli.main import main
from flatmount.errors import EXIT_USAGE, UsageError
from flatmount.observe.doctor.findings import Diagnosis, Finding, Severity
from flatmount.observe.mount_calls import Effect
from flatmount.observe.profile_results import LockWaits, Moment, Profile
from flatmount.observe.symbols import Lock
from flatmount.observe.trace_results import Absent, CallCount, ProcessCalls, TraceReport, TraceRun
from flatmount.report.files import page, read_results, render, side_by_side
from flatmount.report.html import page as storm_page
from flatmount.report.text import render as render_storm
from flatmount.storm.results import HostFacts
from tests import sample_results

HOST = HostFacts("6.18", "x86_64", "cpu", 2, 1 << 30, "3.11", "0.1")
WAITS = (LockWaits(Lock.NAMESPACE_SEM, 1, "<x>", False, 2, 4000.0, 3000.0),)
PROFILE = Profile(
    "2026-01-31T12:00:00Z",
    HOST,
    2.0,
    (),
    None,
    199,
    WAITS,
    (),
    (),
    (),
    (Moment(0.0, 5, 0.0, 0.0, 0.0, None, None),),
    (),
    0,
    0.1,
)
FINDING = Finding("table-large", Severity.WARNING, "<5,000 mounts>", ("kubelet 5,000",), "kubelet", "look", True)
DIAGNOSIS = Diagnosis("2026-01-31T12:00:00Z", "6.18", 1.0, 5000, "verdict", (FINDING,), ("descriptors",))


def traced(layers: int | None, operations: int) -> TraceRun:
    calls = (CallCount("mount", Effect.ATTACH, operations, 0, 1.0, 1.0),)
    process = ProcessCalls(1, "x", calls)
    return TraceRun("<e>", layers, ("x",), 0, 0.1, (process,), 0, (), 1, 1, None, 0, ())


TRACE = TraceReport(
    "2026-01-31T12:00:00Z", HOST, (traced(5, 25), traced(50, 205), traced(None, 1)), (Absent("podman", "not there"),)
)
VALUES = {"storm": sample_report(), "trace": TRACE, "profile": PROFILE, "doctor": DIAGNOSIS}


def saved(directory: Path, name: str, value: Any) -> str:
    path = directory / f"{name}.json"
    path.write_text(json.dumps(value.to_json()))
    return str(path)


@pytest.mark.parametrize("name", VALUES)
def test_each_kind_comes_back_and_has_text_and_a_page(name: str, tmp_path: Path) -> None:
    results = read_results(saved(tmp_path, name, VALUES[name]))
    assert results.value == VALUES[name]
    assert render([results]).endswith("\n")
    html = page([results])
    assert html.startswith("<!doctype html>") and "<script" not in html
    for bad in ("<x>", "<e>", "<5,000 mounts>"):
        assert bad not in html


@pytest.mark.parametrize("name", VALUES)
def test_two_of_a_kind_have_a_ratio(name: str, tmp_path: Path) -> None:
    results = [read_results(saved(tmp_path, one, VALUES[name])) for one in ("a", "b")]
    heads, rows = side_by_side(results)
    assert heads == [name, *(one.path for one in results), "ratio"]
    assert rows and {row[-1] for row in rows} <= {"1.000", "–"}
    assert "side by side" in page(results)
    assert all(row[0] in render(results) for row in rows)


def test_figures_that_one_lacks_are_dashes(tmp_path: Path) -> None:
    other = replace(PROFILE, waits=(replace(WAITS[0], lock=Lock.MOUNT_LOCK, total_us=8000.0),))
    paths = [saved(tmp_path, name, value) for name, value in (("a", PROFILE), ("b", other), ("c", PROFILE))]
    _, rows = side_by_side([read_results(path) for path in paths])
    assert ["waited for namespace_sem, ms", "4.00", "–", "4.00"] in rows
    assert ["waited for mount_lock, ms", "–", "8.00", "–"] in rows


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = saved(tmp_path, "a", TRACE), saved(tmp_path, "b", TRACE)
    assert main(["report", first, second, "--json", "--html", str(tmp_path / "x.html")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "flatmount.report/1" and said["rows"]
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("content", ["not json", "[]", '{"schema": "flatmount.other/1"}', '{"schema": ["x"]}', "{}"])
def test_what_is_no_result_is_refused_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["report", str(path)]) == EXIT_USAGE
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["report", str(tmp_path / "none.json")]) == EXIT_USAGE
    assert main(["report", saved(tmp_path, "a", TRACE), saved(tmp_path, "b", PROFILE)]) == EXIT_USAGE


def test_every_kind_that_a_verb_writes_comes_back(tmp_path: Path) -> None:
    for name, value in sample_results.RESULTS.items():
        path = tmp_path / f"{name}.json"
        sample_results.save(name, path)
        results = read_results(str(path))
        assert results.value == value, name
        assert render([results]).endswith("\n"), name
        heads, rows = side_by_side([results, results])
        assert heads[-1] == "ratio" and rows, name
        assert {row[-1] for row in rows} <= {"1.000", "–"}, name
        for shown in (page([results]), page([results, results])):
            assert shown.startswith("<!doctype html>") and "<script" not in shown, name
            for bad in ("<demo>", "<runc>", "<x>", "<it>", "<each>", "<cri-o>", "<installed>"):
                assert bad not in shown, (name, bad)


def test_the_last_line_of_a_watch_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "watch.jsonl"
    sample_results.save("watch", path)
    path.write_text(path.read_text()[:-40])
    results = read_results(str(path))
    assert len(results.value.samples) == len(sample_results.watch().samples) - 1
    path.write_text("\n".join([*path.read_text().splitlines()[:2], "{broken}"]))
    with pytest.raises(UsageError):
        read_results(str(path))


def test_one_sample_alone_is_a_log_too(tmp_path: Path) -> None:
    path = tmp_path / "watch.jsonl"
    sample_results.save("watch", path)
    path.write_text(path.read_text().splitlines()[0])
    assert "In 1.00 s" in render([read_results(str(path))])


def test_a_storm_without_locks_is_read_as_before(tmp_path: Path) -> None:
    value = sample_report().to_json()
    del value["locks"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(value))
    assert read_results(str(path)).value == sample_report()


def test_who_waits_is_in_the_text_and_on_the_page_of_a_storm() -> None:
    report = sample_results.storm()
    text = render_storm(report, width=120)
    assert "waited for" in text and "100%" in text and "0.003%" in text
    assert "waited for" not in render_storm(sample_report())
    assert "on CPU" not in render_storm(report, width=60) and "waited for" in render_storm(report, width=60)
    assert all(len(line) <= 120 for line in text.splitlines())
    shown = storm_page(report)
    assert "Who waits for the mount locks" in shown and "Who waits" not in storm_page(sample_report())
    nobody = replace(report.locks[0], namespace_sem_ms=0.0, mount_lock_ms=0.0, samples=0, missing=("<perf>",), lost=2)
    shown = storm_page(replace(report, locks=(nobody,)))
    assert "&lt;perf&gt;" in shown
    text = render_storm(replace(report, locks=(nobody,)))
    assert "left out: <perf>" in text and "2 events were lost" in text
