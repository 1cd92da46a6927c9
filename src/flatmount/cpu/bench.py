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
from flatmount.cpu.noise import OTHERS_SHARE, Disturbance, Watch
from flatmount.cpu.placements import Placement
from flatmount.cpu.results import LEAST_REPEATS, BenchResult, Burst, BurstFigure, Cell, Kind, LockFigure, Spread
from flatmount.cpu.schedule import PREHEAT_MS, BenchPlan, LockRunPlan, burst_order, plan_bench
from flatmount.cpu.topology import Topology, read_topology
from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel import _native
from flatmount.kernel.namespaces import apart

Progress = Callable[[str], None]
BurstRuns = dict[tuple[Burst, str], list[BurstRun]]
Job = tuple[Burst, Placement | None]

_MOST_LAYERS = 100
# A burst that takes at least so long is repeated so often; repeats are spread over all rounds.
_REPEATS = ((1.0, LEAST_REPEATS), (0.3, 5), (0.0, 7))
_TICKS_S = 0.015
_BESIDE_REPEATS = 5
_ENOUGH = 5  # quiet repeats, for a range of their own
_SHARE_BESIDE = 0.15
_SHARE_SPARE = 0.05  # a round is not begun that would end in it


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
    rounds = _Rounds(plan, started + budget_s, progress)
    with Watch() as watch:
        if plan.burst_s:
            try:
                apart(lambda: _on_stage(rounds))
            except MissingFeature as refusal:
                rounds.left_out.append(f"bursts: {refusal}")
        rounds.run(None)
    return BenchResult(
        version=VERSION,
        topology=topology,
        placements=plan.placements,
        pause_ns=round(_native.pause_ns(), 2),
        budget_s=budget_s,
        took_s=round(time.monotonic() - started, 2),
        repeats=rounds.repeats,
        load_before=round(load, 2),
        disturbance=watch.disturbance,
        locks=rounds.lock_figures(),
        matrix=rounds.cells(),
        bursts=rounds.burst_figures(),
        left_out=(*rounds.left_out, *_offline_since(topology)),
    )


def _on_stage(rounds: _Rounds) -> None:
    with stage(_MOST_LAYERS) as bench:
        rounds.run(bench)


def _offline_since(topology: Topology) -> Iterable[str]:
    gone = {cpu.number for cpu in topology.cpus} - {cpu.number for cpu in read_topology().cpus}
    if gone:
        yield f"processors {sorted(gone)} went offline meanwhile"


