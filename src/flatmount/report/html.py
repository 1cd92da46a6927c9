"""A storm's results as one page that loads nothing, with the figures of every chart in a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape

from flatmount.report.page import Cell, Row, document, facts, header, legend, plain_table, scroll, section, tiles
from flatmount.report.style import style_of
from flatmount.report.svg import Axis, Bar, Point, Series, bar_chart, line_chart, thinned
from flatmount.report.text import lock_share, unclassified
from flatmount.storm.results import RunResult, StormReport, percentile
from flatmount.storm.summary import Spread, StrategySummary, Summary, figure, sentence, summary

_MOST_POINTS = 600

_METHOD = """<footer>How to read this<ul>
<li>Percentiles are nearest-rank: always a value that was measured. The p99 of fewer than 100 values is their
maximum.</li>
<li>Where a range is given, it is the lowest and the highest repeat, not an error bar.</li>
<li>Ratios hold for this machine, kernel and image. Locks cost more with more processors, sockets and mounts:
measure there.</li>
</ul></footer>"""


def page(report: StormReport) -> str:
    """The whole HTML document. Works without a network, in light and dark, and on paper."""
    outcome = summary(report)
    names = tuple(entry.strategy for entry in outcome.strategies)
    title = f"Container storm: {report.image.name}"
    sections = [_header(report, title), _tiles(outcome)]
    if outcome.strategies:
        sections += [
            _rates(report, outcome),
            _latencies(report, outcome),
            _operations(report, outcome),
            _table_over_time(report, outcome),
            _probe_over_time(report, outcome),
            _phases(report, outcome),
            _locks(report, outcome),
        ]
    sections += [_facts(report), _runs(report), _METHOD]
    return document(title, names, sections)


def _header(report: StormReport, title: str) -> str:
    settings = report.settings
    how = f"{settings.containers:,} containers, {settings.concurrency:,} at a time"
    return header(f"{report.taken_at} · Linux {report.host.kernel} · {how}", title, sentence(report))


def _tiles(outcome: Summary) -> str:
    """The four figures that a reader takes along, where there is something to compare."""
    others = [entry for entry in outcome.strategies if entry.strategy != outcome.baseline]
    if not others:
        return ""
    base = outcome.of(outcome.baseline)
    best = max(others, key=lambda entry: entry.starts_per_s.median)
    against = f"{best.strategy} against {base.strategy}"
    shown = []
    if best.speedup:
        shown.append((f"{figure(best.speedup.median)} ×", f"as many starts a second, {against}"))
    if best.latency_p99_ms and base.latency_p99_ms:
        instead = figure(base.latency_p99_ms.median)
        shown.append((f"{figure(best.latency_p99_ms.median)} ms", f"p99 of a start instead of {instead} ms"))
    operations = best.operations_per_container
    noun = "mount operation" if operations == 1 else "mount operations"
    shown.append((f"{operations:,}", f"{noun} instead of {base.operations_per_container:,}"))
    if best.quotable_probe_ms and base.quotable_probe_ms:
        instead = figure(base.quotable_probe_ms)
        shown.append((f"{figure(best.quotable_probe_ms)} ms", f"p99 of a health check instead of {instead} ms"))
    return tiles(shown)


def _rates(report: StormReport, outcome: Summary) -> str:
    bars = [
        Bar(
            style_of(index),
            entry.strategy,
            entry.starts_per_s.median,
            figure(entry.starts_per_s.median) + (f"  ({figure(entry.speedup.median)} ×)" if entry.speedup else ""),
            *_range(entry),
        )
        for index, entry in enumerate(outcome.strategies)
    ]
    chart = bar_chart(
        "Starts per second for each strategy",
        bars,
        Axis.linear("starts per second, median of the repeats", [bar.value for bar in bars]),
    )
    rows = [
        [
            _spread(entry.starts_per_s),
            _spread(entry.speedup),
            _spread(entry.wall_s),
            _failed(entry.failed),
            *([_spread(entry.watchers_cpu_s)] if report.settings.watchers else []),
        ]
        for entry in outcome.strategies
    ]
    heads = [
        "starts|per second",
        f"times {outcome.baseline}|",
        "wall time|s",
        f"failed|of {max(entry.containers for entry in outcome.strategies):,}",
    ]
    if report.settings.watchers:
        heads.append("watchers' CPU|s")
    return section(
        "Starts per second",
        "A container counts as started when a file of its image was read and a new one written from inside "
        "its user namespace. Whiskers span the repeats; ratios are taken within a repeat.",
        scroll(chart) + _table(outcome, heads, rows),
    )


def _latencies(report: StormReport, outcome: Summary) -> str:
    runs = [_runs_of(report, entry) for entry in outcome.strategies]
    pooled = [sorted(ms for run in one for ms in run.latencies_ms) for one in runs]
    label = "milliseconds from a container's turn to its start"
    x = Axis.logarithmic(label, [ms for one in pooled for ms in one])
    series = [
        Series(style_of(index), entry.strategy, _distribution(values, entry.containers))
        for index, (entry, values) in enumerate(zip(outcome.strategies, pooled, strict=True))
    ]
    chart = line_chart("Distribution of start latency", series, x, Axis("started, %", 0, 100), stepped=True)
    rows = [
        [*(_number(percentile(values, q)) for q in (50, 90, 99, 100)), _failed(entry.failed)]
        for entry, values in zip(outcome.strategies, pooled, strict=True)
    ]
    return section(
        "Latency of a start",
        "The share of containers that had started within a time, all repeats together. A line that ends "
        "below 100 % lacks the containers that failed.",
        _legend(outcome) + scroll(chart) + _table(outcome, ["p50|ms", "p90|ms", "p99|ms", "max|ms", "failed|"], rows),
    )


def _operations(report: StormReport, outcome: Summary) -> str:
    bars = [
        Bar(
            style_of(index),
            entry.strategy,
            entry.operations_per_container,
            f"{entry.operations_per_container:,}",
        )
        for index, entry in enumerate(outcome.strategies)
    ]
    highest = max(bar.value for bar in bars)
    axis = Axis("mount operations for one container (logarithmic)", 0.5, max(10.0, highest * 1.2), log=True)
    rows = []
    for entry in outcome.strategies:
        runs = _runs_of(report, entry)
        counts = [run.mount_operations for run in runs]
        started = entry.containers - entry.failed
        asked = sum(run.containers for run in runs if run.mount_operations.kernel is not None)
        kernel = sum(count.kernel for count in counts if count.kernel is not None)
        reasons = sorted({count.kernel_reason or "not asked" for count in counts if count.kernel is None})
        rows.append(
            [
                f"{entry.operations_per_container:,}",
                _each(sum(count.executed for count in counts), started),
                _each(kernel, asked) if asked else escape("; ".join(reasons)),
                _each(sum(run.undo_operations for run in runs), started),
                f"{sum(count.once for count in counts):,}",
            ]
        )
    heads = [f"{name}|per container" for name in ("planned", "executed", "kernel's count", "undoing")]
    heads.append("once a range|in all")
    return section(
        "Mount operations per container",
        "Operations that attach or detach a mount, each of them under locks that all of the machine shares."
        " Planned is what the plan says, executed what the executor did, and the kernel's count its own "
        "attach and detach events.",
        scroll(bar_chart("Mount operations per container", bars, axis)) + _table(outcome, heads, rows),
    )


def _table_over_time(report: StormReport, outcome: Summary) -> str:
    def growth(run: RunResult) -> tuple[Point, ...]:
        return tuple((at, float(count - run.mount_table.before)) for at, count in run.mounts)

    rows = []
    for entry in outcome.strategies:
        tables = [run.mount_table for run in _runs_of(report, entry)]
        rows.append(
            [
                _whole(table.before for table in tables),
                _whole(table.peak for table in tables),
                _whole(table.after for table in tables),
                _whole(table.peak - table.before for table in tables),
            ]
        )
    chart = _over_time(
        report,
        outcome,
        growth,
        "The mount table over time",
        lambda values: Axis.linear("mounts more than before", values),
        stepped=True,
    )
    return section(
        "The mount table",
        "Mounts in the storm's namespace beyond those that were there before, in the repeat with the median"
        " wall time; sampled fifty times a second. Whoever watches the table reads all of it again at each "
        "change.",
        chart + _table(outcome, ["before|mounts", "peak|mounts", "after|mounts", "growth|mounts"], rows),
    )


def _probe_over_time(report: StormReport, outcome: Summary) -> str:
    rows = []
    for entry in outcome.strategies:
        values = sorted(ms for run in _runs_of(report, entry) for _, ms in run.probe)
        rows.append([f"{len(values):,}", *(_number(percentile(values, q)) for q in (50, 99, 100))])
    chart = _over_time(
        report,
        outcome,
        lambda run: run.probe,
        "Latency of the health probe over time",
        lambda values: Axis.logarithmic("milliseconds of a round", values),
        dots=True,
    )
    return section(
        "A health check beside it",
        "Ten times a second a process of its own reads the mount table and starts a program; its time "
        "counts from when the round was due. The chart shows the repeat with the median wall time, the "
        "table all repeats.",
        chart + _table(outcome, ["rounds|", "p50|ms", "p99|ms", "max|ms"], rows),
    )


def _phases(report: StormReport, outcome: Summary) -> str:
    rows = []
    for entry in outcome.strategies:
        phases = [run.phases_ms for run in _runs_of(report, entry)]
        columns = [[getattr(phase, name) for phase in phases] for name in ("user_namespace", "plan", "execute", "undo")]
        rows.append([_number(spread.median if (spread := Spread.of(column)) else None) for column in columns])
    return section(
        "Where the time of a start goes",
        "Medians over the containers of a repeat, and of those over the repeats. Undoing comes after the "
        "start and is no part of its latency.",
        _table(outcome, ["user namespace|ms", "plan|ms", "execute|ms", "undo|ms"], rows),
    )


def _locks(report: StormReport, outcome: Summary) -> str:
    places = {entry.strategy: index for index, entry in enumerate(outcome.strategies)}
    found = [one for one in report.locks if one.strategy in places]
    if not found:
        return ""
    base = found[0].mount_locks_us_each
    least = min((one.mount_locks_us_each for one in found if one.mount_locks_us_each), default=1.0)
    bars = [
        Bar(
            style_of(places[one.strategy]),
            one.strategy,
            max(one.mount_locks_us_each, least / 2),
            f"{figure(one.mount_locks_us_each)}  ({lock_share(one.mount_locks_us_each, base)})",
        )
        for one in found
    ]
    chart = bar_chart(
        "Waiting for the mount locks, for each container",
        bars,
        Axis.logarithmic(
            "microseconds waited for a container (logarithmic)", [least / 2, *(bar.value for bar in bars)]
        ),
    )
    rows = [
        [
            f'<i class="{style_of(places[one.strategy])}"></i>{escape(one.strategy)}',
            figure(one.namespace_sem_ms * 1e3 / max(one.containers, 1)),
            figure(one.mount_lock_ms * 1e3 / max(one.containers, 1)),
            figure(one.other_locks_ms * 1e3 / max(one.containers, 1)),
            unclassified(one),
            figure(one.grace_period_us_each),
            f"{one.grace_periods / max(one.containers, 1):.1f}",
            f"{one.cpu_spinning + one.cpu_under_lock:.1%}" if one.samples else "–",
        ]
        for one in found
    ]
    heads = ["strategy", "namespace_sem|us each", "mount_lock|us each", "others|us each", "unclassified|of locks"]
    heads += ["grace periods|us each", "of these|waits each", "on CPU|of samples"]
    left_out = "".join(f"<li>{escape(what)}</li>" for what in dict.fromkeys(w for one in found for w in one.missing))
    return section(
        "Who waits for the mount locks",
        "One more burst of each strategy, recorded and not timed, undoing included: the kernel's contention events, "
        "told apart by the functions of the stack that waited. Grace periods of RCU are no lock and in none of these "
        "bars: an umount takes one, or two. On CPU: the share of the tasks' samples that spun on a mount lock or "
        "worked under one.",
        scroll(chart) + plain_table(heads, rows) + (f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else ""),
    )


def _facts(report: StormReport) -> str:
    host, image, settings = report.host, report.image, report.settings
    lists = {
        "Host": [
            ("kernel", f"Linux {host.kernel}"),
            ("processor", host.cpu_model),
            ("CPUs", f"{host.cpus:,} ({host.architecture})"),
            ("memory", f"{host.memory_bytes / 2**30:.1f} GiB"),
            ("flatmount", host.flatmount),
            ("Python", host.python),
        ],
        "Image": [
            ("name", image.name),
            ("layers", f"{image.layers:,}"),
            ("files", f"{image.files:,}"),
            ("store on", settings.store),
            ("uppers on", settings.uppers),
        ],
        "Storm": [
            ("containers", f"{settings.containers:,}, {settings.concurrency:,} at a time"),
            ("repeats", f"{settings.repeats:,}, interleaved"),
            ("time-out", f"{settings.timeout_s:g} s"),
            ("namespace copies", f"{settings.copies:,}"),
            ("watchers", f"{settings.watchers:,}"),
            ("mounts put there before", f"{settings.background:,}"),
            ("user namespaces", "made before" if settings.ranges == "ahead" else "made for each start"),
            ("assembled at a time", "all" if settings.admit is None else f"at most {settings.admit:,}"),
            ("where", "the host's namespace" if settings.on_host else "a namespace of its own"),
            ("seed", str(settings.seed)),
        ],
    }
    return facts(lists)


def _runs(report: StormReport) -> str:
    heads = ["strategy", "repeat", "wall|s", "starts|per s", "p50|ms", "p99|ms", "max|ms", "peak|mounts"]
    heads += ["probe max|ms", "failed|"]
    rows = [
        [
            escape(run.strategy),
            f"{run.repeat + 1}",
            figure(run.wall_s),
            figure(run.starts_per_s),
            _number(run.latency_ms.p50),
            _number(run.latency_ms.p99),
            _number(run.latency_ms.max),
            f"{run.mount_table.peak:,}",
            _number(run.probe_ms.max),
            _failed(run.failed),
        ]
        for run in report.results
    ]
    failures = dict.fromkeys(f"{run.strategy}: {text}" for run in report.results for text in run.failures)
    listed = "".join(f"<li>{escape(text)}</li>" for text in failures)
    said = f"<section><h2>What failed</h2><ul>{listed}</ul></section>" if listed else ""
    if report.not_undone:
        listed = "".join(f"<li>{escape(text)}</li>" for text in report.not_undone)
        said += f"<section><h2>What could not be undone</h2><ul>{listed}</ul></section>"
    order = "<h2>Every run</h2><p>In the order in which they ran.</p>"
    return f"<section>{order}{plain_table(heads, rows)}</section>{said}"


def _over_time(
    report: StormReport,
    outcome: Summary,
    points: Callable[[RunResult], Sequence[Point]],
    label: str,
    axis: Callable[[list[float]], Axis],
    *,
    stepped: bool = False,
    dots: bool = False,
) -> str:
    typical = [_typical(_runs_of(report, entry)) for entry in outcome.strategies]
    series = [
        Series(style_of(index), f"{run.strategy}, repeat {run.repeat + 1}", thinned(points(run), _MOST_POINTS))
        for index, run in enumerate(typical)
    ]
    ends = [at for one in series for at, _ in one.points[-1:]]
    x = Axis.linear("seconds since the storm began", [*ends, *(run.wall_s for run in typical)])
    y = axis([value for one in series for _, value in one.points])
    return _legend(outcome) + scroll(line_chart(label, series, x, y, stepped=stepped, dots=dots))


def _typical(runs: Sequence[RunResult]) -> RunResult:
    middle = statistics.median_low(run.wall_s for run in runs)
    return next(run for run in runs if run.wall_s == middle)


def _distribution(ordered: Sequence[float], containers: int) -> tuple[Point, ...]:
    """The share in percent of all containers, started or not, for at most so many of the latencies."""
    stride = max(1, len(ordered) // _MOST_POINTS)
    kept = [*range(0, len(ordered), stride), len(ordered) - 1] if ordered else []
    start = [(ordered[0], 0.0)] if ordered else []
    return tuple(start + [(ordered[i], 100 * (i + 1) / containers) for i in dict.fromkeys(kept)])


def _runs_of(report: StormReport, entry: StrategySummary) -> list[RunResult]:
    return [run for run in report.results if run.strategy == entry.strategy]


def _range(entry: StrategySummary) -> tuple[float, float] | tuple[None, None]:
    rates = entry.starts_per_s
    return (rates.low, rates.high) if entry.repeats > 1 else (None, None)


def _legend(outcome: Summary) -> str:
    return legend((style_of(index), entry.strategy) for index, entry in enumerate(outcome.strategies))


def _table(outcome: Summary, heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A row for each strategy, its colour before its name. Heads are NAME|UNIT; cells are HTML."""
    named = [
        [f'<i class="{style_of(index)}"></i>{escape(entry.strategy)}', *row]
        for index, (entry, row) in enumerate(zip(outcome.strategies, rows, strict=True))
    ]
    return plain_table(["strategy", *heads], named)


def _number(value: float | None) -> Cell:
    return "–" if value is None else figure(value)


def _spread(spread: Spread | None) -> Cell:
    """The median, and the range where the repeats differ in what is shown."""
    if spread is None:
        return "–"
    low, high = figure(spread.low), figure(spread.high)
    return figure(spread.median) + (f" <small>({low}–{high})</small>" if low != high else "")


def _whole(values: Iterable[int]) -> Cell:
    return f"{statistics.median_high(values):,}"


def _failed(number: int) -> Cell:
    return f'<span class="bad">{number:,}</span>' if number else "0"


def _each(total: int, containers: int) -> Cell:
    """How many each container had: a whole number where all had the same."""
    if not containers:
        return "–"
    return f"{total // containers:,}" if total % containers == 0 else f"{total / containers:,.2f}"
