"""What a burst costs, from six measured ones: the model that fits in a README.

    time of a burst        T(C) = w + 0.9*c + w*waits + C * (K/X + copies * (n0 + n1*M)), with X for min(C, processors)
    mount operations       K = 2(1+2L) + 1 per layer, 7 with a common parent, 1 merged
    between two of them    (c*passes + o*lowers) / K               on a processor of the container's own
    a mount operation      h0 + h1*M*walks/K                       one at a time
    walks over siblings    2L per layer, 2 with a common parent, none merged: one for each bind of a layer or a parent
    live mounts            M = mounts before + containers at once * L/2 (per layer; 1/2 with a common parent)
                           for a copy + C: a container copies when its root, and most others', is attached
    waits                  2L + 2 per layer, 4 with a common parent, none merged; + copies; where no processor is idle
    out of the cache       c, o, h0, n0 times 1 + 0.9*C/(C + 100*processors), h1 and n1 times 1 + 0.9*M/(M + 4000)

A pass makes one overlay; the usual code needs two, a merged root file system one. What grows with the table is not
attaching but cloning: `open_tree(CLONE)` looks at every mount beside the one it clones, holding `namespace_sem`.
X is the throughput of the finite-population chain (flatmount.cpu.chain); copies are made one at a time. The six costs
are shared by all strategies, with copies and without; w, from a wake-up until the first thread runs, is measured.

A wait is an expedited grace period: each detached mount, a namespace that is left, and an overlay twice. One container
alone waits for its own; of several, each for the one under way as well, driven by a kernel's thread on processors that
containers keep. All who wait for the same one go on together, so that nobody is left to fill the next.

What a container needs again after others have run is not in the cache any more: tasks and their stacks of containers,
mounts and their mount points of a walk. The first pass on each processor finds nothing there.

What a cache line costs to move from one processor to another comes on top where it was measured: h is multiplied by
1 + v*(l + b*(k-1)) for k at the lock, with l and b from the lock benchmark at the placement. Below four cores the
slope b is not fitted, and then l and v are not identified either: the costs hold for the processors they were measured
on, and no other placement is predicted.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from flatmount.cpu.chain import throughput
from flatmount.cpu.least_squares import fit as least_squares
from flatmount.cpu.least_squares import line
from flatmount.cpu.results import FAIR, BenchResult, Burst, BurstFigure, LockFigure
from flatmount.errors import UsageError

# Fixed before anything held out was run. At most 50 containers and two numbers of layers.
CALIBRATION = (
    Burst("per-layer", 5, 50),
    Burst("per-layer", 50, 50),
    Burst("per-layer", 50, 50, copies=2),
    Burst("common-parent", 50, 50),
    Burst("flat", 50, 20),
    Burst("flat", 5, 20, copies=2),
)
LEAST_CORES = 4
_COUNTED = "counted in the strategy's plan"
# What work costs more when nothing of it is in the cache, and of how many half is lost: a second-level cache of 1 MiB
# holds about 10 KiB of each of a processor's containers between two turns, or four lines of each mount of a walk.
COLD = 0.9
_CONTAINERS_HALF_COLD, _MOUNTS_HALF_COLD = 100, 4000
_MOST_CONTAINERS = 5000
_BOUND = math.log(30.0)  # a cost this far from where the fit starts was not found in the data


class Source(Enum):
    """Where a parameter's value is from."""

    MEASURED = "measured"
    FITTED = "fitted"
    TABLE = "from a table"
    ASSUMED = "assumed"
    UNKNOWN = "not identified"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number of the model with its range; `value` is None where it is not identified."""

    name: str
    meaning: str
    unit: str
    source: Source
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds. The first two are spent on a container's own processor, the others one container at a time."""

    pass_s: float
    lower_s: float
    operation_s: float
    sibling_s: float
    copy_s: float
    copy_mount_s: float


