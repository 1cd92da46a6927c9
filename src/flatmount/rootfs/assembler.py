"""From a specification and a strategy to root file systems, one for each container, and their undoing."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter_ns
from types import TracebackType

from flatmount.errors import InUse, OperationFailed
from flatmount.kernel.executor import Executable, Outcome
from flatmount.kernel.tree import remove_tree
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import (
    HELPER,
    HOME,
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
from flatmount.rootfs.ranges import Range, RangePool
from flatmount.strategies import STRATEGIES, Attach, Ids, RootfsSpec, Upper, upper_ids

_UNATTACH = Unmount((Parameter.TARGET,), UnmountFlag.NOFOLLOW)
_PINNING = ("detached", "flat")


@dataclass(frozen=True, slots=True)
class Phases:
    """Nanoseconds of an assembly: the range (made or found), what the run is given, and the run itself."""

    range_ns: int
    plan_ns: int
    execute_ns: int


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
        """
        self.spec = spec
        self.strategy = strategy
        self.plan = STRATEGIES[strategy](spec, pool.facts)
        self.ids = upper_ids(spec, pool.facts) if strategy in _PINNING else Ids.HOST
        self.ephemeral = ephemeral
        self.uppers = uppers
        self._pool = pool
        self._scratch = scratch
        self._executable = Executable(self.plan)
        self._needs = frozenset(self._executable.needs)
        undoing: list[Operation] = [_UNATTACH] if spec.attach is Attach.HOST else []
        if undoing and spec.make_target:
            undoing.append(Rmdir((Parameter.TARGET,)))
        self._undo = Executable(MountPlan(tuple(undoing), keep_going=True))
        self._writes = spec.upper is not Upper.NONE

    @property
    def needs(self) -> frozenset[Slot]:
        """The descriptors that its plan is lent."""
        return self._needs

    def assemble(self, mapping: Mapping, name: str, target: str = "") -> Rootfs:
        """Build one root file system.

        Args:
            mapping: the container's ids; its range's namespace and parent are made on first use.
            name: the container's name, one path component; its upper's directory is called so.
            target: where to attach, absolute; made by the plan if the specification says so.

        Raises: OperationFailed, with everything undone; MappingError where the image's root has no host id.
        """
        spec = self.spec
        asked_ns = perf_counter_ns()
        shared = self._pool.get(mapping)
        lent = self._lend(shared)
        lent_ns = perf_counter_ns()
        uid = mapping.host_uid(spec.root.uid)
        gid = mapping.host_gid(spec.root.gid)
        ids = (mapping.uids[0].host, mapping.gids[0].host, uid, gid)
        parameters = {
            Parameter.TARGET: target,
            Parameter.UPPERS: self.uppers,
            Parameter.UPPER: name,
            Parameter.SCRATCH: self._scratch + name,
            Parameter.DATA: self._pool.data,
        }
        planned_ns = perf_counter_ns()
        try:
            outcome = self._executable.run(lent, parameters, ids)
        except OperationFailed as failure:
            # overlayfs may have written into the work directory already, so that rmdir could not take it.
            if self._writes and spec.fresh_upper and not _already_there(failure):
                self._remove_upper(name)
            raise
        phases = Phases(lent_ns - asked_ns, planned_ns - lent_ns, perf_counter_ns() - planned_ns)
        descriptor = outcome.outputs[0] if outcome.outputs else None
        attached = target if descriptor is None else None
        return Rootfs(name, mapping, attached, descriptor, outcome, phases, shared, self.ephemeral, self)

    def _lend(self, shared: Range) -> dict[Slot, int]:
        needs = self._needs
        lent = dict(self._pool.home.lent) if HELPER in needs or HOME in needs else {}
        if USER_NAMESPACE in needs:
            lent[USER_NAMESPACE] = shared.namespace.fileno()
        if LAYERS in needs:
            lent[LAYERS] = shared.layers()
        if UPPERS in needs:
            lent[UPPERS] = self._pool.directory(self.uppers)
        return lent

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


def _already_there(failure: OperationFailed) -> bool:
    """Whether the plan met an upper of that name that is somebody else's."""
    return failure.operation == "mkdir" and failure.position == 0
