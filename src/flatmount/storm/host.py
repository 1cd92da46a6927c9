"""Facts about this machine and moment that a reader of results needs to judge them."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

from flatmount._version import VERSION
from flatmount.storm.results import HostFacts


def this_host() -> HostFacts:
    """The machine this runs on; `cpus` are those that this process may use. Changes nothing."""
    return HostFacts(
        kernel=platform.release(),
        architecture=platform.machine(),
        cpu_model=_cpu_model(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        flatmount=VERSION,
    )


def now_utc() -> str:
    """This moment as results write it, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _cpu_model() -> str:
    # x86 has "model name"; Arm has no name there, and its parts are only numbers.
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()