_START = Costs(1.1e-4, 1.2e-5, 1.4e-5, 2.6e-8, 8e-5, 9e-7)
_MEANINGS = (
    ("c", "a pass: one overlay, whatever its layers", "us", 1e6),
    ("o", "a lower of an overlay", "us", 1e6),
    ("h0", "a mount operation, under the lock", "us", 1e6),
    ("h1", "a sibling that a clone looks at, under the lock", "ns", 1e9),
    ("n0", "a copy of the mount namespace", "us", 1e6),
    ("n1", "the same, for each live mount", "us", 1e6),
)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Nanoseconds that a lock's hand-off costs at a placement: `base_ns` + `slope_ns` for each further waiter."""

    placement: str
    base_ns: float
    slope_ns: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a strategy does for one container.

    `passes` overlays are made over `lowers` in all, by so many mount `operations`; `temporary` mounts come and go in
    each pass. `walks` of the operations were cloned beside the live mounts, and looked at all of them. It waits for so
    many grace periods, one after the other (`waits`).
    """

    operations: int
    passes: int
    lowers: int
    temporary: int

    @property
    def walks(self) -> int:
        return self.passes * self.temporary

    @property
    def waits(self) -> int:
        """One for each temporary mount, two for the overlay that the first of two passes makes for a moment."""
        return self.walks + 2 * (self.passes - 1)


def work_of(strategy: str, layers: int) -> Work:
    """The work of one container; counts are those of the plans (tests compare them)."""
    match strategy:
        case "per-layer":
            return Work(2 * (1 + 2 * layers) + 1, 2, 2 * layers, layers)
        case "common-parent":
            return Work(7, 2, 2 * layers, 1)
        case "detached":
            return Work(1, 1, layers, 0)
        case "flat":
            return Work(1, 1, 1, 0)
    raise UsageError(f"the model does not know the strategy {strategy!r}")


def live_mounts(burst: Burst, before: float) -> tuple[float, float]:
    """Mounts that a clone finds beside it on average, and that a namespace copy finds.

    Containers attach and detach their layers again and again, so that on average half of the most there could be are
    there. Roots stay. Of those that are let in at once none has its root when it clones; the roots of those that were
    let in before are there. A copy comes after all of that, beside the roots of all that were let in with it.
    """
    at_once = min(burst.admit or burst.containers, burst.containers)
    others = before + burst.background + at_once * work_of(burst.strategy, burst.layers).temporary / 2
    let_in_before = (burst.containers - at_once) / 2
    return others + let_in_before, others + let_in_before + at_once


def of_containers(burst: Burst, cpus: int) -> float:
    """What a container's own work is multiplied by, for what those that assemble at once take from the cache."""
    return _colder(min(burst.admit or burst.containers, burst.containers), _CONTAINERS_HALF_COLD * cpus)


def walk_s(costs: Costs, mounts: float) -> float:
    """Seconds of one look at so many mounts beside the one that is cloned."""
    return costs.sibling_s * mounts * _colder(mounts, _MOUNTS_HALF_COLD)


def copying_s(costs: Costs, burst: Burst, copied: float, cpus: int) -> float:
    """Seconds of one copy of a mount namespace in such a burst, of the host's with `copied` mounts or of a template."""
    mounts = 1.0 if burst.template else copied
    return costs.copy_s * of_containers(burst, cpus) + costs.copy_mount_s * mounts * _colder(mounts, _MOUNTS_HALF_COLD)


def _colder(there: float, half: float) -> float:
    return 1 + COLD * there / (there + half)


