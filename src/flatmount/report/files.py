"""Results of any kind out of their files: each as text and as a page, and several of one kind side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flatmount.cpu.records import from_data
from flatmount.cpu.results import SCHEMA as CPU
from flatmount.cpu.results import BenchResult
from flatmount.cpu.validation import SCHEMA as VALIDATION
from flatmount.cpu.validation import Validation
from flatmount.errors import UsageError
from flatmount.observe.doctor.findings import SCHEMA as DOCTOR
from flatmount.observe.doctor.findings import Diagnosis
from flatmount.observe.profile_results import SCHEMA as PROFILE
from flatmount.observe.profile_results import Profile, lock_totals, work_shares
from flatmount.observe.symbols import Work
from flatmount.observe.trace_results import SCHEMA as TRACE
from flatmount.observe.trace_results import TraceReport, fits
from flatmount.observe.watch_results import SCHEMA as WATCH
from flatmount.observe.watch_results import Sample, WatchLog
from flatmount.report import cpu, cpu_text, doctor, html, profile, starts, text, trace, watch_log
from flatmount.report.page import document, header, plain_table, section
from flatmount.storm.results import SCHEMA as STORM
from flatmount.storm.results import StormReport
from flatmount.storm.starts_results import SCHEMA as STARTS
from flatmount.storm.starts_results import StartsReport
from flatmount.storm.summary import figure, summary

Figures = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Kind:
    """What can be done with results of one schema. `page` is None where there is none but the table of figures."""

    name: str
    load: Callable[[Any], Any]
    text: Callable[[Any], str]
    page: Callable[[Any], str] | None
    figures: Callable[[Any], Figures]


@dataclass(frozen=True, slots=True)
class Results:
    """The results of one file."""

    path: str
    kind: Kind
    value: Any


def read_results(path: str) -> Results:
    """Read a file of results. Raises: UsageError for what is not one, or of a schema that is not known."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        log = _watched(text)
        if log is not None:
            return Results(path, _KINDS[WATCH], log)
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint="give a file that --json or --save wrote") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="give a file that --json or --save wrote") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    kind = _KINDS.get(schema) if isinstance(schema, str) else None
    if kind is None:
        raise UsageError(f"{path}: no results with schema {schema!r} are known", hint=f"known: {', '.join(_KINDS)}")
    return Results(path, kind, kind.load(value))


def _watched(text: str) -> WatchLog | None:
    """The samples of lines that `watch --jsonl` wrote; the last may have been cut. None for anything else."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or f'"{WATCH}"' not in lines[0]:
        return None
    if len(lines) > 1 and not lines[-1].endswith("}"):
        lines.pop()
    return WatchLog(tuple(Sample.from_json(json.loads(line)) for line in lines))


def render(results: Sequence[Results]) -> str:
    """One file as its own text, several as one table. Ends with a newline."""
    if len(results) == 1:
        return results[0].kind.text(results[0].value)
    heads, rows = side_by_side(results)
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join(lines) + "\n"


def page(results: Sequence[Results]) -> str:
    """One file as its own page, several (or one of a kind that has none) as a table. Loads nothing."""
    kind = results[0].kind
    if len(results) == 1 and kind.page is not None:
        return kind.page(results[0].value)
    heads, rows = side_by_side(results)
    title = f"{kind.name}: {len(results)} results side by side"
    table = plain_table(heads, [[escape(cell) for cell in row] for row in rows])
    note = "The last column is the last result by the first." if len(results) == 2 else ""
    listed = " · ".join(os.path.basename(one.path) for one in results)
    return document(title, (), [header(listed, title, note), section("Figures", "", table)])


def side_by_side(results: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a row for each figure, a column for each file; of two files also the ratio.

    Raises: UsageError where the files are not of one kind.
    """
    kinds = {one.kind.name for one in results}
    if len(kinds) > 1:
        raise UsageError(f"{' and '.join(sorted(kinds))} do not compare", hint="give files of one kind")
    columns = [one.kind.figures(one.value) for one in results]
    names = dict.fromkeys(name for column in columns for name in column)
    heads = [results[0].kind.name, *(one.path for one in results)]
    rows = [[name, *(_cell(column.get(name)) for column in columns)] for name in names]
    if len(results) == 2:
        heads.append("ratio")
        for row, name in zip(rows, names, strict=True):
            row.append(_ratio(columns[0].get(name), columns[1].get(name)))
    return heads, rows


