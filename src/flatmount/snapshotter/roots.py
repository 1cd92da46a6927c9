"""Root file systems that are assembled before containerd asks for them: form `bind`.

One overlay for each container at RUN/roots/NUMBER, made by the usual assembler from the pinned parent of its range.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

from flatmount.errors import InUse
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import read_table
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import MountPlan, Unmount, UnmountFlag
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.ranges import RangePool
from flatmount.snapshotter.model import Snapshot
from flatmount.strategies import Attach, RootfsSpec, Upper

# A container without a user namespace of its own sees every id as it is.
_IDENTITY = Mapping.single(0, 2**32 - 1)


class Roots:
    """The assembled root file systems of one store. Safe to use from any number of threads.

    Mounts are made in the mount namespace of the thread that made the object, which must be containerd's.
    """

    def __init__(self, data: str, run: str, facts: HostFacts) -> None:
        """Serve the store whose data directory is `data`, below the run directory `run`; both absolute."""
        self._pool = RangePool(data, facts)
        self._snapshots = os.path.join(data, "snapshots")
        self._place = os.path.join(run, "roots")
        self._mounted: set[int] = set()
        self._gone: set[int] = set()
        self._lock = threading.Lock()
        os.makedirs(self._place, mode=0o700, exist_ok=True)

    @property
    def mounted(self) -> int:
        """How many there are now."""
        return len(self._mounted)

    def recover(self, live: Iterable[int]) -> list[str]:
        """Take stock after a start, and take off what belongs to no live snapshot. Returns what could not be."""
        begin = self._place + "/"
        found = {e.mount_point[len(begin) :] for e in read_table() if e.mount_point.startswith(begin)}
        self._mounted = {int(name) for name in found if name.isdigit()}
        self._gone = {int(name) for name in {*os.listdir(self._place), *found} if name.isdigit()} - set(live)
        return self.retry()

    def retry(self) -> list[str]:
        """Take off what was busy when its snapshot went. Returns what still is."""
        left = []
        for number in tuple(self._gone):
            try:
                self.take_off(number)
            except InUse as error:
                left.append(error.line())
        return left

    def holds(self, number: int) -> bool:
        """Whether a root file system stands on a snapshot's files, so that they may not go yet."""
        return number in self._mounted

    def ensure(self, snapshot: Snapshot, lowers: Sequence[str]) -> str:
        """The path of a snapshot's root file system, assembled now where it is not. Lowers are topmost first.

        Mount operations: 1, or none. Raises: OperationFailed, MissingFeature; TooManyLayers.
        """
        target = os.path.join(self._place, str(snapshot.number))
        if snapshot.number in self._mounted:
            return target
        flat = lowers[0] if len(lowers) == 1 else None
        spec = RootfsSpec(
            layers=tuple(reversed(lowers)),
            flat=flat,
            upper=Upper.ELSEWHERE if snapshot.host_ids or snapshot.mapping is None else Upper.STORE,
            uppers="snapshots",
            fresh_upper=False,
            attach=Attach.HOST,
        )
        assembler = Assembler(
            spec, "flat" if flat is not None else "detached", self._pool, uppers=self._snapshots, scratch=target
        )
        with suppress(FileExistsError):
            os.mkdir(target, 0o700)
        assembler.assemble(snapshot.mapping or _IDENTITY, str(snapshot.number), target)
        with self._lock:
            self._mounted.add(snapshot.number)
        return target

    def take_off(self, number: int) -> None:
        """Unmount a root file system; one that is not there is no error.

        Raises: InUse, when something still uses it: nothing has changed then, and the next try may succeed.
        """
        target = os.path.join(self._place, str(number))
        if number in self._mounted:
            outcome = run_once(MountPlan((Unmount(target, UnmountFlag.NOFOLLOW),), keep_going=True))
            if outcome.failure is not None:
                self._gone.add(number)
                raise InUse(str(outcome.failure), hint=outcome.failure.hint)
            with self._lock:
                self._mounted.discard(number)
        self._gone.discard(number)
        with suppress(FileNotFoundError):
            os.rmdir(target)

    def close(self) -> None:
        """Let go of the pinned parents. No mount is undone."""
        self._pool.close()
