"""A storm's results for a terminal: a table that fits its width, what to mind about it, and one sentence."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from flatmount.storm.results import RunResult, StormReport, StrategyLocks
from flatmount.storm.summary import Spread, StrategySummary, Summary, figure, sentence, summary

_BOLD, _DIM, _RED, _GREEN, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"
_GAP = 2


@dataclass(frozen=True, slots=True)
class _Column:
    """A head over its unit, a strategy's cell, and how readily the column is left out (0: never)."""

    head: str
    unit: str
    cell: Callable[[StrategySummary], str]
    spare: int = 0
    colour: Callable[[StrategySummary], str] = lambda entry: ""


def render(report: StormReport, *, width: int = 100, colour: bool = False) -> str:
    """The table, notes and sentence as text of at most `width` columns, ending with a newline.

    Columns that do not fit are left out, the least important first; strategy, rate and failures stay.
    """
    outcome = summary(report)
    paint = _painter(colour)
    lines = _table(_columns(report, outcome), outcome, width, paint) if outcome.strategies else []
    if report.locks:
        lines += ["", *_locks(report.locks, width, paint)]
    notes = [line for note in _notes(report) for line in _wrapped(note, width)]
    lines += ["", *(paint(_DIM, note) for note in notes)]
    lines += ["", *_wrapped(sentence(report), width)]
    return "\n".join(line.rstrip() for line in lines).lstrip("\n") + "\n"


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour what goes to `stream`: a terminal that can, and NO_COLOR unset or empty."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM", "dumb") != "dumb"


def _columns(report: StormReport, outcome: Summary) -> list[_Column]:
    fastest = max((entry.starts_per_s.median for entry in outcome.strategies), default=0.0)

    def best(entry: StrategySummary) -> str:
        return _GREEN if len(outcome.strategies) > 1 and entry.starts_per_s.median == fastest else ""

    columns = [
        _Column("strategy", "", lambda entry: entry.strategy),
        _Column("starts", "per s", lambda entry: _median(entry.starts_per_s), colour=best),
        _Column("times", outcome.baseline, lambda entry: _median(entry.speedup), 3),
        _Column("range", "times", lambda entry: _range(entry.speedup), 9),
        _Column("p50", "ms", lambda entry: _median(entry.latency_p50_ms), 6),
        _Column("p99", "ms", lambda entry: _median(entry.latency_p99_ms), 1),
        _Column("max", "ms", lambda entry: _median(entry.latency_max_ms), 8),
        _Column("failed", "", lambda entry: f"{entry.failed:,}", colour=lambda entry: _RED if entry.failed else ""),
        _Column("mount ops", "each", lambda entry: f"{entry.operations_per_container:,}", 2),
        _Column("table", "mounts", lambda entry: f"+{entry.table_growth.median:,.0f}", 4),
        _Column("probe p99", "ms", lambda entry: _quotable(entry.quotable_probe_ms), 5),
    ]
    if report.settings.watchers:
        columns.append(_Column("watchers", "CPU s", lambda entry: _median(entry.watchers_cpu_s), 7))
    return columns


def _table(columns: list[_Column], outcome: Summary, width: int, paint: Callable[[str, str], str]) -> list[str]:
    columns = list(columns)
    while _width(columns, outcome) > width and any(column.spare for column in columns):
        columns.remove(max(columns, key=lambda column: column.spare))
    widths = [_column_width(column, outcome) for column in columns]

    def line(cells: Sequence[str], colours: Sequence[str]) -> str:
        first, *others = [
            cell.ljust(size) if index == 0 else cell.rjust(size)
            for index, (cell, size) in enumerate(zip(cells, widths, strict=True))
        ]
        painted = [paint(colour, cell) for cell, colour in zip([first, *others], colours, strict=True)]
        return (" " * _GAP).join(painted)

    return [
        line([column.head for column in columns], [_BOLD] * len(columns)),
        line([column.unit for column in columns], [_DIM] * len(columns)),
        *(
            line([column.cell(entry) for column in columns], [column.colour(entry) for column in columns])
            for entry in outcome.strategies
        ),
    ]


