"""What a bench measured, as frozen values with a schema name; the model, the advice and the page read only these."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flatmount.cpu.noise import Disturbance
from flatmount.cpu.placements import Placement
from flatmount.cpu.records import from_data, to_data
from flatmount.cpu.topology import Topology
from flatmount.errors import UsageError

SCHEMA = "flatmount.cpu-bench/1"
LEAST_REPEATS = 3
TOO_FEW = "too few repeats"
DISTURBED = "disturbed"
# By how much of their width, at either end, ranges of few repeats are wider than the repeats: without it every tenth
# pair of ranges of three, and every 130th of five, would miss each other with nothing changed; so it is one in a
# thousand (two samples of a normal or a skewed distribution, counted in 200,000 pairs).
_WIDER = {3: 1.5, 4: 0.5, 5: 0.2, 6: 0.1}
_LEFT_OUT_OF = 20  # one, at either end: a single batch of hundreds that was interrupted says nothing of the next run's
# A gap this wide between sorted values, with this share of them on either side, makes two modes of them.
_MODE_RATIO = 1.5
_MODE_SHARE = 0.2


class Kind(Enum):
    """A kind of lock."""

    TAS = "test-and-set"
    TTAS = "test-and-test-and-set"
    TICKET = "ticket"
    MCS = "mcs"
    MUTEX = "pthread mutex"
    RWLOCK = "futex read-write"
    SEQLOCK = "seqlock"

    @property
    def number(self) -> int:
        """Its place in native/locks.c."""
        return list(Kind).index(self)


FAIR = (Kind.TICKET, Kind.MCS)


@dataclass(frozen=True, slots=True)
class Mode:
    """One of the values that a wandering figure keeps returning to, and its share of the repeats."""

    value: float
    share: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one figure: their median, and the range in which another run's would lie.

    From the lowest to the highest of seven or more repeats; a range of three to six is wider than they are, and one of
    twenty or more leaves the twentieth part out at either end. More than one mode where they fall into groups.
    """

    median: float
    low: float
    high: float
    count: int
    modes: tuple[Mode, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises: ValueError for no values."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        low, high = _range(ordered)
        return cls(statistics.median(ordered), low, high, len(ordered), modes_of(ordered))

    def overlaps(self, other: Spread) -> bool:
        """Whether the two ranges have a value in common: then neither is better."""
        return self.low <= other.high and other.low <= self.high


def _range(ordered: Sequence[float]) -> tuple[float, float]:
    cut = len(ordered) // _LEFT_OUT_OF
    low, high = ordered[cut], ordered[-1 - cut]
    if low <= 0:
        return low, high
    factor = (high / low) ** _WIDER.get(len(ordered), 0.0)
    return low / factor, high * factor


def modes_of(ordered: Sequence[float]) -> tuple[Mode, ...]:
    """The groups that sorted values fall into where gaps are wide; a single mode for most."""
    groups: list[list[float]] = [[ordered[0]]]
    for before, value in itertools.pairwise(ordered):
        if before > 0 and value / before > _MODE_RATIO:
            groups.append([])
        groups[-1].append(value)
    least = _MODE_SHARE * len(ordered)
    kept = [group for group in groups if len(group) >= least and len(group) > 1]
    if len(kept) < 2:
        return (Mode(statistics.median(ordered), 1.0),)
    return tuple(Mode(statistics.median(group), round(len(group) / len(ordered), 3)) for group in kept)


@dataclass(frozen=True, slots=True)
class LockFigure:
    """One kind of lock, at one placement, with so many threads.

    `ns` are nanoseconds for each section over all threads together. `hand_off` is the fraction of exclusive sections
    whose lock came from another processor (None: the kind has none); `fairness` Jain's index of the threads' shares,
    from 1/n to 1; `retries` a reader's repeats for each read. Latencies come from runs of their own and include the
    reading of the clock, about 25 ns. `disturbed`: others used the processors meanwhile.
    """

    kind: Kind
    placement: str
    threads: int
    ns: Spread
    hand_off: float | None
    fairness: float
    retries: float | None
    p50_ns: float | None = None
    p99_ns: float | None = None
    max_ns: float | None = None
    moved: bool = False
    disturbed: bool = False

    @property
    def shows_transfer(self) -> bool:
        """Whether the figure holds a hand-off between processors, rather than hiding it by keeping the lock."""
        return self.threads > 1 and self.hand_off is not None and self.hand_off >= 0.5


@dataclass(frozen=True, slots=True)
class Cell:
    """One-way latency between two processors, with the page first touched by `home` and found on NUMA node `node`."""

    a: int
    b: int
    ns: Spread
    home: int
    node: int
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Burst:
    """What to start.

    `copies` mount-namespace copies are made for each container (a runtime makes two), from the host's table or, with
    `template`, from a namespace that holds one mount. At most `admit` containers assemble at a time (None: all).
    `background` mounts were there before. `one_range` gives all containers the same user range.
    """

    strategy: str
    containers: int
    layers: int
    copies: int = 0
    admit: int | None = None
    background: int = 0
    template: bool = False
    one_range: bool = False

    def __str__(self) -> str:
        parts = [self.strategy, f"C={self.containers}", f"L={self.layers}"]
        parts += [f"{self.copies} copies"] if self.copies else []
        parts += ["of a template"] if self.template else []
        parts += [f"admit {self.admit}"] if self.admit else []
        parts += [f"beside {self.background} mounts"] if self.background else []
        parts += ["one range"] if self.one_range else []
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class BurstFigure:
    """Repeats of one burst. `half_s` is the median container's latency in the median repeat, `least_s` the first's, and
    `woken_s` the time from the start until its first thread ran (0: an earlier version did not say). `disturbed`: too
    few repeats had a quiet moment."""

    burst: Burst
    wall_s: Spread
    half_s: float
    least_s: float
    mount_operations: int
    mounts_before: int
    placement: str = ""
    woken_s: float = 0.0
    disturbed: bool = False

    @property
    def operations_per_s(self) -> float:
        """Mount operations a second over the whole burst."""
        return self.mount_operations / self.wall_s.median


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One bench of one machine. `left_out` says what the budget or the machine did not allow."""

    version: str
    topology: Topology
    placements: tuple[Placement, ...]
    pause_ns: float
    budget_s: float
    took_s: float
    repeats: int
    load_before: float
    disturbance: Disturbance
    locks: tuple[LockFigure, ...] = ()
    matrix: tuple[Cell, ...] = ()
    bursts: tuple[BurstFigure, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields of an object of the schema `flatmount.cpu-bench/1`."""
        data: dict[str, Any] = to_data(self)
        return data

    def burst(self, burst: Burst) -> BurstFigure | None:
        """The figure of that burst, where it was measured on all processors."""
        return next((figure for figure in self.bursts if figure.burst == burst and not figure.placement), None)


def load_bench(path: str) -> BenchResult:
    """Read a result that `cpu bench --json` wrote. Raises: UsageError for another schema or a damaged file."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a bench's result: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path} has the schema {schema!r}", hint=f"this version reads {SCHEMA}")
    return from_data(BenchResult, data, path)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of two benches.

    `verdict` is "same", "lower" or "higher", across machines "indistinguishable" in place of "same"; "too few repeats"
    where one of the two has no range to speak of, and "disturbed" where ranges lie apart and others used the processors
    while one of them was measured.
    """

    figure: str
    unit: str
    first: Spread
    second: Spread
    verdict: str


def require_comparable(results: Sequence[BenchResult]) -> None:
    """Refuse results of different versions: their loops differ, so that nothing follows from their figures."""
    versions = sorted({result.version for result in results})
    if len(versions) > 1:
        raise UsageError(
            f"results of versions {' and '.join(versions)} cannot be compared", hint="measure both with one version"
        )


def same_machine(first: BenchResult, second: BenchResult) -> bool:
    """Whether two results look like the same machine: model, processors, and kernel."""
    return _identity(first) == _identity(second)


def _identity(result: BenchResult) -> tuple[object, ...]:
    topology = result.topology
    return topology.model, topology.kernel, tuple(cpu.number for cpu in topology.cpus)


def compare(first: BenchResult, second: BenchResult) -> tuple[Comparison, ...]:
    """Every figure that both have. Where the ranges overlap nothing is told apart. Raises: UsageError (versions)."""
    require_comparable((first, second))
    same = "same" if same_machine(first, second) else "indistinguishable"
    found = []
    for name, unit, one, other, disturbed in _pairs(first, second):
        verdict = same if one.overlaps(other) else "lower" if other.median < one.median else "higher"
        if min(one.count, other.count) < LEAST_REPEATS:
            verdict = TOO_FEW
        elif verdict != same and disturbed:
            verdict = DISTURBED
        found.append(Comparison(name, unit, one, other, verdict))
    return tuple(found)


def _pairs(first: BenchResult, second: BenchResult) -> Iterable[tuple[str, str, Spread, Spread, bool]]:
    locks = {(f.kind, f.placement, f.threads): f for f in second.locks}
    for f in first.locks:
        if lock := locks.get((f.kind, f.placement, f.threads)):
            name = f"{f.kind.value}, {f.placement}, {f.threads} threads"
            yield name, "ns", f.ns, lock.ns, f.disturbed or lock.disturbed
    cells = {(c.a, c.b): c for c in second.matrix}
    for c in first.matrix:
        if cell := cells.get((c.a, c.b)):
            yield f"processors {c.a} and {c.b}", "ns", c.ns, cell.ns, c.moved or cell.moved
    bursts = {(b.burst, b.placement): b for b in second.bursts}
    for b in first.bursts:
        if burst := bursts.get((b.burst, b.placement)):
            yield str(b.burst), "s", b.wall_s, burst.wall_s, b.disturbed or burst.disturbed
