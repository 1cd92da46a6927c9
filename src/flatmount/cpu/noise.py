"""Whether the machine was quiet while something was measured: stolen time and other people's work."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from types import TracebackType

OTHERS_SHARE = 0.05
STOLEN_SHARE = 0.01
# Below this, a tick (10 ms) more or less says nothing.
LEAST_SECONDS = 0.2
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PF_KTHREAD = 0x00200000
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Processor time, in seconds, that went elsewhere while a measurement took `seconds` on `cpus` processors.

    `stolen_s` went to other guests of the hypervisor, `others_s` to processes that did not measure; the kernel's own
    threads are in neither. Adds up over measurements: short ones alone are below the clock's resolution.
    """

    seconds: float
    cpus: int
    stolen_s: float
    others_s: float

    def __add__(self, other: Disturbance) -> Disturbance:
        return Disturbance(
            self.seconds + other.seconds,
            max(self.cpus, other.cpus),
            self.stolen_s + other.stolen_s,
            self.others_s + other.others_s,
        )

    @property
    def stolen(self) -> float:
        """Share of all processor time that was stolen, 0 to 1."""
        return self._share(self.stolen_s)

    @property
    def others(self) -> float:
        """Share of all processor time that other processes used, 0 to 1."""
        return self._share(self.others_s)

    @property
    def disturbed(self) -> bool:
        """Whether a figure taken meanwhile needs a warning beside it."""
        return self.stolen > STOLEN_SHARE or self.others > OTHERS_SHARE

    def _share(self, seconds: float) -> float:
        return min(1.0, max(0.0, seconds) / (self.seconds * self.cpus)) if self.seconds >= LEAST_SECONDS else 0.0

    def line(self) -> str:
        """What a person reads beside the figure; "" where nothing was disturbed."""
        if not self.disturbed:
            return ""
        said = []
        if self.stolen > STOLEN_SHARE:
            said.append(f"the hypervisor took {self.stolen:.0%} of the processor time")
        if self.others > OTHERS_SHARE:
            said.append(f"other processes used {self.others:.0%} of it")
        return f"disturbed: {', '.join(said)}; measure again on a quiet machine"


QUIET = Disturbance(0.0, 1, 0.0, 0.0)


def others_running() -> int:
    """How many tasks besides the caller want a processor at this moment; 0 where the kernel does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            for line in file:
                if line.startswith("procs_running"):
                    return max(0, int(line.split()[1]) - 1)
    except OSError:
        pass
    return 0


def wait_until_quiet(limit_s: float) -> bool:
    """Wait, for `limit_s` at most, until nobody else wants a processor. Returns whether that came."""
    deadline = time.monotonic() + limit_s
    while others_running():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


class Watch:
    """Measures the `disturbance` of the time it is open, from /proc and this process's own use.

    Without `kernel_threads` it reads one line and no process, and takes the kernel's threads for others: for what gives
    them no work.
    """

    def __init__(self, *, kernel_threads: bool = True) -> None:
        self._kernel_threads = kernel_threads

    def __enter__(self) -> Watch:
        self._before = _times(self._kernel_threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = _times(self._kernel_threads)
        elapsed, busy, stolen, ours, kernel = (b - a for a, b in zip(self._before, now, strict=True))
        self.disturbance = Disturbance(elapsed, os.cpu_count() or 1, stolen, busy - ours - kernel)


def _times(kernel_threads: bool) -> tuple[float, float, float, float, float]:
    """Seconds: a clock, processors busy, stolen, used by us and by what we waited for, by the kernel's threads."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ours = sum(usage.ru_utime + usage.ru_stime for usage in used)
    clock = time.monotonic()
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, _irq, _softirq, steal, *_ = map(int, file.readline().split()[1:])
    except OSError:
        return clock, 0.0, 0.0, ours, 0.0
    kernel_s = _kernel_threads_s() if kernel_threads else 0.0
    return clock, (user + nice + system) / _TICKS_PER_S, steal / _TICKS_PER_S, ours, kernel_s


def _kernel_threads_s() -> float:
    """What grace periods, work queues and the like used; they work for whoever makes mounts, so mostly for us."""
    total = 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[6]) & _PF_KTHREAD:
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S