def _cell(value: float | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else figure(value)


def _ratio(first: float | str | None, last: float | str | None) -> str:
    if isinstance(first, str) or isinstance(last, str) or not first or last is None:
        return "–"
    return f"{last / first:.3f}"


def _of_storm(report: StormReport) -> Figures:
    found: Figures = {}
    for entry in summary(report).strategies:
        found[f"{entry.strategy}: starts a second"] = entry.starts_per_s.median
        found[f"{entry.strategy}: mount operations each"] = float(entry.operations_per_container)
        for name, spread in (
            ("p50 ms", entry.latency_p50_ms),
            ("p99 ms", entry.latency_p99_ms),
            ("probe p99 ms", entry.probe_p99_ms),
        ):
            if spread is not None:
                found[f"{entry.strategy}: {name}"] = spread.median
        found[f"{entry.strategy}: failed"] = float(entry.failed)
    for one in report.locks:
        found[f"{one.strategy}: waited for mount locks, us each"] = one.mount_locks_us_each
        found[f"{one.strategy}: waited for grace periods, us each"] = one.grace_period_us_each
        found[f"{one.strategy}: waits for grace periods, each"] = one.grace_periods / max(one.containers, 1)
        found[f"{one.strategy}: processors on mount locks, %"] = 100 * (one.cpu_spinning + one.cpu_under_lock)
    return found


def _of_starts(report: StartsReport) -> Figures:
    found: Figures = {}
    for one in report.waves:
        name = f"{one.engine}, wave {one.wave + 1}, repeat {one.repeat + 1}"
        found[f"{name}: starts a second"] = one.starts_per_s
        if one.latency_ms.p50 is not None:
            found[f"{name}: p50 ms"] = one.latency_ms.p50
        found[f"{name}: failed"] = float(one.failed)
    return found


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _bench(value: Any) -> BenchResult:
    return from_data(BenchResult, value, "cpu bench")


def _of_bench(bench: BenchResult) -> Figures:
    found: Figures = {"processors": float(len(bench.topology.cpus))}
    found |= {f"{f.kind.value}, {f.placement}, {f.threads} threads: ns": f.ns.median for f in bench.locks}
    found |= {f"processors {c.a} and {c.b}: ns": c.ns.median for c in bench.matrix}
    return found | {
        f"{f.burst}{f' at {f.placement}' if f.placement else ''}: ms": f.wall_s.median * 1e3 for f in bench.bursts
    }


def _validation(value: Any) -> Validation:
    return from_data(Validation, value, "cpu model")


def _of_validation(validation: Validation) -> Figures:
    found: Figures = {"median error, %": 100 * validation.median_error}
    return found | {f"{point.burst}: error, %": 100 * abs(point.error) for point in validation.points}


def _of_trace(report: TraceReport) -> Figures:
    found: Figures = {
        f"{run.subject}{'' if run.layers is None else f', {run.layers} layers'}": float(run.operations)
        for run in report.runs
    }
    return found | {f"{fit.subject}: for each layer": max(0.0, fit.per_layer) for fit in fits(report.runs)}


def _of_profile(taken: Profile) -> Figures:
    totals = lock_totals(taken.waits, command_only=bool(taken.command))
    found: Figures = {"seconds": taken.seconds}
    found |= {f"waited for {one.lock}, ms": one.total_ms for one in totals}
    shares = work_shares(taken.cpu)
    return found | {f"processors {work}, %": 100 * shares.get(work, 0.0) for work in Work}


def _of_diagnosis(diagnosis: Diagnosis) -> Figures:
    found: Figures = {"mounts": float(diagnosis.mounts)}
    return found | {f"{finding.id}: {finding.title}": str(finding.severity) for finding in diagnosis.findings}


_KINDS = {
    STORM: Kind("storm", StormReport.from_json, text.render, html.page, _of_storm),
    STARTS: Kind("starts", StartsReport.from_json, starts.render, starts.page, _of_starts),
    TRACE: Kind("trace", TraceReport.from_json, trace.render_trace, trace.page, _of_trace),
    PROFILE: Kind("profile", Profile.from_json, profile.render_profile, profile.page, _of_profile),
    CPU: Kind("cpu bench", _bench, lambda bench: _ended(cpu_text.bench_text(bench)), cpu.page, _of_bench),
    VALIDATION: Kind(
        "cpu model", _validation, lambda found: _ended(cpu_text.validation_text(found)), None, _of_validation
    ),
    WATCH: Kind("watch", lambda log: log, watch_log.render_log, watch_log.page, lambda log: {**watch_log.figures(log)}),
    DOCTOR: Kind("doctor", Diagnosis.from_json, doctor.render_diagnosis, doctor.page, _of_diagnosis),
}
