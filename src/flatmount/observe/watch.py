"""Looking at a node's mounts again and again, at a cost that is itself a figure."""

from __future__ import annotations

import os
import time
from types import TracebackType

from flatmount.errors import FlatmountError
from flatmount.kernel.mounts import MountEvents, mount_count, mount_ids
from flatmount.observe.causes import Calls, watch_calls
from flatmount.observe.lock_watch import LockWatch
from flatmount.observe.processes import Place, cpu_seconds, name_of, read_place
from flatmount.observe.tracefs import TraceInstance
from flatmount.observe.watch_results import CauseRate, LockRate, Sample
from flatmount.storm.host import now_utc

MOST_CAUSES = 10
_BUSY_PER_S = 20.0
_OPERATIONS = frozenset(("mount", "umount", "move_mount", "pivot_root"))
_KEPT_PLACES = 4096


class Watch:
    """Counts from when it is made; each `sample` is what happened since the one before. A context manager.

    The kernel counts events of this mount table (fanotify, 6.15), else two looks are compared. Who causes them, in
    whatever namespace, comes from system call events, of which only the beginning is recorded.
    """

    def __init__(self, *, locks: bool = True) -> None:
        """Begin to count. `locks`: also waits for the mount locks."""
        self._unseen: list[str] = []
        self._events: MountEvents | None = None
        self._instance: TraceInstance | None = None
        self._pipe = -1
        self._rest = b""
        self._calls = Calls()
        self._locks: LockWatch | None = None
        self._places: dict[int, Place] = {}
        try:
            self._events = MountEvents()
        except FlatmountError as error:
            self._unseen.append(f"single events, two looks are compared instead: {error}")
        try:
            self._instance = TraceInstance("watch")
            watch_calls(self._instance, only=_OPERATIONS)
            self._pipe = self._instance.open_pipe()
            if locks:
                self._locks = LockWatch()
                if not self._locks.available:
                    self._unseen.append("lock waits: this kernel has no lock:contention_begin event (Linux 5.19)")
        except FlatmountError as error:
            self._unseen.append(f"causes and lock waits: {error}")
        self._ids = frozenset(mount_ids()) if self._events is None else frozenset()
        self._attached = self._detached = self._peak = 0
        self._began_ns = time.monotonic_ns()
        self._cpu_s = time.process_time()
        self._init_s = cpu_seconds(1)

    def sample(self) -> Sample:
        """What happened since the last call, or since the object was made."""
        now_ns = time.monotonic_ns()
        seconds = (now_ns - self._began_ns) / 1e9
        self._began_ns = now_ns
        begun_ns = time.perf_counter_ns()
        mounts = mount_count()
        health_ms = (time.perf_counter_ns() - begun_ns) / 1e6
        self._peak = max(self._peak, mounts)
        attached, detached = self._changes()
        causes = self._causes(seconds)
        busy = sum(cause.operations_per_s for cause in causes or ()) >= _BUSY_PER_S
        locks: tuple[LockRate, ...] | None = None
        if self._locks is not None:
            locks = self._locks.sample(now_ns / 1e9, busy=busy)
        init_s, cpu_s = cpu_seconds(1), time.process_time()
        init_share = None
        if init_s is not None and self._init_s is not None:
            init_share = round((init_s - self._init_s) / seconds, 4)
        own_share = (cpu_s - self._cpu_s) / seconds
        self._init_s, self._cpu_s = init_s, cpu_s
        return Sample(
            at=now_utc(),
            seconds=round(seconds, 3),
            mounts=mounts,
            peak=self._peak,
            attached=self._attached,
            detached=self._detached,
            attached_per_s=round(attached / seconds, 1),
            detached_per_s=round(detached / seconds, 1),
            polled=self._events is None,
            causes=causes,
            locks=locks,
            health_ms=round(health_ms, 3),
            init_name=name_of(1),
            init_cpu_share=init_share,
            own_cpu_share=round(own_share, 4),
            lost=self._instance.lost() if self._instance is not None else 0,
            unseen=tuple(self._unseen),
        )

    def _changes(self) -> tuple[int, int]:
        if self._events is not None:
            counts = self._events.counts()
            attached, detached = counts.attached - self._attached, counts.detached - self._detached
        else:
            ids = frozenset(mount_ids())
            attached, detached = len(ids - self._ids), len(self._ids - ids)
            self._ids = ids
        self._attached += attached
        self._detached += detached
        return attached, detached

    def _causes(self, seconds: float) -> tuple[CauseRate, ...] | None:
        if self._instance is None:
            return None
        lines, self._rest = self._instance.read_lines(self._pipe, self._rest)
        for line in lines:
            self._calls.take(line)
        names = self._calls.names
        rates: dict[tuple[str, int, Place], float] = {}
        for (pid, _), count in self._calls.drain().items():
            if pid == os.getpid():
                continue
            place = self._place(pid)
            alive = bool(place.cgroup)
            key = (names.get(pid, "?"), pid if alive else 0, place)
            rates[key] = rates.get(key, 0.0) + count / seconds
        top = sorted(rates.items(), key=lambda item: -item[1])[:MOST_CAUSES]
        self._calls.names.clear()
        return tuple(
            CauseRate(name, pid, place.container, place.pod, place.cgroup, round(rate, 1))
            for (name, pid, place), rate in top
        )

    def _place(self, pid: int) -> Place:
        known = self._places.get(pid)
        if known is None:
            if len(self._places) >= _KEPT_PLACES:
                self._places.clear()
            known = self._places[pid] = read_place(pid)
        return known

    def close(self) -> None:
        """Stop counting. Closing twice is fine."""
        if self._locks is not None:
            self._locks.close()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._instance is not None:
            self._instance.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
