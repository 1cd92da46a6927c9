"""A burst: C containers of L layers started together, with real mounts in a mount namespace of its own.

The layers are small directories on a tmpfs of the burst's own, so that what is timed is the kernel's mounts and locks
and not a disk; the plans are those that root file systems are made with. User namespaces are made before the clock
starts, all containers stay mounted until the last one is done, and undoing is not timed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flatmount.cpu.noise import Disturbance, Watch, others_running, wait_until_quiet
from flatmount.cpu.results import Burst
from flatmount.errors import FlatmountError, MissingFeature, OperationFailed, UsageError
from flatmount.kernel import _native
from flatmount.kernel.executor import Executable, run_once
from flatmount.kernel.namespaces import empty_mount_namespace, enter_private_mounts
from flatmount.kernel.probes import probe
from flatmount.plan.encode import encode
from flatmount.plan.explain import kernel_name, subject
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import (
    LAYERS,
    UPPERS,
    USER_NAMESPACE,
    Mount,
    MountFlag,
    MountPlan,
    Parameter,
    Slot,
    Unmount,
    UnmountFlag,
)
from flatmount.rootfs.ranges import RangePool
from flatmount.strategies import STRATEGIES as PLANS
from flatmount.strategies import RootfsSpec, Upper

STRATEGIES = ("per-layer", "common-parent", "detached", "flat")
MOST_CONTAINERS = 1000
_FIRST_HOST_ID = 1_000_000
_IDS = 65_536
_SPARE_MOUNTS = 1_000  # left free below fs.mount-max, for the copy of the host's table that the burst starts from
_NO_TEMPLATE = -1
_PATIENCE_S = 0.1  # for a quiet moment to start in; a busy machine is measured busy


@dataclass(frozen=True, slots=True)
class BurstRun:
    """One burst as it happened. Seconds are from the moment all were let go to each container's end, sorted.

    `mount_operations` are all containers' together; `mounts_before` and `mounts_after` the burst's own mount table;
    `woken_s` is when the first thread ran.
    """

    burst: Burst
    wall_s: float
    latencies_s: tuple[float, ...]
    mount_operations: int
    mounts_before: int
    mounts_after: int
    disturbance: Disturbance
    crowded: bool
    woken_s: float

    @property
    def quiet(self) -> bool:
        """Whether nobody else wanted a processor just before or after, nor (as far as it took long enough to tell) in
        between."""
        return not self.crowded and not self.disturbance.disturbed


class Bench:
    """Layers for bursts, on a tmpfs in the calling thread's private mount namespace. Made by `stage`."""

    def __init__(self, directory: str, most_layers: int) -> None:
        self.data = f"{directory}/data"
        self._points = f"{directory}/points"
        self._background = f"{directory}/background"
        for path in (self.data, f"{self.data}/uppers", self._points, self._background):
            os.mkdir(path, 0o711)
        self._layers = tuple(f"layers/{i}/fs" for i in range(most_layers))
        for path in (*self._layers, "flat/fs"):
            _fill(f"{self.data}/{path}", path)
        self._facts = probe(self.data).facts
        self._template = empty_mount_namespace()
        self._runs = 0
        self._beside = 0

    def run(self, burst: Burst) -> BurstRun:
        """Start one burst, wait for its last container, and undo it all.

        Mounts in the calling thread's namespace, which has to be private; nothing of it is left there.
        Raises: UsageError for a burst that cannot be meant, MissingFeature, OperationFailed of the first container
        that failed.
        """
        check(burst, len(self._layers))
        self._put_beside(burst.background)
        self._runs += 1
        spec = RootfsSpec(self._layers[: burst.layers], flat="flat/fs", upper=Upper.STORE, make_target=True)
        plan = PLANS[burst.strategy](spec, self._facts)
        pool = RangePool(self.data, self._facts)
        names = [f"{self._runs}-{i}" for i in range(burst.containers)]
        try:
            return self._start(burst, plan, pool, names)
        finally:
            for name in names:
                _take_off(f"{self._points}/{name}")
                shutil.rmtree(f"{self.data}/uppers/{name}", ignore_errors=True)
            pool.close()

    def _start(self, burst: Burst, plan: MountPlan, pool: RangePool, names: list[str]) -> BurstRun:
        encoded = encode(plan)
        runs = []
        for i, name in enumerate(names):
            first = _FIRST_HOST_ID + (0 if burst.one_range else _IDS * i)
            lent = _lend(pool, Mapping.single(first, _IDS), encoded.lent)
            parameters = self._parameters(name)
            strings = tuple(os.fsencode(parameters[parameter]) for parameter in encoded.parameters)
            runs.append((tuple(lent[slot] for slot in encoded.lent), strings, (first,) * 4))
        program = _native.Program(
            encoded.records,
            encoded.strings,
            encoded.slots,
            len(encoded.lent),
            len(encoded.parameters),
            encoded.flags,
            encoded.outputs,
        )
        template = self._template.fileno() if burst.template else _NO_TEMPLATE
        crew = min(burst.admit or burst.containers, burst.containers)
        before = _native.count_mounts(0)
        with Watch() as watch:
            crowded = not wait_until_quiet(_PATIENCE_S)
            woken_ns, done_ns, outcomes = program.burst(tuple(runs), crew, burst.copies, template)
            crowded |= others_running() > 0
        after = _native.count_mounts(0)
        for name, (outcome, copy_error) in zip(names, outcomes, strict=True):
            _raise_failure(plan, self._parameters(name), outcome)
            if copy_error:
                raise FlatmountError(f"{burst}: a copy of the mount namespace failed: {os.strerror(copy_error)}")
        return BurstRun(
            burst,
            max(done_ns) / 1e9,
            tuple(ns / 1e9 for ns in sorted(done_ns)),
            sum(outcome[1] for outcome, _ in outcomes),
            before,
            after,
            watch.disturbance,
            crowded,
            woken_ns / 1e9,
        )

    def _parameters(self, name: str) -> dict[Parameter, str]:
        return {
            Parameter.TARGET: f"{self._points}/{name}",
            Parameter.UPPERS: f"{self.data}/uppers",
            Parameter.UPPER: name,
            Parameter.SCRATCH: f"{self._points}/tmp-{name}",
            Parameter.DATA: self.data,
        }

    def _put_beside(self, wanted: int) -> None:
        if wanted < self._beside:
            raise UsageError(f"{self._beside} mounts are there already", hint="ask for growing numbers")
        for i in range(self._beside, wanted):
            point = f"{self._background}/{i}"
            os.mkdir(point)
            run_once(MountPlan((Mount("none", point, "tmpfs", MountFlag.NONE, "size=4k"),)))
        self._beside = wanted


