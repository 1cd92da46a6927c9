"""One result of every kind, as large as real ones are: what pages are tried with."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatmount.observe.doctor.findings import Diagnosis, Finding, Severity, verdict
from flatmount.observe.mount_calls import Effect
from flatmount.observe.perf import Wait
from flatmount.observe.profile import cpu_stacks, lock_waits, moments, wait_stacks
from flatmount.observe.profile_results import ProcessOperations, Profile
from flatmount.observe.symbols import waited_for
from flatmount.observe.trace_results import Absent, CallCount, ProcessCalls, TraceReport, TraceRun
from flatmount.observe.watch_results import CauseRate, LockRate, Sample, WatchLog
from flatmount.storm.results import HostFacts, ImageFacts, LatencyMs, ProbeMs, StormReport, StrategyLocks
from flatmount.storm.starts_results import Skipped, StartSettings, StartsReport, WaveResult
from tests.unit import cpu_samples
from tests.unit.sample_storm import sample_report

HOST = HostFacts("6.18.44", "x86_64", "AMD EPYC 9R14", 2, 25_276_502_016, "3.11.7", "0.1.0")
AT = "2026-01-31T12:00:00Z"
_STACKS = Path(__file__).parent / "data" / "stacks" / "6.18.44.txt"


def storm() -> StormReport:
    locks = [
        ("per-layer", 458.0, 6.1, 9_640.0, 0.091, 0.067),
        ("common-parent", 52.0, 0.4, 856.0, 0.02, 0.02),
        ("detached", 0.031, 0.004, 250.0, 0.0, 0.004),
        ("flat", 0.016, 0.0, 180.0, 0.0, 0.002),
    ]
    return replace(
        sample_report(),
        locks=tuple(
            StrategyLocks(name, 200, sem, spin, 30.0, 0.1, grace, 4000, 900, 400, spinning, under, 0.01, 0, ())
            for name, sem, spin, grace, spinning, under in locks
        ),
    )


def starts() -> StartsReport:
    draw = random.Random(7)
    rates = {"containerd": 11.1, "podman": 6.2, "flatmount:run": 27.5}
    settings = StartSettings(tuple(rates), 50, 16, 2, 3, True, 1000, 30.0, False, True, "/var/lib/flatmount")
    waves = []
    for repeat in range(3):
        for engine, rate in rates.items():
            for number in range(2):
                each = sorted(1600 / rate * (0.6 + draw.expovariate(2.2)) for _ in range(50))
                failed = 1 if engine == "podman" and repeat == 1 else 0
                waves.append(
                    WaveResult(
                        engine, repeat, number, 50 * number, 50, failed, ("<it> took too long",) * failed, 50 / rate,
                        rate * (0.9 + 0.1 * draw.random()), LatencyMs.of(each), ProbeMs.of([8.0, 40.0]), 1020,
                        1020 + 50 * 3, None, tuple(each),
                    )
                )  # fmt: skip
    skipped = (Skipped("cri-o", "there is no crio; install <cri-o>"),)
    return StartsReport(AT, HOST, ImageFacts("demo", 60, 11_842), settings, skipped, tuple(waves))


def trace() -> TraceReport:
    def run(subject: str, layers: int | None, operations: int) -> TraceRun:
        calls = (
            CallCount("mount", Effect.ATTACH, operations // 2, 0, 900.0, 80.0),
            CallCount("umount", Effect.DETACH, operations - operations // 2, 1, 90_000.0, 1_400.0),
        )
        process = ProcessCalls(1200, subject, calls)
        return TraceRun(subject, layers, ("sh", "-c", "<x>"), 0, 0.4, (process,), 1, (22,), 3, 3, None, 0, ())

    per_layer = [run("per-layer", layers, 4 + 4 * layers) for layers in (5, 50, 120)]
    others = [run(name, layers, count) for name, count in (("containerd", 24), ("flat", 2)) for layers in (5, 50, 120)]
    absent = (Absent("podman", "it is not <installed>"),)
    return TraceReport(AT, HOST, (*per_layer, *others, run("command", None, 160)), absent)


def profile() -> Profile:
    draw = random.Random(3)
    waits, samples = [], []
    for line in _STACKS.read_text().splitlines():
        if not line.startswith("#"):
            count, us, event, _, *stack = line.split()
            lock = waited_for(stack, spins=event == "spin")
            ns = max(1, int(us) * 1000 // int(count))
            waits += [
                Wait(77, "flatmount", draw.randrange(3_000_000_000), ns, lock, tuple(stack)) for _ in range(int(count))
            ]
            samples += [("flatmount", tuple(stack[draw.randrange(3) :]), True)] * (1 + int(count) // 8)
    calls = (
        CallCount("umount", Effect.DETACH, 9800, 3, 15_000_000.0, 5_580.0),
        CallCount("mount_setattr", Effect.CHANGE, 4900, 0, 61_000.0, 300.0),
    )
    taken = [
        (tenth * 100_000_000, 30 + int(400 * math.sin(tenth / 10) ** 2), tenth * 40_000, tenth * 900)
        for tenth in range(31)
    ]
    return Profile(
        taken_at=AT,
        host=HOST,
        seconds=3.0,
        command=("flatmount", "storm", "<demo>", "--strategies", "per-layer"),
        exit_code=0,
        sample_hz=199,
        waits=lock_waits(waits, frozenset((77,))),
        cpu=cpu_stacks(samples),
        wait_stacks=wait_stacks(waits),
        operations=(ProcessOperations(77, "flatmount", "/user.slice", True, calls),),
        moments=moments(taken, waits, 0, 3.0),
        missing=("the event syscalls/sys_enter_open_tree_attr",),
        lost=0,
        cost_cpu_s=0.61,
    )


def doctor() -> Diagnosis:
    findings = (
        Finding(
            "per-layer-assembly",
            Severity.CRITICAL,
            "containerd mounts the layers of images one by one",
            ("containerd [812] (/system.slice/containerd.service): 2,140 mount operations a second", "49 <each>"),
            "containerd in /system.slice/containerd.service",
            "update containerd to 2.0.7, 2.1.5 or 2.2 or later, or use flatmount's snapshotter",
            True,
        ),
        Finding(
            "table-large",
            Severity.WARNING,
            "the mount table has 6,204 mounts",
            ("by owner: kubelet 4,811, containerd 1,320, the system 73", "each new mount namespace copies them: 11 ms"),
            "kubelet",
            "look for pods with many volumes, and for volumes of pods that are gone",
            True,
        ),
        Finding(
            "topology",
            Severity.NOTE,
            "mount locks cost more on this machine (192 processors)",
            ("2 sockets: a contended lock's cache line crosses between them",),
            "the administrator",
            "keep bursts of starts within one cache domain, or make the mounts few",
            False,
        ),
    )
    unseen = ("time-outs in the journal: there is no journalctl",)
    return Diagnosis(AT, "6.18.44", 2.4, 6_204, verdict(findings, unseen), findings, unseen)


def watch() -> WatchLog:
    draw = random.Random(5)
    samples = []
    attached = detached = 0
    for second in range(60):
        rate = round(20 + 900 * max(0.0, math.sin(second / 9)) + 10 * draw.random(), 1)
        attached, detached = attached + int(rate), detached + int(0.9 * rate)
        causes = (
            CauseRate("containerd", 812, "", "", "/system.slice/containerd.service", rate * 0.8),
            CauseRate("<runc>", 0, "", "", "", rate * 0.2),
        )
        locks = (LockRate("namespace_sem", int(rate), rate / 9), LockRate("mount_lock", int(rate) // 5, rate / 400))
        samples.append(
            Sample(
                AT, 1.0, 300 + attached - detached, 300 + attached - detached, attached, detached, rate, 0.9 * rate,
                False, causes, locks if second > 4 else None, 0.04 + rate / 9000, "systemd", 0.02 + rate / 4000,
                0.004 + rate / 300_000, 0, (),
            )
        )  # fmt: skip
    return WatchLog(tuple(samples))


def bench() -> Any:
    return cpu_samples.two_sockets()


RESULTS: dict[str, Any] = {
    "storm": storm(),
    "starts": starts(),
    "trace": trace(),
    "profile": profile(),
    "doctor": doctor(),
    "watch": watch(),
    "cpu": bench(),
}


def save(name: str, path: Path) -> None:
    """Write one of them as the command line does."""
    value = RESULTS[name]
    lines = [sample.to_json() for sample in value.samples] if name == "watch" else [value.to_json()]
    if name == "cpu":
        lines = [{"schema": "flatmount.cpu-bench/1", **lines[0]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
