"""What would help on this machine, in the order in which it should be tried, with what is known about each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from flatmount.cpu.model import Model
from flatmount.cpu.placements import Placement, placements
from flatmount.cpu.results import BenchResult, Burst, BurstFigure, Kind, LockFigure, Spread, require_comparable
from flatmount.cpu.topology import Topology, counted, format_list
from flatmount.errors import FlatmountError, UsageError

CAPS = (1, 2, 4, 8, 16, 32)
_LABELS = "flatmount.io"


class Evidence(Enum):
    """Where an expectation comes from."""

    MEASURED = "measured here"
    PREDICTED = "predicted"
    PUBLISHED = "published"
    NONE = "not known"


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times faster, most likely and at the ends of the range; below 1: slower."""

    factor: float
    low: float
    high: float

    @property
    def indistinguishable(self) -> bool:
        """Whether the range holds "no difference"."""
        return self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        if self.indistinguishable:
            return f"indistinguishable from no change ({self.low:.2g} to {self.high:.2g} times)"
        return f"{self.factor:.2g} times faster ({self.low:.2g} to {self.high:.2g})"


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to do. `gain` is None where only words are known; `how` are commands or files, ready to use."""

    name: str
    title: str
    evidence: Evidence
    gain: Gain | None
    why: str
    how: tuple[str, ...] = ()
    worth_it: bool = True


@dataclass(frozen=True, slots=True)
class Question:
    """What the node does today: containers of an image with `layers`, started together, and when a start counts as
    failed."""

    containers: int = 100
    layers: int = 50
    copies: int = 2
    limit_s: float = 30.0
    strategy: str = "per-layer"

    def burst(self, strategy: str | None = None) -> Burst:
        return Burst(strategy or self.strategy, self.containers, self.layers, self.copies)


def gain_of(before: Spread, after: Spread) -> Gain:
    """What changing from one measured figure to another is worth, at worst and at best."""
    return Gain(before.median / after.median, before.low / after.high, before.high / after.low)


def advise(
    question: Question, topology: Topology, bench: BenchResult | None, model: Model | None
) -> tuple[Advice, ...]:
    """Ordered advice. Without a bench or a model only what was published, and what the topology rules out, is said."""
    return (
        _constant_mounts(question, bench, model),
        _cap(question, bench, model),
        _pinning(question, topology, bench, model),
        _smt(topology, bench),
        _another_machine(question, model),
    )


def _constant_mounts(question: Question, bench: BenchResult | None, model: Model | None) -> Advice:
    how = (
        "containerd 2.0.7, 2.1.5 or 2.2 and later: one id-mapped mount instead of one for each layer",
        "flatmount mount --strategy flat: one mount, and a cost that does not grow with layers",
    )
    name, title = "constant-mounts", "a constant number of mounts for each container"
    if question.strategy != "per-layer":
        return Advice(name, title, Evidence.NONE, None, f"{question.strategy} has it already", (), worth_it=False)
    measured = _measured_pair(bench, question, "flat")
    if measured is not None:
        before, after = measured
        why = f"{before.burst}: {before.wall_s.median:.3g} s; merged {after.wall_s.median:.3g} s"
        return Advice(name, title, Evidence.MEASURED, gain_of(before.wall_s, after.wall_s), why, how)
    if model is not None:
        now, then = model.predict(question.burst()), model.predict(question.burst("flat"))
        gain = Gain(now.seconds / then.seconds, now.low / then.high, now.high / then.low)
        why = f"{now.burst}: {now.seconds:.3g} s; merged {then.seconds:.3g} s"
        return Advice(name, title, Evidence.PREDICTED, gain, why, how)
    why = "100 containers of 50 layers: 20,200 mount operations become 600, or 100"
    return Advice(name, title, Evidence.PUBLISHED, None, why, how)


def _measured_pair(bench: BenchResult | None, question: Question, other: str) -> tuple[BurstFigure, BurstFigure] | None:
    """The measured burst that is nearest to the question, and the same with another strategy."""
    if bench is None:
        return None
    pairs = []
    for figure in bench.bursts:
        burst = figure.burst
        if burst.strategy != question.strategy or burst.copies != question.copies or figure.placement or burst.admit:
            continue
        twin = bench.burst(dataclasses.replace(burst, strategy=other))
        if twin is not None:
            pairs.append((figure, twin))
    return min(
        pairs,
        key=lambda pair: (
            abs(pair[0].burst.containers - question.containers) + abs(pair[0].burst.layers - question.layers)
        ),
        default=None,
    )


def _cap(question: Question, bench: BenchResult | None, model: Model | None) -> Advice:
    name, title = "cap", "a cap on concurrent starts"
    how = (
        "flatmount storm --admit K",
        "a roll-out in waves (maxSurge, maxUnavailable); kubelet's serializeImagePulls caps pulls, not starts",
    )
    measured = _measured_caps(bench)
    if measured is not None:
        free, best = measured
        why = f"{best.burst}: {best.wall_s.median:.3g} s; all at once {free.wall_s.median:.3g} s"
        gain = gain_of(free.wall_s, best.wall_s)
        return Advice(name, f"{title}: {best.burst.admit}", Evidence.MEASURED, gain, why, how, gain.low > 1)
    if model is None:
        return Advice(name, title, Evidence.PUBLISHED, None, "bursts cost about the square of their size", how)
    free_run = model.predict(question.burst(), limit_s=question.limit_s)
    capped = {k: model.predict(dataclasses.replace(question.burst(), admit=k)) for k in CAPS if k < question.containers}
    if not capped:
        return Advice(name, title, Evidence.NONE, None, "the burst is too small for one", (), worth_it=False)
    k, best_run = min(capped.items(), key=lambda item: item[1].seconds)
    gain = Gain(free_run.seconds / best_run.seconds, free_run.low / best_run.high, free_run.high / best_run.low)
    cliff = model.cliff(question.burst(), question.limit_s)
    said = (
        "no cliff within 5000 containers" if cliff is None else f"the cliff is at {cliff[0]} ({cliff[1]} to {cliff[2]})"
    )
    why = f"{free_run.burst}: {free_run.seconds:.3g} s, with {k} at a time {best_run.seconds:.3g} s; {said}"
    return Advice(name, f"{title}: {k}", Evidence.PREDICTED, gain, why, how, gain.low > 1)


def _measured_caps(bench: BenchResult | None) -> tuple[BurstFigure, BurstFigure] | None:
    capped = [figure for figure in bench.bursts if figure.burst.admit and not figure.placement] if bench else []
    if bench is None or not capped:
        return None
    best = min(capped, key=lambda figure: figure.wall_s.median)
    free = bench.burst(dataclasses.replace(best.burst, admit=None))
    return (free, best) if free is not None else None


def _pinning(question: Question, topology: Topology, bench: BenchResult | None, model: Model | None) -> Advice:
    name, title = "pin", "pin the runtime to one socket or one level-3 cache"
    there = [p for p in placements(topology) if p.name in ("one-l3", "socket", "socket-smt")]
    whole = len(topology.allowed)
    smaller = [p for p in there if len(p.cpus) < whole]
    if not smaller:
        why = f"{counted(len(topology.l3_domains), 'level-3 cache')}: there is nothing smaller to pin to"
        return Advice(name, title, Evidence.NONE, None, why, (), worth_it=False)
    best, gain = _measured_placement(bench, smaller)
    if best is not None and gain is not None:
        why = f"per-layer bursts on {best.title}"
        return Advice(name, title, Evidence.MEASURED, gain, why, drop_in(best.cpus), gain.low > 1)
    for placement in smaller:
        here = model.predict_at(question.burst(), placement.name, len(placement.cpus)) if model else None
        if model is not None and here is not None:
            now = model.predict(question.burst())
            gain = Gain(now.seconds / here.seconds, now.low / here.high, now.high / here.low)
            return Advice(name, title, Evidence.PREDICTED, gain, placement.title, drop_in(placement.cpus), gain.low > 1)
    why = "one NUMA node instead of two was markedly better at high thread counts; measure it with `cpu bench`"
    return Advice(name, title, Evidence.PUBLISHED, None, why, drop_in(smaller[-1].cpus))


def _measured_placement(
    bench: BenchResult | None, smaller: Sequence[Placement]
) -> tuple[Placement | None, Gain | None]:
    if bench is None:
        return None, None
    by_place = {figure.placement: figure for figure in bench.bursts if figure.placement}
    whole = max(by_place.values(), key=lambda f: len(_cpus_of(bench, f.placement)), default=None)
    found = [(placement, by_place[placement.name]) for placement in smaller if placement.name in by_place]
    if whole is None or not found:
        return None, None
    best, figure = min(found, key=lambda pair: pair[1].wall_s.median)
    return best, gain_of(whole.wall_s, figure.wall_s)


def _cpus_of(bench: BenchResult, name: str) -> tuple[int, ...]:
    return next((placement.cpus for placement in bench.placements if placement.name == name), ())


def _smt(topology: Topology, bench: BenchResult | None) -> Advice:
    name, title = "smt", "SMT off"
    if len(topology.cores) == len(topology.cpus):
        hidden = "; the hypervisor may hide it" if topology.hypervisor else ""
        return Advice(name, title, Evidence.NONE, None, f"no core shows siblings{hidden}", (), worth_it=False)
    how = ("echo off > /sys/devices/system/cpu/smt/control", "or nosmt on the kernel's command line")
    without, with_smt = (_fair_lock(bench, place) for place in ("socket", "socket-smt"))
    if without is not None and with_smt is not None:
        gain = gain_of(with_smt.ns, without.ns)
        why = f"a section under a {with_smt.kind.value} lock, {with_smt.threads} and {without.threads} threads"
        return Advice(name, title, Evidence.MEASURED, gain, why, how, gain.low > 1)
    return Advice(name, title, Evidence.PUBLISHED, None, "launch latency 20-30 % better on m7i.metal-24xl", how)


def _fair_lock(bench: BenchResult | None, placement: str) -> LockFigure | None:
    found = [
        figure
        for figure in (bench.locks if bench else ())
        if figure.placement == placement and figure.kind is Kind.TICKET and figure.shows_transfer
    ]
    return max(found, key=lambda figure: figure.threads, default=None)


def _another_machine(question: Question, model: Model | None) -> Advice:
    why = (
        "at 100 starts one socket with distributed caches and no SMT (m7a.24xlarge) went on where two sockets with a "
        "central mesh (r5.metal) failed; compare `cpu bench --json` of both before buying"
    )
    if model is not None and question.strategy == "per-layer":
        flat = model.predict(question.burst("flat"))
        why += f"; with a constant number of mounts this one needs {flat.seconds:.2g} s"
    return Advice("machine", "another machine", Evidence.PUBLISHED, None, why)


def drop_in(cpus: Iterable[int], unit: str = "containerd.service") -> tuple[str, ...]:
    """A systemd drop-in that keeps a runtime's daemon on these processors; containers keep their own cpusets."""
    return (
        f"# /etc/systemd/system/{unit}.d/10-flatmount-cpus.conf",
        "[Service]",
        f"AllowedCPUs={format_list(cpus)}",
    )


