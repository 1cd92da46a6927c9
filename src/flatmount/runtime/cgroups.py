"""The control groups of containers: to end what a killed runtime left, and to leave none behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from flatmount.errors import FlatmountError
from flatmount.runtime.bundle import CGROUP_PARENT

_HIERARCHIES: Final = "/sys/fs/cgroup"
_SECONDS: Final = 10.0


def unified() -> bool:
    """Whether the host has the second version only."""
    return os.path.exists(f"{_HIERARCHIES}/cgroup.controllers")


def groups(container_id: str) -> tuple[str, ...]:
    """The container's groups that exist, in every hierarchy."""
    return tuple(path for parent in _parents() if os.path.isdir(path := f"{parent}/{container_id}"))


def clear(container_id: str) -> None:
    """Kill every process in the container's groups, and remove them. None is no error.

    Raises: FlatmountError where a process is still there after ten seconds (one that waits in the kernel).
    """
    deadline = time.monotonic() + _SECONDS
    while left := groups(container_id):
        for path in left:
            for directory in _deepest_first(path):
                _kill(directory)
                with suppress(OSError):
                    os.rmdir(directory)
        if not groups(container_id):
            return
        if time.monotonic() > deadline:
            raise FlatmountError(f"container {container_id} has processes that do not end, in {left[0]}")
        time.sleep(0.005)


def remove_empty(name: str) -> None:
    """Remove the group `name` below the root of every hierarchy, and those in it, as far as they are empty."""
    with suppress(FileNotFoundError):
        for hierarchy in [""] if unified() else os.listdir(_HIERARCHIES):
            for directory in _deepest_first(os.path.join(_HIERARCHIES, hierarchy, name)):
                with suppress(OSError):
                    os.rmdir(directory)


def _parents() -> Iterator[str]:
    with suppress(FileNotFoundError):
        if unified():
            yield f"{_HIERARCHIES}/{CGROUP_PARENT}"
            return
        for name in os.listdir(_HIERARCHIES):
            yield f"{_HIERARCHIES}/{name}/{CGROUP_PARENT}"


def _deepest_first(path: str) -> Iterator[str]:
    for directory, _, _ in os.walk(path, topdown=False):
        yield directory


def _kill(group: str) -> None:
    with suppress(OSError), open(f"{group}/cgroup.procs", encoding="ascii") as file:
        for pid in file.read().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    # A frozen process does not end before it is thawed.
    with suppress(OSError), open(f"{group}/freezer.state", "w", encoding="ascii") as state:
        state.write("THAWED")
