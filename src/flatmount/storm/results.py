"""What a storm measured, as frozen values with a schema name; reports and comparisons read only these.

`flatmount.storm/1` grows by additions only: a reader takes an object that has more fields than it knows, and
refuses one that lacks a field or has one of the wrong type.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flatmount.decoding import decode
from flatmount.errors import UsageError

SCHEMA = "flatmount.storm/1"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine that a storm ran on."""

    kernel: str
    architecture: str
    cpu_model: str
    cpus: int
    memory_bytes: int
    python: str
    flatmount: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The image whose containers were started. `files` counts the entries that a container sees."""

    name: str
    layers: int
    files: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What the storm was asked for.

    `ranges` says whether user namespaces were made as part of a start (`fresh`) or before (`ahead`), `admit` how many
    containers were assembled at a time where that was limited. `uppers` and `store` say where these were.
    """

    containers: int
    concurrency: int
    strategies: tuple[str, ...]
    repeats: int
    timeout_s: float
    copies: int
    watchers: int
    background: int
    on_host: bool
    ranges: str
    admit: int | None
    uppers: str
    store: str
    seed: int


@dataclass(frozen=True, slots=True)
class LatencyMs:
    """Milliseconds from a container's turn to its probe file written; None where none started."""

    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> LatencyMs:
        ordered = sorted(values)
        return cls(*(percentile(ordered, q) for q in (50, 90, 99, 100)))


@dataclass(frozen=True, slots=True)
class ProbeMs:
    """Milliseconds of the health probe's rounds, from when each was due; None where none was."""

    p50: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> ProbeMs:
        ordered = sorted(values)
        return cls(*(percentile(ordered, q) for q in (50, 99, 100)))


@dataclass(frozen=True, slots=True)
class MountOperations:
    """Operations that attach or detach a mount in the storm's namespace, undoing not counted.

    `planned_per_container` comes from the plan, `executed` from the executor over all containers, `kernel`
    from the kernel's attach and detach events over all containers in a run apart from the timed one. Where
    there is no such count, `kernel` is None and `kernel_reason` says why. `once` was made for ranges rather
    than containers and is in neither `planned_per_container` nor `executed`.
    """

    planned_per_container: int
    executed: int
    kernel: int | None
    kernel_reason: str | None
    once: int


@dataclass(frozen=True, slots=True)
class MountTable:
    """Mounts in the storm's namespace: before, at most while it ran (as sampled), after all was undone."""

    before: int
    peak: int
    after: int


@dataclass(frozen=True, slots=True)
class PhasesMs:
    """Median milliseconds of a container's phases, None where none went through it. Latency is without undoing."""

    user_namespace: float | None
    plan: float | None
    execute: float | None
    undo: float | None


@dataclass(frozen=True, slots=True)
class RunResult:
    """One strategy in one repeat.

    `starts_per_s` is of those that started; `latencies_ms` has one value for each of them, in the order in
    which they finished. `mounts` are (seconds from the start, mounts in the namespace), `probe` (seconds from
    the start to when the round was due, milliseconds it took from then on). `failures` has the first few
    messages, one for each kind.
    """

    strategy: str
    repeat: int
    containers: int
    concurrency: int
    wall_s: float
    starts_per_s: float
    failed: int
    failures: tuple[str, ...]
    latency_ms: LatencyMs
    mount_operations: MountOperations
    mount_table: MountTable
    probe_ms: ProbeMs
    watchers_cpu_s: float
    watchers_rereads: int
    phases_ms: PhasesMs
    undo_operations: int
    latencies_ms: tuple[float, ...]
    mounts: tuple[tuple[float, int], ...]
    probe: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class ContainerTimes:
    """Milliseconds of one container that started: its latency, and its phases; `undo_ms` None where it still stands."""

    latency_ms: float
    user_namespace_ms: float
    plan_ms: float
    execute_ms: float
    undo_ms: float | None


