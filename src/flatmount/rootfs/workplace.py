"""A directory to work in whose mounts and leftovers somebody can find if we are killed.

RUN/work/<name>.<pid>-<start time>/       the directory; a tmpfs while it is in use
RUN/work/<name>.<pid>-<start time>.json   directories elsewhere that go with it
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from flatmount.errors import FlatmountError, from_os_error
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import read_table
from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.kernel.tree import remove_tree
from flatmount.plan.operations import Mount, MountFlag, MountPlan, Unmount, UnmountFlag

_RECORD = ".json"


def ensure_run_directory(run: str) -> None:
    """Make the run directory (0711: a runtime in a user namespace walks through it) and its parents."""
    os.makedirs(run, mode=0o755, exist_ok=True)
    with suppress(PermissionError):
        os.chmod(run, 0o711)


@contextmanager
def workplace(run: str, name: str, *, elsewhere: Sequence[str] = (), ram: bool = True) -> Iterator[str]:
    """A fresh directory on a tmpfs of its own, attached in the calling thread's mount namespace; all gone afterwards.

    Args:
        run: the run directory.
        name: what it is for, one word.
        elsewhere: directories on other file systems that go with it; made here, each must not exist.
        ram: whether it is a tmpfs of its own, or a plain directory of the run directory.

    What cannot be cleared afterwards is told on stderr and left to the next sweep: what was done in here is not lost.
    """
    place = os.path.join(run, "work")
    ensure_run_directory(run)
    os.makedirs(place, exist_ok=True)
    os.chmod(place, 0o711)
    path = os.path.join(place, owned_name(name))
    with open(path + _RECORD, "x", encoding="utf-8") as record:
        json.dump({"elsewhere": list(elsewhere)}, record)
    try:
        os.mkdir(path, 0o711)
        for directory in elsewhere:
            os.mkdir(directory, 0o711)
        if ram:
            run_once(MountPlan((Mount("flatmount-work", path, "tmpfs", MountFlag.NONE, "mode=0711"),)))
        yield path
    finally:
        _cleared(path, "which is left to the next command", _on_stderr)


def sweep(run: str, problem: Callable[[str], None] | None = None) -> tuple[str, ...]:
    """Remove what killed processes left in their workplaces. Returns the names that were cleared.

    One that cannot be cleared is told to `problem` (default: a line on stderr) and left to the next sweep.
    """
    place = os.path.join(run, "work")
    try:
        names = {name.removesuffix(_RECORD) for name in os.listdir(place)}
    except (FileNotFoundError, PermissionError):
        return ()
    cleared = []
    for name in sorted(name for name in names if owner_is_gone(name)):
        if _cleared(os.path.join(place, name), "left by a killed command", problem or _on_stderr):
            cleared.append(name)
    return tuple(cleared)


def _cleared(path: str, why: str, problem: Callable[[str], None]) -> bool:
    try:
        _clear(path)
    except OSError as error:
        problem(from_os_error(error, f"clear {path}, {why}:").line())
    except FlatmountError as error:
        problem(f"clear {path}, {why}: {error.line()}")
    else:
        return True
    return False


def _on_stderr(line: str) -> None:
    sys.stderr.write(f"flatmount: {line}\n")


def _clear(path: str) -> None:
    directories = (*_elsewhere(path), path)
    for directory in directories:
        take_off_below(directory)
    for directory in directories:
        try:
            parent = os.open(os.path.dirname(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            with suppress(FileNotFoundError):
                remove_tree(parent, os.path.basename(directory))
        finally:
            os.close(parent)
    with suppress(FileNotFoundError):
        os.unlink(path + _RECORD)


def take_off_below(path: str) -> int:
    """Detach every mount at or below `path` in the calling thread's namespace, deepest first. Returns how many."""
    below = [
        entry.mount_point
        for entry in read_table()
        if entry.mount_point == path or entry.mount_point.startswith(path + "/")
    ]
    flags = UnmountFlag.DETACH | UnmountFlag.NOFOLLOW
    run_once(MountPlan(tuple(Unmount(point, flags) for point in reversed(below)), keep_going=True))
    return len(below)


def _elsewhere(path: str) -> list[str]:
    try:
        with open(path + _RECORD, encoding="utf-8") as record:
            found = json.load(record)["elsewhere"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # Killed before the record was whole: nothing elsewhere had been made yet.
        return []
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []
