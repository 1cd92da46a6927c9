"""Running a bench: locks, latencies, the core-to-core matrix and bursts, repeats interleaved, within a budget."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from flatmount._version import VERSION
from flatmount.cpu.burst import Bench as Stage
from flatmount.cpu.burst import BurstRun, stage
from flatmount.cpu.locks import GoneCpu, LockRun, PairRun, run_lock, run_pair
from flatmount.cpu.model import CALIBRATION
from flatmount.cpu.noise import Watch
from flatmount.cpu.placements import Placement
from flatmount.cpu.results import BenchResult, Burst, BurstFigure, Cell, Kind, LockFigure, Spread
from flatmount.cpu.schedule import PREHEAT_MS, BenchPlan, LockRunPlan, burst_order, plan_bench
from flatmount.cpu.topology import Topology, read_topology
from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel import _native
from flatmount.kernel.namespaces import apart

Progress = Callable[[str], None]
BurstRuns = dict[tuple[Burst, str], list[BurstRun]]
Job = tuple[Burst, Placement | None]

_MOST_LAYERS = 100
_ENOUGH = 3
_CALIBRATION_REPEATS = 3
_SHARE_BESIDE = 0.15
# Of the budget, for what comes after the locks, with bursts and without.
_LEFT_FOR_LATER, _LEFT_FOR_MATRIX = 0.5, 0.2


def run_bench(budget_s: float, *, bursts: bool = True, progress: Progress = lambda _: None) -> BenchResult:
    """Measure this machine within about `budget_s` seconds.

    Pins threads to the processors this process may use, and (with `bursts`) mounts in a namespace of its own; nothing
    is left. What cannot be measured is left out and named in the result.
    Raises: UsageError for a budget too small.
    """
    started = time.monotonic()
    topology = read_topology()
    plan = plan_bench(topology, budget_s, bursts=bursts)
    load = os.getloadavg()[0]
    left_out = list(plan.left_out)
    with Watch() as watch:
        # A busy machine takes longer than planned: what is late ends after the round that has begun.
        for_later = _LEFT_FOR_LATER if plan.burst_s else _LEFT_FOR_MATRIX
        repeats, locks = _locks(plan, started + budget_s * (1 - for_later), left_out, progress)
        matrix = _matrix(plan, left_out, progress)
        figures: tuple[BurstFigure, ...] = ()
        if plan.burst_s:
            deadline = started + budget_s
            try:
                figures = apart(lambda: _bursts(plan, deadline, left_out, progress))
            except MissingFeature as refusal:
                left_out.append(f"bursts: {refusal}")
    return BenchResult(
        version=VERSION,
        topology=topology,
        placements=plan.placements,
        pause_ns=round(_native.pause_ns(), 2),
        budget_s=budget_s,
        took_s=round(time.monotonic() - started, 2),
        repeats=repeats,
        load_before=round(load, 2),
        disturbance=watch.disturbance,
        locks=locks,
        matrix=matrix,
        bursts=figures,
        left_out=(*left_out, *_offline_since(topology)),
    )


def _offline_since(topology: Topology) -> Iterable[str]:
    gone = {cpu.number for cpu in topology.cpus} - {cpu.number for cpu in read_topology().cpus}
    if gone:
        yield f"processors {sorted(gone)} went offline meanwhile"


def _locks(
    plan: BenchPlan, deadline: float, left_out: list[str], progress: Progress
) -> tuple[int, tuple[LockFigure, ...]]:
    """How often each lock was run, and the figures."""
    runs: dict[LockRunPlan, list[LockRun]] = {lock: [] for lock in plan.locks}
    sampled: dict[LockRunPlan, LockRun] = {}
    for repeat in range(plan.repeats):
        progress(f"locks, round {repeat + 1} of {plan.repeats}")
        for lock in plan.locks:
            try:
                runs[lock].append(run_lock(lock.kind, lock.cpus, plan.run_ms, preheat_ms=PREHEAT_MS))
            except GoneCpu as gone:
                _once(left_out, f"{lock.kind.value} at {lock.placement.name}: {gone}")
        if time.monotonic() > deadline and repeat + 1 < plan.repeats:
            left_out.append(f"locks: {plan.repeats - repeat - 1} of {plan.repeats} repeats, it took too long")
            break
    progress("latencies")
    for lock in plan.latencies:
        try:
            sampled[lock] = run_lock(lock.kind, lock.cpus, plan.run_ms, preheat_ms=PREHEAT_MS, sample=True)
        except GoneCpu as gone:
            _once(left_out, f"{lock.kind.value} at {lock.placement.name}: {gone}")
    figures = tuple(lock_figure(lock, found, sampled.get(lock)) for lock, found in runs.items() if found)
    return max(map(len, runs.values()), default=0), figures


def _once(left_out: list[str], line: str) -> None:
    if line not in left_out:
        left_out.append(line)


def lock_figure(lock: LockRunPlan, runs: Sequence[LockRun], sampled: LockRun | None) -> LockFigure:
    """One figure from its repeats; fractions are those of the repeat in the middle."""
    middle = sorted(runs, key=lambda run: run.ns)[len(runs) // 2]
    samples = sampled.samples_ns if sampled else ()
    return LockFigure(
        lock.kind,
        lock.placement.name,
        lock.threads,
        Spread.of(round(run.ns, 3) for run in runs),
        middle.hand_off,
        middle.fairness,
        middle.retries,
        p50_ns=_quantile(samples, 0.50),
        p99_ns=_quantile(samples, 0.99),
        max_ns=_quantile(samples, 1.0),
        moved=any(run.moved for run in runs),
    )


def _quantile(ordered: Sequence[int], share: float) -> float | None:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) if ordered else None


def _matrix(plan: BenchPlan, left_out: list[str], progress: Progress) -> tuple[Cell, ...]:
    runs: dict[tuple[int, int], list[PairRun]] = {pair: [] for pair in plan.pairs}
    for repeat in range(plan.pair_repeats):
        progress(f"core to core, round {repeat + 1} of {plan.pair_repeats}")
        for a, b in plan.pairs:
            try:
                runs[a, b].append(run_pair(a, b, home=a))
            except GoneCpu as gone:
                _once(left_out, f"core to core {a} and {b}: {gone}")
    cells = []
    for (a, b), found in runs.items():
        batches = [ns for run in found for ns in run.batches_ns]
        if batches:
            cells.append(cell_of(a, b, a, found))
        elif found:
            left_out.append(f"core to core {a} and {b}: no batch was done in time")
    return tuple(cells)


def cell_of(a: int, b: int, home: int, runs: Sequence[PairRun]) -> Cell:
    """One cell from its repeats. A page whose node changed between them was moved: the cell has two homes then."""
    nodes = {run.node for run in runs}
    batches = Spread.of(round(ns, 2) for run in runs for ns in run.batches_ns)
    return Cell(a, b, batches, home, runs[0].node, len(nodes) > 1 or any(run.moved for run in runs))


def _bursts(plan: BenchPlan, deadline: float, left_out: list[str], progress: Progress) -> tuple[BurstFigure, ...]:
    """The model's bursts and, in rounds over all that fit a round, the others: a range then holds what the machine
    drifted meanwhile. What did not fit comes in rounds of its own while there is time, and bursts beside other mounts,
    which can only get more, one after the other at the end."""
    order = burst_order(plan.placements)
    everyone: list[Job] = [*((burst, None) for burst in CALIBRATION), *(job for job in order if not job[0].background)]
    began = time.monotonic()
    for_rounds_s = (deadline - began) * (1 - _SHARE_BESIDE)
    with stage(_MOST_LAYERS) as bench:
        runner = _Runner(bench, progress)
        chosen: list[Job] = []
        for job in dict.fromkeys(everyone):
            if job[0] in CALIBRATION or runner.ends(job) < began + for_rounds_s / _CALIBRATION_REPEATS:
                runner.run(job)
                chosen.append(job)
        for _ in range(_CALIBRATION_REPEATS - 1):
            for job in chosen:
                if runner.ends(job) < began + for_rounds_s:
                    runner.run(job)
        later = [job for job in order if job not in runner.taken and not job[0].background]
        for _ in range(_CALIBRATION_REPEATS):
            for job in later:
                if runner.ends(job) < began + for_rounds_s:
                    runner.run(job)
        for job in order:
            for _ in range(_CALIBRATION_REPEATS if job[0].background else 0):
                if runner.ends(job) < deadline:
                    runner.run(job)
    skipped = sum(job not in runner.taken for job in order)
    if skipped:
        left_out.append(f"bursts: {skipped} of {len(order)} combinations beyond the model's")
    return tuple(burst_figure(found, placement) for (_, placement), found in runner.runs.items())


class _Runner:
    """Runs bursts and guesses, from the seconds that were `taken`, when one would be over."""

    def __init__(self, bench: Stage, progress: Progress) -> None:
        self._bench = bench
        self._progress = progress
        self.runs: BurstRuns = {}
        self.taken: dict[Job, float] = {}

    def run(self, job: Job) -> None:
        self._progress(f"burst {job[0]}")
        began = time.monotonic()
        run_at(self._bench, *job, self.runs)
        self.taken[job] = time.monotonic() - began

    def ends(self, job: Job) -> float:
        """A burst that was not run yet takes as long as the last of its strategy, and four times as long where it has
        twice the containers."""
        known = self.taken.get(job)
        if known is None:
            kin = [(of, s) for of, s in self.taken.items() if of[0].strategy == job[0].strategy]
            size = job[0].containers * job[0].layers
            known = max(
                (s * max(1.0, size / (of[0].containers * of[0].layers)) ** 2 for of, s in kin[-1:]), default=0.05
            )
        return time.monotonic() + known


def run_at(bench: Stage, burst: Burst, placement: Placement | None, runs: BurstRuns) -> None:
    """Run a burst on a placement's processors (None: on all) and add it to `runs`."""
    before = os.sched_getaffinity(0)
    if placement is not None:
        os.sched_setaffinity(0, placement.cpus)
    try:
        found = bench.run(burst)
    finally:
        os.sched_setaffinity(0, before)
    runs.setdefault((burst, placement.name if placement else ""), []).append(found)


def burst_figure(runs: Sequence[BurstRun], placement: str = "") -> BurstFigure:
    """One figure from its repeats: the quiet ones, if they make a range. Raises: FlatmountError for none."""
    if not runs:
        raise FlatmountError("a burst without a run")
    quiet = [run for run in runs if run.quiet]
    runs = quiet if len(quiet) >= _ENOUGH else runs
    middle = sorted(runs, key=lambda run: run.wall_s)[len(runs) // 2]
    return BurstFigure(
        middle.burst,
        Spread.of(run.wall_s for run in runs),
        middle.latencies_s[len(middle.latencies_s) // 2],
        middle.latencies_s[0],
        middle.mount_operations,
        middle.mounts_before,
        placement,
        statistics.median(run.woken_s for run in runs),
    )


def ranked_by_hand_off(locks: Iterable[LockFigure]) -> tuple[LockFigure, ...]:
    """Figures that show what a hand-off costs, cheapest first. One that hides its hand-offs has no rank."""
    return tuple(
        sorted((f for f in locks if f.shows_transfer and f.kind is not Kind.RWLOCK), key=lambda f: f.ns.median)
    )