class _Rounds:
    """Rounds over everything: each lock, a share of the core-to-core repeats, and the bursts that are due. A range then
    holds what the machine drifted over the whole time, whatever it is a range of."""

    def __init__(self, plan: BenchPlan, deadline: float, progress: Progress) -> None:
        self.left_out = list(plan.left_out)
        self.repeats = 0
        self._plan = plan
        self._deadline = deadline
        self._progress = progress
        self._left = iter(range(plan.repeats))
        self._locks: dict[LockRunPlan, list[tuple[LockRun, Disturbance]]] = {lock: [] for lock in plan.locks}
        self._sampled: dict[LockRunPlan, LockRun] = {}
        self._pairs: dict[tuple[int, int], list[PairRun]] = {pair: [] for pair in plan.pairs}
        self._bursts: BurstRuns = {}

    def run(self, bench: Stage | None) -> None:
        """Run the rounds that are left, with bursts where there is a stage for them; without any left, nothing.

        A busy machine takes longer than planned: what is late ends after a round, and not before the third.
        """
        budget_s = self._plan.budget_s
        end = self._deadline - budget_s * (_SHARE_SPARE + (_SHARE_BESIDE if bench else 0.0))
        bursts = _Bursts(bench, self._plan, end, self._bursts, self._progress) if bench else None
        others_s = 0.0
        for repeat in self._left:
            began = time.monotonic()
            if repeat >= LEAST_REPEATS and began + others_s > end:
                self.left_out.append(f"{self._plan.repeats - repeat} of {self._plan.repeats} repeats, it took too long")
                break
            self._progress(f"round {repeat + 1} of {self._plan.repeats}")
            self._run_locks()
            self._run_pairs(repeat)
            others_s = time.monotonic() - began
            if bursts:
                bursts.round(repeat, others_s)
            self.repeats = repeat + 1
        self._left = iter(())
        if not self._sampled:
            self._run_latencies()
        if bursts:
            bursts.make_up()
            bursts.beside(self._deadline)
            self.left_out += bursts.left_out()

    def _run_locks(self) -> None:
        for lock in self._plan.locks:
            try:
                with Watch(kernel_threads=False) as watch:
                    run = run_lock(lock.kind, lock.cpus, self._plan.run_ms, preheat_ms=PREHEAT_MS)
            except GoneCpu as gone:
                self._once(f"{lock.kind.value} at {lock.placement.name}: {gone}")
                continue
            self._locks[lock].append((run, watch.disturbance))

    def _run_latencies(self) -> None:
        self._progress("latencies")
        for lock in self._plan.latencies:
            try:
                self._sampled[lock] = run_lock(
                    lock.kind, lock.cpus, self._plan.run_ms, preheat_ms=PREHEAT_MS, sample=True
                )
            except GoneCpu as gone:
                self._once(f"{lock.kind.value} at {lock.placement.name}: {gone}")

    def _run_pairs(self, repeat: int) -> None:
        """So many repeats of the matrix that all are done with the last round."""
        plan = self._plan
        due = (repeat + 1) * plan.pair_repeats // plan.repeats - repeat * plan.pair_repeats // plan.repeats
        for _ in range(due):
            for a, b in plan.pairs:
                try:
                    self._pairs[a, b].append(run_pair(a, b, home=a))
                except GoneCpu as gone:
                    self._once(f"core to core {a} and {b}: {gone}")

    def _once(self, line: str) -> None:
        if line not in self.left_out:
            self.left_out.append(line)

    def lock_figures(self) -> tuple[LockFigure, ...]:
        return tuple(lock_figure(lock, found, self._sampled.get(lock)) for lock, found in self._locks.items() if found)

    def cells(self) -> tuple[Cell, ...]:
        cells = []
        for (a, b), found in self._pairs.items():
            if any(run.batches_ns for run in found):
                cells.append(cell_of(a, b, a, found))
            elif found:
                self._once(f"core to core {a} and {b}: no batch was done in time")
        return tuple(cells)

    def burst_figures(self) -> tuple[BurstFigure, ...]:
        return tuple(burst_figure(found, placement) for (_, placement), found in self._bursts.items())


def lock_figure(lock: LockRunPlan, found: Sequence[tuple[LockRun, Disturbance]], sampled: LockRun | None) -> LockFigure:
    """One figure from its repeats, the quiet ones if they make a range; fractions are the middle one's."""
    quiet = [run for run, beside in found if _nobody_else(beside)]
    enough = len(quiet) >= min(len(found), _ENOUGH)
    runs = quiet if enough else [run for run, _ in found]
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
        disturbed=not enough,
    )


def _nobody_else(beside: Disturbance) -> bool:
    """Of a short run, whose processor time is counted in ticks of 10 ms, no more than one of which may be wrong."""
    return beside.stolen_s < _TICKS_S and beside.others_s < _TICKS_S + OTHERS_SHARE * beside.seconds * beside.cpus


def _quantile(ordered: Sequence[int], share: float) -> float | None:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) if ordered else None


def cell_of(a: int, b: int, home: int, runs: Sequence[PairRun]) -> Cell:
    """One cell from its repeats. A page whose node changed between them was moved: the cell has two homes then."""
    nodes = {run.node for run in runs}
    batches = Spread.of(round(ns, 2) for run in runs for ns in run.batches_ns)
    return Cell(a, b, batches, home, runs[0].node, len(nodes) > 1 or any(run.moved for run in runs))


