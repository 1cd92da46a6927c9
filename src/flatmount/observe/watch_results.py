"""What `watch` sees in one interval, as frozen values. `flatmount.watch/1` grows by additions only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flatmount.decoding import decode
from flatmount.errors import UsageError

SCHEMA = "flatmount.watch/1"


@dataclass(frozen=True, slots=True)
class CauseRate:
    """Mount operations a second of one process, or of all processes of a name that are gone (pid 0)."""

    process: str
    pid: int
    container: str
    pod: str
    cgroup: str
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class LockRate:
    """Waits for one lock in the interval: how many, and milliseconds of all tasks together."""

    lock: str
    waits: int
    total_ms: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One interval. What could not be measured is None, and `unseen` says why.

    `attached` and `detached` count since `watch` began, the rates are of this interval. `health_ms` is how long looking
    the mount table's length up took, which waits behind whoever changes it. Shares are of one processor.
    """

    at: str
    seconds: float
    mounts: int
    peak: int
    attached: int
    detached: int
    attached_per_s: float
    detached_per_s: float
    polled: bool
    causes: tuple[CauseRate, ...] | None
    locks: tuple[LockRate, ...] | None
    health_ms: float
    init_name: str
    init_cpu_share: float | None
    own_cpu_share: float
    lost: int
    unseen: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with its schema's name."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: object) -> Sample:
        """The sample that `value`, as `json.load` returned it, holds. Raises: UsageError naming the field."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise UsageError("not a sample of `watch`", hint=f"give lines with schema {SCHEMA}")
        return decode(cls, value, "watch")


@dataclass(frozen=True, slots=True)
class WatchLog:
    """What `watch --jsonl` wrote: its samples in the order in which they were taken, one at least."""

    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> float:
        """How long was watched."""
        return sum(sample.seconds for sample in self.samples)

    def times(self) -> tuple[float, ...]:
        """Seconds from the beginning to the end of each sample."""
        return tuple(accumulate(sample.seconds for sample in self.samples))
