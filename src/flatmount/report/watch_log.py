"""What `watch --jsonl` wrote over a time: as text, and as a page with its lines."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from html import escape

from flatmount.observe.watch_results import Sample, WatchLog
from flatmount.report.page import Row, document, facts, header, legend, plain_table, scroll, section, tiles
from flatmount.report.style import style_of
from flatmount.report.svg import Axis, Point, Series, line_chart, thinned
from flatmount.storm.results import percentile
from flatmount.storm.summary import figure

_SERIES = ("mounts", "attached", "detached", "namespace_sem", "mount_lock")
_MOST_POINTS, _MOST_ROWS, _MOST_CAUSES = 600, 15, 10


def figures(log: WatchLog) -> dict[str, float]:
    """What a log says in numbers; a figure that was never measured is left out."""
    samples = log.samples
    rates = [_rate(sample) for sample in samples]
    health = sorted(sample.health_ms for sample in samples)
    found = {
        "seconds": log.seconds,
        "mounts at the end": float(samples[-1].mounts),
        "mounts at most": float(max(sample.peak for sample in samples)),
        "attached": sum(sample.attached_per_s * sample.seconds for sample in samples),
        "detached": sum(sample.detached_per_s * sample.seconds for sample in samples),
        "events a second, median": statistics.median(rates),
        "events a second, at most": max(rates),
        "table look-up p99, ms": percentile(health, 99) or 0.0,
        "watching, % of a processor": 100 * _share(log, lambda sample: sample.own_cpu_share),
    }
    for name, (waits, total_ms) in _locks(log).items():
        found[f"{name}: waits"] = float(waits)
        found[f"{name}: waited, ms"] = total_ms
    if any(sample.init_cpu_share is not None for sample in samples):
        found["PID 1, % of a processor"] = 100 * _share(log, lambda sample: sample.init_cpu_share)
    return found


def sentence(log: WatchLog) -> str:
    """What happened, in one sentence."""
    known = figures(log)
    locks = _locks(log)
    waited = sum(total_ms for _, total_ms in locks.values())
    said = f"; tasks waited {figure(waited)} ms for the mount locks" if locks else ""
    return (
        f"In {figure(log.seconds)} s {known['attached']:,.0f} mounts were attached and {known['detached']:,.0f} "
        f"detached, {figure(known['events a second, at most'])} a second at most; the table had "
        f"{known['mounts at most']:,.0f} mounts at most{said}."
    )


def render_log(log: WatchLog) -> str:
    """The log as text, ending with a newline."""
    lines = [sentence(log), ""]
    width = max(map(len, figures(log)))
    lines += [f"{name.ljust(width)}  {figure(value):>10}" for name, value in figures(log).items()]
    causes = _causes(log)
    if causes:
        lines += ["", "mount operations by process"]
        lines += [f"{operations:>10,.0f}  {process}  {where}" for (process, where), operations in causes]
    lines += [f"not seen: {what}" for what in _unseen(log)]
    return "\n".join(lines) + "\n"


def page(log: WatchLog) -> str:
    """The whole HTML document. Works without a network, in light and dark, and on paper."""
    first = log.samples[0]
    known = figures(log)
    head = header(f"{first.at} · {figure(log.seconds)} s watched", "Mounts as they come and go", sentence(log))
    shown = [
        (f"{known['mounts at most']:,.0f}", "mounts at most"),
        (figure(known["events a second, at most"]), "mounts attached and detached a second, at most"),
        (f"{figure(known['table look-up p99, ms'])} ms", "to look the table's length up, p99"),
        (f"{figure(known['watching, % of a processor'])} %", "of a processor went into watching"),
    ]
    return document(
        "Mounts as they come and go",
        _SERIES,
        [head, tiles(shown), _table_over_time(log), _events(log), _waits(log), _who(log), _cost(log)],
    )


def _table_over_time(log: WatchLog) -> str:
    points = [(at, float(sample.mounts)) for at, sample in zip(log.times(), log.samples, strict=True)]
    chart = line_chart(
        "Mounts over time",
        [Series(style_of(0), "mounts", thinned(points, _MOST_POINTS))],
        _seconds(log),
        Axis.linear("mounts in the table", [value for _, value in points]),
        stepped=True,
    )
    rows: list[Row] = [
        [figure(at), f"{sample.mounts:,}", f"{sample.peak:,}", figure(sample.health_ms)] for at, sample in _some(log)
    ]
    text = "The length of the mount table at the end of each interval, and how long looking it up took: this waits "
    text += "behind whoever changes the table."
    return section(
        "The mount table", text, scroll(chart) + plain_table(["at|s", "mounts|", "peak|", "look-up|ms"], rows)
    )


def _events(log: WatchLog) -> str:
    columns: list[list[Point]] = [
        [(at, getattr(sample, f"{name}_per_s")) for at, sample in zip(log.times(), log.samples, strict=True)]
        for name in ("attached", "detached")
    ]
    series = [
        Series(style_of(index + 1), name, thinned(points, _MOST_POINTS))
        for index, (name, points) in enumerate(zip(("attached", "detached"), columns, strict=True))
    ]
    y = Axis.linear("a second", [value for points in columns for _, value in points])
    rows: list[Row] = [
        [figure(at), figure(sample.attached_per_s), figure(sample.detached_per_s)] for at, sample in _some(log)
    ]
    how = (
        "from two looks at the table" if any(sample.polled for sample in log.samples) else "by the kernel's own events"
    )
    return section(
        "Attached and detached",
        f"Mounts of this table a second, counted {how}.",
        legend([(style_of(1), "attached"), (style_of(2), "detached")])
        + scroll(line_chart("Events over time", series, _seconds(log), y, stepped=True))
        + plain_table(["at|s", "attached|per s", "detached|per s"], rows),
    )


def _waits(log: WatchLog) -> str:
    locks = _locks(log)
    if not locks:
        return ""
    lines: dict[str, list[Point]] = {name: [] for name in locks}
    for at, sample in zip(log.times(), log.samples, strict=True):
        for one in sample.locks or ():
            lines[one.lock].append((at, one.total_ms / sample.seconds))
    index = {name: _SERIES.index(name) if name in _SERIES else 0 for name in lines}
    series = [Series(style_of(index[name]), name, thinned(points, _MOST_POINTS)) for name, points in lines.items()]
    y = Axis.linear("ms waited in a second", [value for points in lines.values() for _, value in points])
    rows: list[Row] = [[escape(name), f"{waits:,}", figure(total_ms)] for name, (waits, total_ms) in locks.items()]
    return section(
        "Waiting for the mount locks",
        "All tasks together. The locks' addresses are learned while somebody mounts; waits before that are not here.",
        legend([(style_of(index[name]), name) for name in lines])
        + scroll(line_chart("Waits over time", series, _seconds(log), y, stepped=True))
        + plain_table(["lock", "waits|", "waited|ms"], rows),
    )


def _who(log: WatchLog) -> str:
    rows: list[Row] = [
        [escape(process), escape(where), f"{operations:,.0f}"] for (process, where), operations in _causes(log)
    ]
    if not rows:
        return ""
    return section(
        "Who mounts",
        "Mount operations that were begun, in whatever mount namespace; at most ten processes of an interval.",
        plain_table(["process", "where|", "operations|"], rows),
    )


def _cost(log: WatchLog) -> str:
    rows = [
        ("watching took", f"{100 * _share(log, lambda sample: sample.own_cpu_share):.2f} % of a processor"),
        ("intervals", f"{len(log.samples):,}"),
        ("calls not recorded", f"{max(sample.lost for sample in log.samples):,}"),
        *(("not seen", what) for what in _unseen(log)),
    ]
    return facts({"How it was taken": rows})


def _rate(sample: Sample) -> float:
    return sample.attached_per_s + sample.detached_per_s


def _share(log: WatchLog, of: Callable[[Sample], float | None]) -> float:
    return sum((of(sample) or 0.0) * sample.seconds for sample in log.samples) / (log.seconds or 1.0)


def _seconds(log: WatchLog) -> Axis:
    return Axis.linear("seconds", log.times())


def _some(log: WatchLog) -> list[tuple[float, Sample]]:
    step = max(1, len(log.samples) // _MOST_ROWS)
    return list(zip(log.times(), log.samples, strict=True))[::step]


def _locks(log: WatchLog) -> dict[str, tuple[int, float]]:
    waits: Counter[str] = Counter()
    total_ms: dict[str, float] = {}
    for sample in log.samples:
        for one in sample.locks or ():
            waits[one.lock] += one.waits
            total_ms[one.lock] = total_ms.get(one.lock, 0.0) + one.total_ms
    return {name: (waits[name], total) for name, total in total_ms.items()}


def _causes(log: WatchLog) -> list[tuple[tuple[str, str], float]]:
    sums: dict[tuple[str, str], float] = {}
    for sample in log.samples:
        for one in sample.causes or ():
            where = f"pod {one.pod}" if one.pod else f"container {one.container[:12]}" if one.container else one.cgroup
            key = (one.process, where)
            sums[key] = sums.get(key, 0.0) + one.operations_per_s * sample.seconds
    return sorted(sums.items(), key=lambda item: -item[1])[:_MOST_CAUSES]


def _unseen(log: WatchLog) -> tuple[str, ...]:
    return tuple(dict.fromkeys(what for sample in log.samples for what in sample.unseen))
