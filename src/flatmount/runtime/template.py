"""The mount namespace that runtimes start in: almost nothing, so that its copies cost almost nothing.

A copy of a mount namespace costs 1.4-1.9 us for each mount in it (28 ms on a host with 10,000). A runtime needs few of
them: the host's root directory, `/proc` and `/sys` as they are (with a mount on top of either, a user namespace may
not mount its own), every cgroup hierarchy, `/dev`, and wherever the runtime and its state are. The template holds
these, private, so that nothing that is mounted in a copy is seen by anybody else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from flatmount.errors import MissingFeature, OperationFailed
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import mount_count
from flatmount.kernel.namespaces import Namespace, empty_mount_namespace, own_mount_namespace
from flatmount.plan.operations import (
    HELPER,
    HOME,
    Mount,
    MountFlag,
    MountPlan,
    MoveMount,
    OpenTree,
    Operation,
    Setns,
    Slot,
)

MOST_MOUNTS = 32
WITHOUT = "--attach host does without"
_ROOT = "/"
_ALWAYS = ("/proc", "/sys", "/dev")
_CGROUPS = "/sys/fs/cgroup"
_PROGRAMS = ("/usr", "/usr/local", "/lib", "/lib64", "/bin", "/sbin", "/etc")
_OWN_ROOT = 1  # the empty tmpfs that the host's root directory lies over


@dataclass(frozen=True, slots=True)
class Template:
    """A template namespace, there as long as this object. `mounts` is what the kernel counts in it."""

    namespace: Namespace
    paths: tuple[str, ...]
    mounts: int


def plan(paths: Sequence[str]) -> MountPlan:
    """Clone the mounts at `paths`, parents first, and attach them in the helper namespace; nothing changes at home."""
    slots = {path: Slot(f"tree {path}") for path in paths}
    operations: list[Operation] = [OpenTree(slots[path], path) for path in paths]
    # Entered twice: a task stays beneath what is mounted over its root until it enters anew.
    operations += (Setns(HELPER), MoveMount(slots[_ROOT], _ROOT), Setns(HELPER), _private(_ROOT))
    for path in paths:
        if path != _ROOT:
            # A clone of a shared mount is its peer: what is attached to it would appear at home as well.
            operations += (MoveMount(slots[path], path), _private(path))
    return MountPlan((*operations, Setns(HOME)))


def _private(path: str) -> Mount:
    return Mount("none", path, None, MountFlag.PRIVATE)


def needed(places: Iterable[str]) -> tuple[str, ...]:
    """Mount points that a template needs, parents first: those every runtime needs, and those that `places` lie on.

    Looks at paths and not at the mount table, whose reading costs 2 us for each mount. Reads only.
    """
    points = {_ROOT, *map(mount_point, (*_ALWAYS, *_PROGRAMS, *places)), *_cgroup_hierarchies()}
    return tuple(sorted(points, key=lambda path: (path.count("/"), path) if path != _ROOT else (0, "")))


def make(places: Iterable[str]) -> Template:
    """Make a template in which `places` (absolute paths) are what they are here.

    Costs 3 ms however long the host's mount table is (`bench starts`), once for each process; where the namespace that
    it is emptied from cannot be had, a copy of the caller's (flatmount.kernel.namespaces.empty_mount_namespace).
    Nothing in the caller's namespace changes.
    Raises: MissingFeature where that takes too many mounts, or the kernel does not let us.
    Kernel: 5.2 (open_tree, move_mount), CAP_SYS_ADMIN.
    """
    paths = needed(places)
    if len(paths) + _OWN_ROOT >= MOST_MOUNTS:
        raise MissingFeature(
            f"a private attachment needs {len(paths) + _OWN_ROOT} mounts of this host, and copies stay cheap below "
            f"{MOST_MOUNTS}",
            hint=WITHOUT,
        )
    try:
        helper = empty_mount_namespace()
        with closing(own_mount_namespace()) as home:
            run_once(plan(paths), {HELPER: helper.fileno(), HOME: home.fileno()})
    except (OSError, OperationFailed) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise MissingFeature(f"this kernel does not attach privately: {said}", hint=WITHOUT) from error
    return Template(helper, paths, mount_count(namespace_fd=helper.fileno()))


class Templates:
    """The process's template, made on first use. Safe to use from any number of threads."""

    def __init__(self, places: Iterable[str]) -> None:
        self._places = tuple(places)
        self._lock = threading.Lock()
        self._made: Template | None = None

    def get(self) -> Template:
        """The template. Raises: as `make`."""
        with self._lock:
            if self._made is None:
                self._made = make(self._places)
            return self._made


def mount_point(path: str) -> str:
    """Where the mount that `path` (absolute) is on is attached."""
    path = os.path.realpath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    here = _mount_id(path)
    while path != _ROOT and _mount_id(os.path.dirname(path)) == here:
        path = os.path.dirname(path)
    return path


def _mount_id(path: str) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as facts:
            return next(int(line.split()[1]) for line in facts if line.startswith("mnt_id:"))
    finally:
        os.close(fd)


def _cgroup_hierarchies() -> Iterable[str]:
    """The unified hierarchy, or the directory of the older ones with each of them."""
    yield mount_point(_CGROUPS)
    if not os.path.isdir(_CGROUPS) or os.path.exists(f"{_CGROUPS}/cgroup.controllers"):
        return
    with os.scandir(_CGROUPS) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and mount_point(entry.path) == entry.path:
                yield entry.path
