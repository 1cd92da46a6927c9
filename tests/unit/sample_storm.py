"""A storm as it looks on two CPUs: 200 containers of 50 layers, a watcher, three repeats, some failures."""

from __future__ import annotations

import math
import random

from flatmount.storm.results import (
    ContainerTimes,
    HostFacts,
    ImageFacts,
    MountOperations,
    RunResult,
    Settings,
    StormReport,
    measured,
)

# strategy: (ms for one container, operations planned, mounts at its peak beyond those before, failures)
_SHAPES = {
    "per-layer": (9.1, 203, 304, 3),
    "common-parent": (1.62, 7, 207, 0),
    "detached": (1.35, 1, 200, 0),
    "flat": (0.61, 1, 200, 0),
}
CONTAINERS, CONCURRENCY, REPEATS = 200, 2, 3


def sample_report(containers: int = CONTAINERS, strategies: tuple[str, ...] = tuple(_SHAPES)) -> StormReport:
    """The same report at every call."""
    return StormReport(
        taken_at="2026-01-31T12:00:00Z",
        host=HostFacts(
            kernel="6.18.44",
            architecture="x86_64",
            cpu_model="AMD EPYC 9R14",
            cpus=2,
            memory_bytes=25_276_502_016,
            python="3.11.7",
            flatmount="0.1.0",
        ),
        image=ImageFacts(name="demo:60", layers=50, files=11_842),
        settings=Settings(
            containers=containers,
            concurrency=CONCURRENCY,
            strategies=strategies,
            repeats=REPEATS,
            timeout_s=30.0,
            copies=2,
            watchers=1,
            background=1000,
            on_host=False,
            ranges="fresh",
            admit=None,
            uppers="tmpfs",
            store="ext4",
            seed=1,
        ),
        results=tuple(_run(strategy, repeat, containers) for repeat in range(REPEATS) for strategy in strategies),
    )


def _run(strategy: str, repeat: int, containers: int) -> RunResult:
    draw = random.Random(f"{strategy} {repeat}")
    cost_ms, operations, growth, failures = _SHAPES[strategy]
    failed = failures if repeat == 1 else 0
    slow = 1 + 0.06 * repeat
    started = []
    for _ in range(containers - failed):
        took = cost_ms * slow * CONCURRENCY * (0.7 + draw.expovariate(3.0))
        started.append(ContainerTimes(took, 0.14 + 0.05 * draw.random(), 0.04, took - 0.3, took / 4))
    wall_s = cost_ms * slow * containers / 1000
    before = 1020
    samples = [(i / 50, wall_s and i / 50 / wall_s) for i in range(math.ceil(wall_s * 50))]
    return measured(
        strategy=strategy,
        repeat=repeat,
        containers=containers,
        concurrency=CONCURRENCY,
        wall_s=wall_s,
        started=started,
        failures=["move_mount merged: Device or resource busy [EBUSY], operation 7 of 309"] * failed,
        mount_operations=MountOperations(
            planned_per_container=operations,
            executed=operations * (containers - failed),
            kernel=operations * containers if repeat < 2 else None,
            kernel_reason=None if repeat < 2 else "count mount events: Invalid argument",
            once=0 if strategy == "per-layer" else 1,
        ),
        mounts_before=before,
        mounts_after=before,
        mounts=[(at, before + round(growth * done * (0.9 + 0.1 * draw.random()))) for at, done in samples],
        probe=[(i / 10, 3 + cost_ms * 4 * draw.expovariate(2.0)) for i in range(1, math.ceil(wall_s * 10) + 1)],
        watchers_cpu_s=wall_s * min(0.9, growth / 400),
        watchers_rereads=round(wall_s * 170),
        undo_operations=containers - failed,
    )
