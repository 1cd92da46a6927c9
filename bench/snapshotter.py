"""The snapshot service: what its calls cost beside a service that does nothing and beside containerd's own, and what a
start through `ctr` costs in each form, alone and beside ten thousand mounts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from bench.measure import Figures, ratio, show_ratio
from flatmount.kernel.executor import run_once
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.tiny_image import NAME, PROGRAM, write_tiny_image
from flatmount.plan.operations import Mount, MountFlag, MountPlan, Unmount, UnmountFlag
from flatmount.snapshotter.engine import Engine, engine_place, running_engine
from flatmount.snapshotter.wire import snapshots_pb2 as wire

CALLS = (
    "one cycle is Prepare, Mounts and Remove of a container on an image of 50 layers; client and service are processes "
    "of their own on the same processors; the floor is a service on the same library that does nothing; 3 rounds "
    "interleaved, medians"
)
STARTS = "`ctr run --rm` of a program that ends at once, 50 layers, one user range; medians of 15, forms interleaved"
IN_FLIGHT = (1, 10, 50)
ROUNDS, CYCLES, LAYERS, MANY, RUNS = 3, 400, 50, 10_000, 15
FLOOR, OURS, MAPPED, BUILT_IN = "floor", "flatmount", "flatmount, mapped", "containerd's overlayfs"


def run() -> None:
    """The whole section."""
    enter_private_mounts()
    with engine_place() as place:
        write_tiny_image(f"{place}/image", LAYERS)
        subprocess.run(["tar", "-C", f"{place}/image", "-cf", f"{place}/image.tar", "."], check=True)
        _calls(place)
        _starts(place)
    print()


def _calls(place: str) -> None:
    print(CALLS)
    work = f"{place}/calls"
    os.mkdir(work, 0o711)
    with running_engine(work) as engine, _floor(f"{work}/floor.sock") as floor:
        engine.take_image(f"{place}/image.tar", NAME)
        engine.take_image(f"{place}/image.tar", NAME, snapshotter="overlayfs")
        own, theirs = _top(engine.snapshotter_socket, "flatmount"), _top(engine.socket, "overlayfs")
        engine.ctr("run", "--rm", "--snapshotter", "flatmount", NAME, "first", PROGRAM)
        time.sleep(2)
        ways = {
            FLOOR: (floor, "", "none", "plain"),
            OURS: (engine.snapshotter_socket, own, "flatmount", "plain"),
            MAPPED: (engine.snapshotter_socket, own, "flatmount", "mapped"),
            BUILT_IN: (engine.socket, theirs, "overlayfs", "plain"),
        }
        seen: dict[tuple[str, int], list[dict[str, float]]] = {}
        for turn in range(ROUNDS):
            for in_flight in IN_FLIGHT:
                names = list(ways)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    socket, parent, snapshotter, mapped = ways[name]
                    words = (socket, str(in_flight), str(CYCLES), parent, snapshotter, mapped)
                    command = [sys.executable, "-m", "bench.snapshot_client", *words]
                    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                    seen.setdefault((name, in_flight), []).append(json.loads(done.stdout))
    for in_flight in IN_FLIGHT:
        print(f"  {in_flight} in flight: calls a second, p50 and p99 of a cycle in ms")
        figures = {name: _figures(seen[name, in_flight]) for name in ways}
        for name, (rate, p50, p99) in figures.items():
            print(f"    {name:<26} {rate.median:8.0f}   {p50.median:8.1f}   {p99.median:8.1f}")
        show_ratio(f"p99 of a cycle, {OURS} against the floor", ratio(figures[OURS][2], figures[FLOOR][2]))
        show_ratio(f"p99 of a cycle, {OURS} against {BUILT_IN}", ratio(figures[OURS][2], figures[BUILT_IN][2]))


def _figures(rounds: list[dict[str, float]]) -> tuple[Figures, Figures, Figures]:
    rate, p50, p99 = (Figures(tuple(r[k] for r in rounds)) for k in ("calls_per_second", "p50_ms", "p99_ms"))
    return rate, p50, p99


def _starts(place: str) -> None:
    print(STARTS)
    engines: dict[str, Engine] = {}
    medians: dict[tuple[str, int], float] = {}
    seen: dict[tuple[str, int], list[float]] = {}
    forms = ("overlay", "bind", "helper")
    with _several(place, forms, engines):
        for many in (0, MANY):
            with _beside(f"{place}/many", many):
                for number in range(RUNS):
                    for form in (*forms, BUILT_IN):
                        seen.setdefault((form, many), []).append(_one_start(engines, form, number + many))
    for key, values in seen.items():
        medians[key] = statistics.median(values)
    for form in (*forms, BUILT_IN):
        print(f"    {form:<26} {medians[form, 0]:8.0f} ms alone   {medians[form, MANY]:8.0f} ms beside {MANY} mounts")
    for form in forms[1:]:
        for many in (0, MANY):
            figures = Figures(tuple(seen[form, many])), Figures(tuple(seen["overlay", many]))
            show_ratio(f"a start, {form} against overlay, {many} mounts", ratio(*figures))


@contextmanager
def _several(place: str, forms: tuple[str, ...], engines: dict[str, Engine]) -> Iterator[None]:
    """An engine for each form, one inside the other."""
    if not forms:
        yield
        return
    work = f"{place}/{forms[0]}"
    os.mkdir(work, 0o711)
    with running_engine(work, form=forms[0]) as engine:
        engine.take_image(f"{place}/image.tar", NAME)
        if forms[0] == "overlay":
            engine.take_image(f"{place}/image.tar", NAME, snapshotter="overlayfs")
        engine.ctr("run", "--rm", "--snapshotter", "flatmount", NAME, "first", PROGRAM)
        engines[forms[0]] = engine
        with _several(place, forms[1:], engines):
            yield


def _one_start(engines: dict[str, Engine], form: str, number: int) -> float:
    engine = engines["overlay" if form == BUILT_IN else form]
    snapshotter = "overlayfs" if form == BUILT_IN else "flatmount"
    mapping = f"0:{1 << 20}:65536"
    # containerd 1.x has no user ranges for its own overlayfs but by a copy of the image: it starts without one.
    mapped = () if form == BUILT_IN else ("--uidmap", mapping, "--gidmap", mapping, "--remap-labels")
    command = engine.command(
        "run", "--rm", "--snapshotter", snapshotter, *mapped, NAME, f"s-{form[:7]}-{number}", PROGRAM
    )
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return (time.perf_counter() - begun) * 1e3


@contextmanager
def _beside(path: str, many: int) -> Iterator[None]:
    """So many more mounts in the table, on a tmpfs that goes with all of them."""
    os.makedirs(path, exist_ok=True)
    if not many:
        yield
        return
    run_once(MountPlan((Mount("many", path, "tmpfs", MountFlag.NONE, ""),)))
    try:
        for number in range(many):
            os.mkdir(f"{path}/{number}")
            run_once(MountPlan((Mount(f"{path}/{number}", f"{path}/{number}", "", MountFlag.BIND, ""),)))
        yield
    finally:
        run_once(MountPlan((Unmount(path, UnmountFlag.DETACH),)))


@contextmanager
def _floor(socket: str) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-m", "bench.snapshot_client", socket, "SERVE"])
    try:
        deadline = time.monotonic() + 20
        while not os.path.exists(socket) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield socket
    finally:
        process.terminate()
        process.wait()


def _top(socket: str, snapshotter: str) -> str:
    """The committed snapshot that has no other on it: the image."""
    request = wire.ListRequest(snapshotter=snapshotter, filters=["kind==committed"])
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        call = channel.unary_stream(
            "/containerd.services.snapshots.v1.Snapshots/List",
            wire.ListRequest.SerializeToString,
            wire.ListResponse.FromString,
        )
        blocks = call(request, timeout=20, metadata=(("containerd-namespace", "default"),))
        infos = [info for block in blocks for info in block.info]
    parents = {info.parent for info in infos}
    (top,) = (info.name for info in infos if info.name not in parents)
    return str(top)