def burst_s(
    costs: Costs, burst: Burst, *, cpus: int, before: float, woken_s: float = 0.0, dearer: Sequence[float] = ()
) -> float:
    """Seconds from the start of a burst to its last container.

    Args:
        costs: the six costs.
        burst: what is started.
        cpus: processors it runs on.
        before: mounts in the table before it, without `burst.background`.
        woken_s: from a wake-up until the thread runs: the first one's, and that of who drives a grace period.
        dearer: for k = 1, 2, ... at the lock, what a section's time is multiplied by; missing ones are 1.
    """
    work = work_of(burst.strategy, burst.layers)
    mounts, copied = live_mounts(burst, before)
    at_once = min(burst.admit or burst.containers, burst.containers)
    customers = max(1, min(at_once, cpus))
    colder = of_containers(burst, cpus)

    def at_lock(section_s: float) -> Callable[[int], float]:
        return lambda k: section_s * (dearer[k - 1] if k <= len(dearer) else 1.0)

    own_s = (costs.pass_s * work.passes + costs.lower_s * work.lowers) * colder / work.operations
    section_s = costs.operation_s * colder + walk_s(costs, mounts) * work.walks / work.operations
    assembling_s = work.operations / throughput(customers, own_s, at_lock(section_s))
    copies_s = burst.copies * at_lock(copying_s(costs, burst, copied, cpus))(customers)
    idle = at_once < cpus
    waiting_s = 0.0 if idle else woken_s * (work.waits + burst.copies) * burst.containers / at_once
    return woken_s + COLD * costs.pass_s + waiting_s + burst.containers * (assembling_s + copies_s)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a strategy's containers finish within a burst: the first's and the median's share of its time."""

    strategy: str
    first: float
    half: float

    def late(self, burst_s: float, limit_s: float) -> float:
        """The fraction of containers that finish after `limit_s`, with straight lines between first, half and last."""
        at = limit_s / burst_s
        if at >= 1:
            return 0.0
        if at >= self.half:
            return 0.5 * (1 - at) / (1 - self.half) if self.half < 1 else 0.5
        if at <= self.first:
            return 1.0
        return 1.0 - 0.5 * (at - self.first) / (self.half - self.first)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a burst with their range, and the fraction of its containers later than the time-out."""

    burst: Burst
    seconds: float
    low: float
    high: float
    late: float


@dataclass(frozen=True, slots=True)
class Model:
    """A model of one machine. `variants` are the costs with each calibrated point moved to either end of its range."""

    costs: Costs
    variants: tuple[Costs, ...]
    cpus: int
    before: float
    parameters: tuple[Parameter, ...]
    shapes: tuple[Shape, ...]
    transfers: tuple[Transfer, ...] = ()
    transfers_per_section: float | None = None
    woken_s: float = 0.0

    def predict(self, burst: Burst, *, cpus: int | None = None, limit_s: float = 30.0) -> Prediction:
        """Time and failures of a burst on `cpus` processors (those it was measured on by default)."""
        seconds = self._seconds(self.costs, burst, cpus)
        low, high = _range(seconds, (self._seconds(costs, burst, cpus) for costs in self.variants))
        return Prediction(burst, seconds, low, high, self._shape(burst).late(seconds, limit_s))

    def predict_at(self, burst: Burst, placement: str, cpus: int, *, limit_s: float = 30.0) -> Prediction | None:
        """The same at another placement; None where what its distance costs is not identified."""
        here = next((transfer for transfer in self.transfers if transfer.placement == placement), None)
        if here is None or self.transfers_per_section is None:
            return None
        dearer = dearer_sections(here, self.transfers_per_section, cpus)
        values = [
            burst_s(costs, burst, cpus=cpus, before=self.before, woken_s=self.woken_s, dearer=dearer)
            for costs in (self.costs, *self.variants)
        ]
        low, high = _range(values[0], values[1:])
        return Prediction(burst, values[0], low, high, self._shape(burst).late(values[0], limit_s))

    def cliff(self, burst: Burst, limit_s: float) -> tuple[int, int, int] | None:
        """How many containers of such a burst take longer than `limit_s`: most likely, fewest, most; None if none do.

        The burst's own number of containers does not matter.
        """
        found = [self._cliff(costs, burst, limit_s) for costs in (self.costs, *self.variants)]
        if found[0] > _MOST_CONTAINERS:
            return None
        return found[0], min(found), max(found)

    def _cliff(self, costs: Costs, burst: Burst, limit_s: float) -> int:
        low, high = 0, _MOST_CONTAINERS + 1
        while high - low > 1:
            middle = (low + high) // 2
            late = self._seconds(costs, dataclasses.replace(burst, containers=middle), None) > limit_s
            low, high = (low, middle) if late else (middle, high)
        return high

    def _seconds(self, costs: Costs, burst: Burst, cpus: int | None) -> float:
        return burst_s(costs, burst, cpus=cpus or self.cpus, before=self.before, woken_s=self.woken_s)

    def _shape(self, burst: Burst) -> Shape:
        if burst.admit is not None:
            return Shape(burst.strategy, 0.0, 0.5)  # one after the other
        return next((s for s in self.shapes if s.strategy == burst.strategy), Shape(burst.strategy, 0.0, 0.5))


def dearer_sections(transfer: Transfer, per_section: float, cpus: int) -> tuple[float, ...]:
    """What sections are multiplied by for 1, 2, ... at the lock: `per_section` is v, in 1/ns."""
    return tuple(1 + per_section * (transfer.base_ns + transfer.slope_ns * (k - 1)) for k in range(1, cpus + 1))


def _range(value: float, variants: Iterable[float]) -> tuple[float, float]:
    """Deviations of single points add up in squares, upwards and downwards apart."""
    up = down = 0.0
    for variant in variants:
        deviation = math.log(variant / value)
        up, down = (up + deviation**2, down) if deviation > 0 else (up, down + deviation**2)
    return value * math.exp(-math.sqrt(down)), value * math.exp(math.sqrt(up))


def fit_costs(points: Sequence[tuple[Burst, float]], *, cpus: int, before: float, woken_s: float = 0.0) -> Costs:
    """The six costs that explain the seconds of at least six bursts, by least squares of the logarithms."""
    if len(points) < len(dataclasses.fields(Costs)):
        raise UsageError(f"{len(points)} bursts do not determine six costs", hint="`flatmount cpu bench` runs them all")

    start = [math.log(value) for value in dataclasses.astuple(_START)]

    def bounded(logarithms: Sequence[float]) -> Costs:
        pairs = zip(logarithms, start, strict=True)
        return Costs(*(math.exp(max(at - _BOUND, min(at + _BOUND, value))) for value, at in pairs))

    def residuals(logarithms: Sequence[float]) -> list[float]:
        costs = bounded(logarithms)
        return [
            math.log(burst_s(costs, burst, cpus=cpus, before=before, woken_s=woken_s) / wall_s)
            for burst, wall_s in points
        ]

    return bounded(least_squares(residuals, start))


def fit(bench: BenchResult) -> Model:
    """Fit the model to a bench's result.

    Raises: UsageError where the bench lacks one of the six bursts (no privilege, or too small a budget).
    """
    figures = [bench.burst(burst) for burst in CALIBRATION]
    missing = [str(b) for b, figure in zip(CALIBRATION, figures, strict=True) if figure is None]
    if missing:
        raise UsageError(
            f"the bench did not measure {', '.join(missing)}",
            hint="run `flatmount cpu bench` as root with a budget of 30 s or more",
        )
    return fit_figures([figure for figure in figures if figure is not None], bench)


def fit_figures(figures: Sequence[BurstFigure], bench: BenchResult) -> Model:
    """Fit the model to these bursts, and what transfers cost to the bench's locks."""
    cpus = len(bench.topology.allowed)
    before = figures[0].mounts_before
    woken_s = statistics.median(figure.woken_s for figure in figures)
    middle = [(figure.burst, figure.wall_s.median) for figure in figures]
    costs = fit_costs(middle, cpus=cpus, before=before, woken_s=woken_s)
    variants = []
    for i, figure in enumerate(figures):
        for end in (figure.wall_s.low, figure.wall_s.high):
            moved = [*middle[:i], (figure.burst, end), *middle[i + 1 :]]
            variants.append(fit_costs(moved, cpus=cpus, before=before, woken_s=woken_s))
    transfers, why_not = transfers_of(bench)
    per_section = _fit_transfers(costs, transfers, bench, before) if transfers else None
    return Model(
        costs,
        tuple(variants),
        cpus,
        before,
        (
            Parameter("N", "processors the bursts ran on", "", Source.MEASURED, cpus, cpus, cpus),
            Parameter("M0", "mounts before a burst", "", Source.MEASURED, before, before, before),
            Parameter("w", "a wake-up, until the thread runs", "us", Source.MEASURED, woken_s * 1e6, *_ends(figures)),
            Parameter("K", "mount operations of a container", "", Source.MEASURED, note=_COUNTED),
            Parameter("1/2", "share of temporary mounts that are live", "", Source.ASSUMED, 0.5),
            Parameter("0.9", "what work costs more out of the cache", "", Source.ASSUMED, COLD),
            *_cost_parameters(costs, variants),
            *_transfer_parameters(transfers, per_section, why_not),
        ),
        tuple(_shapes(figures)),
        transfers,
        per_section,
        woken_s,
    )


