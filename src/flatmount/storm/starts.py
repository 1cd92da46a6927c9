"""A storm of real containers: each engine in turn, wave after wave, from the request to the first instruction."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from flatmount.errors import FlatmountError, MissingFeature, UsageError, from_os_error
from flatmount.kernel.mounts import mount_count
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.kernel.process import owned_name
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.workplace import workplace
from flatmount.runtime.records import new_id
from flatmount.runtime.request import Attachment
from flatmount.store import Store, StoredImage
from flatmount.storm.burst import together
from flatmount.storm.containers import FIRST_HOST_ID, MOST_CONTAINERS, RANGE_SIZE
from flatmount.storm.engine import Interrupted, Progress, Stop, background_mounts, rotated, stoppable
from flatmount.storm.engines.base import Arrivals, Ask, Engine
from flatmount.storm.engines.containerd import ContainerdEngine
from flatmount.storm.engines.own import FlatmountEngine
from flatmount.storm.engines.podman import PodmanEngine
from flatmount.storm.engines.runc import RuncEngine
from flatmount.storm.host import now_utc, this_host
from flatmount.storm.limits import allow_descriptors
from flatmount.storm.probe import HealthProbe
from flatmount.storm.results import ImageFacts, LatencyMs, ProbeMs
from flatmount.storm.starts_results import Skipped, StartSettings, StartsReport, WaveResult

NAMES = ("flatmount", "flatmount-host", "runc", "runc-plain", "containerd", "podman")


@dataclass(slots=True)
class _Wave:
    begun_ns: int = 0
    ended_ns: int = 0
    latencies_ns: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


# Containers that were started and are not ended: their names, and what the engine's `undo` takes.
_Held = list[tuple[str, Any]]


def run_starts(
    store: Store,
    image: StoredImage,
    settings: StartSettings,
    *,
    facts: HostFacts,
    run: str,
    layout: str | None,
    containerd: str | None = None,
    progress: Progress,
) -> StartsReport:
    """Run the whole storm; as flatmount.storm.engine.run_storm, with real containers.

    Args:
        layout: the image as an OCI layout, for engines with image stores of their own.
        containerd: a directory with other binaries of containerd than those on PATH.

    What cannot be ended or taken down afterwards is said in the report: what was measured is not lost for it.
    Raises: FlatmountError; Interrupted.
    """
    _check(settings)
    report: StartsReport | None = None
    try:
        with ExitStack() as stack:
            report = _measure(stack, store, image, settings, facts, run, layout, containerd, progress)
    except FlatmountError as error:
        if report is None or isinstance(error, Interrupted):
            raise
        # Everything was measured, and an engine could not be taken down.
        report = replace(report, left=(*report.left, str(error)))
    return report


def _measure(
    stack: ExitStack,
    store: Store,
    image: StoredImage,
    settings: StartSettings,
    facts: HostFacts,
    run: str,
    layout: str | None,
    containerd: str | None,
    progress: Progress,
) -> StartsReport:
    standing = settings.containers * (settings.waves if settings.hold else 1)
    allow_descriptors(standing, settings.concurrency, layers=len(image.layers))
    taken_at = now_utc()
    if not settings.on_host:
        enter_private_mounts()
    skipped: list[Skipped] = []
    elsewhere = (f"/run/{owned_name('fm')}",) if "podman" in settings.engines else ()
    stop = stack.enter_context(stoppable())
    place = stack.enter_context(workplace(run, "storm", elsewhere=elsewhere))
    background_mounts(place, settings.background)
    arrivals = stack.enter_context(Arrivals(f"{place}/first"))
    short = elsewhere[0] if elsewhere else place
    makers = _makers(store, image, run, facts, arrivals.directory, place, short, layout, containerd)
    engines: dict[str, Engine] = {}
    for name in settings.engines:
        progress(f"{name}: getting ready")
        try:
            engines[name] = stack.enter_context(makers[name]())
        except (MissingFeature, UsageError) as missing:
            skipped.append(Skipped(name, missing.line()))
        stop.check()
    probe = stack.enter_context(HealthProbe()) if settings.probe else None
    waves: list[WaveResult] = []
    left: list[str] = []
    for repeat in range(settings.repeats):
        for name in rotated(tuple(engines), repeat) if engines else ():
            ran, problems = _engine_waves(engines[name], name, repeat, settings, arrivals, probe, stop, progress)
            waves += ran
            left += problems
    named = ImageFacts(image.name or image.digest, len(image.layers), image.files)
    own = engines.get("flatmount")
    template = own.template_mounts if isinstance(own, FlatmountEngine) else None
    return StartsReport(taken_at, this_host(), named, settings, tuple(skipped), tuple(waves), template, tuple(left))


def _check(settings: StartSettings) -> None:
    unknown = next((name for name in settings.engines if name not in NAMES), None)
    if unknown is not None:
        raise UsageError(f"there is no engine {unknown!r}", hint=f"one of {', '.join(NAMES)}")
    if settings.containers * settings.waves > MOST_CONTAINERS:
        raise UsageError("so many containers need more host ids than there are", hint=f"at most {MOST_CONTAINERS}")


def _makers(
    store: Store,
    image: StoredImage,
    run: str,
    facts: HostFacts,
    arrivals: str,
    place: str,
    short: str,
    layout: str | None,
    containerd: str | None,
) -> dict[str, Callable[[], Any]]:
    def of_layout(make: Callable[[str], Engine]) -> Engine:
        if layout is None:
            raise MissingFeature("it needs the image as an OCI layout", hint="--layout names it")
        return make(layout)

    def own(attachment: Attachment) -> Engine:
        return FlatmountEngine(store, image, run, facts, arrivals, attachment)

    return {
        "flatmount": lambda: own(Attachment.PRIVATE),
        "flatmount-host": lambda: own(Attachment.HOST),
        "runc": lambda: RuncEngine(store, image, run, facts, arrivals, place, plain=False),
        "runc-plain": lambda: RuncEngine(store, image, run, facts, arrivals, place, plain=True),
        "containerd": lambda: of_layout(
            lambda known: ContainerdEngine(image, known, arrivals, place, directory=containerd)
        ),
        "podman": lambda: of_layout(lambda known: PodmanEngine(known, arrivals, short)),
    }


def _engine_waves(
    engine: Engine,
    name: str,
    repeat: int,
    settings: StartSettings,
    arrivals: Arrivals,
    probe: HealthProbe | None,
    stop: Stop,
    progress: Progress,
) -> tuple[list[WaveResult], list[str]]:
    """All waves of an engine in one repeat, and what of it could not be ended, a line each.

    Whatever it started is undone afterwards, also after an error.
    """
    held: _Held = []
    results: list[WaveResult] = []
    left: list[str] = []
    tag = new_id()
    ran = False
    try:
        for number in range(settings.waves):
            progress(f"repeat {repeat + 1} of {settings.repeats}, {name}: wave {number + 1} of {settings.waves}")
            running = len(held)
            asks = _asks(f"{tag}-{number}", number * settings.containers, settings.containers)
            gc.collect()
            before = mount_count()
            wave = _one_wave(engine, asks, held, settings, arrivals, stop)
            standing = mount_count()
            rounds = probe.between(wave.begun_ns, wave.ended_ns).rounds if probe is not None else ()
            undone = None if settings.hold else _undo(engine, held, settings.concurrency, left)
            results.append(_result(name, repeat, number, running, wave, settings, rounds, before, standing, undone))
            stop.check()
        ran = True
    finally:
        progress(f"{name}: undoing")
        _undo(engine, held, settings.concurrency, left)
        if left and not ran:
            raise FlatmountError(f"{len(left)} containers could not be undone: {left[0]}")
    return results, [f"{name}: {line}" for line in left]


def _asks(tag: str, first: int, count: int) -> list[Ask]:
    return [
        Ask(f"s{tag}-{i}", Mapping.single(FIRST_HOST_ID + (first + i) * RANGE_SIZE, RANGE_SIZE), holds=True)
        for i in range(count)
    ]


def _one_wave(
    engine: Engine, asks: Sequence[Ask], held: _Held, settings: StartSettings, arrivals: Arrivals, stop: Stop
) -> _Wave:
    wave = _Wave()
    waiting = iter(asks)
    lock = threading.Lock()

    def one(ask: Ask) -> None:
        asked_ns = time.monotonic_ns()
        started = engine.start(ask)
        with lock:
            held.append((ask.name, started))
        first_ns = arrivals.wait(ask.name, asked_ns / 1e9 + settings.timeout_s)
        with lock:
            wave.latencies_ns.append(first_ns - asked_ns)

    def requester() -> None:
        while not stop.event.is_set():
            with lock:
                ask = next(waiting, None)
            if ask is None:
                return
            try:
                one(ask)
            except (FlatmountError, OSError) as error:
                told = from_os_error(error, "start") if isinstance(error, OSError) else error
                with lock:
                    wave.failures.append(str(told).replace(ask.name, "NAME"))

    wave.begun_ns = together(min(settings.concurrency, len(asks)), requester, stop.event)
    wave.ended_ns = time.monotonic_ns()
    return wave


def _undo(engine: Engine, held: _Held, concurrency: int, left: list[str]) -> float:
    """End everything in `held`; empties it. Says in `left` what could not be ended. Returns seconds."""

    def undoer() -> None:
        while True:
            try:
                name, started = held.pop()
            except IndexError:
                return
            try:
                engine.undo(started)
            except (FlatmountError, OSError) as error:
                left.append(f"{name} could not be ended: {error}")

    begun = time.monotonic()
    if held:
        # Few at a time: ending a container is the kernel's work, and many threads only wait for each other.
        together(min(concurrency, 2 * (os.cpu_count() or 1)), undoer, threading.Event())
    return time.monotonic() - begun


def _result(
    name: str,
    repeat: int,
    number: int,
    running: int,
    wave: _Wave,
    settings: StartSettings,
    rounds: Sequence[tuple[float, float]],
    before: int,
    standing: int,
    undone: float | None,
) -> WaveResult:
    wall_s = (wave.ended_ns - wave.begun_ns) / 1e9
    latencies = tuple(round(value / 1e6, 3) for value in wave.latencies_ns)
    return WaveResult(
        engine=name,
        repeat=repeat,
        wave=number,
        running_before=running,
        containers=settings.containers,
        failed=len(wave.failures),
        failures=tuple(dict.fromkeys(wave.failures))[:5],
        wall_s=round(wall_s, 4),
        starts_per_s=round(len(latencies) / wall_s, 3),
        latency_ms=LatencyMs.of(latencies),
        probe_ms=ProbeMs.of(round(ms, 3) for _, ms in rounds),
        mounts_before=before,
        mounts_standing=standing,
        undo_s=None if undone is None else round(undone, 4),
        latencies_ms=latencies,
    )
