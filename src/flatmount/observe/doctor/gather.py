"""Looking at a node for the doctor. Reads only, for about a second, and says what it could not see."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from flatmount.errors import FlatmountError
from flatmount.kernel.mounts import MountEntry, MountEvents, read_table
from flatmount.observe.causes import Calls, watch_calls
from flatmount.observe.doctor import software
from flatmount.observe.doctor.machine import read_system
from flatmount.observe.doctor.snapshotters import containerd_here, find_snapshotter
from flatmount.observe.doctor.state import Cause, NodeState, Table, Watcher
from flatmount.observe.leaks import leaks_between, mount_key, suspicious_elsewhere
from flatmount.observe.mount_calls import CALLS
from flatmount.observe.owners import by_owner
from flatmount.observe.processes import Process, cpu_seconds, name_of, read_place, scan
from flatmount.observe.tracefs import Reader, TraceInstance

LOOK_S = 1.0
_SCAN_S = 0.8
_MOST_CAUSES = 20


class _Look:
    """What is counted while the doctor looks: mount events of this table, mount calls of everybody."""

    def __init__(self, unseen: list[str]) -> None:
        self._unseen = unseen
        self.calls = Calls()
        self._events: MountEvents | None = None
        self._instance: TraceInstance | None = None
        self._reader: Reader | None = None
        try:
            self._events = MountEvents()
        except FlatmountError:
            unseen.append(
                "every single change of the mount table (Linux 6.15 and root): two looks are compared instead"
            )
        try:
            self._instance = TraceInstance("doctor")
            watch_calls(self._instance)
            self._reader = Reader(self._instance, self.calls.take)
        except FlatmountError as error:
            unseen.append(f"who makes mount calls: {error}")
        self._begun = time.monotonic()

    def finish(self) -> tuple[float, int | None]:
        """Seconds looked, and changes of this table; None where they were not counted."""
        seconds = time.monotonic() - self._begun
        changes = None
        if self._events is not None:
            counts = self._events.counts()
            changes = counts.attached + counts.detached
        if self._reader is not None:
            self._reader.finish()
        if self._instance is not None and self._instance.lost():
            self._unseen.append("some mount calls: more were made than could be read")
        return seconds, changes

    def close(self) -> None:
        if self._reader is not None:
            self._reader.finish()
        if self._instance is not None:
            self._instance.close()
        if self._events is not None:
            self._events.close()


def gather(*, look_s: float = LOOK_S) -> NodeState:
    """Look at this node for `look_s` seconds and what reading takes beside that. Changes nothing.

    With root it sees all; else its own processes, the mount table, versions and limits, and `unseen` names the rest.
    """
    unseen: list[str] = []
    with ThreadPoolExecutor(4, thread_name_prefix="doctor") as pool:
        before = read_table()
        processes, _ = scan(deadline_s=_SCAN_S)
        others_before = suspicious_elsewhere(processes)
        watching = [process for process in processes if process.watches]
        look = _Look(unseen)
        try:
            cpu_before = {pid: cpu_seconds(pid) for pid in (1, *(process.pid for process in watching))}
            begun = time.monotonic()
            engines = pool.submit(software.engines, processes)
            images = pool.submit(software.images)
            time_outs = pool.submit(software.time_outs)
            stores = pool.submit(software.layer_stores, before)
            snapshotter, snapshotter_word = find_snapshotter(containerd_here(processes))
            system = read_system()
            threading.Event().wait(max(0.0, look_s - (time.monotonic() - begun)))
            cpu_s = time.monotonic() - begun
            shares = {pid: _share(used, cpu_seconds(pid), cpu_s) for pid, used in cpu_before.items()}
            seconds, changes = look.finish()
        finally:
            look.close()
        after = read_table()
        found = leaks_between(before, after, others_before, *scan(deadline_s=_SCAN_S))
        if os.geteuid() != 0:
            unseen.append("whether layer stores can be id-mapped: run as root")
        if snapshotter_word:
            unseen.append(snapshotter_word)
        journal, journal_word = time_outs.result()
        if journal_word:
            unseen.append(f"time-outs in the journal: {journal_word}")
        return NodeState(
            table=_table(before, after, seconds, changes, system.mount_limit),
            init_name=name_of(1),
            init_cpu_share=shares.get(1, 0.0),
            watchers=tuple(_watcher(process, shares) for process in watching),
            causes=causes_of(look.calls.drain(), look.calls.names, seconds),
            engines=engines.result(),
            images=images.result(),
            stores=stores.result(),
            system=system.system,
            time_outs=journal,
            leaks=found.leaks,
            unseen=(*unseen, *found.unseen),
            snapshotter=snapshotter,
        )


def _share(before: float | None, after: float | None, seconds: float) -> float:
    return 0.0 if before is None or after is None else max(0.0, after - before) / seconds


def _watcher(process: Process, shares: dict[int, float]) -> Watcher:
    return Watcher(process.pid, process.name, str(process.place), round(shares.get(process.pid, 0.0), 3))


def _table(
    before: Sequence[MountEntry], after: Sequence[MountEntry], seconds: float, changes: int | None, limit: int
) -> Table:
    if changes is None:
        old, new = {mount_key(entry) for entry in before}, {mount_key(entry) for entry in after}
        changes = len(old ^ new)
    peers, where = largest_peers(after)
    return Table(
        mounts=len(after),
        limit=limit,
        changes_per_s=round(changes / seconds, 1),
        growth_per_s=round((len(after) - len(before)) / seconds, 1),
        owners=tuple(by_owner(entry.mount_point for entry in after).items()),
        peers=peers,
        peers_at=where,
    )


def largest_peers(table: Sequence[MountEntry]) -> tuple[int, str]:
    """The largest number of mounts of one directory in one peer group, and where the first of them is."""
    groups: Counter[tuple[int, str]] = Counter()
    first: dict[tuple[int, str], str] = {}
    for entry in table:
        if entry.peer_group:
            key = (entry.peer_group, entry.root)
            groups[key] += 1
            first.setdefault(key, entry.mount_point)
    if not groups:
        return 0, ""
    key, count = groups.most_common(1)[0]
    return count, first[key]


def causes_of(counts: Counter[tuple[int, str]], names: dict[int, str], seconds: float) -> tuple[Cause, ...]:
    """Calls as rates, the busiest first. Processes that are gone count together under their name, with pid 0."""
    merged: Counter[tuple[int, str, str]] = Counter()
    places: dict[int, str] = {}
    for (pid, call), count in counts.items():
        if pid == os.getpid():
            continue
        if pid not in places:
            places[pid] = str(read_place(pid))
        merged[pid if places[pid] else 0, names.get(pid, "?"), call] += count
    causes = []
    for pid, name in dict.fromkeys((pid, name) for pid, name, _ in merged):
        made = {call: merged[pid, name, call] / seconds for call in CALLS}
        causes.append(
            Cause(
                pid=pid,
                name=name_of(pid) if pid else name,
                place=places.get(pid, ""),
                operations=round(made["mount"] + made["move_mount"] + made["umount"] + made["pivot_root"], 1),
                attaches=round(made["mount"] + made["move_mount"], 1),
                idmaps=round(made["mount_setattr"] + made["open_tree_attr"], 1),
                roots=round(made["mount"] + made["fsmount"], 1),
            )
        )
    causes.sort(key=lambda cause: -cause.operations)
    return tuple(cause for cause in causes[:_MOST_CAUSES] if cause.operations)
