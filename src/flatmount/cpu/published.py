"""Published facts about three machines and one public table of lock costs, and whether the model reproduces them.

Three free knobs are set from three of the facts (and called calibrated); the others are then tested. That is weak
evidence, and the table says so: six facts, most of them of the kind "better" and "worse".

See: Netflix, "Mount mayhem at Netflix: scaling containers on modern CPUs"; the lock table is from the Linux kernel
mailing list, 2025-11-24; latencies are medians of public core-to-core matrices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from flatmount.cpu.model import Costs, burst_s, work_of
from flatmount.cpu.results import Burst

_TIMEOUT_S = 30.0
_LAYERS = 50
_BEFORE = 100


class Verdict(Enum):
    """How a fact and the model go together."""

    FITS = "fits"
    MISSES = "does not fit"
    CALIBRATED = "calibrated"
    OUTSIDE = "outside the model"


@dataclass(frozen=True, slots=True)
class Machine:
    """A published machine. `hand_off_ns` is a contended lock's, not a latency: latencies rank machines wrongly."""

    name: str
    title: str
    cpus: int
    smt: bool
    hand_off_ns: float
    derived: str


@dataclass(frozen=True, slots=True)
class LockTable:
    """Nanoseconds for a critical section as each of N threads sees it. `near` threads share the nearest domain; from
    `all_of` on they are on all processors, and `far_share` of the hand-offs cross."""

    name: str
    ns: tuple[tuple[int, float], ...]
    near: int | None
    all_of: int
    far_share: float


@dataclass(frozen=True, slots=True)
class TableFit:
    """A lock table with the model's line: costs of a section in ns, and their number (the free parameters)."""

    table: LockTable
    alone_ns: float
    near_ns: float
    far_ns: float
    free_parameters: int
    predicted: tuple[tuple[int, float], ...]
    slope: float
    published_slope: float

    def error(self, threads: int) -> float:
        """predicted/published - 1 at so many threads."""
        return dict(self.predicted)[threads] / dict(self.table.ns)[threads] - 1


@dataclass(frozen=True, slots=True)
class Fact:
    """One published statement, what the model says to it, and the verdict."""

    subject: str
    statement: str
    said: str
    verdict: Verdict


LOCK_TABLES = (
    LockTable(
        "AMD, 32 CPUs",
        ((1, 2.6), (2, 8.6), (4, 67), (8, 111), (16, 186), (32, 725), (64, 1436), (128, 2913), (256, 5763)),
        near=16,
        all_of=32,
        far_share=0.5,
    ),
    LockTable(
        "Intel, 28 primary threads",
        ((1, 6), (2, 60), (4, 150), (8, 311), (16, 624), (32, 1170), (64, 2287), (128, 4353), (256, 8321)),
        near=None,
        all_of=28,
        far_share=0.0,
    ),
    LockTable(
        "Intel, lock loop modified",
        ((1, 6), (2, 38), (4, 119), (8, 241), (16, 463), (32, 1037), (64, 2018), (128, 3834), (256, 7704)),
        near=None,
        all_of=28,
        far_share=0.0,
    ),
)
# Costs of the shape that this project measured (docs/processors.md); only their ratios matter, the scale is a knob.
_SHAPE = Costs(1.1e-4, 1.2e-5, 1.4e-5, 2.6e-8, 8e-5, 9e-7)


def fit_table(table: LockTable) -> TableFit:
    """Fit a lock table: a section costs the same whoever waits, so that each of N threads sees N of them.

    One cost for a thread alone, one for the near domain, and (where the table has two domains) one for hand-offs that
    cross. Two threads are not fitted: they may share a core, and a lock that one of them keeps shows no hand-off.
    """
    sections = {n: ns / n for n, ns in table.ns}
    alone = sections[1]
    far_seen = _geometric(ns for n, ns in sections.items() if n >= table.all_of)
    if table.near is None:
        near = far = _geometric(ns for n, ns in sections.items() if n >= 4)
    else:
        near = _geometric(ns for n, ns in sections.items() if 4 <= n <= table.near)
        far = (far_seen - (1 - table.far_share) * near) / table.far_share
    predicted = tuple((n, n * _section_ns(table, n, alone, near, far)) for n, _ in table.ns)
    return TableFit(
        table, alone, near, far, 2 if table.near is None else 3, predicted,
        _slope(predicted, table.all_of), _slope(table.ns, table.all_of),
    )  # fmt: skip


