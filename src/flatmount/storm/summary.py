"""What a storm's results say: medians over repeats, ratios of one run against another, and one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from flatmount.storm.results import RunResult, StormReport

BASELINE = "per-layer"
_ROUNDS_TO_QUOTE = 10


@dataclass(frozen=True, slots=True)
class Spread:
    """The median over repeats, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


@dataclass(frozen=True, slots=True)
class StrategySummary:
    """One strategy over all its repeats: totals, and spreads over repeats; None where nothing was measured.

    `speedup` is this strategy's starts per second over the baseline's *in the same repeat*, so that what
    slows the whole machine for a while slows both. `table_growth` is the mount table's peak over what it was
    before.
    """

    strategy: str
    repeats: int
    containers: int
    failed: int
    wall_s: Spread
    starts_per_s: Spread
    speedup: Spread | None
    latency_p50_ms: Spread | None
    latency_p99_ms: Spread | None
    latency_max_ms: Spread | None
    probe_p99_ms: Spread | None
    probe_rounds: int
    operations_per_container: int
    table_growth: Spread
    watchers_cpu_s: Spread

    @property
    def quotable_probe_ms(self) -> float | None:
        """The probe's p99, or None of too few rounds: a storm of a fraction of a second meets one or two."""
        if self.probe_p99_ms is None or self.probe_rounds < _ROUNDS_TO_QUOTE:
            return None
        return self.probe_p99_ms.median


@dataclass(frozen=True, slots=True)
class Summary:
    """All strategies in the order they first ran, and which of them the ratios are against."""

    baseline: str
    strategies: tuple[StrategySummary, ...]

    def of(self, strategy: str) -> StrategySummary:
        """The summary of one strategy by its name. Raises: KeyError."""
        for entry in self.strategies:
            if entry.strategy == strategy:
                return entry
        raise KeyError(strategy)


def summary(report: StormReport) -> Summary:
    """Medians, ranges and ratios; the baseline is `per-layer`, or else the first strategy that ran."""
    by_strategy: dict[str, list[RunResult]] = {}
    for result in report.results:
        by_strategy.setdefault(result.strategy, []).append(result)
    baseline = BASELINE if BASELINE in by_strategy else next(iter(by_strategy), "")
    base_rates = {result.repeat: result.starts_per_s for result in by_strategy.get(baseline, [])}
    return Summary(baseline, tuple(_summarise(runs, base_rates) for runs in by_strategy.values()))


def sentence(report: StormReport) -> str:
    """The outcome in one sentence in words, with the figures that a person would quote."""
    outcome = summary(report)
    if not outcome.strategies:
        return "Nothing was measured."
    base = outcome.of(outcome.baseline)
    others = [entry for entry in outcome.strategies if entry is not base]
    parts = [
        f"On {_counted(report.host.cpus, 'CPU')}, {_counted(report.settings.containers, 'container')} "
        f"of an image with {_counted(report.image.layers, 'layer')} "
    ]
    if others:
        parts += _comparison(max(others, key=lambda entry: entry.starts_per_s.median), base)
    else:
        parts.append(f"started at {figure(base.starts_per_s.median)} a second with {base.strategy}, ")
        parts.append(f"{_counted(base.operations_per_container, 'mount operation')} each")
    parts += (
        f"; {entry.strategy} failed {entry.failed:,} of {entry.containers:,} starts"
        for entry in outcome.strategies
        if entry.failed
    )
    return "".join(parts) + "."


def figure(value: float) -> str:
    """A number of 0 or more to about three significant digits, thousands separated, without an exponent."""
    if value == 0:
        return "0"
    for above, digits in ((99.95, 0), (9.995, 1), (0.0995, 2), (0.00095, 3)):
        if value >= above:
            return f"{value:,.{digits}f}"
    return "<0.001"


def _comparison(best: StrategySummary, base: StrategySummary) -> list[str]:
    rates = f"{figure(best.starts_per_s.median)} against {figure(base.starts_per_s.median)} starts a second"
    if best.speedup:
        times = figure(best.speedup.median)
        parts = [f"started {times} times as fast with {best.strategy} as with {base.strategy} "]
    else:
        parts = [f"did not start with {base.strategy} and did with {best.strategy} "]
    if best.speedup and best.repeats > 1:
        low, high = figure(best.speedup.low), figure(best.speedup.high)
        rates += f"; {low} to {high} times over {best.repeats} repeats"
    parts.append(f"({rates}), with {_counted(best.operations_per_container, 'mount operation')} ")
    parts.append(f"instead of {base.operations_per_container:,} for each")
    if best.quotable_probe_ms and base.quotable_probe_ms:
        parts.append(f", while a health check beside them took {figure(best.quotable_probe_ms)} ms ")
        parts.append(f"instead of {figure(base.quotable_probe_ms)} ms (p99)")
    return parts


def _summarise(runs: list[RunResult], base_rates: dict[int, float]) -> StrategySummary:
    return StrategySummary(
        strategy=runs[0].strategy,
        repeats=len(runs),
        containers=sum(run.containers for run in runs),
        failed=sum(run.failed for run in runs),
        wall_s=_spread(run.wall_s for run in runs),
        starts_per_s=_spread(run.starts_per_s for run in runs),
        speedup=Spread.of(
            run.starts_per_s / base_rates[run.repeat] if base_rates.get(run.repeat) else None for run in runs
        ),
        latency_p50_ms=Spread.of(run.latency_ms.p50 for run in runs),
        latency_p99_ms=Spread.of(run.latency_ms.p99 for run in runs),
        latency_max_ms=Spread.of(run.latency_ms.max for run in runs),
        probe_rounds=sum(len(run.probe) for run in runs),
        probe_p99_ms=Spread.of(run.probe_ms.p99 for run in runs),
        operations_per_container=runs[0].mount_operations.planned_per_container,
        table_growth=_spread(run.mount_table.peak - run.mount_table.before for run in runs),
        watchers_cpu_s=_spread(run.watchers_cpu_s for run in runs),
    )


def _spread(values: Iterable[float]) -> Spread:
    spread = Spread.of(values)
    assert spread
    return spread


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