class _Bursts:
    """The bursts of a bench: those of the model, and of the others as many as fit, in the order of their worth.

    What is chosen is repeated at least `LEAST_REPEATS` times: a single run has no range, and of two such ranges of
    three every tenth pair misses each other with nothing changed.
    """

    def __init__(self, bench: Stage, plan: BenchPlan, end: float, runs: BurstRuns, progress: Progress) -> None:
        self._bench = bench
        self._rounds = plan.repeats
        self._order = burst_order(plan.placements)
        self._end = end
        self._runs = runs
        self._progress = progress
        self._taken: dict[Job, float] = {}

    def round(self, repeat: int, others_s: float) -> None:
        """One round, the first of which chooses; `others_s` is what the rest of a round takes."""
        if repeat == 0:
            self._choose(self._end - time.monotonic() - others_s * (self._rounds - 1))
            return
        for job in self._taken:
            if self._due(job, repeat) and self._in_time(job):
                self._run(job)

    def make_up(self) -> None:
        """What rounds that were given up would have repeated: the model's bursts in any case, others while there is
        time."""
        for job in self._taken:
            while len(self._runs[key_of(*job)]) < LEAST_REPEATS and self._in_time(job):
                self._run(job)

    def _in_time(self, job: Job) -> bool:
        return job[0] in CALIBRATION or time.monotonic() + self._expected_s(job) < self._end

    def beside(self, deadline: float) -> None:
        """Bursts beside other mounts, which can only get more: one after the other."""
        for job in (job for job in self._order if job[0].background):
            if time.monotonic() + self._expected_s(job) * _BESIDE_REPEATS < deadline:
                for _ in range(_BESIDE_REPEATS):
                    self._run(job)

    def left_out(self) -> Iterable[str]:
        skipped = sum(job not in self._taken for job in self._order)
        if skipped:
            yield f"bursts: {skipped} of {len(self._order)} combinations beyond the model's"

    def _choose(self, seconds: float) -> None:
        everyone: list[Job] = [*((burst, None) for burst in CALIBRATION)]
        everyone += [job for job in self._order if not job[0].background]
        spent_s = 0.0
        for job in dict.fromkeys(everyone):
            if job[0] in CALIBRATION or spent_s + self._all_repeats_s(job) < seconds:
                self._run(job)
                spent_s += self._all_repeats_s(job)

    def _all_repeats_s(self, job: Job) -> float:
        return self._expected_s(job) * self._repeats(job)

    def _repeats(self, job: Job) -> int:
        expected_s = self._expected_s(job)
        return min(self._rounds, next(n for least_s, n in _REPEATS if expected_s >= least_s))

    def _due(self, job: Job, repeat: int) -> bool:
        repeats = self._repeats(job)
        return repeat * repeats // self._rounds > (repeat - 1) * repeats // self._rounds

    def _run(self, job: Job) -> None:
        self._progress(f"burst {job[0]}")
        began = time.monotonic()
        run_at(self._bench, *job, self._runs)
        # The first run of its kind tells how it is repeated: one that was late by chance shall not change it.
        self._taken.setdefault(job, time.monotonic() - began)

    def _expected_s(self, job: Job) -> float:
        """A burst that was not run yet takes no longer than a larger one of its strategy, and than the nearest smaller
        one as if it grew with the square of containers times layers."""
        if job in self._taken:
            return self._taken[job]
        kin = [(of, s) for of, s in self._taken.items() if of[0].strategy == job[0].strategy]
        larger = [s for of, s in kin if _size(of) >= _size(job) and of[0].copies >= job[0].copies]
        if larger:
            return min(larger)
        nearest = max(kin, key=lambda one: (one[0][0].copies >= job[0].copies, _size(one[0])), default=None)
        if nearest is None:
            return 0.05
        of, seconds = nearest
        wall_s = self._runs[key_of(*of)][0].wall_s
        growth = max(1.0, _size(job) / _size(of))
        return (seconds - wall_s) * growth + wall_s * growth**2


def _size(job: Job) -> int:
    return job[0].containers * job[0].layers


def key_of(burst: Burst, placement: Placement | None) -> tuple[Burst, str]:
    """Under which a burst's runs are kept: "" for all processors."""
    return burst, placement.name if placement else ""


def run_at(bench: Stage, burst: Burst, placement: Placement | None, runs: BurstRuns) -> None:
    """Run a burst on a placement's processors (None: on all) and add it to `runs`."""
    before = os.sched_getaffinity(0)
    if placement is not None:
        os.sched_setaffinity(0, placement.cpus)
    try:
        found = bench.run(burst)
    finally:
        os.sched_setaffinity(0, before)
    runs.setdefault(key_of(burst, placement), []).append(found)


def burst_figure(runs: Sequence[BurstRun], placement: str = "") -> BurstFigure:
    """One figure from its repeats: the quiet ones, if they make a range; else it is disturbed.

    Raises: FlatmountError for none.
    """
    if not runs:
        raise FlatmountError("a burst without a run")
    quiet = [run for run in runs if run.quiet]
    disturbed = len(quiet) < min(len(runs), _ENOUGH)
    runs = runs if disturbed else quiet
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
        disturbed,
    )


def ranked_by_hand_off(locks: Iterable[LockFigure]) -> tuple[LockFigure, ...]:
    """Figures that show what a hand-off costs, cheapest first. One that hides its hand-offs has no rank."""
    return tuple(
        sorted((f for f in locks if f.shows_transfer and f.kind is not Kind.RWLOCK), key=lambda f: f.ns.median)
    )
