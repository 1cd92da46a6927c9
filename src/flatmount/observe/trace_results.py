"""What a trace counted, as frozen values with a schema name, and whether the counts are constant or grow with layers.

`flatmount.trace/1` grows by additions only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flatmount.decoding import decode
from flatmount.errors import UsageError
from flatmount.observe.mount_calls import Effect
from flatmount.storm.results import HostFacts

SCHEMA = "flatmount.trace/1"
_GROWS_FROM = 0.05  # operations a layer: one for twenty layers
_STRAIGHT_WITHIN = 0.05  # of the largest count


@dataclass(frozen=True, slots=True)
class CallCount:
    """One system call with one effect: how often it succeeded and failed, microseconds in all and of the longest."""

    call: str
    effect: Effect
    done: int
    failed: int
    total_us: float
    longest_us: float


@dataclass(frozen=True, slots=True)
class ProcessCalls:
    """The calls of one process (a thread group), by the name of the program that made the first of them."""

    process: int
    command: str
    calls: tuple[CallCount, ...]


@dataclass(frozen=True, slots=True)
class TraceRun:
    """One command, or one container of an engine from its start to its removal.

    `table_lengths` has the mounts in the namespaces that were copied, as the nearest living ancestor of whoever copied
    one saw it right after; `copies` counts all, also where nobody was left to ask. `attached` and `detached` are the
    kernel's own events in the namespace in which the command was started, what a watcher of that table sees, or None,
    and `events_reason` says why. `lost` events were counted nowhere: a count with `lost` above 0 is too low. `layers`
    is None for a command.
    """

    subject: str
    layers: int | None
    command: tuple[str, ...]
    exit_code: int
    seconds: float
    processes: tuple[ProcessCalls, ...]
    copies: int
    table_lengths: tuple[int, ...]
    attached: int | None
    detached: int | None
    events_reason: str | None
    lost: int
    missing: tuple[str, ...]

    def done(self, *effects: Effect) -> int:
        """Calls with one of these effects that succeeded, over all processes."""
        return sum(call.done for one in self.processes for call in one.calls if call.effect in effects)

    @property
    def operations(self) -> int:
        """Mount operations: calls that attached or detached a mount in whatever namespace."""
        return self.done(Effect.ATTACH, Effect.DETACH)


@dataclass(frozen=True, slots=True)
class Absent:
    """An engine that could not be tried, and why."""

    engine: str
    reason: str


@dataclass(frozen=True, slots=True)
class TraceReport:
    """All runs of one trace, in the order they were made, and the engines that are missing here."""

    taken_at: str
    host: HostFacts
    runs: tuple[TraceRun, ...]
    absent: tuple[Absent, ...]

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with its schema's name; `from_json` gives an equal report."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> TraceReport:
        """The report that `value`, as `json.load` returned it, holds. Raises: UsageError naming the field."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise UsageError("not the results of a trace", hint=f"give a file with schema {SCHEMA}")
        return decode(cls, value, "trace")


@dataclass(frozen=True, slots=True)
class Fit:
    """The line `base + per_layer * L` nearest to a subject's counts (least squares); `worst` is furthest off."""

    subject: str
    what: str
    base: float
    per_layer: float
    worst: float
    grows: bool
    straight: bool

    def sentence(self) -> str:
        """In words, for a person."""
        if not self.grows:
            return f"{self.subject} is constant: {self.base:.0f} {self.what} for a container, whatever its layers"
        line = f"{self.base:.0f} + {self.per_layer:.2f} × layers"
        bent = "" if self.straight else f", though not on a line (up to {self.worst:.0f} off)"
        return f"{self.subject} grows with layers: {line} = {self.what} for a container{bent}"


def fits(runs: Iterable[TraceRun]) -> tuple[Fit, ...]:
    """For each subject that was traced with two numbers of layers at least, how its mount operations grow."""
    points: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        if run.layers is not None and run.exit_code == 0:
            points.setdefault(run.subject, []).append((run.layers, run.operations))
    return tuple(_fit(subject, at) for subject, at in points.items() if len({layers for layers, _ in at}) > 1)


def _fit(subject: str, points: list[tuple[int, int]]) -> Fit:
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    per_layer = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    base = mean_y - per_layer * mean_x
    worst = max(abs(y - base - per_layer * x) for x, y in points)
    grows = per_layer >= _GROWS_FROM
    straight = worst <= max(1.0, _STRAIGHT_WITHIN * max(y for _, y in points))
    return Fit(subject, "mount operations", base if grows else mean_y, per_layer, worst, grows, straight)
