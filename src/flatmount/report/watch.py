"""What `watch` sees: a page for a terminal, and the text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flatmount.observe.watch_results import Sample
from flatmount.storm.summary import figure

_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 60


@dataclass(slots=True)
class Screen:
    """The terminal page. Keeps the last minute for its lines of bars."""

    mounts: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)

    def draw(self, sample: Sample, width: int = 100) -> str:
        """The page for a sample, as text of at most `width` columns, ending with a newline."""
        rate = sample.attached_per_s + sample.detached_per_s
        for history, value in ((self.mounts, float(sample.mounts)), (self.events, rate)):
            history.append(value)
            del history[:-_HISTORY]
        polled = " (compared looks)" if sample.polled else ""
        init = "–" if sample.init_cpu_share is None else f"{sample.init_cpu_share:.1%}"
        lines = [
            f"flatmount watch  {sample.at}",
            "",
            f"mounts   {sample.mounts:>9,}  peak {sample.peak:,}   {_bars(self.mounts)}",
            f"events   {rate:>9,.1f}  a second{polled}   {_bars(self.events)}",
            f"           attached {sample.attached_per_s:,.1f}, detached {sample.detached_per_s:,.1f} a second; "
            f"since the start {sample.attached:,} and {sample.detached:,}",
            f"health   {sample.health_ms:>9.2f}  ms to look the table up",
            f"PID 1    {init:>9}  of a processor ({sample.init_name})",
            "",
            *_locks(sample),
            *_causes(sample),
            "",
            f"watching costs {sample.own_cpu_share:.1%} of a processor",
            *([f"{sample.lost:,} calls were not recorded: too many at once"] if sample.lost else []),
            *(f"not seen: {what}" for what in sample.unseen),
        ]
        return "\n".join(line[:width].rstrip() for line in lines) + "\n"


def one_line(sample: Sample) -> str:
    """A sample as one line, for output that is not a terminal."""
    top = sample.causes[0] if sample.causes else None
    cause = f"  {top.process} {top.operations_per_s:,.0f}/s" if top else ""
    return (
        f"{sample.at}  {sample.mounts:,} mounts  +{sample.attached_per_s:,.1f} -{sample.detached_per_s:,.1f} a second  "
        f"health {sample.health_ms:.2f} ms{cause}"
    )


def prometheus(sample: Sample) -> str:
    """All figures in Prometheus's text format. Labels are bounded: at most ten causes, and two locks."""
    causes = [
        (_labels(process=one.process, container=one.container[:12], pod=one.pod), one.operations_per_s)
        for one in sample.causes or ()
    ]
    locks = sample.locks or ()
    parts = [
        _metric("mounts", "gauge", "Mounts in the mount table.", [("", sample.mounts)]),
        _metric("mounts_peak", "gauge", "Most mounts since the start.", [("", sample.peak)]),
        _metric(
            "mount_events_total",
            "counter",
            "Mounts attached and detached.",
            [('{kind="attached"}', sample.attached), ('{kind="detached"}', sample.detached)],
        ),
        _metric("table_lookup_seconds", "gauge", "Time to look the table up.", [("", sample.health_ms / 1000)]),
        _metric("cause_operations_per_second", "gauge", "Mount calls of the busiest processes.", _summed(causes)),
        _metric(
            "lock_wait_milliseconds",
            "gauge",
            "Waiting for mount locks in the last interval.",
            [(_labels(lock=one.lock), one.total_ms) for one in locks],
        ),
        _metric(
            "lock_waits", "gauge", "Waits in the last interval.", [(_labels(lock=one.lock), one.waits) for one in locks]
        ),
        _metric("init_cpu_share", "gauge", "PID 1's share of a processor.", [("", sample.init_cpu_share)]),
        _metric("watch_cpu_share", "gauge", "Share of a processor that watching takes.", [("", sample.own_cpu_share)]),
    ]
    return "".join(parts)


def _metric(name: str, kind: str, text: str, values: Sequence[tuple[str, float | None]]) -> str:
    known = [(labels, value) for labels, value in values if value is not None]
    if not known:
        return ""
    head = f"# HELP flatmount_{name} {text}\n# TYPE flatmount_{name} {kind}\n"
    return head + "".join(f"flatmount_{name}{labels} {value:.10g}\n" for labels, value in known)


def _summed(values: Sequence[tuple[str, float]]) -> list[tuple[str, float | None]]:
    """One value for each set of labels: two processes of a name in one place are one series."""
    sums: dict[str, float] = {}
    for labels, value in values:
        sums[labels] = sums.get(labels, 0.0) + value
    return list(sums.items())


def _labels(**labels: str) -> str:
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in labels.values())
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(labels, quoted, strict=True)) + "}"


def _locks(sample: Sample) -> list[str]:
    if sample.locks is None:
        return []
    return [
        *(f"{one.lock:<15} {one.waits:>7,} waits  {figure(one.total_ms):>8} ms" for one in sample.locks),
        "",
    ]


def _causes(sample: Sample) -> list[str]:
    if not sample.causes:
        return ["nobody mounts"] if sample.causes is not None else []
    lines = ["operations a second, in any mount namespace"]
    for one in sample.causes:
        where = f"pod {one.pod}" if one.pod else f"container {one.container[:12]}" if one.container else one.cgroup
        process = f"{one.process} [{one.pid}]" if one.pid else f"{one.process} (ended)"
        lines.append(f"{one.operations_per_s:>12,.1f}  {process:<28}  {where}")
    return lines


def _bars(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[1 + round((value - low) / span * (len(_BARS) - 2))] for value in values)