def measured(
    *,
    strategy: str,
    repeat: int,
    containers: int,
    concurrency: int,
    wall_s: float,
    started: Sequence[ContainerTimes],
    failures: Sequence[str],
    mount_operations: MountOperations,
    mounts_before: int,
    mounts_after: int,
    mounts: Sequence[tuple[float, int]],
    probe: Sequence[tuple[float, float]],
    watchers_cpu_s: float,
    watchers_rereads: int,
    undo_operations: int,
) -> RunResult:
    """The result of one run from what was measured: rates, percentiles, medians and the peak.

    `started` has the containers in the order in which they finished, `failures` one message for each that did
    not. Milliseconds are kept to the microsecond and seconds to a tenth of a millisecond.
    """
    latencies = [one.latency_ms for one in started]
    return RunResult(
        strategy=strategy,
        repeat=repeat,
        containers=containers,
        concurrency=concurrency,
        wall_s=round(wall_s, 4),
        starts_per_s=round(len(started) / wall_s, 3),
        failed=len(failures),
        failures=tuple(dict.fromkeys(failures))[:5],
        latency_ms=LatencyMs.of(round(value, 3) for value in latencies),
        mount_operations=mount_operations,
        mount_table=MountTable(
            before=mounts_before,
            peak=max(mounts_before, mounts_after, *(count for _, count in mounts)),
            after=mounts_after,
        ),
        probe_ms=ProbeMs.of(round(value, 3) for _, value in probe),
        watchers_cpu_s=round(watchers_cpu_s, 4),
        watchers_rereads=watchers_rereads,
        phases_ms=PhasesMs(
            user_namespace=_median_ms(one.user_namespace_ms for one in started),
            plan=_median_ms(one.plan_ms for one in started),
            execute=_median_ms(one.execute_ms for one in started),
            undo=_median_ms(one.undo_ms for one in started if one.undo_ms is not None),
        ),
        undo_operations=undo_operations,
        latencies_ms=tuple(round(value, 3) for value in latencies),
        mounts=tuple((round(at, 4), count) for at, count in mounts),
        probe=tuple((round(at, 4), round(value, 3)) for at, value in probe),
    )


@dataclass(frozen=True, slots=True)
class StrategyLocks:
    """What one strategy waited for and spun on, recorded in a burst of its own: recording makes a burst slower.

    Milliseconds are waited by the storm's own tasks, undoing included, its health probe and watchers not; `waits` are
    those for the two mount locks, `grace_periods` those for grace periods, which are no lock. Shares are of the
    processor samples of these tasks: `cpu_spinning` turned round for a mount lock, `cpu_under_lock` worked while
    others waited for one. `missing` names what could not be recorded, whose figures are then 0; `lost` counts events
    that the kernel had no room for.
    """

    strategy: str
    containers: int
    namespace_sem_ms: float
    mount_lock_ms: float
    other_locks_ms: float
    unclassified_ms: float
    grace_period_ms: float
    grace_periods: int
    waits: int
    samples: int
    cpu_spinning: float
    cpu_under_lock: float
    cpu_grace_period: float
    lost: int
    missing: tuple[str, ...]

    @property
    def mount_locks_us_each(self) -> float:
        """Microseconds that one container waited for the two mount locks."""
        return (self.namespace_sem_ms + self.mount_lock_ms) * 1e3 / max(self.containers, 1)

    @property
    def grace_period_us_each(self) -> float:
        """Microseconds that one container waited for grace periods, which are no lock."""
        return self.grace_period_ms * 1e3 / max(self.containers, 1)


@dataclass(frozen=True, slots=True)
class StormReport:
    """A storm: when, where, on what, how, and a result for each strategy and repeat in the order they ran.

    `taken_at` is when it began, in UTC as ISO 8601 writes it (`2026-01-31T12:00:00Z`). `locks` has an entry for each
    strategy where the storm was asked to record them. `not_undone` has a line for each burst of which something could
    not be undone: what, where, why, and what has become of it.
    """

    taken_at: str
    host: HostFacts
    image: ImageFacts
    settings: Settings
    results: tuple[RunResult, ...]
    locks: tuple[StrategyLocks, ...] = ()
    not_undone: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with its schema's name; `from_json` gives an equal report."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> StormReport:
        """The report that `value`, as `json.load` returned it, holds.

        Raises: UsageError naming the field: another schema, a field that is missing, of the wrong type,
        negative or not finite. Fields that are not known are left out.
        """
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            found = f"its schema is {schema!r}" if schema else "it names no schema"
            raise UsageError(f"not the results of a storm: {found}", hint=f"give a file with schema {SCHEMA}")
        return decode(cls, value, "storm")


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank percentile: the smallest value that at least `q` percent of `ordered` do not exceed.

    Always a value that was measured, never one in between; the p99 of fewer than 100 values is their maximum.
    None of nothing. `ordered` is ascending, `q` above 0 and at most 100.
    """
    return ordered[math.ceil(len(ordered) * q / 100) - 1] if ordered else None


def _median_ms(values: Iterable[float]) -> float | None:
    known = list(values)
    return round(statistics.median(known), 4) if known else None