def _ends(figures: Sequence[BurstFigure]) -> tuple[float, float]:
    found = [figure.woken_s * 1e6 for figure in figures]
    return min(found), max(found)


def _cost_parameters(costs: Costs, variants: Sequence[Costs]) -> Iterable[Parameter]:
    for i, (name, meaning, unit, factor) in enumerate(_MEANINGS):
        value = dataclasses.astuple(costs)[i]
        if abs(math.log(value / dataclasses.astuple(_START)[i])) > 0.99 * _BOUND:
            note = "the six bursts do not tell it from nothing: too noisy, measure again"
            yield Parameter(name, meaning, unit, Source.UNKNOWN, note=note)
            continue
        low, high = _range(value, (dataclasses.astuple(variant)[i] for variant in variants))
        yield Parameter(name, meaning, unit, Source.FITTED, value * factor, low * factor, high * factor)


def _transfer_parameters(transfers: Sequence[Transfer], per_section: float | None, why_not: str) -> Iterable[Parameter]:
    if not transfers:
        for name, meaning in (("l", "a hand-off of the lock"), ("b", "the same, for each further waiter")):
            yield Parameter(name, meaning, "ns", Source.UNKNOWN, note=why_not)
    for t in transfers:
        yield Parameter("l", f"a hand-off of the lock, {t.placement}", "ns", Source.FITTED, t.base_ns)
        yield Parameter("b", f"the same, for each further waiter, {t.placement}", "ns", Source.FITTED, t.slope_ns)
    if per_section is None:
        note = why_not or "bursts at two placements are needed"
        yield Parameter("v", "share of a section that a hand-off's ns add", "1/ns", Source.UNKNOWN, note=note)
    else:
        yield Parameter("v", "share of a section that a hand-off's ns add", "1/ns", Source.FITTED, per_section)