def _locks(locks: Sequence[StrategyLocks], width: int, paint: Callable[[str, str], str]) -> list[str]:
    """Who waited for what, by strategy, in a burst that was recorded apart."""
    heads = [("waited for", ""), ("mount locks", "us each"), ("of baseline", ""), ("grace periods", "us each")]
    heads += [("on CPU: mount locks", "of its samples"), ("unclassified", "of lock waits")]
    base = locks[0].mount_locks_us_each
    rows = [
        [
            one.strategy,
            figure(one.mount_locks_us_each),
            lock_share(one.mount_locks_us_each, base),
            figure(one.grace_period_us_each),
            f"{one.cpu_spinning + one.cpu_under_lock:.1%}" if one.samples else "–",
            unclassified(one),
        ]
        for one in locks
    ]
    while len(heads) > 4 and sum(_widths(heads, rows)) + _GAP * (len(heads) - 1) > width:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    widths = _widths(heads, rows)

    def line(cells: Sequence[str], code: str = "") -> str:
        aligned = [c.ljust(w) if at == 0 else c.rjust(w) for at, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return paint(code, (" " * _GAP).join(aligned))

    left_out = dict.fromkeys(what for one in locks for what in one.missing)
    lost = sum(one.lost for one in locks)
    return [
        line([head for head, _ in heads], _BOLD),
        line([unit for _, unit in heads], _DIM),
        *(line(row) for row in rows),
        *(f"left out: {what}" for what in left_out),
        *([f"{lost:,} events were lost while it was recorded"] if lost else []),
    ]


def _widths(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(text) for text in (*head, *(row[at] for row in rows))) for at, head in enumerate(heads)]


def lock_share(value: float, base: float) -> str:
    """A strategy's waiting by the first one's, or a dash where that did not wait."""
    if not base:
        return "–"
    share = value / base
    return f"{share:.0%}" if share >= 0.1 else f"{share:.3%}"


def unclassified(one: StrategyLocks) -> str:
    """The share of lock waiting whose lock is not known; a dash where nobody waited."""
    whole = one.namespace_sem_ms + one.mount_lock_ms + one.other_locks_ms + one.unclassified_ms
    return f"{one.unclassified_ms / whole:.1%}" if whole else "–"


def _column_width(column: _Column, outcome: Summary) -> int:
    return max(len(text) for text in (column.head, column.unit, *map(column.cell, outcome.strategies)))


def _width(columns: Sequence[_Column], outcome: Summary) -> int:
    return sum(_column_width(column, outcome) for column in columns) + _GAP * (len(columns) - 1)


def _notes(report: StormReport) -> list[str]:
    """What a reader has to know to trust the table or not."""
    notes = []
    if report.settings.repeats > 1:
        notes.append(f"Medians of {report.settings.repeats} repeats; ratios within a repeat.")
    if report.results:
        notes.append(_account(report.results))
    for run in report.results:
        left = run.mount_table.after - run.mount_table.before
        if left > 0:
            notes.append(f"{run.strategy} (repeat {run.repeat + 1}) left {left:,} mounts behind.")
    failures = dict.fromkeys(f"{run.strategy}: {text}" for run in report.results for text in run.failures)
    return [*notes, *failures, *report.not_undone]


def _account(results: Sequence[RunResult]) -> str:
    """Whether plan, executor and kernel agree on the mount operations."""
    wrong = [
        f"{run.strategy} (repeat {run.repeat + 1}): planned {_planned(run):,}, executed {count.executed:,}"
        + (f", the kernel counted {count.kernel:,}" if count.kernel is not None else "")
        for run in results
        if not run.failed
        for count in [run.mount_operations]
        if count.executed != _planned(run) or count.kernel not in (None, count.executed)
    ]
    if wrong:
        return "Mount operations do not agree: " + "; ".join(wrong) + "."
    reasons = {run.mount_operations.kernel_reason for run in results if run.mount_operations.kernel is None}
    if reasons:
        said = "; ".join(sorted(reason for reason in reasons if reason))
        return f"Mount operations: executed as planned; not counted by the kernel: {said or 'not asked'}."
    return "Mount operations: executed as planned, and the kernel counted the same."


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _planned(run: RunResult) -> int:
    return run.mount_operations.planned_per_container * run.containers


def _median(spread: Spread | None) -> str:
    return figure(spread.median) if spread else "–"


def _quotable(value: float | None) -> str:
    return figure(value) if value is not None else "–"


def _range(spread: Spread | None) -> str:
    return f"{figure(spread.low)}–{figure(spread.high)}" if spread else "–"


def _painter(colour: bool) -> Callable[[str, str], str]:
    def paint(code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if colour and code else text

    return paint
