"""Schedules, figures, comparisons, disturbance, and the native loops on the processors there are."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatmount.cpu import bench as bench_module
from flatmount.cpu.bench import burst_figure, cell_of, lock_figure, ranked_by_hand_off, run_bench
from flatmount.cpu.burst import BurstRun
from flatmount.cpu.locks import GoneCpu, LockRun, PairRun, jain, run_lock, run_pair
from flatmount.cpu.model import CALIBRATION, burst_s
from flatmount.cpu.noise import QUIET, Disturbance, Watch
from flatmount.cpu.placements import placements
from flatmount.cpu.results import (
    SCHEMA,
    BenchResult,
    Burst,
    Cell,
    Kind,
    Spread,
    compare,
    load_bench,
    modes_of,
    same_machine,
)
from flatmount.cpu.schedule import PREHEAT_MS, LockRunPlan, plan_bench
from flatmount.cpu.topology import read_topology
from flatmount.errors import UsageError
from flatmount.kernel import _native
from flatmount.report.cpu_text import comparison_text
from tests.unit import cpu_samples as samples
from tests.unit.sysfs_trees import NAMES, recorded

CPUS = tuple(sorted(os.sched_getaffinity(0)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget_s", [3.0, 10.0, 60.0, 300.0])
def test_a_plan_fits_its_budget(name: str, budget_s: float) -> None:
    plan = plan_bench(recorded(name), budget_s, bursts=True)
    locks_s = plan.repeats * len(plan.locks) * (plan.run_ms + PREHEAT_MS) / 1e3
    latencies_s = len(plan.latencies) * (plan.run_ms + PREHEAT_MS) / 1e3
    pairs_s = plan.pair_repeats * len(plan.pairs) * 0.008
    assert locks_s + latencies_s + pairs_s + plan.burst_s <= budget_s
    assert plan.repeats >= 3 and any(lock.kind is Kind.TICKET for lock in plan.locks)


def test_a_plan_says_what_it_leaves_out() -> None:
    plan = plan_bench(recorded("r5-metal"), 5.0, bursts=True)
    said = "\n".join(plan.left_out)
    assert "bursts" in said and "locks: " in said and "matrix: " in said
    # All relations stay in a thinned matrix.
    assert {(0, 48), (0, 1)} <= {tuple(sorted(pair)) for pair in plan.pairs}
    assert any(a < 24 <= b < 48 for a, b in plan.pairs)


def test_a_budget_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="too small"):
        plan_bench(recorded("vm"), 1.0, bursts=False)


def test_modes_of_a_wandering_figure() -> None:
    found = Spread.of([25, 26, 25.5, 130, 128, 131])
    assert [mode.value for mode in found.modes] == [25.5, 130]
    assert len(Spread.of([25, 26, 27, 28, 500]).modes) == 1  # one outlier is not a mode


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40))
def test_spreads_hold_their_values(values: list[float]) -> None:
    found = Spread.of(values)
    assert found.low <= found.median <= found.high and found.count == len(values)
    assert 0.99 < sum(mode.share for mode in modes_of(sorted(values))) <= 1.01 or len(found.modes) > 1


@pytest.mark.parametrize("repeats", [3, 4, 5, 6, 7, 9, 21])
def test_ranges_of_the_same_miss_each_other_once_in_a_thousand(repeats: int) -> None:
    rng = random.Random(repeats)
    pairs = [[Spread.of(rng.lognormvariate(0, 0.2) for _ in range(repeats)) for _ in range(2)] for _ in range(4000)]
    missed = sum(not one.overlaps(other) for one, other in pairs)
    assert missed <= 4000 * 0.003
    # Not by being so wide that nothing is told apart: what is twice as dear is seen by seven repeats of such noise.
    twice = [Spread.of(2.5 * rng.lognormvariate(0, 0.2) for _ in range(repeats)) for _ in range(4000)]
    told = sum(not one.overlaps(other) for (one, _), other in zip(pairs, twice, strict=True))
    assert told > 4000 * (0.8 if repeats >= 7 else 0.1)


def test_an_interrupted_batch_of_hundreds_is_not_the_range() -> None:
    found = Spread.of([25.0 + i / 100 for i in range(479)] + [120_000.0])
    assert (found.low, found.high, found.count) == (25.24, 29.55, 480)


def test_an_unfair_lock_has_no_rank_beside_fair_ones() -> None:
    fair = samples.lock(Kind.TICKET, "all", 8, 200.0, 0.97)
    queue = samples.lock(Kind.MCS, "all", 8, 170.0, 0.95)
    unfair = samples.lock(Kind.TAS, "all", 8, 12.0, 0.01)
    assert ranked_by_hand_off([fair, unfair, queue]) == (queue, fair)


def test_hand_offs_and_fairness_are_those_of_the_middle_repeat() -> None:
    plan = LockRunPlan(Kind.TICKET, placements(recorded("vm"))[0], 2)
    runs = [LockRun(ns, share, 1.0, None, (), False) for ns, share in ((9.0, 0.1), (5.0, 0.9), (7.0, 0.5))]
    found = lock_figure(plan, [(run, QUIET) for run in runs], LockRun(8.0, 0.9, 1.0, None, tuple(range(1, 101)), False))
    assert (found.ns.median, found.hand_off, found.p50_ns, found.p99_ns, found.max_ns) == (7.0, 0.5, 51, 100, 100)


@pytest.mark.parametrize(("shares", "index"), [((5, 5), 1.0), ((10, 0), 0.5), ((1, 1, 1, 1), 1.0), ((0, 0), 1.0)])
def test_fairness(shares: tuple[int, ...], index: float) -> None:
    assert jain(shares) == index


def test_a_matrix_whose_home_node_moved_says_so() -> None:
    there = [PairRun((50.0, 51.0), 0, False), PairRun((130.0, 131.0), 1, False)]
    assert cell_of(0, 1, 0, there).moved
    assert not cell_of(0, 1, 0, there[:1]).moved
    assert cell_of(0, 1, 0, [dataclasses.replace(there[0], moved=True)]).moved


def test_results_survive_json(tmp_path: Path) -> None:
    cells = [Cell(0, 24, samples.spread(130), 0, 0)]
    made = dataclasses.replace(samples.two_sockets(), matrix=tuple(cells), left_out=("nothing",))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"schema": SCHEMA, **made.to_json()}))
    assert load_bench(str(path)) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="flatmount.storm/1"), "has the schema"),
        (lambda d: d.pop("locks"), None),
        (lambda d: d.pop("version"), "has no version"),
        (lambda d: d.update(repeats="3"), "repeats is not of the type int"),
        (lambda d: d["topology"].update(cpus=[1]), r"cpus\[0\] is not an object"),
        (lambda d: d["locks"][0].update(kind="futex"), "does not know"),
    ],
)
def test_damaged_results_name_the_field(change: object, message: str | None, tmp_path: Path) -> None:
    assert callable(change)
    data = {"schema": SCHEMA, **samples.two_sockets().to_json()}
    change(data)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data))
    if message is None:
        assert load_bench(str(path)).locks == ()
        return
    with pytest.raises(UsageError, match=message):
        load_bench(str(path))


def test_results_of_different_versions_do_not_compare() -> None:
    one = samples.two_sockets()
    with pytest.raises(UsageError, match=r"versions 0\.0\.1 and"):
        compare(one, dataclasses.replace(one, version="0.0.1"))


def test_overlapping_ranges_are_not_told_apart() -> None:
    vm = recorded("vm")
    first = samples.bench(vm, locks=[samples.lock(Kind.TICKET, "one-l3", 2, 100.0)], bursts=samples.calibrated(2))
    close = samples.bench(vm, locks=[samples.lock(Kind.TICKET, "one-l3", 2, 101.0)], bursts=samples.calibrated(2))
    apart = samples.bench(vm, locks=[samples.lock(Kind.TICKET, "one-l3", 2, 50.0)])
    assert {c.verdict for c in compare(first, close)} == {"same"}
    assert [c.verdict for c in compare(first, apart)] == ["lower"]
    once = dataclasses.replace(apart.locks[0], ns=Spread.of([50.0]))
    assert [c.verdict for c in compare(first, dataclasses.replace(apart, locks=(once,)))] == ["too few repeats"]
    busy = dataclasses.replace(apart.locks[0], disturbed=True)
    assert [c.verdict for c in compare(first, dataclasses.replace(apart, locks=(busy,)))] == ["disturbed"]
    assert [c.verdict for c in compare(dataclasses.replace(apart, locks=(busy,)), apart)] == ["same"]
    assert comparison_text(compare(first, dataclasses.replace(apart, locks=(busy,)))).endswith(
        "0 of 1 figures have ranges that overlap; 1 of the others were disturbed"
    )
    other_machine = dataclasses.replace(close, topology=recorded("genoa"))
    assert not same_machine(first, other_machine)
    assert {c.verdict for c in compare(first, other_machine)} == {"indistinguishable"}


@pytest.mark.parametrize("kind", Kind)
def test_every_lock_makes_progress_and_counts(kind: Kind) -> None:
    found = run_lock(kind, CPUS[:2], 15)
    assert 0 < found.ns < 1e9 and 0 < found.fairness <= 1
    assert (found.hand_off is None) == (kind is Kind.SEQLOCK)
    assert found.hand_off is None or 0 <= found.hand_off <= 1
    assert len(found.samples_ns) == 0
    alone = run_lock(kind, CPUS[:1], 5, sample=True)
    assert len(alone.samples_ns) > 10 and alone.fairness == 1.0
    assert alone.hand_off in (None, 0.0)


@pytest.mark.skipif(len(CPUS) < 2, reason="two processors are needed for a hand-off")
def test_a_fair_lock_changes_hands_and_an_unfair_one_does_not() -> None:
    fair = max(run_lock(Kind.TICKET, CPUS[:2], 40).hand_off or 0 for _ in range(3))
    unfair = min(run_lock(Kind.TAS, CPUS[:2], 40).hand_off or 0 for _ in range(3))
    assert fair > 0.5 and fair > unfair


@pytest.mark.parametrize("kind", Kind)
def test_a_lock_excludes(kind: Kind) -> None:
    # Whoever is in adds one to a plain number: two at once would lose one of them.
    threads, lost = _native.contend_for_lock(kind.number, CPUS[:2], 1_000_000, 20_000_000, 0)
    assert len(threads) == len(CPUS[:2]) and lost == 0


def test_a_processor_that_is_not_there_is_named() -> None:
    with pytest.raises(GoneCpu, match="1000"):
        run_lock(Kind.TICKET, (CPUS[0], 1000), 5)
    with pytest.raises(GoneCpu):
        run_pair(CPUS[0], 1000, CPUS[0])


@pytest.mark.parametrize("arguments", [(99, (0,)), (0, ()), (0, (-1,)), (0, (5000,))])
def test_calls_that_make_no_sense_are_refused(arguments: tuple[int, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError):
        _native.contend_for_lock(*arguments, 0, 1000, 0)


def test_pairs_that_make_no_sense_are_refused() -> None:
    for a, b, batches, rounds in ((0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1000, 10**6), (-1, 1, 1, 1)):
        with pytest.raises(ValueError):
            _native.ping_pong(a, b, 0, batches, rounds, 10**9)


@pytest.mark.skipif(len(CPUS) < 2, reason="two processors are needed for a pair")
def test_a_pair_gives_up_at_its_limit() -> None:
    batches, _, _ = _native.ping_pong(CPUS[0], CPUS[1], CPUS[0], 1000, 10_000, 50_000_000)
    assert len(batches) < 1000


@pytest.mark.skipif(len(CPUS) < 2, reason="two processors are needed for a pair")
def test_a_pair_tells_latency_and_home() -> None:
    found = run_pair(CPUS[0], CPUS[1], CPUS[1])
    assert len(found.batches_ns) == 24 and min(found.batches_ns) > 1
    assert found.node >= -1


def test_disturbance_adds_up_and_is_named() -> None:
    short = Disturbance(0.05, 2, 0.0, 0.05)
    assert not short.disturbed  # below the clock's resolution
    long = sum((short for _ in range(9)), short)
    assert long.disturbed and "other processes used 50%" in long.line()
    assert Disturbance(10, 2, 0.5, 0).line().startswith("disturbed: the hypervisor took")
    assert samples.QUIET.line() == ""


def test_a_busy_neighbour_is_noticed() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with Watch() as watch:
            run_lock(Kind.TICKET, CPUS[:1], 600)
    finally:
        busy.kill()
        busy.wait()
    assert watch.disturbance.others_s > 0.1
    assert watch.disturbance.disturbed


def test_a_whole_bench_without_privilege(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_bench(3.0, bursts=False)
    assert result.bursts == () and result.budget_s == 3.0
    assert result.topology == read_topology()
    assert {f.kind for f in result.locks} >= {Kind.TICKET}
    assert (
        len(result.matrix) == (len(result.topology.allowed) * (len(result.topology.allowed) - 1)) // 2
        or result.left_out
    )
    assert isinstance(result, BenchResult)


def test_a_processor_that_goes_offline_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(kind: Kind, cpus: tuple[int, ...], *args: object, **kwargs: object) -> LockRun:
        if len(cpus) > 1:
            raise GoneCpu(f"one of the processors {cpus} is offline or not allowed")
        return run_lock(kind, cpus, 1)

    monkeypatch.setattr(bench_module, "run_lock", gone)
    result = run_bench(3.0, bursts=False)
    assert {f.threads for f in result.locks} == {1}
    if len(CPUS) > 1:
        assert any("is offline" in line for line in result.left_out)


class _Clockwork:
    """A stage whose bursts take as long as a model says, on a clock of its own."""

    def __init__(self, lock_s: float = 0.1) -> None:
        self.now_s = 0.0
        self.lock_s = lock_s
        self.done: list[tuple[float, str]] = []

    def drive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_module, "time", self)
        monkeypatch.setattr(bench_module, "run_lock", self.lock)
        monkeypatch.setattr(bench_module, "run_pair", self.pair)
        monkeypatch.setattr(bench_module, "stage", lambda _: nullcontext(self))
        monkeypatch.setattr(bench_module, "read_topology", lambda: recorded("vm"))
        monkeypatch.setattr(bench_module, "apart", lambda work: work())

    def monotonic(self) -> float:
        return self.now_s

    def note(self, what: str, seconds: float) -> None:
        self.done.append((self.now_s, what))
        self.now_s += seconds

    def run(self, burst: Burst) -> BurstRun:
        wall_s = burst_s(samples.COSTS, burst, cpus=2, before=samples.BEFORE)
        self.note(str(burst), wall_s + 0.1)
        return BurstRun(burst, wall_s, (wall_s,) * burst.containers, 1, 20, 20, samples.QUIET, False, 0.0)

    def lock(self, *_: object, **__: object) -> LockRun:
        self.note("lock", self.lock_s)
        return LockRun(9.0, 0.9, 1.0, None, (1,), False)

    def pair(self, *_: object, **__: object) -> PairRun:
        self.note("pair", 0.008)
        return PairRun((50.0,), 0, False)


@pytest.mark.parametrize("budget_s", [30.0, 60.0, 300.0])
def test_repeats_of_everything_are_spread_over_the_time(budget_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clockwork()
    clock.drive(monkeypatch)
    result = run_bench(budget_s)
    assert result.took_s <= budget_s * 1.02
    times: dict[str, list[float]] = {}
    for when, what in clock.done:
        times.setdefault(what, []).append(when)
    for what, at in times.items():
        assert len(at) >= 3, what
        assert "beside" in what or at[-1] - at[0] > 0.5 * result.took_s, what
    assert {str(b) for b in CALIBRATION} < set(times) and len(times["per-layer C=5 L=50"]) >= 5
    assert all(f.wall_s.count >= 3 and not f.disturbed for f in result.bursts)


def test_rounds_that_are_given_up_leave_the_model_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clockwork(lock_s=1.0)
    clock.drive(monkeypatch)
    result = run_bench(60.0)
    assert 3 <= result.repeats < 9 and any("repeats, it took too long" in line for line in result.left_out)
    found = {f.burst: f.wall_s.count for f in result.bursts}
    assert all(found[burst] >= 3 for burst in CALIBRATION)


def test_a_lock_that_others_ran_beside_is_disturbed_unless_enough_was_quiet() -> None:
    plan = LockRunPlan(Kind.TICKET, placements(recorded("vm"))[0], 2)
    quiet = (LockRun(5.0, 0.9, 1.0, None, (), False), Disturbance(0.11, 2, 0.0, 0.012))
    busy, stolen = (
        (LockRun(50.0, 0.9, 1.0, None, (), False), beside)
        for beside in (Disturbance(0.11, 2, 0.0, 0.05), Disturbance(0.11, 2, 0.02, 0.0))
    )
    kept = lock_figure(plan, [quiet] * 5 + [busy, stolen], None)
    assert (kept.disturbed, kept.ns.high, kept.ns.count) == (False, 5.0, 5)
    for other in (busy, stolen):
        mixed = lock_figure(plan, [quiet] * 4 + [other] * 5, None)
        assert (mixed.disturbed, mixed.ns.high, mixed.ns.count) == (True, 50.0, 9)


def test_a_burst_that_never_had_a_quiet_moment_is_disturbed() -> None:
    run = _Clockwork().run(Burst("flat", 5, 5))
    crowded = dataclasses.replace(run, crowded=True, wall_s=9.0)
    assert not burst_figure([run] * 5 + [crowded] * 4).disturbed
    assert burst_figure([run] * 5 + [crowded] * 4).wall_s.high == run.wall_s
    assert burst_figure([run] * 4 + [crowded] * 5).disturbed
    assert burst_figure([run] * 3).disturbed is False and burst_figure([run, run, crowded]).disturbed


def test_bursts_in_words() -> None:
    everything = Burst("flat", 5, 9, 2, admit=3, background=100, template=True, one_range=True)
    assert str(everything) == "flat C=5 L=9 2 copies of a template admit 3 beside 100 mounts one range"
