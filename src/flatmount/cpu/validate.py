"""The model against bursts it has not seen, on this machine: how wrong it is, and where most."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterable, Sequence

from flatmount._version import VERSION
from flatmount.cpu.bench import BurstRuns, Progress, burst_figure, run_at
from flatmount.cpu.burst import Bench as Stage
from flatmount.cpu.burst import BurstRun, stage
from flatmount.cpu.model import CALIBRATION, Model, burst_s, fit_figures
from flatmount.cpu.noise import Disturbance, Watch
from flatmount.cpu.placements import placements
from flatmount.cpu.results import BenchResult, Burst, BurstFigure
from flatmount.cpu.simulation import simulate_burst
from flatmount.cpu.topology import Topology, read_topology
from flatmount.cpu.validation import Point, SimulatedPoint, Validation, interpolate
from flatmount.errors import FlatmountError
from flatmount.kernel import _native
from flatmount.kernel.namespaces import apart

STRATEGIES = ("per-layer", "common-parent", "flat")

# Fixed before they were run; none of the calibrated ones is among them.
HELD_OUT = tuple(
    burst
    for containers, layers, copies, strategy in itertools.product(
        (1, 2, 5, 10, 20, 50, 100, 150, 200), (5, 20, 50, 100), (0, 2), STRATEGIES
    )
    if (burst := Burst(strategy, containers, layers, copies)) not in CALIBRATION
)
# What plain interpolation is given: the four corners for each strategy, with copies and without.
CORNERS = tuple(
    Burst(strategy, containers, layers, copies)
    for strategy, copies, containers, layers in itertools.product(STRATEGIES, (0, 2), (10, 50), (10, 100))
)
_CALIBRATION_REPEATS = 21
# What takes longer than a time is repeated so often.
_SHORT_S, _MIDDLING_REPEATS = 0.1, 7
_REPEATS = ((1.5, 1), (_SHORT_S, 3), (0.0, 7))
_TRIES = 3
_MOST_REPEATS = _TRIES * 7
_MOST_LAYERS = 100
_SIMULATED = tuple(
    Burst(strategy, containers, 20, copies)
    for strategy, containers, copies in itertools.product(STRATEGIES, (20, 50, 100, 200), (0, 2))
)
# A simulation is run until its mean is known so well, by its own scatter, or so often.
_KNOWN_TO = 0.005
_FEWEST_RUNS, _MOST_RUNS = 5, 200


def validate(budget_s: float, *, progress: Progress = lambda _: None) -> Validation:
    """Calibrate on six bursts, then run the held-out ones until `budget_s` seconds are over.

    Mounts in a namespace of its own. Raises: MissingFeature without the privilege, FlatmountError where the budget did
    not suffice for a single held-out burst.
    """
    started = time.monotonic()
    topology = read_topology()
    runs: BurstRuns = {}
    with Watch() as watch:
        not_run = apart(lambda: _run_all(runs, started + budget_s, progress))
    figures = {burst: burst_figure(found) for (burst, _), found in runs.items()}
    bench = bench_of(topology, [figures[burst] for burst in CALIBRATION])
    model = fit_figures([figures[burst] for burst in CALIBRATION], bench)
    points = tuple(_point(figures[b], model, figures, repeatability(runs[b, ""])) for b in HELD_OUT if b in figures)
    if not points:
        raise FlatmountError(f"{budget_s:g} s were over before a held-out burst ran", hint="give --budget 240s")
    return Validation(
        VERSION,
        topology,
        model,
        tuple(figures[burst] for burst in CALIBRATION),
        points,
        tuple(simulated_points(model)),
        tuple(not_run),
        round(time.monotonic() - started, 1),
        watch.disturbance,
    )


def bench_of(topology: Topology, figures: Sequence[BurstFigure]) -> BenchResult:
    """A result that holds bursts only, for the model to be fitted to."""
    return BenchResult(
        VERSION, topology, placements(topology), _native.pause_ns(), 0.0, 0.0, _CALIBRATION_REPEATS, 0.0,
        Disturbance(0.0, 1, 0.0, 0.0), bursts=tuple(figures),
    )  # fmt: skip


def _run_all(runs: BurstRuns, deadline: float, progress: Progress) -> list[Burst]:
    """Rounds over the calibrated, the corners and the held-out bursts in an order drawn once, so that a machine that
    drifts drifts for all of them; and the dearest after all others, smallest first. A held-out burst that would not be
    over by the deadline, by what the same with fewer containers took, is left out."""
    by_size = sorted(HELD_OUT, key=lambda burst: burst.containers * burst.layers)
    cheap = [burst for burst in by_size if burst.containers * burst.layers < _DEAR]
    dear = by_size[len(cheap) :]
    order = [*dict.fromkeys((*CALIBRATION, *CORNERS, *cheap))]
    random.Random(7).shuffle(order)
    needed = {*CALIBRATION, *CORNERS}
    not_run: list[Burst] = []
    with stage(_MOST_LAYERS) as bench:
        for burst in (*CALIBRATION, *CORNERS):
            run_at(bench, burst, None, runs)
        for repeat in range(_MOST_REPEATS):
            progress(f"round {repeat + 1} of at most {_MOST_REPEATS}")
            for burst in order:
                if burst in needed and _wanted(burst, runs) and time.monotonic() < deadline:
                    run_at(bench, burst, None, runs)
                elif burst not in needed and _wanted(burst, runs):
                    _run_in_time(bench, burst, runs, deadline, not_run)
        for burst in dear:
            progress(f"held out, {burst}")
            while _wanted(burst, runs) and _run_in_time(bench, burst, runs, deadline, not_run):
                pass
    return not_run


def _wanted(burst: Burst, runs: BurstRuns) -> bool:
    """Whether one more repeat is due, by what the last one took; noisy ones are made up for, as often again."""
    known = runs.get((burst, ""), [])
    if not known:
        return True
    due = next(n for least, n in _REPEATS if known[-1].wall_s >= least)
    if burst in CALIBRATION and due > 1:
        due = max(due, _CALIBRATION_REPEATS if known[-1].wall_s < _SHORT_S else _MIDDLING_REPEATS)
    return sum(run.quiet for run in known) < due and len(known) < _TRIES * due


_DEAR = 10_000  # containers times layers


def _run_in_time(bench: Stage, burst: Burst, runs: BurstRuns, deadline: float, not_run: list[Burst]) -> bool:
    if time.monotonic() + _expected_s(burst, runs) < deadline:
        run_at(bench, burst, None, runs)
        return True
    if (burst, "") not in runs and burst not in not_run:
        not_run.append(burst)
    return False


def _expected_s(burst: Burst, runs: BurstRuns) -> float:
    """From the nearest smaller one of its kind, as if all grew with the square of containers times layers."""
    size = burst.containers * burst.layers
    same = [
        (known.containers * known.layers, found[-1].wall_s)
        for (known, _), found in runs.items()
        if (known.strategy, known.copies) == (burst.strategy, burst.copies)
    ]
    smaller = [entry for entry in same if entry[0] <= size]
    if not smaller:
        return 0.1
    nearest, wall_s = max(smaller)
    return wall_s * (size / nearest) ** 2


def repeatability(runs: Sequence[BurstRun]) -> float | None:
    """How far the medians of every other run and of those between lie apart, as a fraction; None for a single run.

    Medians of all runs lie nearer than those of halves; a model that is not far above this cannot be told from noise.
    """
    if len(runs) < 2:
        return None
    one, other = (statistics.median(run.wall_s for run in half) for half in (runs[::2], runs[1::2]))
    return abs(one / other - 1)


def _point(figure: BurstFigure, model: Model, figures: dict[Burst, BurstFigure], repeated: float | None) -> Point:
    predicted = model.predict(figure.burst)
    return Point(
        figure.burst,
        figure.wall_s,
        predicted.seconds,
        predicted.low,
        predicted.high,
        interpolate(figure.burst, figures),
        repeated,
    )


def simulated_points(model: Model) -> Iterable[SimulatedPoint]:
    """The formula and the simulation with a model's costs, over all strategies."""
    for burst in _SIMULATED:
        formula = burst_s(model.costs, burst, cpus=model.cpus, before=model.before)
        times: list[float] = []
        while len(times) < _FEWEST_RUNS or (len(times) < _MOST_RUNS and _scatter(times) > _KNOWN_TO):
            times.append(simulate_burst(model.costs, burst, cpus=model.cpus, before=model.before, seed=len(times)))
        yield SimulatedPoint(burst, formula, statistics.mean(times))


def _scatter(times: Sequence[float]) -> float:
    """The standard error of their mean, as a part of it."""
    return float(statistics.stdev(times) / statistics.mean(times) / len(times) ** 0.5)
