"""A storm of real containers: for a terminal a line for each engine and wave, and a page that loads nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape

from flatmount.report.page import document, facts, header, legend, plain_table, scroll, section
from flatmount.report.style import style_of
from flatmount.report.svg import Axis, Bar, Series, bar_chart, line_chart, thinned
from flatmount.storm.results import percentile
from flatmount.storm.starts_results import StartsReport, WaveResult
from flatmount.storm.summary import figure

_MOST_POINTS = 600
_HEADS = ("engine", "running before", "starts per s", "p50 ms", "p99 ms", "probe p99 ms", "mounts each", "failed")


def render(report: StartsReport) -> str:
    """Medians over the repeats; below, engines that were not there, failures, and what could not be taken away."""
    settings = report.settings
    held = ", held" if settings.hold else ""
    lines = [
        f"{settings.containers} containers at once, {settings.concurrency} at a time, {settings.waves} waves{held}, "
        f"{settings.repeats} repeats, {settings.background} mounts beside them; {report.image.name}, "
        f"{report.image.layers} layers",
        "latency: from the request to the container's first instruction",
        "",
        *_table([_HEADS, *(_row(waves) for waves in _grouped(report.waves))]),
    ]
    if report.template_mounts is not None:
        lines.append(f"the runtime of flatmount started in copies of {report.template_mounts} mounts")
    lines += [f"{one.engine} was left out: {one.reason}" for one in report.skipped]
    for message in dict.fromkeys(f"{wave.engine}: {text}" for wave in report.waves for text in wave.failures):
        lines.append(message)
    lines += [f"left behind: {what}" for what in report.left]
    return "\n".join(lines) + "\n"


def page(report: StartsReport) -> str:
    """The whole HTML document. Works without a network, in light and dark, and on paper."""
    settings = report.settings
    groups = _grouped(report.waves)
    engines = tuple(dict.fromkeys(waves[0].engine for waves in groups))
    title = f"Starts of containers: {report.image.name}"
    how = f"{settings.containers:,} containers at once, {settings.concurrency:,} at a time"
    head = header(f"{report.taken_at} · Linux {report.host.kernel} · {how}", title, sentence(report))
    parts = [head]
    if groups:
        parts += [_rates(groups, engines), _latencies(report, engines), _waves(groups, engines)]
    skipped = [[escape(one.engine), escape(one.reason)] for one in report.skipped]
    parts.append(section("Left out", "", plain_table(["engine", "why"], skipped)) if skipped else "")
    failures = dict.fromkeys(f"{wave.engine}: {text}" for wave in report.waves for text in wave.failures)
    if failures:
        listed = "".join(f"<li>{escape(text)}</li>" for text in failures)
        parts.append(f"<section><h2>What failed</h2><ul>{listed}</ul></section>")
    if report.left:
        listed = "".join(f"<li>{escape(text)}</li>" for text in report.left)
        parts.append(f"<section><h2>Left behind</h2><ul>{listed}</ul></section>")
    parts.append(_facts(report))
    return document(title, engines, parts)


def sentence(report: StartsReport) -> str:
    """The outcome in one sentence."""
    rates: dict[str, list[float]] = {}
    for wave in report.waves:
        rates.setdefault(wave.engine, []).append(wave.starts_per_s)
    if not rates:
        return "Nothing was started."
    medians = {engine: statistics.median(values) for engine, values in rates.items()}
    listed = ", ".join(f"{engine} {figure(rate)}" for engine, rate in sorted(medians.items(), key=lambda one: -one[1]))
    return f"Starts a second of an image with {report.image.layers:,} layers on {report.host.cpus:,} CPUs: {listed}."


def _rates(groups: Sequence[Sequence[WaveResult]], engines: tuple[str, ...]) -> str:
    bars = []
    for waves in groups:
        rates = [wave.starts_per_s for wave in waves]
        median = statistics.median(rates)
        after = f"  (beside {waves[0].running_before:,})" if waves[0].running_before else ""
        several = len(rates) > 1
        bars.append(
            Bar(
                style_of(engines.index(waves[0].engine)),
                waves[0].engine,
                median,
                figure(median) + after,
                min(rates) if several else None,
                max(rates) if several else None,
            )
        )
    chart = bar_chart("Starts a second", bars, Axis.linear("starts a second, median", [bar.value for bar in bars]))
    rows = [
        [f'<i class="{bar.style}"></i>{escape(bar.name)}', *_spread_of(waves)]
        for bar, waves in zip(bars, groups, strict=True)
    ]
    return section(
        "Starts a second",
        "A container counts as started at its first instruction; beside: so many of the engine's ran already. Whiskers "
        "span the repeats.",
        scroll(chart)
        + plain_table(["engine", "running before|", "starts|per s", "lowest|per s", "highest|per s"], rows),
    )


def _spread_of(waves: Sequence[WaveResult]) -> list[str]:
    rates = [wave.starts_per_s for wave in waves]
    return [f"{waves[0].running_before:,}", figure(statistics.median(rates)), figure(min(rates)), figure(max(rates))]


def _latencies(report: StartsReport, engines: tuple[str, ...]) -> str:
    pooled = {
        engine: sorted(ms for wave in report.waves if wave.engine == engine for ms in wave.latencies_ms)
        for engine in engines
    }
    x = Axis.logarithmic(
        "milliseconds from the request to the first instruction", [ms for p in pooled.values() for ms in p]
    )
    series = [
        Series(
            style_of(index),
            engine,
            thinned([(ms, 100 * (at + 1) / len(values)) for at, ms in enumerate(values)], _MOST_POINTS),
        )
        for index, (engine, values) in enumerate(pooled.items())
    ]
    rows = [
        [
            f'<i class="{style_of(index)}"></i>{escape(engine)}',
            *("–" if (ms := percentile(values, q)) is None else figure(ms) for q in (50, 90, 99, 100)),
        ]
        for index, (engine, values) in enumerate(pooled.items())
    ]
    return section(
        "Latency of a start",
        "The share of the containers that started which had done so within a time, all waves and repeats together.",
        legend((style_of(index), engine) for index, engine in enumerate(engines))
        + scroll(line_chart("Distribution of start latency", series, x, Axis("started, %", 0, 100), stepped=True))
        + plain_table(["engine", "p50|ms", "p90|ms", "p99|ms", "max|ms"], rows),
    )


def _waves(groups: Sequence[Sequence[WaveResult]], engines: tuple[str, ...]) -> str:
    rows = [
        [f'<i class="{style_of(engines.index(waves[0].engine))}"></i>{escape(waves[0].engine)}', *_row(waves)[1:]]
        for waves in groups
    ]
    return section(
        "Every wave",
        "Medians over the repeats. Mounts each: what one container adds to the mount table for as long as it runs.",
        plain_table(["engine", *_HEADS[1:]], rows),
    )


def _facts(report: StartsReport) -> str:
    host, settings = report.host, report.settings
    return facts(
        {
            "Host": [("kernel", f"Linux {host.kernel}"), ("processor", host.cpu_model), ("CPUs", f"{host.cpus:,}")],
            "Storm": [
                ("image", f"{report.image.name}, {report.image.layers:,} layers"),
                ("containers", f"{settings.containers:,}, {settings.concurrency:,} at a time"),
                ("waves", f"{settings.waves:,}{', held' if settings.hold else ''}"),
                ("repeats", f"{settings.repeats:,}"),
                ("mounts beside them", f"{settings.background:,}"),
            ],
        }
    )


def _grouped(waves: Iterable[WaveResult]) -> list[list[WaveResult]]:
    """By engine and wave, each with all repeats."""
    found: dict[tuple[str, int], list[WaveResult]] = {}
    for wave in waves:
        found.setdefault((wave.engine, wave.wave), []).append(wave)
    return list(found.values())


def _row(waves: Sequence[WaveResult]) -> tuple[str, ...]:
    started = max(1, sum(len(wave.latencies_ms) for wave in waves))
    grown = sum(wave.mounts_standing - wave.mounts_before for wave in waves)
    return (
        waves[0].engine,
        str(waves[0].running_before),
        _median(wave.starts_per_s for wave in waves),
        _median(wave.latency_ms.p50 for wave in waves),
        _median(wave.latency_ms.p99 for wave in waves),
        _median(wave.probe_ms.p99 for wave in waves),
        f"{grown / started:.1f}",
        str(sum(wave.failed for wave in waves)),
    )


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}" if known else "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
