"""What `watch` sees in one interval, as frozen values. `flatmount.watch/1` grows by additions only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

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
