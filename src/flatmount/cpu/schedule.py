"""What a bench does with the time it is given: pure planning, before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flatmount.cpu.placements import Placement, placements, thread_counts
from flatmount.cpu.results import Burst, Kind
from flatmount.cpu.topology import Topology, counted
from flatmount.errors import UsageError

LEAST_BUDGET_S = 3.0
PREHEAT_MS = 5.0
_STARTING_MS = 2.0  # making and joining threads
_PAIR_MS = 8.0
_SHARES = {"locks": 0.40, "latency": 0.08, "matrix": 0.10, "bursts": 0.38}  # the rest is for what was not foreseen
_LEAST_FOR_BURSTS_S = 15.0
_PAIRS_OF_A_RELATION = 12

# Each line is dearer than the next: repeats, milliseconds of a run, kinds, all numbers of threads or only the ends.
_FEW = (Kind.TTAS, Kind.TICKET, Kind.MCS, Kind.SEQLOCK)
_ECONOMIES: tuple[tuple[int, float, tuple[Kind, ...], bool], ...] = (
    (9, 100.0, tuple(Kind), True),
    (7, 60.0, tuple(Kind), True),
    (5, 40.0, tuple(Kind), True),
    (5, 25.0, tuple(Kind), True),
    (5, 25.0, tuple(Kind), False),
    (5, 20.0, _FEW, False),
    (3, 15.0, _FEW, False),
    (3, 10.0, (Kind.TICKET,), False),
)


@dataclass(frozen=True, slots=True)
class LockRunPlan:
    """One lock at one placement with so many threads."""

    kind: Kind
    placement: Placement
    threads: int

    @property
    def cpus(self) -> tuple[int, ...]:
        return self.placement.cpus[: self.threads]


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """A bench that fits its budget; `left_out` says what had to go."""

    budget_s: float
    placements: tuple[Placement, ...]
    repeats: int
    run_ms: float
    locks: tuple[LockRunPlan, ...]
    latencies: tuple[LockRunPlan, ...]
    pairs: tuple[tuple[int, int], ...]
    pair_repeats: int
    burst_s: float
    left_out: tuple[str, ...]


def plan_bench(topology: Topology, budget_s: float, *, bursts: bool) -> BenchPlan:
    """Fit locks, latencies, the matrix and bursts into `budget_s`. Raises: UsageError for too small a budget."""
    if budget_s < LEAST_BUDGET_S:
        raise UsageError(f"a budget of {budget_s:g} s is too small", hint=f"give {LEAST_BUDGET_S:g} s or more")
    there = placements(topology)
    left_out: list[str] = []
    bursts = bursts and _bursts_fit(budget_s, left_out)
    scale = 1.0 if bursts else 1 / (1 - _SHARES["bursts"])
    repeats, run_ms, locks = _locks(there, budget_s * _SHARES["locks"] * scale, left_out)
    latencies = _latencies(there, locks, budget_s * _SHARES["latency"] * scale, run_ms)
    pairs, pair_repeats = _pairs(topology, budget_s * _SHARES["matrix"] * scale, left_out)
    if len(topology.allowed) < 2:
        left_out.append("hand-offs: this process may use one processor only")
    return BenchPlan(
        budget_s, there, repeats, run_ms, locks, latencies, pairs, pair_repeats,
        budget_s * _SHARES["bursts"] if bursts else 0.0, tuple(left_out),
    )  # fmt: skip


def _bursts_fit(budget_s: float, left_out: list[str]) -> bool:
    if budget_s >= _LEAST_FOR_BURSTS_S:
        return True
    left_out.append(f"bursts: they need a budget of {_LEAST_FOR_BURSTS_S:g} s")
    return False


def _locks(
    there: Sequence[Placement], seconds: float, left_out: list[str]
) -> tuple[int, float, tuple[LockRunPlan, ...]]:
    for repeats, run_ms, kinds, all_counts in _ECONOMIES:
        plans = tuple(_lock_runs(there, kinds, all_counts))
        if repeats * len(plans) * (run_ms + PREHEAT_MS + _STARTING_MS) / 1e3 <= seconds:
            break
    if len(kinds) < len(Kind):
        left_out.append(f"locks: {', '.join(kind.value for kind in Kind if kind not in kinds)}")
    if not all_counts and any(len(thread_counts(placement)) > 3 for placement in there):
        left_out.append("locks: numbers of threads between two and all")
    # The last economy may still be too dear on a large machine: as many as fit, larger placements first.
    fitting = max(1, int(seconds * 1e3 / repeats / (run_ms + PREHEAT_MS + _STARTING_MS)))
    if fitting < len(plans):
        left_out.append(f"locks: {len(plans) - fitting} of {len(plans)} combinations")
        plans = tuple(sorted(plans, key=lambda plan: -plan.threads)[:fitting])
    return repeats, run_ms, plans


def _lock_runs(there: Sequence[Placement], kinds: Sequence[Kind], all_counts: bool) -> Iterator[LockRunPlan]:
    for placement, kind in itertools.product(there, kinds):
        counts = thread_counts(placement)
        for threads in counts if all_counts else sorted({1, min(2, counts[-1]), counts[-1]}):
            yield LockRunPlan(kind, placement, threads)


def _latencies(
    there: Sequence[Placement], locks: Sequence[LockRunPlan], seconds: float, run_ms: float
) -> tuple[LockRunPlan, ...]:
    """At each placement's full number of threads."""
    full = {placement.name: len(placement.cpus) for placement in there}
    wanted = [plan for plan in locks if plan.threads == full[plan.placement.name]]
    return tuple(wanted[: max(1, int(seconds * 1e3 / (run_ms + PREHEAT_MS + _STARTING_MS)))])


