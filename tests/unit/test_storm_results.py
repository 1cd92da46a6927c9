"""Percentiles, the JSON form of a storm and its strict reading, medians and ratios, and the sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_storm import CONTAINERS, REPEATS, sample_report

from flatmount.errors import UsageError
from flatmount.storm.results import LatencyMs, MountOperations, ProbeMs, StormReport, measured, percentile
from flatmount.storm.summary import Spread, figure, sentence, summary


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([], 50, None),
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([1.0, 2.0], 50, 1.0),
        ([1.0, 2.0, 3.0], 50, 2.0),
        ([float(i) for i in range(1, 101)], 99, 99.0),
        ([float(i) for i in range(1, 102)], 99, 100.0),
        ([float(i) for i in range(1, 100)], 99, 99.0),
        ([float(i) for i in range(1, 11)], 90, 9.0),
        ([1.0, 2.0, 3.0], 100, 3.0),
    ],
)
def test_percentile_is_nearest_rank(values: list[float], q: float, expected: float | None) -> None:
    assert percentile(values, q) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 100))
def test_percentile_is_the_least_value_that_covers_its_share(values: list[float], q: int) -> None:
    ordered = sorted(values)
    found = percentile(ordered, q)
    assert found in ordered
    assert sum(value <= found for value in ordered) * 100 >= q * len(ordered)
    assert sum(value < found for value in ordered) * 100 < q * len(ordered)


def test_json_has_the_fields_of_the_schema_and_comes_back_equal() -> None:
    report = sample_report()
    encoded = json.dumps(report.to_json(), allow_nan=False)
    value = json.loads(encoded)
    assert next(iter(value)) == "schema"
    assert value["schema"] == "flatmount.storm/1"
    assert {"host", "image", "settings", "results"} <= value.keys()
    assert {"layers", "files"} <= value["image"].keys()
    assert len(value["results"]) == 4 * REPEATS
    run = value["results"][0]
    assert run.keys() >= {
        "strategy", "repeat", "containers", "concurrency", "wall_s", "starts_per_s", "failed", "latency_ms",
        "mount_operations", "mount_table", "probe_ms", "watchers_cpu_s", "phases_ms", "undo_operations",
    }  # fmt: skip
    assert run["latency_ms"].keys() == {"p50", "p90", "p99", "max"}
    assert run["mount_operations"].keys() >= {"planned_per_container", "executed", "kernel"}
    assert run["mount_table"].keys() == {"before", "peak", "after"}
    assert run["probe_ms"].keys() == {"p50", "p99", "max"}
    assert run["phases_ms"].keys() == {"user_namespace", "plan", "execute", "undo"}
    assert StormReport.from_json(value) == report


def test_fields_that_a_later_version_added_are_left_out() -> None:
    report = sample_report()
    value = report.to_json()
    value["weather"] = "fine"
    value["host"]["sockets"] = 2
    assert StormReport.from_json(value) == report


def _set(path: str, to: object) -> Any:
    def change(value: Any) -> None:
        *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in way:
            value = value[step]
        value[last] = to

    return change


def _drop(value: Any) -> None:
    del value["results"][1]["latency_ms"]["p90"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("schema", "flatmount.storm/2"), "flatmount.storm/2"),
        (_set("schema", None), "names no schema"),
        (_drop, r"storm.results\[1\].latency_ms lacks 'p90'"),
        (_set("host.cpus", "2"), "storm.host.cpus is not a whole number: '2'"),
        (_set("host.cpus", 2.5), "storm.host.cpus is not a whole number"),
        (_set("host.cpus", True), "storm.host.cpus is not a whole number"),
        (_set("host.kernel", 6.18), "storm.host.kernel is not a string"),
        (_set("settings.on_host", 0), "storm.settings.on_host is not true or false"),
        (_set("settings.strategies", "flat"), "storm.settings.strategies is not a list"),
        (_set("results.0.wall_s", math.nan), r"storm.results\[0\].wall_s is not finite"),
        (_set("results.0.wall_s", -1), r"storm.results\[0\].wall_s is not finite and not negative: -1"),
        (_set("results.0.wall_s", None), r"storm.results\[0\].wall_s is not a number"),
        (_set("results.0.mounts.0", [0.1]), r"storm.results\[0\].mounts\[0\] is not a list of 2"),
        (_set("results.0.mounts.0.1", 1.5), r"storm.results\[0\].mounts\[0\]\[1\] is not a whole number"),
        (_set("results", {}), "storm.results is not a list"),
        (_set("image", []), "storm.image is not an object"),
    ],
)
def test_a_file_that_is_not_such_results_is_refused_by_field(change: Any, says: str) -> None:
    value = json.loads(json.dumps(sample_report().to_json()))
    change(value)
    with pytest.raises(UsageError, match=says) as raised:
        StormReport.from_json(value)
    assert raised.value.hint


@pytest.mark.parametrize("value", [None, [], "x", 1, {}])
def test_what_is_no_object_with_a_schema_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="not the results of a storm"):
        StormReport.from_json(value)


def test_a_run_where_nothing_started_has_no_latency() -> None:
    run = measured(
        strategy="flat",
        repeat=0,
        containers=2,
        concurrency=1,
        wall_s=60.0,
        started=[],
        failures=["timed out after 30 s", "timed out after 30 s"],
        mount_operations=MountOperations(1, 0, None, "not asked", 0),
        mounts_before=20,
        mounts_after=20,
        mounts=[],
        probe=[],
        watchers_cpu_s=0.0,
        watchers_rereads=0,
        undo_operations=0,
    )
    assert (run.failed, run.starts_per_s, run.failures) == (2, 0.0, ("timed out after 30 s",))
    assert run.latency_ms == LatencyMs(None, None, None, None)
    assert run.probe_ms == ProbeMs(None, None, None)
    assert run.phases_ms.execute is None
    assert run.mount_table.peak == 20
    report = dataclasses.replace(sample_report(), results=(run,))
    assert StormReport.from_json(report.to_json()) == report
    assert "flat failed 2 of 2 starts" in sentence(report)


def test_ratios_are_taken_within_a_repeat() -> None:
    report = sample_report(strategies=("per-layer", "flat"))
    # A repeat in which the whole machine was ten times slower changes no ratio.
    slow = tuple(
        dataclasses.replace(run, starts_per_s=run.starts_per_s / (10 if run.repeat == 1 else 1))
        for run in report.results
    )
    before = summary(report).of("flat")
    after = summary(dataclasses.replace(report, results=slow)).of("flat")
    assert before.speedup is not None
    assert after.speedup is not None
    assert after.speedup.median == pytest.approx(before.speedup.median)
    assert after.speedup.high == pytest.approx(before.speedup.high)
    assert after.starts_per_s.low < before.starts_per_s.low / 5


def test_summary_counts_and_spreads() -> None:
    outcome = summary(sample_report())
    assert outcome.baseline == "per-layer"
    assert [entry.strategy for entry in outcome.strategies] == [
        "per-layer",
        "common-parent",
        "detached",
        "flat",
    ]
    base = outcome.of("per-layer")
    assert (base.repeats, base.containers, base.failed) == (REPEATS, REPEATS * CONTAINERS, 3)
    assert base.speedup == Spread(1.0, 1.0, 1.0)
    assert base.wall_s.low < base.wall_s.median < base.wall_s.high
    assert base.operations_per_container == 203
    with pytest.raises(KeyError):
        outcome.of("chown")


def test_without_per_layer_the_first_strategy_is_the_baseline() -> None:
    outcome = summary(sample_report(strategies=("detached", "flat")))
    assert outcome.baseline == "detached"
    assert "as fast with flat as with detached" in sentence(sample_report(strategies=("detached", "flat")))


def test_the_sentence_has_what_a_person_would_quote() -> None:
    text = sentence(sample_report(containers=2000))
    assert text.startswith("On 2 CPUs, 2,000 containers of an image with 50 layers started 14.9 times as fast ")
    assert "with flat as with per-layer" in text
    assert re.search(r"1,547 against \d+ starts a second; [\d.]+ to [\d.]+ times over 3 repeats", text)
    assert "with 1 mount operation instead of 203 for each" in text
    assert "a health check beside them took" in text
    assert text.endswith("per-layer failed 3 of 6,000 starts.")


def test_too_few_rounds_of_the_probe_are_not_quoted() -> None:
    assert "health check" not in sentence(sample_report())


def test_a_baseline_that_never_started_is_said_in_words() -> None:
    report = sample_report(strategies=("per-layer", "flat"))
    dead = tuple(
        dataclasses.replace(run, starts_per_s=0.0, failed=run.containers) if run.strategy == "per-layer" else run
        for run in report.results
    )
    report = dataclasses.replace(report, results=dead)
    assert summary(report).of("flat").speedup is None
    assert "did not start with per-layer and did with flat" in sentence(report)


def test_no_results_and_one_strategy_have_a_sentence() -> None:
    assert sentence(dataclasses.replace(sample_report(), results=())) == "Nothing was measured."
    assert sentence(sample_report(strategies=("flat",))).endswith("a second with flat, 1 mount operation each.")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0004, "<0.001"),
        (0.0123, "0.012"),
        (0.5, "0.50"),
        (1, "1.00"),
        (9.99, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1547.4, "1,547"),
        (12345678, "12,345,678"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def test_the_sample_is_the_same_at_every_call() -> None:
    assert copy.deepcopy(sample_report()) == sample_report()