def _section_ns(table: LockTable, threads: int, alone: float, near: float, far: float) -> float:
    if threads == 1:
        return alone
    crossing = table.far_share if threads > (table.near or threads) else 0.0
    return (1 - crossing) * near + crossing * far


def _geometric(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _slope(points: Sequence[tuple[int, float]], least: int) -> float:
    beyond = [point for point in points if point[0] >= least]
    return (beyond[-1][1] - beyond[0][1]) / (beyond[-1][0] - beyond[0][0])


def machines() -> dict[str, Machine]:
    """The published machines. A hand-off within a socket is the lock table's; across sockets it is scaled by the ratio
    of published latencies (134 and 47 ns: half of the hand-offs cross)."""
    amd, intel, *_ = (fit_table(table) for table in LOCK_TABLES)
    one_socket = intel.near_ns
    two_sockets = one_socket * (0.5 * 134 + 0.5 * 47) / 47
    chiplets = amd.near_ns * (1 - amd.table.far_share) + amd.far_ns * amd.table.far_share
    found = (
        Machine("r5.metal", "two sockets, mesh, SMT", 96, True, two_sockets, "lock table x ratio of latencies"),
        Machine("r5.metal, one node", "one of its sockets, SMT", 48, True, one_socket, "lock table (Intel)"),
        Machine("m7i.metal-24xl", "one socket, mesh, SMT", 96, True, one_socket, "lock table (Intel)"),
        Machine("m7i, SMT off", "one socket, mesh", 48, False, one_socket, "lock table (Intel)"),
        Machine("m7a.24xlarge", "one socket, chiplets, no SMT", 96, False, chiplets, "lock table (AMD)"),
    )
    return {machine.name: machine for machine in found}


@dataclass(frozen=True, slots=True)
class Knobs:
    """The three that are free: what all costs are multiplied by, what a ns of hand-off adds to a section, and what a
    waiting SMT sibling adds."""

    scale: float
    per_ns: float
    sibling: float


def calibrate(costs: Costs = _SHAPE) -> Knobs:
    """Set the knobs from three facts: r5.metal reaches the time-out at 100 starts, SMT off is worth 25 % on m7i, and
    m7a is 20 % ahead of m7i without SMT."""
    there = machines()
    intel, amd = there["m7i, SMT off"].hand_off_ns, there["m7a.24xlarge"].hand_off_ns
    # (1 + v*intel) / (1 + v*amd) = 1.2
    per_ns = 0.2 / (intel - 1.2 * amd)
    knobs = Knobs(1.0, per_ns, 1 / 0.75 - 1)
    return dataclasses.replace(knobs, scale=_TIMEOUT_S / storm_s(there["r5.metal"], 100, knobs, costs))


def storm_s(machine: Machine, containers: int, knobs: Knobs, costs: Costs = _SHAPE) -> float:
    """Seconds of a storm of containers of 50 layers, per layer, with two namespace copies each, on that machine."""
    factor = 1 + knobs.per_ns * machine.hand_off_ns
    factor *= 1 + knobs.sibling if machine.smt else 1
    burst = Burst("per-layer", containers, _LAYERS, copies=2)
    dearer = (factor,) * machine.cpus
    return knobs.scale * burst_s(costs, burst, cpus=machine.cpus, before=_BEFORE, dearer=dearer)


def facts(costs: Costs = _SHAPE) -> tuple[Fact, ...]:
    """Every published fact against the model with these costs."""
    return (*_storm_facts(costs), *_table_facts())


def _storm_facts(costs: Costs) -> Iterable[Fact]:
    there = machines()
    knobs = calibrate(costs)
    at = {name: {c: storm_s(machine, c, knobs, costs) for c in (20, 100)} for name, machine in there.items()}
    r5, r5_node, m7i, m7i_off, m7a = (at[name] for name in there)
    operations = 100 * (2 * (1 + 2 * _LAYERS))
    planned = 100 * (work_of("per-layer", _LAYERS).operations - 1)
    yield Fact(
        "all", "100 containers of 50 layers make 20,200 mount operations",
        f"{planned:,}, and 100 to take the first pass's overlay off", _verdict(operations == planned),
    )  # fmt: skip
    yield Fact("r5.metal", "begins to fail around 100 starts (30 s)", f"{r5[100]:.0f} s at 100", Verdict.CALIBRATED)
    yield Fact(
        "m7i.metal-24xl", "SMT off: 20-30 % better", f"{1 - m7i_off[100] / m7i[100]:.0%} better", Verdict.CALIBRATED
    )
    yield Fact(
        "m7a.24xlarge", "about 20 % better than m7i without SMT",
        f"{m7i_off[100] / m7a[100] - 1:.0%} better", Verdict.CALIBRATED,
    )  # fmt: skip
    slowest, fastest = max(r5[20], m7i[20], m7a[20]), min(r5[20], m7i[20], m7a[20])
    yield Fact(
        "all three", "alike up to about 20 starts",
        f"{fastest:.1f} to {slowest:.1f} s at 20: {(slowest - fastest) / _TIMEOUT_S:.0%} of the time-out apart, "
        f"but {slowest / fastest:.1f} times",
        _verdict((slowest - fastest) / _TIMEOUT_S < 0.1),
    )  # fmt: skip
    yield Fact(
        "all three", "m7a the most even, r5.metal the worst",
        f"{m7a[100]:.0f}, {m7i[100]:.0f} and {r5[100]:.0f} s at 100 (m7a, m7i, r5); the first two by calibration",
        _verdict(m7a[100] < m7i[100] < r5[100]),
    )  # fmt: skip
    yield Fact(
        "r5.metal", "one NUMA node instead of two: markedly better",
        f"{1 - r5_node[100] / r5[100]:.0%} better", _verdict(r5_node[100] < 0.85 * r5[100]),
    )  # fmt: skip
    yield Fact(
        "all", "reading the mount table took up to 30 s",
        "the model has no reader of the table", Verdict.OUTSIDE,
    )  # fmt: skip
    yield Fact(
        "all", "95.5 % contested accesses, 57 % false sharing",
        "shares of cycles, which the model does not count", Verdict.OUTSIDE,
    )  # fmt: skip


def _table_facts() -> Iterable[Fact]:
    for table in LOCK_TABLES:
        fit = fit_table(table)
        errors = {n: fit.error(n) for n, _ in table.ns}
        slope = fit.slope / fit.published_slope - 1
        yield Fact(
            table.name,
            f"slope beyond {table.all_of} threads: {fit.published_slope:.1f} ns a thread",
            f"{fit.slope:.1f} ns ({slope:+.0%})", _verdict(abs(slope) <= 0.15),
        )  # fmt: skip
        worst = max((n for n in errors if n >= 4), key=lambda n: abs(errors[n]))
        yield Fact(
            table.name, "saturation: a section costs the same however many wait",
            f"worst {errors[worst]:+.0%} at {worst} threads, with {fit.free_parameters} free parameters",
            _verdict(abs(errors[worst]) <= 0.25),
        )  # fmt: skip
        yield Fact(
            table.name, f"two threads: {dict(table.ns)[2]:g} ns",
            f"{dict(fit.predicted)[2]:.0f} ns ({errors[2]:+.0%})", _verdict(abs(errors[2]) <= 0.25),
        )  # fmt: skip


def _verdict(holds: bool) -> Verdict:
    return Verdict.FITS if holds else Verdict.MISSES