def relation(topology: Topology, a: int, b: int) -> str:
    """How near two processors are: "sibling", "same L3", "same socket" or "other socket"."""
    one, other = topology.cpu(a), topology.cpu(b)
    if one.core == other.core:
        return "sibling"
    if one.l3 == other.l3:
        return "same L3"
    return "same socket" if one.package == other.package else "other socket"


def _pairs(topology: Topology, seconds: float, left_out: list[str]) -> tuple[tuple[tuple[int, int], ...], int]:
    usable = [cpu for cpu in topology.in_order if cpu in topology.allowed]
    pairs = tuple(itertools.combinations(usable, 2))
    affordable = int(seconds * 1e3 / _PAIR_MS)
    if len(pairs) <= affordable:
        return pairs, max(1, min(20, affordable // max(1, len(pairs))))
    chosen = _spread_out(topology, pairs, min(_PAIRS_OF_A_RELATION, max(1, affordable // 4)))
    left_out.append(f"matrix: {len(pairs) - len(chosen)} of {counted(len(pairs), 'pair')}")
    return chosen, max(1, min(20, affordable // len(chosen)))


def _spread_out(topology: Topology, pairs: Sequence[tuple[int, int]], of_each: int) -> tuple[tuple[int, int], ...]:
    by_relation: dict[str, list[tuple[int, int]]] = {}
    for pair in pairs:
        by_relation.setdefault(relation(topology, *pair), []).append(pair)
    chosen = [
        found[i * len(found) // min(of_each, len(found))]
        for found in by_relation.values()
        for i in range(min(of_each, len(found)))
    ]
    return tuple(sorted(chosen, key=pairs.index))


def burst_order(there: Sequence[Placement]) -> tuple[tuple[Burst, Placement | None], ...]:
    """Bursts after the calibration, in the order in which they are worth their time; a placement means "only there"."""
    sweep = [
        (Burst(strategy, containers, 50, copies), None)
        for containers in (1, 10, 20, 50, 100, 200)
        for copies in (0, 2)
        for strategy in ("per-layer", "common-parent", "flat")
    ]
    places = [(Burst("per-layer", 50, 20), p) for p in there if len(p.cpus) > 1] if len(there) > 1 else []
    caps = [(Burst("per-layer", 100, 50, admit=k), None) for k in (1, 2, 4, 8, 16, 32)]
    beside = [
        (Burst(strategy, 20, 20, background=background), None)
        for background in (0, 1000, 4000)
        for strategy in ("per-layer", "common-parent", "flat")
    ]
    return (*places, *sweep, *caps, *beside)
