"""Running the native loops: one lock at one placement, and the latency between two processors."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from flatmount.cpu.results import Kind
from flatmount.errors import FlatmountError
from flatmount.kernel import _native

_WRITES_OF_RWLOCK = 8
_SAMPLE_EVERY = 16
_TRIES = 4
_BATCHES = 24
_ROUNDS = 400
_PAIR_LIMIT_NS = 2_000_000_000


class GoneCpu(FlatmountError):
    """A processor was offline, outside of this process's affinity mask, or had no time for us."""


@dataclass(frozen=True, slots=True)
class LockRun:
    """One run of one lock, as LockFigure; `samples_ns` are sorted, and empty for a run that did not sample."""

    ns: float
    hand_off: float | None
    fairness: float
    retries: float | None
    samples_ns: Sequence[int]
    moved: bool


def run_lock(
    kind: Kind, cpus: tuple[int, ...], run_ms: float, *, preheat_ms: float = 5, sample: bool = False
) -> LockRun:
    """Let a thread on each of `cpus` take one lock for `run_ms`. Raises: GoneCpu."""
    every = _SAMPLE_EVERY if sample else 0
    for attempt in range(_TRIES):
        try:
            threads, lost = _native.contend_for_lock(kind.number, cpus, int(preheat_ms * 1e6), int(run_ms * 1e6), every)
        except OSError as error:
            raise _gone(error, cpus) from error
        if lost:
            raise FlatmountError(f"the {kind.value} lock let two in at once: {lost} sections were lost")
        starved = not all(thread[0] for thread in threads)
        # Somebody else may have had a processor all the time: a longer try tells that from an unfair lock.
        if not starved or (attempt == _TRIES - 1 and any(thread[0] for thread in threads)):
            return _lock_run(kind, threads)
        run_ms *= 2
    raise GoneCpu(f"no thread on the processors {cpus} got to run", hint="others keep them busy")


def _lock_run(kind: Kind, threads: tuple[tuple[int, int, int, int, int, bytes], ...]) -> LockRun:
    sections = [thread[0] for thread in threads]
    seconds_ns = max(thread[3] for thread in threads)
    total = sum(sections)
    samples = array("I")
    for thread in threads:
        samples.frombytes(thread[5])
    readers = threads[1:] if kind is Kind.SEQLOCK else ()
    return LockRun(
        ns=seconds_ns / total,
        hand_off=_hand_off(kind, sum(thread[1] for thread in threads), total),
        fairness=jain(sections),
        retries=_ratio(sum(thread[2] for thread in readers), sum(thread[0] for thread in readers)) if readers else None,
        samples_ns=sorted(samples),
        moved=any(thread[4] for thread in threads),
    )


def _hand_off(kind: Kind, hand_offs: int, sections: int) -> float | None:
    if kind is Kind.SEQLOCK:
        return None
    exclusive = sections / _WRITES_OF_RWLOCK if kind is Kind.RWLOCK else sections
    return min(1.0, _ratio(hand_offs, exclusive))


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def jain(shares: Sequence[int]) -> float:
    """Jain's fairness index: 1 where all have the same, 1/n where one has everything."""
    squares = sum(share * share for share in shares)
    return round(sum(shares) ** 2 / (len(shares) * squares), 4) if squares else 1.0


@dataclass(frozen=True, slots=True)
class PairRun:
    """One-way nanoseconds of each batch between two processors, and the NUMA node of the page (-1: not known)."""

    batches_ns: tuple[float, ...]
    node: int
    moved: bool


def run_pair(a: int, b: int, home: int) -> PairRun:
    """Send a fresh cache line to and fro between two processors; `home` touches its page first. Raises: GoneCpu."""
    try:
        batches, node, moved = _native.ping_pong(a, b, home, _BATCHES, _ROUNDS, _PAIR_LIMIT_NS)
    except OSError as error:
        raise _gone(error, (a, b, home)) from error
    return PairRun(tuple(batches), node, bool(moved))


def _gone(error: OSError, cpus: tuple[int, ...]) -> FlatmountError:
    if error.errno in (errno.EINVAL, errno.EPERM):
        return GoneCpu(f"one of the processors {cpus} is offline or not allowed", hint="its figures are left out")
    return FlatmountError(f"threads on the processors {cpus}: {os.strerror(error.errno or 0)}")
