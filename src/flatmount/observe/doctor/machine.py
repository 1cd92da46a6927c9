"""The kernel's limits, its pressure and the machine's shape, read from /proc and /sys."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass

from flatmount.observe.doctor.state import System

_CPUS = "/sys/devices/system/cpu"
_AVERAGE = re.compile(r"^some .*avg60=([0-9.]+)", re.MULTILINE)
_DEFAULT_MOUNT_LIMIT = 100_000


@dataclass(frozen=True, slots=True)
class Machine:
    """The system, and fs.mount-max, which belongs to the mount table."""

    system: System
    mount_limit: int


def read_system() -> Machine:
    """The machine this runs on. What a kernel does not tell counts as one, or as None."""
    processors = [name for name in _listed(_CPUS) if re.fullmatch(r"cpu\d+", name)]
    siblings = {_text(f"{_CPUS}/{cpu}/topology/thread_siblings_list") for cpu in processors} - {""}
    packages = {_text(f"{_CPUS}/{cpu}/topology/physical_package_id") for cpu in processors} - {""}
    caches = {_text(f"{_last_cache(cpu)}/shared_cpu_list") for cpu in processors} - {""}
    opened = _text("/proc/sys/fs/file-nr").split()
    system = System(
        kernel=os.uname().release,
        processors=len(processors) or (os.cpu_count() or 1),
        sockets=len(packages) or 1,
        threads_per_core=max((_cpus_in(text) for text in siblings), default=1),
        cache_domains=len(caches) or 1,
        open_files=int(opened[0]) if opened else 0,
        open_files_limit=int(opened[2]) if opened else 1 << 62,
        mount_namespaces_limit=_number("/proc/sys/user/max_mnt_namespaces"),
        user_namespaces_limit=_number("/proc/sys/user/max_user_namespaces"),
        cpu_pressure=_pressure("cpu"),
        memory_pressure=_pressure("memory"),
        io_pressure=_pressure("io"),
    )
    return Machine(system, _number("/proc/sys/fs/mount-max") or _DEFAULT_MOUNT_LIMIT)


def _last_cache(cpu: str) -> str:
    directory = f"{_CPUS}/{cpu}/cache"
    indexes = [name for name in _listed(directory) if name.startswith("index")]
    last = max(indexes, key=lambda name: _number(f"{directory}/{name}/level") or 0, default="index0")
    return f"{directory}/{last}"


def _cpus_in(text: str) -> int:
    total = 0
    for part in text.split(","):
        low, _, high = part.partition("-")
        total += int(high or low) - int(low) + 1
    return total


def _pressure(what: str) -> float | None:
    match = _AVERAGE.search(_text(f"/proc/pressure/{what}"))
    return float(match[1]) if match else None


def _listed(path: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(path)
    return []


def _number(path: str) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        return file.read().strip()
    return ""