def pin_process(pid: int, cpus: Sequence[int]) -> tuple[int, ...]:
    """Pin every thread of a running process to `cpus`; what it starts from then on inherits that.

    Returns the processors it had before (those of its first thread), to undo it with. Needs CAP_SYS_NICE for another
    user's process. Raises: UsageError for a process that is not there; FlatmountError where it may not be done.
    See: sched_setaffinity(2).
    """
    try:
        before = tuple(sorted(os.sched_getaffinity(pid)))
        pinned: set[int] = set()
        # Threads that start while we walk are started by ones that may not be pinned yet: until nothing is new.
        while new := {int(task) for task in os.listdir(f"/proc/{pid}/task")} - pinned:
            for task in new:
                _pin_task(task, cpus)
            pinned |= new
    except (FileNotFoundError, ProcessLookupError) as error:
        raise UsageError(f"there is no process {pid}", hint="give --pid of the running daemon") from error
    except OSError as error:
        raise FlatmountError(
            f"process {pid} cannot be pinned to {format_list(cpus)}: {os.strerror(error.errno or 0)}",
            hint="run as root, and name processors that are online",
        ) from error
    return before


def _pin_task(task: int, cpus: Sequence[int]) -> None:
    try:
        os.sched_setaffinity(task, cpus)
    except ProcessLookupError:
        return  # it has ended since it was listed


