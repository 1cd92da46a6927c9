"""From a specification and a strategy to root file systems, one for each container, and their undoing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter_ns
from types import TracebackType
from typing import NamedTuple

from flatmount.errors import FlatmountError, InUse, OperationFailed
from flatmount.kernel.executor import Executable, Job, Outcome
from flatmount.kernel.tree import remove_tree
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import (
    IMAGE_ROOT,
    LAYERS,
    UPPERS,
    USER_NAMESPACE,
    MountPlan,
    Operation,
    Parameter,
    Rmdir,
    Slot,
    Unmount,
    UnmountFlag,
)
from flatmount.rootfs.ranges import Pin, Range, RangePool
from flatmount.strategies import (
    BY_OPTIONS,
    PINNING,
    STRATEGIES,
    Attach,
    Ids,
    RootfsSpec,
    Upper,
    flat,
    require_plain_paths,
    upper_ids,
)

_UNATTACH = Unmount((Parameter.TARGET,), UnmountFlag.NOFOLLOW)


class Phases(NamedTuple):
    """Nanoseconds of an assembly: the range (made or found), what the run is given, and the run itself."""

    range_ns: int
    plan_ns: int
    execute_ns: int


class Request(NamedTuple):
    """One of many root file systems that are built together; arguments as of Assembler.assemble."""

    mapping: Mapping
    name: str
    target: str = ""


@dataclass(slots=True)
class Rootfs:
    """One root file system. A context manager: leaving it undoes it, and removes the upper if it is ephemeral.

    `target` is None and `descriptor` the caller's when it was attached nowhere.
    """

    name: str
    mapping: Mapping
    target: str | None
    descriptor: int | None
    outcome: Outcome
    phases: Phases
    range: Range
    ephemeral: bool
    _assembler: Assembler = field(repr=False)

    def undo(self) -> Outcome | None:
        """Take the root file system off; remove its target if the plan made it, and the upper if it is ephemeral.

        Undoing twice is fine. Raises: InUse where something still uses it; nothing is removed then.
        """
        return self._assembler.take_off(self)

    def __enter__(self) -> Rootfs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class Assembler:
    """Makes root file systems of one image by one strategy. The plan is made once and runs for each container.

    `pins` says whether a range's parent is pinned for it, and `image` is the EROFS image of which a range has a clone.

    Safe to use from any number of threads.
    """

    def __init__(
        self, spec: RootfsSpec, strategy: str, pool: RangePool, *, uppers: str, scratch: str, ephemeral: bool = False
    ) -> None:
        """Make and check the plan.

        Args:
            spec: what to build.
            strategy: a name of flatmount.strategies.STRATEGIES (`auto` was resolved before).
            pool: the ranges to share; its store is the one `spec` speaks of.
            uppers: the directory for uppers, absolute; the store's own for Upper.STORE.
            scratch: beginning of temporary names (an existing directory and a prefix), absolute.
            ephemeral: uppers go with their root file systems.

        Raises: UsageError, MissingFeature, TooManyLayers where the strategy cannot build it here.
        """
        if strategy in BY_OPTIONS:
            require_plain_paths(strategy, scratch, *([] if spec.upper is Upper.NONE else [uppers]))
        self.spec = spec
        self.strategy = strategy
        self._executable = _executable(strategy, spec, pool.facts)
        self.plan = self._executable.plan
        self.ids = upper_ids(spec, pool.facts) if strategy in PINNING else Ids.HOST
        self.ephemeral = ephemeral
        self.uppers = uppers
        self._pool = pool
        self._scratch = scratch
        self._given = frozenset(self._executable.parameters)
        self.pins = LAYERS in self._executable.needs or Parameter.LAYERS_AT in self._given
        self.image = spec.erofs if strategy == flat.NAME else None
        self._uppers = os.fsencode(uppers)
        self._data = os.fsencode(pool.data)
        undoing: list[Operation] = [_UNATTACH] if spec.attach is Attach.HOST else []
        if undoing and spec.make_target:
            undoing.append(Rmdir((Parameter.TARGET,)))
        self._undo = Executable(MountPlan(tuple(undoing), keep_going=True))
        self._writes = spec.upper is not Upper.NONE
        self._uppers_pin: Pin | None = None

    def assemble(self, mapping: Mapping, name: str, target: str = "") -> Rootfs:
        """Build one root file system.

        Args:
            mapping: the container's ids; its range's namespace and parent are made on first use.
            name: the container's name, one path component; its upper's directory is called so.
            target: where to attach, absolute; made by the plan if the specification says so.

        Raises: OperationFailed, with everything undone; MappingError where the image's root has no host id; UsageError
        for a name that the strategy cannot pass on.
        """
        asked_ns = perf_counter_ns()
        shared = self._pool.get(mapping)
        lent = self._lend(shared)
        lent_ns = perf_counter_ns()
        job = self._job(shared, lent, name, target)
        planned_ns = perf_counter_ns()
        try:
            outcome = self._executable.run_in_order(*job)
        except OperationFailed as failure:
            self._after_failure(failure, name)
            raise
        phases = Phases(lent_ns - asked_ns, planned_ns - lent_ns, perf_counter_ns() - planned_ns)
        return self._made(outcome, phases, shared, name, target)

    def assemble_many(self, requests: Sequence[Request], *, at_once: int) -> list[Rootfs | FlatmountError]:
        """Build many root file systems, `at_once` at a time, with Python out of the way between first and last.

        For bursts: threads that each call `assemble` wait for each other's turns at the interpreter, which can cost as
        much as the kernel's part does. Ranges that are not there yet are made first, as many at a time.

        Returns, in the order of the requests, what was made; a failure, everything of it undone, in place of what was
        not. Raises: FlatmountError where a range cannot be made, UsageError for a name that the
        strategy cannot pass on; nothing is assembled then.
        """
        asked_ns = perf_counter_ns()
        mappings = (request.mapping for request in requests)
        ranges = self._pool.prepare(mappings, pinned=self.pins, image=self.image, at_once=at_once)
        lent_ns = perf_counter_ns()
        jobs = [
            self._job(shared, self._lend(shared), request.name, request.target)
            for shared, request in zip(ranges, requests, strict=True)
        ]
        planned_ns = perf_counter_ns()
        outcomes = self._executable.run_many(jobs, at_once=at_once)
        # What all of them shared in: each is told an equal part.
        share = max(len(requests), 1)
        before = ((lent_ns - asked_ns) // share, (planned_ns - lent_ns) // share)
        made: list[Rootfs | FlatmountError] = []
        for outcome, shared, request in zip(outcomes, ranges, requests, strict=True):
            if outcome.failure is not None:
                self._after_failure(outcome.failure, request.name)
                made.append(outcome.failure)
            else:
                phases = Phases(*before, sum(outcome.nanoseconds))
                made.append(self._made(outcome, phases, shared, request.name, request.target))
        return made

    def _job(self, shared: Range, lent: tuple[int, ...], name: str, target: str) -> Job:
        if self.strategy in BY_OPTIONS:
            require_plain_paths(self.strategy, name)
        root = self.spec.root
        values = {
            Parameter.TARGET: os.fsencode(target),
            Parameter.UPPERS: self._uppers,
            Parameter.UPPER: os.fsencode(name),
            Parameter.SCRATCH: os.fsencode(self._scratch + name),
            Parameter.DATA: self._data,
        }
        if Parameter.LAYERS_AT in self._given:
            values[Parameter.LAYERS_AT] = os.fsencode(shared.layers().place)
        if Parameter.IMAGE_AT in self._given and self.image is not None:
            values[Parameter.IMAGE_AT] = os.fsencode(shared.image(self.image).place)
        if Parameter.UPPERS_AT in self._given:
            values[Parameter.UPPERS_AT] = os.fsencode(self._pinned_uppers().place)
        parameters = tuple([values[parameter] for parameter in self._executable.parameters])
        return lent, parameters, shared.ids(root.uid, root.gid)

    def _made(self, outcome: Outcome, phases: Phases, shared: Range, name: str, target: str) -> Rootfs:
        descriptor = outcome.outputs[0] if outcome.outputs else None
        attached = target if descriptor is None else None
        return Rootfs(name, shared.mapping, attached, descriptor, outcome, phases, shared, self.ephemeral, self)

    def _after_failure(self, failure: OperationFailed, name: str) -> None:
        # overlayfs may have written into the work directory already, so that the undoing's rmdir could not take it.
        # Where the undoing itself failed, a mount may still stand on the upper.
        if self._writes and self.spec.fresh_upper and not _already_there(failure) and not failure.not_undone:
            self._remove_upper(name)

    def _lend(self, shared: Range) -> tuple[int, ...]:
        return tuple([self._descriptor(slot, shared) for slot in self._executable.needs])

    def _descriptor(self, slot: Slot, shared: Range) -> int:
        if slot is LAYERS:
            return shared.layers().fd
        if slot is USER_NAMESPACE:
            return shared.namespace.fileno()
        if slot is IMAGE_ROOT and self.image is not None:
            return shared.image(self.image).fd
        if slot is UPPERS:
            return self._pinned_uppers().fd
        return self._pool.home.lent[slot]

    def _pinned_uppers(self) -> Pin:
        # Held here: a pool that is closed meanwhile must not take the descriptor from under a run.
        if self._uppers_pin is None:
            self._uppers_pin = self._pool.directory(self.uppers)
        return self._uppers_pin

    def take_off(self, rootfs: Rootfs) -> Outcome | None:
        """Undo a root file system of this assembler; see Rootfs.undo."""
        outcome = None
        if rootfs.descriptor is not None:
            os.close(rootfs.descriptor)
            rootfs.descriptor = None
        if rootfs.target is not None:
            outcome = self._undo.run({}, {Parameter.TARGET: rootfs.target})
            if outcome.failure is not None and outcome.failure.operation == "umount2":
                raise InUse(str(outcome.failure), hint=outcome.failure.hint)
            rootfs.target = None
        if rootfs.ephemeral and self._writes:
            rootfs.ephemeral = False
            self._remove_upper(rootfs.name)
        return outcome

    def _remove_upper(self, name: str) -> None:
        parent = os.open(self.uppers, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                remove_tree(parent, name)
        finally:
            os.close(parent)


@lru_cache(maxsize=128)
def _executable(strategy: str, spec: RootfsSpec, facts: HostFacts) -> Executable:
    """The plan of equal specifications is made, encoded and checked once in a process."""
    return Executable(STRATEGIES[strategy](spec, facts))


def _already_there(failure: OperationFailed) -> bool:
    """Whether the plan met an upper of that name that is somebody else's."""
    return failure.operation == "mkdir" and failure.position == 0
