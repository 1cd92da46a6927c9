"""An incident recording as frozen values with a schema name. `flatmount.profile/1` grows by additions only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flatmount.decoding import decode
from flatmount.errors import UsageError
from flatmount.observe.symbols import MOUNT_LOCKS, Lock, Work
from flatmount.observe.trace_results import CallCount
from flatmount.storm.results import HostFacts

SCHEMA = "flatmount.profile/1"


@dataclass(frozen=True, slots=True)
class LockWaits:
    """Waits of one process for one lock. `of_command`: the process descends from the command that was profiled."""

    lock: Lock
    process: int
    name: str
    of_command: bool
    waits: int
    total_us: float
    longest_us: float


@dataclass(frozen=True, slots=True)
class CpuStack:
    """Samples with the same stack: root first, joined by `;`, the process's name in front.

    `of_command`: the processes descend from the command that was profiled.
    """

    folded: str
    work: Work
    samples: int
    of_command: bool = False


@dataclass(frozen=True, slots=True)
class WaitStack:
    """Waits with the same stack, written as in CpuStack, and the microseconds that they took together."""

    folded: str
    lock: Lock
    waits: int
    total_us: float


@dataclass(frozen=True, slots=True)
class ProcessOperations:
    """Mount calls of one process with their latency, and where the process belongs."""

    process: int
    name: str
    place: str
    of_command: bool
    calls: tuple[CallCount, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """What one tenth of a second held. Times of waits count where the wait began; None where nothing was measured.

    Pressure is the percentage of this time in which some task waited for processors or memory.
    """

    at_s: float
    mounts: int | None
    namespace_sem_ms: float
    mount_lock_ms: float
    grace_period_ms: float
    cpu_pressure: float | None
    memory_pressure: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """A recording of the whole machine on one clock (CLOCK_MONOTONIC).

    `sample_hz` is how often each busy processor was sampled. `missing` names parts that could not be recorded, and why;
    `lost` counts events that the kernel had no room for. `cost_cpu_s` is what the recorder and this process used.
    """

    taken_at: str
    host: HostFacts
    seconds: float
    command: tuple[str, ...]
    exit_code: int | None
    sample_hz: int
    waits: tuple[LockWaits, ...]
    cpu: tuple[CpuStack, ...]
    wait_stacks: tuple[WaitStack, ...]
    operations: tuple[ProcessOperations, ...]
    moments: tuple[Moment, ...]
    missing: tuple[str, ...]
    lost: int
    cost_cpu_s: float

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with its schema's name; `from_json` gives an equal profile."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> Profile:
        """The profile that `value`, as `json.load` returned it, holds. Raises: UsageError naming the field."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise UsageError("not a profile", hint=f"give a file with schema {SCHEMA}")
        return decode(cls, value, "profile")


@dataclass(frozen=True, slots=True)
class LockTotal:
    """Waits for one lock over all processes: how many, milliseconds in all and of the longest."""

    lock: Lock
    waits: int
    total_ms: float
    longest_ms: float


def lock_totals(waits: Iterable[LockWaits], *, command_only: bool = False) -> tuple[LockTotal, ...]:
    """By lock, the most time first; of the command's processes or of all."""
    counts: Counter[Lock] = Counter()
    total: Counter[Lock] = Counter()
    longest: dict[Lock, float] = {}
    for one in waits:
        if command_only and not one.of_command:
            continue
        counts[one.lock] += one.waits
        total[one.lock] += one.total_us  # type: ignore[assignment]
        longest[one.lock] = max(longest.get(one.lock, 0.0), one.longest_us)
    return tuple(
        LockTotal(lock, counts[lock], round(us / 1e3, 3), round(longest[lock] / 1e3, 3))
        for lock, us in total.most_common()
    )


def mount_lock_ms(totals: Iterable[LockTotal]) -> float:
    """Milliseconds of waiting for the two mount locks together."""
    return sum(one.total_ms for one in totals if one.lock in MOUNT_LOCKS)


def unclassified_share(totals: Iterable[LockTotal]) -> float:
    """The share of lock waiting (grace periods are none) whose lock is not known."""
    locks = [one for one in totals if one.lock is not Lock.GRACE_PERIOD]
    whole = sum(one.total_ms for one in locks)
    return sum(one.total_ms for one in locks if one.lock is Lock.UNKNOWN) / whole if whole else 0.0


def work_shares(stacks: Iterable[CpuStack], *, command_only: bool = False) -> dict[Work, float]:
    """The share of samples for each kind of work, of the command's processes or of all; empty where there is none."""
    counts: Counter[Work] = Counter()
    for stack in stacks:
        if stack.of_command or not command_only:
            counts[stack.work] += stack.samples
    whole = counts.total()
    return {work: counts[work] / whole for work in Work if counts[work]} if whole else {}