def _shapes(figures: Sequence[BurstFigure]) -> Iterable[Shape]:
    largest: dict[str, BurstFigure] = {}
    for figure in figures:
        known = largest.get(figure.burst.strategy)
        if not figure.burst.copies and (known is None or figure.burst.containers > known.burst.containers):
            largest[figure.burst.strategy] = figure
    for strategy, figure in largest.items():
        wall = figure.wall_s.median
        half = min(1.0, figure.half_s / wall)
        yield Shape(strategy, min(half, figure.least_s / wall), half)


def transfers_of(bench: BenchResult) -> tuple[tuple[Transfer, ...], str]:
    """What a hand-off costs at each placement of four cores or more, from the fair locks; and why, where not.

    Only figures that show the hand-off count: an unfair lock that is kept by one processor is fast because it hides it.
    """
    found = []
    for placement in bench.placements:
        if placement.distinct_cores < LEAST_CORES:
            continue
        points = [
            (float(figure.threads), figure.ns.median)
            for figure in bench.locks
            if figure.placement == placement.name and usable_for_slope(figure)
        ]
        if len({x for x, _ in points}) >= 2:
            at_one, slope = line(points)
            found.append(Transfer(placement.name, max(0.0, at_one + slope), max(0.0, slope)))
    if found:
        return tuple(found), ""
    most = max((placement.distinct_cores for placement in bench.placements), default=1)
    if most < LEAST_CORES:
        return (), f"{most} cores: a slope over waiters needs {LEAST_CORES} or more"
    return (), "no fair lock was measured with two or more numbers of threads"


def usable_for_slope(figure: LockFigure) -> bool:
    """Whether a figure shows what a hand-off costs: a fair lock that changes hands, on processors that stayed."""
    return figure.kind in FAIR and figure.shows_transfer and not figure.moved


def _fit_transfers(costs: Costs, transfers: Sequence[Transfer], bench: BenchResult, before: float) -> float | None:
    """v, from bursts that were run at two placements or more. The costs were fitted with some of it in them: what is
    left is how much the placements differ."""
    by_name = {transfer.placement: transfer for transfer in transfers}
    size = {placement.name: len(placement.cpus) for placement in bench.placements}
    points = [figure for figure in bench.bursts if figure.placement in by_name]
    if len({figure.placement for figure in points}) < 2:
        return None

    def residuals(values: Sequence[float]) -> list[float]:
        found = []
        for figure in points:
            cpus = size[figure.placement]
            dearer = dearer_sections(by_name[figure.placement], math.exp(values[0]), cpus)
            predicted = burst_s(costs, figure.burst, cpus=cpus, before=before, dearer=dearer)
            found.append(math.log(predicted / figure.wall_s.median) + values[1])
        return found

    return math.exp(least_squares(residuals, [math.log(1e-3), 0.0])[0])
