"""Bench results made of numbers that a known machine would have given."""

from __future__ import annotations

from collections.abc import Iterable

from flatmount._version import VERSION
from flatmount.cpu.model import CALIBRATION, Costs, Transfer, burst_s, dearer_sections
from flatmount.cpu.noise import Disturbance
from flatmount.cpu.placements import placements
from flatmount.cpu.results import BenchResult, Burst, BurstFigure, Cell, Kind, LockFigure, Spread
from flatmount.cpu.topology import Topology
from tests.unit.sysfs_trees import recorded

COSTS = Costs(1.5e-4, 7e-6, 1.5e-5, 2.5e-8, 8e-5, 1.1e-6)
BEFORE = 21
QUIET = Disturbance(10.0, 2, 0.0, 0.0)


def spread(value: float, noise: float = 0.02) -> Spread:
    return Spread.of((value * (1 - noise), value, value * (1 + noise)))


def burst(what: Burst, seconds: float, placement: str = "", noise: float = 0.02) -> BurstFigure:
    return BurstFigure(what, spread(seconds, noise), 0.9 * seconds, 0.2 * seconds, 1000, BEFORE, placement)


def calibrated(cpus: int, costs: Costs = COSTS) -> tuple[BurstFigure, ...]:
    return tuple(burst(b, burst_s(costs, b, cpus=cpus, before=BEFORE)) for b in CALIBRATION)


def lock(kind: Kind, placement: str, threads: int, ns: float, hand_off: float | None = 0.98) -> LockFigure:
    return LockFigure(kind, placement, threads, spread(ns), hand_off if threads > 1 else 0.0, 1.0, None, 50, 90, 900)


def bench(
    topology: Topology,
    *,
    locks: Iterable[LockFigure] = (),
    bursts: Iterable[BurstFigure] = (),
    matrix: Iterable[Cell] = (),
    version: str = VERSION,
) -> BenchResult:
    return BenchResult(
        version,
        topology,
        placements(topology),
        24.4,
        60.0,
        58.0,
        3,
        0.1,
        QUIET,
        tuple(locks),
        tuple(matrix),
        tuple(bursts),
    )


def two_sockets() -> BenchResult:
    """r5.metal as the model would have it: a section grows with the transfer's cost, dearer over two sockets."""
    topology = recorded("r5-metal")
    slopes = {"one-l3": (40.0, 2.0), "all": (90.0, 5.0)}
    locks = [
        lock(Kind.TICKET, place, n, base + slope * (n - 1))
        for place, (base, slope) in slopes.items()
        for n in (2, 4, 8, 16)
    ]
    what = Burst("per-layer", 50, 20)
    placed = []
    for place, (base, slope) in slopes.items():
        cpus = len(next(p.cpus for p in placements(topology) if p.name == place))
        dearer = dearer_sections(Transfer(place, base, slope), 0.004, cpus)
        placed.append(burst(what, burst_s(COSTS, what, cpus=cpus, before=BEFORE, dearer=dearer), place, noise=0.01))
    return bench(topology, locks=locks, bursts=[*calibrated(96), *placed])