def node_labels(topology: Topology, model: Model | None, question: Question) -> dict[str, str]:
    """Labels that say what a scheduler may want to know, as Node Feature Discovery takes them."""
    labels = {
        f"{_LABELS}/cpu-sockets": str(len(topology.packages)),
        f"{_LABELS}/cpu-numa-nodes": str(len(topology.nodes)),
        f"{_LABELS}/cpu-l3-caches": str(len(topology.l3_domains)),
        f"{_LABELS}/cpu-smt": str(len(topology.cores) < len(topology.cpus)).lower(),
    }
    if model is not None:
        cliff = model.cliff(question.burst(), question.limit_s)
        labels[f"{_LABELS}/burst-cliff"] = "none" if cliff is None else str(cliff[1])
    return labels


def kubernetes(labels: dict[str, str]) -> tuple[str, str]:
    """The file that Node Feature Discovery reads, and a preferred affinity for pods that start in bursts."""
    feature_file = "".join(f"{name}={value}\n" for name, value in labels.items())
    affinity = f"""\
affinity:
  nodeAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 50
        preference:
          matchExpressions:
            - key: {_LABELS}/cpu-sockets
              operator: In
              values: ["1"]
      - weight: 20
        preference:
          matchExpressions:
            - key: {_LABELS}/cpu-smt
              operator: In
              values: ["false"]
"""
    return feature_file, affinity


def rank(results: Sequence[BenchResult]) -> tuple[tuple[str, Spread, bool], ...]:
    """Measured machines by what the largest burst that all have took, fastest first; the flag says that the range
    overlaps the one before, so that the two are indistinguishable. Raises: UsageError for different versions."""
    require_comparable(results)
    shared = set.intersection(*({f.burst for f in result.bursts if not f.placement} for result in results))
    if not shared:
        raise UsageError("these results have no burst in common", hint="run `cpu bench` with the same budget on each")
    burst = max(shared, key=lambda b: (b.strategy == "per-layer", b.containers * b.layers, b.copies, str(b)))
    figures = [(result.topology.model, figure.wall_s) for result in results if (figure := result.burst(burst))]
    figures.sort(key=lambda pair: pair[1].median)
    ranked = []
    for i, (name, wall_s) in enumerate(figures):
        ranked.append((name, wall_s, i > 0 and wall_s.overlaps(figures[i - 1][1])))
    return tuple(ranked)
