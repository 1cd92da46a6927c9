"""The id-mapped trees that are attached for containerd: one mount for each user range, shared by its containers.

containerd can only mount what it finds by path, so the store's data directory is attached once more for each range,
outside of itself: RUN/ranges/NAME. Each tree is counted by the snapshots that use it and goes with the last of them.
Overlays that stand keep their own clone of it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from functools import lru_cache

from flatmount.errors import OperationFailed
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import read_table
from flatmount.kernel.namespaces import user_namespace
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import (
    USER_NAMESPACE,
    MountPlan,
    MountSetattr,
    MoveMount,
    OpenTree,
    Slot,
    Unmount,
    UnmountFlag,
)

_TREE = Slot("tree")


@lru_cache(maxsize=4096)
def range_name(mapping: Mapping) -> str:
    """The name of a range's tree: FIRST-SIZE for the usual one range, else a digest of its lines."""
    (first, *more) = mapping.uids
    if not more and mapping.uids == mapping.gids and first.container == 0:
        return f"{first.host}-{first.size}"
    return "x" + hashlib.sha256(str(mapping).encode()).hexdigest()[:16]


class Ranges:
    """The attached trees of one store. Safe to use from any number of threads.

    Mounts are made in the mount namespace of the calling thread, which must be containerd's.
    """

    def __init__(self, data: str, run: str) -> None:
        """Serve the store whose data directory is `data` below the run directory `run`, both absolute."""
        self._data = data
        self.place = os.path.join(run, "ranges")
        self._users: dict[str, set[int]] = {}
        self._attached: set[str] = set()
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        os.makedirs(self.place, mode=0o700, exist_ok=True)

    @property
    def attached(self) -> int:
        """How many mounts there are now."""
        return len(self._attached)

    def recover(self, used: dict[int, Mapping]) -> int:
        """Take stock after a start: `used` are the mappings of live snapshots. Returns how many trees were left over.

        A tree that is missing, after a reboot, is attached when it is asked for.
        """
        for number, mapping in used.items():
            self._users.setdefault(range_name(mapping), set()).add(number)
        begin = self.place + "/"
        found = [e.mount_point[len(begin) :] for e in read_table() if e.mount_point.startswith(begin)]
        self._attached = set(found)
        left = 0
        for name in set(os.listdir(self.place)) | self._attached:
            if name not in self._users or found.count(name) > 1 or name not in self._attached:
                left += self._detach(name)
        return left

    def acquire(self, number: int, mapping: Mapping) -> str:
        """The tree of a mapping, attached now if it is not; counted for snapshot `number` until it is released.

        Mount operations: 1 for the first user of the range, else none.
        Raises: OperationFailed; OSError where the user namespace cannot be made. Kernel: 5.12; CAP_SYS_ADMIN.
        """
        name = range_name(mapping)
        path = os.path.join(self.place, name)
        with self._lock(name):
            users = self._users.setdefault(name, set())
            if name not in self._attached:
                self._attach(mapping, path)
                self._attached.add(name)
            users.add(number)
        return path

    def acquire_attached(self, number: int, mapping: Mapping) -> str | None:
        """As `acquire`, but never waits: None where the tree is not attached, or somebody works on it."""
        name = range_name(mapping)
        if name in self._attached and number in self._users.get(name, ()):
            # Counted before: the tree stays until this number is released.
            return f"{self.place}/{name}"
        lock = self._lock(name)
        if not lock.acquire(blocking=False):
            return None
        try:
            users = self._users.get(name)
            if not users or name not in self._attached:
                return None
            users.add(number)
            return f"{self.place}/{name}"
        finally:
            lock.release()

    def release_shared(self, number: int, mapping: Mapping) -> bool:
        """As `release` where others still use the tree, without waiting. Returns whether that was so."""
        name = range_name(mapping)
        lock = self._lock(name)
        if not lock.acquire(blocking=False):
            return False
        try:
            users = self._users.get(name, set())
            if len(users) - (number in users) == 0:
                return False
            users.discard(number)
            return True
        finally:
            lock.release()

    def release(self, number: int, mapping: Mapping) -> None:
        """Snapshot `number` is gone; the tree goes with its last user. Raises: OperationFailed, the tree still there.

        What could not be taken off is tried again by the next `acquire` and `release` of that range, or by `recover`.
        """
        name = range_name(mapping)
        with self._lock(name):
            users = self._users.get(name, set())
            users.discard(number)
            if not users:
                self._detach(name)
                self._users.pop(name, None)

    def _attach(self, mapping: Mapping, path: str) -> None:
        namespace = user_namespace(mapping)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        plan = MountPlan(
            (OpenTree(_TREE, self._data), MountSetattr(_TREE, userns=USER_NAMESPACE), MoveMount(_TREE, path))
        )
        run_once(plan, {USER_NAMESPACE: namespace.fileno()})

    def _detach(self, name: str) -> int:
        path = os.path.join(self.place, name)
        count = 0
        if name in self._attached:
            try:
                # Lazily: containerd may be opening a path in it this moment, and gets its error there.
                while count < 16:
                    run_once(MountPlan((Unmount(path, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW),)))
                    count += 1
            except OperationFailed:
                if not count:
                    raise
            self._attached.discard(name)
        with suppress(FileNotFoundError):
            os.rmdir(path)
        return count

    def _lock(self, name: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())
