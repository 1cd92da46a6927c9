"""A trace for a terminal: each run's operations by process, and in words whether a subject grows with layers."""

from __future__ import annotations

from collections.abc import Sequence

from flatmount.observe.mount_calls import Effect
from flatmount.observe.trace_results import ProcessCalls, TraceReport, TraceRun, fits

_KINDS = (Effect.ATTACH, Effect.DETACH, Effect.CHANGE, Effect.PREPARE, Effect.COPY)


def render_trace(report: TraceReport) -> str:
    """The whole report as text, ending with a newline."""
    lines: list[str] = []
    commands = [run for run in report.runs if run.layers is None]
    engines = [run for run in report.runs if run.layers is not None]
    for run in commands:
        lines += _of_command(run)
    if engines:
        lines += _of_engines(engines)
        lines += ["", *(f"{fit.sentence()}." for fit in fits(engines))]
    lines += [f"{one.engine}: not traced: {one.reason}" for one in report.absent]
    for run in report.runs:
        name = run.subject if run.layers is None else f"{run.subject} at {run.layers} layers"
        if run.lost:
            lines.append(f"{name}: {run.lost:,} events were lost, so the counts are too low.")
    missing = sorted({name for run in report.runs for name in run.missing})
    if missing:
        lines.append(f"this kernel has no events for: {', '.join(missing)}")
    return "\n".join(lines) + "\n"


def _of_command(run: TraceRun) -> list[str]:
    rows = [
        [f"{one.command} [{one.process}]", *(str(_done(one, kind) or "–") for kind in _KINDS), _calls(one)]
        for one in run.processes
    ]
    heads = ["process", *_KINDS, "calls"]
    lines = _table(heads, rows) if rows else ["no mount calls at all"]
    lines += ["", f"{run.operations:,} mount operations (attach and detach) in {run.seconds:.2f} s; {_seen(run)}"]
    if run.copies:
        lengths = sorted(run.table_lengths)
        of = f"of {lengths[0]:,} to {lengths[-1]:,} mounts" if lengths else "of unknown length"
        lines.append(f"{run.copies:,} copies of a mount namespace, {of}")
    return lines


def _of_engines(runs: Sequence[TraceRun]) -> list[str]:
    heads = ["engine", "layers", *_KINDS, "operations", "seen by watchers", "longest copied table"]
    rows = []
    for run in runs:
        watchers = "–" if run.attached is None or run.detached is None else f"{run.attached + run.detached:,}"
        longest = f"{max(run.table_lengths):,}" if run.table_lengths else "–"
        counts = [f"{run.done(kind):,}" for kind in _KINDS]
        failed = "" if run.exit_code == 0 else f" (ended with {run.exit_code})"
        rows.append([run.subject + failed, str(run.layers), *counts, f"{run.operations:,}", watchers, longest])
    return _table(heads, rows)


def _done(one: ProcessCalls, kind: Effect) -> int:
    return sum(call.done for call in one.calls if call.effect is kind)


def _calls(one: ProcessCalls) -> str:
    return ", ".join(
        f"{call.call} {call.done}" + (f" ({call.failed} failed)" if call.failed else "") for call in one.calls
    )


def _seen(run: TraceRun) -> str:
    if run.attached is None or run.detached is None:
        return f"what a watcher of this table saw is not known: {run.events_reason}"
    return f"a watcher of this table saw {run.attached:,} attached and {run.detached:,} detached"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    last = len(heads) - 1

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell if i == last and heads[last] == "calls" else cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    return [line(heads), *map(line, rows)]
