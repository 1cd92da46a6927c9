"""The chain, the simulation, the fit and its limits."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmount.cpu.chain import throughput
from flatmount.cpu.least_squares import fit as least_squares
from flatmount.cpu.least_squares import line, solve
from flatmount.cpu.model import (
    CALIBRATION,
    COLD,
    Shape,
    Source,
    burst_s,
    fit,
    fit_costs,
    live_mounts,
    transfers_of,
    usable_for_slope,
    walk_s,
    work_of,
)
from flatmount.cpu.results import Burst, Kind
from flatmount.cpu.simulation import simulate_burst, simulate_lock
from flatmount.cpu.topology import read_topology
from flatmount.cpu.validate import CORNERS, HELD_OUT, STRATEGIES
from flatmount.errors import UsageError
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import Parameter, Unmount
from flatmount.strategies import STRATEGIES as PLANS
from flatmount.strategies import RootfsSpec, Upper
from tests.unit import cpu_samples as samples
from tests.unit.sysfs_trees import grow, recorded


@pytest.mark.parametrize("threads", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("parallel_s", [1e-6, 1e-5])
def test_the_chain_agrees_with_its_simulation(threads: int, parallel_s: float) -> None:
    def section_s(k: int) -> float:
        return 4e-7 * (1 + 0.05 * (k - 1))

    formula = throughput(threads, parallel_s, section_s)
    assert formula == pytest.approx(simulate_lock(threads, parallel_s, section_s, 40_000), rel=0.03)


def test_the_chain_at_its_ends() -> None:
    assert throughput(1, 3e-6, lambda k: 1e-6) == pytest.approx(1 / 4e-6)
    assert throughput(64, 0.0, lambda k: 2e-6) == pytest.approx(1 / 2e-6)
    assert throughput(500, 1e-9, lambda k: 1e-6) == pytest.approx(1e6, rel=1e-6)


def test_throughput_has_a_peak_where_waiting_makes_sections_dearer() -> None:
    rates = {n: throughput(n, 1e-5, lambda k: 1e-6 * (1 + 0.2 * (k - 1))) for n in range(1, 65)}
    assert 2 < max(rates, key=lambda n: rates[n]) < 20
    assert rates[64] < max(rates.values()) / 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("containers", [50, 100, 200])
@pytest.mark.parametrize("copies", [0, 2])
def test_the_formula_agrees_with_the_simulated_burst(strategy: str, containers: int, copies: int) -> None:
    what = Burst(strategy, containers, 20, copies)
    rounds = 8 if strategy == "per-layer" else 60
    times = [simulate_burst(samples.COSTS, what, cpus=2, before=samples.BEFORE, seed=i) for i in range(rounds)]
    formula = burst_s(samples.COSTS, what, cpus=2, before=samples.BEFORE)
    # The formula's own 3 %, and three standard errors of what it is held against.
    least = 3 * statistics.stdev(times) / rounds**0.5
    assert formula == pytest.approx(statistics.mean(times), abs=0.03 * formula + least)


def facts() -> HostFacts:
    return HostFacts(**{field.name: True for field in dataclasses.fields(HostFacts)})


@pytest.mark.parametrize("strategy", ["per-layer", "common-parent", "detached", "flat"])
@pytest.mark.parametrize("layers", [1, 10, 100])
def test_the_work_of_a_container_is_that_of_its_plan(strategy: str, layers: int) -> None:
    spec = RootfsSpec(tuple(f"layers/{i}/fs" for i in range(layers)), flat="flat/fs", upper=Upper.STORE)
    assert work_of(strategy, layers).operations == PLANS[strategy](spec, facts()).mount_operations


@pytest.mark.parametrize("strategy", ["per-layer", "common-parent", "detached", "flat"])
@pytest.mark.parametrize("layers", [2, 10, 100])
def test_grace_periods_are_those_of_what_the_plan_takes_off(strategy: str, layers: int) -> None:
    spec = RootfsSpec(tuple(f"layers/{i}/fs" for i in range(layers)), flat="flat/fs", upper=Upper.STORE)
    off = [op for op in PLANS[strategy](spec, facts()).operations if isinstance(op, Unmount) and not op.expect_gone]
    # An overlay's superblock and the clones of its lowers wait once more.
    overlays = [op for op in off if op.target == (Parameter.SCRATCH, "-look")]
    assert len(overlays) == work_of(strategy, layers).passes - 1
    assert work_of(strategy, layers).waits == len(off) + len(overlays)


def test_grace_periods_cost_where_no_processor_is_idle() -> None:
    def waited_s(containers: int, *, admit: int | None = None, cpus: int = 2) -> float:
        what = Burst("per-layer", containers, 20, admit=admit)
        times = [
            burst_s(samples.COSTS, what, cpus=cpus, before=samples.BEFORE, woken_s=woken_s) for woken_s in (0, 5e-5)
        ]
        return (times[1] - times[0]) / 5e-5 - 1  # one wake-up is the first thread's

    once = work_of("per-layer", 20).waits
    assert waited_s(1) == pytest.approx(0, abs=1e-6)
    assert (waited_s(2), waited_s(100)) == pytest.approx((once, once))
    assert waited_s(100, cpus=128) == pytest.approx(0, abs=1e-6)
    # Those of a group wait together, one group after the other.
    assert waited_s(100, admit=10) == pytest.approx(10 * once)


def test_work_gets_dearer_with_what_leaves_the_cache_and_has_an_end() -> None:
    def each_s(containers: int) -> float:
        return burst_s(samples.COSTS, Burst("flat", containers, 20), cpus=2, before=samples.BEFORE) / containers

    assert 1.2 < each_s(200) / each_s(20) < 1 + COLD
    assert each_s(10**9) / each_s(10**7) == pytest.approx(1, rel=1e-4)
    assert walk_s(samples.COSTS, 8000) / walk_s(samples.COSTS, 100) > 80 * 1.4


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(UsageError, match="chown"):
        work_of("chown", 5)


def test_calibration_keeps_its_own_rules() -> None:
    assert len(CALIBRATION) <= 6
    assert all(b.containers <= 50 for b in CALIBRATION)
    assert len({b.layers for b in CALIBRATION}) <= 2
    assert not set(CALIBRATION) & set(HELD_OUT)
    assert {b.containers for b in HELD_OUT} >= {1, 200} and {b.layers for b in HELD_OUT} >= {5, 100}
    assert {(b.strategy, b.copies) for b in HELD_OUT} == {(s, c) for s in STRATEGIES for c in (0, 2)}
    assert len(CORNERS) == 24


def test_the_fit_finds_the_costs_that_made_the_bursts() -> None:
    points = [(b, burst_s(samples.COSTS, b, cpus=2, before=samples.BEFORE)) for b in CALIBRATION]
    found = fit_costs(points, cpus=2, before=samples.BEFORE)
    for got, wanted in zip(dataclasses.astuple(found), dataclasses.astuple(samples.COSTS), strict=True):
        assert got == pytest.approx(wanted, rel=0.01)


def test_five_bursts_do_not_determine_six_costs() -> None:
    with pytest.raises(UsageError, match="5 bursts"):
        fit_costs([(b, 1.0) for b in CALIBRATION[:5]], cpus=2, before=20)


@settings(max_examples=30)
@given(
    st.sampled_from(STRATEGIES),
    st.integers(1, 300),
    st.integers(1, 100),
    st.sampled_from((0, 2)),
    st.sampled_from((2, 8, 96)),
)
def test_more_of_anything_never_takes_less(strategy: str, containers: int, layers: int, copies: int, cpus: int) -> None:
    def seconds(what: Burst) -> float:
        return burst_s(samples.COSTS, what, cpus=cpus, before=samples.BEFORE)

    here = Burst(strategy, containers, layers, copies)
    assert seconds(dataclasses.replace(here, containers=containers + 1)) > seconds(here) * (1 - 1e-9)
    assert seconds(dataclasses.replace(here, layers=layers + 1)) >= seconds(here) * (1 - 1e-9)
    assert seconds(dataclasses.replace(here, copies=copies + 1)) > seconds(here)
    # Nothing of a merged root file system looks at the table; a copy of it does.
    beside = seconds(dataclasses.replace(here, background=1000))
    assert beside > seconds(here) if strategy != "flat" or copies else beside == seconds(here)


def test_a_cap_keeps_the_table_short() -> None:
    free, capped = Burst("per-layer", 100, 50, 2), Burst("per-layer", 100, 50, 2, admit=4)
    assert live_mounts(capped, 20)[0] < live_mounts(free, 20)[0] / 5
    assert burst_s(samples.COSTS, capped, cpus=2, before=20) < burst_s(samples.COSTS, free, cpus=2, before=20)


def test_two_processors_do_not_identify_transfers() -> None:
    topology = recorded("vm")
    locks = [samples.lock(Kind.TICKET, "one-l3", n, 10.0 * n) for n in (1, 2)]
    model = fit(samples.bench(topology, locks=locks, bursts=samples.calibrated(2)))
    unknown = {p.name: p for p in model.parameters if p.source is Source.UNKNOWN}
    assert set(unknown) == {"l", "b", "v"}
    assert all(p.value is None and "cores" in p.note for p in unknown.values())
    assert model.transfers == () and model.transfers_per_section is None
    assert model.predict_at(Burst("per-layer", 10, 10), "one-l3", 2) is None


def test_three_cores_refuse_a_slope_and_four_have_one(tmp_path: Path) -> None:
    grow("genoa", tmp_path)
    for cores, expected in ((3, 0), (4, 1)):
        topology = read_topology(str(tmp_path), allowed=range(cores))
        locks = [samples.lock(Kind.MCS, "one-l3", n, 30 + 4.0 * n) for n in (1, 2, cores)]
        found, why_not = transfers_of(samples.bench(topology, locks=locks))
        assert len(found) == expected
        assert bool(why_not) == (expected == 0)


def test_a_lock_that_hides_its_hand_offs_gives_no_slope() -> None:
    assert usable_for_slope(samples.lock(Kind.TICKET, "all", 8, 100.0, 0.97))
    assert not usable_for_slope(samples.lock(Kind.TICKET, "all", 8, 100.0, 0.2))
    assert not usable_for_slope(samples.lock(Kind.TAS, "all", 8, 10.0, 0.97))
    assert not usable_for_slope(dataclasses.replace(samples.lock(Kind.TICKET, "all", 8, 9.0), moved=True))


def test_transfers_of_two_sockets_come_back() -> None:
    bench = samples.two_sockets()
    model = fit(bench)
    by_name = {t.placement: t for t in model.transfers}
    assert by_name["one-l3"].base_ns == pytest.approx(40, rel=0.01)
    assert by_name["all"].slope_ns == pytest.approx(5, rel=0.01)
    assert model.transfers_per_section == pytest.approx(0.004, rel=0.15)
    what = Burst("per-layer", 100, 50)
    near, far = model.predict_at(what, "one-l3", 24), model.predict_at(what, "all", 48)
    assert near is not None and far is not None and near.seconds < far.seconds


def test_a_cost_that_the_bursts_do_not_show_is_not_identified() -> None:
    topology = recorded("vm")
    figures = [samples.burst(b, 0.05) for b in CALIBRATION]  # all the same: nonsense
    model = fit(samples.bench(topology, bursts=figures))
    assert any(p.source is Source.UNKNOWN and "noisy" in p.note for p in model.parameters)


def test_ranges_and_cliffs() -> None:
    model = fit(samples.bench(recorded("vm"), bursts=samples.calibrated(2)))
    predicted = model.predict(Burst("per-layer", 200, 100, 2), limit_s=5.0)
    assert predicted.low < predicted.seconds < predicted.high < 1.5 * predicted.seconds
    assert predicted.late > 0.5
    cliff = model.cliff(Burst("per-layer", 1, 100, 2), 5.0)
    assert cliff is not None
    most_likely, fewest, most = cliff
    assert fewest <= most_likely <= most
    here = Burst("per-layer", most_likely, 100, 2)
    assert (
        model.predict(here).seconds
        > 5.0
        >= model.predict(dataclasses.replace(here, containers=most_likely - 1)).seconds
    )
    assert model.cliff(Burst("flat", 1, 100), 3600.0) is None


def test_a_bench_without_the_six_bursts_says_which() -> None:
    with pytest.raises(UsageError, match=r"per-layer C=5 L=50"):
        fit(samples.bench(recorded("vm")))


@pytest.mark.parametrize(("limit_s", "late"), [(11, 0.0), (10, 0.0), (9, 0.5), (9.5, 0.25), (2, 1.0), (5.5, 0.75)])
def test_the_share_of_late_containers(limit_s: float, late: float) -> None:
    assert Shape("per-layer", 0.2, 0.9).late(10.0, limit_s) == pytest.approx(late)


def test_least_squares_and_lines() -> None:
    assert solve([[2, 1], [1, 3]], [5, 10]) == pytest.approx([1, 3])
    assert line([(1, 5), (2, 7), (3, 9)]) == pytest.approx((3, 2))
    found = least_squares(lambda p: [p[0] * math.exp(-p[1] * x) - 3 * math.exp(-0.5 * x) for x in range(8)], [1.0, 1.0])
    assert found == pytest.approx([3, 0.5], rel=1e-4)
