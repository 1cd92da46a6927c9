"""The snapshot service: what its calls cost beside a service that does nothing and beside containerd's own, and what a
start through `ctr` costs in each form, alone and beside ten thousand mounts."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import grpc

from bench.clients import (
    CALLS,
    Load,
    Served,
    Service,
    build_client,
    build_floor_service,
    build_go_client,
    call,
    grpcio_floor,
    serving,
)
from bench.measure import Figures, ratio, show_ratio
from flatmount.kernel.executor import run_once
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.tiny_image import NAME, PROGRAM, write_tiny_image
from flatmount.plan.operations import Mount, MountFlag, MountPlan, Unmount, UnmountFlag
from flatmount.snapshotter.engine import Engine, engine_place, running_engine
from flatmount.snapshotter.wire import snapshots_pb2 as wire

METHOD = """\
One cycle is Prepare, Mounts and Remove of a container on an image of 50 layers. Client and service are processes of
their own on the same processors; a floor is a service that does nothing. In a burst, 50 cycles begin at once and the
next 50 when the last has ended. Medians of 3 interleaved rounds: calls a second, ms of a cycle and of each call, and us
of processor time that the client itself takes for a call. On tmpfs, and on the disk of /var/tmp."""
STARTS = "`ctr run --rm` of a program that ends at once, 50 layers, one user range; medians of 15, forms interleaved"
ROUNDS, LAYERS, MANY, RUNS = 3, 50, 10_000, 15
FLOOR, GRPCIO, OURS, MAPPED = "floor on libnghttp2", "floor on grpcio", "flatmount", "flatmount, mapped"
BUILT_IN = "containerd's overlayfs"
LOADS = {
    "1 in flight": Load(1, 500),
    "10 in flight": Load(10, 1000),
    "50 in flight": Load(50, 1000),
    "bursts of 50": Load(50, 1000, burst=True),
}
LIGHT, CONTAINERDS = "a client on libnghttp2", "a client on grpc-go, as containerd is"
AIMED_AT = "50 in flight"
GO_LOADS = (AIMED_AT, "bursts of 50")
TARGET_MS = 5


def run(part: str = "") -> None:
    """The whole section, or one part of it."""
    parts = {"calls": _calls, "starts": _starts}
    if part and part not in parts:
        sys.exit(f"bench: snapshotter has no part {part!r}; there are {', '.join(parts)}")
    enter_private_mounts()
    with engine_place() as place:
        write_tiny_image(f"{place}/image", LAYERS)
        subprocess.run(["tar", "-C", f"{place}/image", "-cf", f"{place}/image.tar", "."], check=True)
        for name in [part] if part else parts:
            parts[name](place)
    print()


def _calls(place: str) -> None:
    print(METHOD)
    clients = {LIGHT: build_client(place), CONTAINERDS: build_go_client(place)}
    work = f"{place}/memory"
    os.mkdir(work)
    run_once(MountPlan((Mount("calls", work, "tmpfs", MountFlag.NONE, "mode=0711"),)))
    try:
        _calls_on(place, work, "tmpfs", clients, {LIGHT: tuple(LOADS), CONTAINERDS: GO_LOADS})
    finally:
        run_once(MountPlan((Unmount(work, UnmountFlag.DETACH),)))
    work = f"{place}/disk"
    os.mkdir(work, 0o711)
    _calls_on(place, work, "the disk", clients, {LIGHT: GO_LOADS})


def _calls_on(
    place: str, work: str, medium: str, clients: Mapping[str, str], wanted: Mapping[str, Sequence[str]]
) -> None:
    floors = [build_floor_service(place), f"{work}/floor.sock"], grpcio_floor(f"{work}/grpcio.sock")
    with (
        running_engine(work) as engine,
        serving(floors[0], f"{work}/floor.sock") as floor,
        serving(floors[1], f"{work}/grpcio.sock") as grpcio,
    ):
        engine.take_image(f"{place}/image.tar", NAME)
        engine.take_image(f"{place}/image.tar", NAME, snapshotter="overlayfs")
        own, theirs = _top(engine.snapshotter_socket, "flatmount"), _top(engine.socket, "overlayfs")
        engine.ctr("run", "--rm", "--snapshotter", "flatmount", NAME, "first", PROGRAM)
        time.sleep(2)
        ways = {
            FLOOR: Service(floor, "", "none"),
            GRPCIO: Service(grpcio, "", "none"),
            OURS: Service(engine.snapshotter_socket, own, "flatmount"),
            MAPPED: Service(engine.snapshotter_socket, own, "flatmount", mapped=True),
            BUILT_IN: Service(engine.socket, theirs, "overlayfs"),
        }
        for client, loads in wanted.items():
            for load in loads:
                seen: dict[str, list[Served]] = {name: [] for name in ways}
                for turn in range(ROUNDS):
                    names = list(ways)
                    for name in names[turn % len(names) :] + names[: turn % len(names)]:
                        seen[name].append(call(clients[client], ways[name], LOADS[load]))
                _show_calls(f"{medium}, {client}, {load}", seen, target=client == LIGHT and load in GO_LOADS)


def _show_calls(what: str, seen: Mapping[str, Sequence[Served]], *, target: bool) -> None:
    columns = ("calls/s", "p50", "p99", "max", *(f"{name} p99" for name in CALLS), "client us")
    print(f"  {what}")
    print(f"    {'':<24}" + "".join(f"{column:>13}" for column in columns))
    for name, rounds in seen.items():
        rows = [(r.calls_per_second, r.p50_ms, r.p99_ms, r.max_ms, *r.each_p99_ms, r.cpu_us_per_call) for r in rounds]
        medians = [statistics.median(values) for values in zip(*rows, strict=True)]
        print(f"    {name:<24}{medians[0]:13.0f}" + "".join(f"{value:13.2f}" for value in medians[1:]))
    p99 = {name: Figures(tuple(r.p99_ms for r in rounds)) for name, rounds in seen.items()}
    if target:
        for name in (OURS, MAPPED):
            slowest = Figures(tuple(max(r.each_p99_ms) for r in seen[name]))
            show_ratio(f"p99 of a cycle of three calls, {name}, ms", p99[name], target=f"< {TARGET_MS}")
            show_ratio(f"p99 of the slowest of the calls, {name}, ms", slowest, target=f"< {TARGET_MS}")
    for name, other in ((OURS, FLOOR), (OURS, GRPCIO), (OURS, BUILT_IN), (MAPPED, BUILT_IN)):
        show_ratio(f"p99 of a cycle, {name} against {other}", ratio(p99[name], p99[other]))


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
