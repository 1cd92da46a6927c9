"""A trace for a terminal and as a page: operations by process, and in words whether a subject grows with layers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from flatmount.observe.mount_calls import Effect
from flatmount.observe.trace_results import ProcessCalls, TraceReport, TraceRun, fits
from flatmount.report.page import document, header, legend, plain_table, scroll, section
from flatmount.report.style import style_of
from flatmount.report.svg import Axis, Series, line_chart

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


def page(report: TraceReport) -> str:
    """The whole HTML document. Works without a network, in light and dark, and on paper."""
    engines = [run for run in report.runs if run.layers is not None]
    subjects = tuple(dict.fromkeys(run.subject for run in engines))
    outcome = " ".join(f"{fit.sentence()}." for fit in fits(engines))
    commands = [run for run in report.runs if run.layers is None]
    if not outcome:
        outcome = " ".join(
            f"{run.subject} made {run.operations:,} mount operations in {run.seconds:.2f} s; {_seen(run)}."
            for run in commands
        )
    parts = [header(f"{report.taken_at} · Linux {report.host.kernel}", "Mount operations", outcome)]
    if engines:
        parts.append(_by_layers(engines, subjects))
    rows = [
        [
            escape(run.subject),
            "–" if run.layers is None else str(run.layers),
            *(f"{run.done(kind):,}" for kind in _KINDS),
            f"{run.operations:,}",
            "–" if run.attached is None or run.detached is None else f"{run.attached + run.detached:,}",
            f"{run.lost:,}",
        ]
        for run in report.runs
    ]
    heads = ["subject", "layers|", *(f"{kind}|calls" for kind in _KINDS), "operations|", "seen by watchers|", "lost|"]
    how = "Attach and detach are the mount operations; the others change or clone what no table shows, or copy a table."
    parts.append(section("Calls by kind", how, plain_table(heads, rows)))
    parts += [_by_process(run) for run in commands if run.processes]
    absent = [[escape(one.engine), escape(one.reason)] for one in report.absent]
    parts.append(section("Not traced", "", plain_table(["engine", "why"], absent)) if absent else "")
    return document("Mount operations", subjects, parts)


def _by_layers(engines: Sequence[TraceRun], subjects: tuple[str, ...]) -> str:
    points = {
        name: sorted((float(run.layers or 0), float(run.operations)) for run in engines if run.subject == name)
        for name in subjects
    }
    series = [Series(style_of(i), name, tuple(points[name])) for i, name in enumerate(subjects)]
    x = Axis.linear("layers", [at for one in series for at, _ in one.points])
    y = Axis.linear("mount operations for a container", [value for one in series for _, value in one.points])
    layers = sorted({at for one in series for at, _ in one.points})
    lines = {fit.subject: fit for fit in fits(engines)}
    rows = [
        [
            f'<i class="{style_of(i)}"></i>{escape(name)}',
            *(_cell(dict(points[name]).get(at)) for at in layers),
            f"{max(0.0, lines[name].per_layer):.2f}" if name in lines else "–",
        ]
        for i, name in enumerate(subjects)
    ]
    heads = ["subject", *(f"{at:.0f}|layers" for at in layers), "more|for each layer"]
    return section(
        "By layers",
        "One container's whole life, from before its root file system is made until it is removed. A line that does "
        "not rise costs the same whatever the image is made of.",
        legend((style_of(i), name) for i, name in enumerate(subjects))
        + scroll(line_chart("Mount operations by layers", series, x, y, dots=True))
        + plain_table(heads, rows),
    )


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _by_process(run: TraceRun) -> str:
    rows = [
        [
            f"{escape(one.command)} [{one.process}]",
            escape(call.call),
            escape(str(call.effect)),
            f"{call.done:,}",
            f"{call.failed:,}",
            f"{call.total_us / max(call.done + call.failed, 1):,.1f}",
            f"{call.longest_us:,.1f}",
        ]
        for one in run.processes
        for call in one.calls
    ]
    heads = ["process", "call|", "kind|", "done|", "failed|", "mean|us", "longest|us"]
    return section(f"By process: {run.subject}", " ".join(run.command), plain_table(heads, rows))


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