def _lend(pool: RangePool, mapping: Mapping, needed: tuple[Slot, ...]) -> dict[Slot, int]:
    shared = pool.get(mapping)
    lent = dict(pool.home.lent)
    lent[USER_NAMESPACE] = shared.namespace.fileno()
    if LAYERS in needed:
        lent[LAYERS] = shared.layers().fd
    if UPPERS in needed:
        lent[UPPERS] = pool.directory(f"{pool.data}/uppers").fd
    return lent


def _raise_failure(plan: MountPlan, parameters: dict[Parameter, str], outcome: tuple[int, int, int, int, str]) -> None:
    _, _, at, code, message = outcome
    if code:
        operation = plan.operations[min(at, len(plan.operations) - 1)]
        raise OperationFailed(
            kernel_name(operation),
            subject(operation, parameters),
            code,
            position=at,
            total=len(plan.operations),
            kernel_message=message,
        )


def _take_off(target: str) -> None:
    Executable(MountPlan((Unmount(target, UnmountFlag.DETACH),), keep_going=True)).run({}, {})
    if os.path.isdir(target):
        os.rmdir(target)


def _fill(path: str, content: str) -> None:
    os.makedirs(f"{path}/etc")
    for name in ("etc/passwd", "etc/group", "file"):
        with open(f"{path}/{name}", "w", encoding="ascii") as file:
            file.write(f"{content}\n")


def check(burst: Burst, most_layers: int) -> None:
    """Refuse, in one line, a burst that cannot be meant or that fs.mount-max would stop half-way."""
    if burst.strategy not in STRATEGIES:
        raise UsageError(f"there is no burst of strategy {burst.strategy!r}", hint=f"one of {', '.join(STRATEGIES)}")
    if not 1 <= burst.containers <= MOST_CONTAINERS:
        raise UsageError(f"{burst.containers} containers: a burst has 1 to {MOST_CONTAINERS}")
    if not 1 <= burst.layers <= most_layers:
        raise UsageError(f"{burst.layers} layers: this burst has 1 to {most_layers}")
    if burst.admit is not None and burst.admit < 1:
        raise UsageError(f"{burst.admit} containers at a time would never start", hint="admit at least 1")
    with open("/proc/sys/fs/mount-max", encoding="ascii") as file:
        most = int(file.read()) - _SPARE_MOUNTS
    live = burst.background + burst.containers * (burst.layers + 2 if burst.strategy == "per-layer" else 3)
    if live > most:
        raise UsageError(f"{burst} could have {live} mounts at once", hint=f"fs.mount-max leaves {most}")


@contextmanager
def stage(most_layers: int) -> Iterator[Bench]:
    """Put the calling thread into a private mount namespace, for good, with a bench of layers on a tmpfs.

    Nothing is seen outside it, and the tmpfs is taken off at the end. Use it through `apart`.
    Raises: MissingFeature without the privilege.
    """
    directory = tempfile.mkdtemp(prefix="flatmount-burst-")
    try:
        try:
            enter_private_mounts()
            run_once(MountPlan((Mount("flatmount-burst", directory, "tmpfs", MountFlag.NONE, "mode=0711"),)))
        except (OSError, FlatmountError) as error:
            raise MissingFeature(
                f"the burst needs a mount namespace of its own: {error}", hint="run as root, or leave it out"
            ) from error
        try:
            yield Bench(directory, most_layers)
        finally:
            run_once(MountPlan((Unmount(directory, UnmountFlag.DETACH),)))
    finally:
        os.rmdir(directory)
