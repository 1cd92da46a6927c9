"""A storm of real containers for a terminal: a line for each engine and wave."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from flatmount.storm.starts_results import StartsReport, WaveResult

_HEADS = ("engine", "running before", "starts per s", "p50 ms", "p99 ms", "probe p99 ms", "mounts each", "failed")


def render(report: StartsReport) -> str:
    """Medians over the repeats, with the engines that were not there and the failures named below."""
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
    return "\n".join(lines) + "\n"


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
