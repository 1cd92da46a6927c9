"""Waits for the mount locks without a stack for each: their addresses are learned once, then the kernel filters.

An address is learned from contended waits with stacks, which are recorded for a few hundredths of a second at a time, a
few times in a minute, and only while somebody mounts. From then on only waits for these two locks are recorded, without
a stack.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterable

from flatmount.observe.symbols import MOUNT_LOCKS, Lock, waited_for
from flatmount.observe.tracefs import TraceInstance
from flatmount.observe.watch_results import LockRate

_BEGIN, _END = "lock/contention_begin", "lock/contention_end"
_EVENT = re.compile(r".*-(\d+)\s+\S*.*?\s(\d+)\.(\d{6}): contention_(begin|end): (?:0x)?([0-9a-f]+) \((.*)\)")
_TRACE = re.compile(r".*-(\d+)\s+(?:\(.*?\)\s+)?\[\d+\].*<stack trace>")
_FRAME = re.compile(r" => (\S+)")
_SURE = 2
_LEARN_FOR_S = 0.02
_LESSONS, _LESSONS_IN_S = 5, 60.0


class StackLines:
    """Learns from lines of contended waits with stacks which address belongs to which mount lock."""

    def __init__(self) -> None:
        self.stacks = 0
        self._seen: Counter[tuple[str, Lock]] = Counter()
        self._waiting: dict[str, tuple[str, bool]] = {}  # by task: events of several processors come between each other
        self._task = ""
        self._frames: list[str] = []

    def take(self, lines: Iterable[str]) -> None:
        """Take lines in the kernel's order: an event, and later a note of its task with the stack, leaf first."""
        for line in lines:
            frame = _FRAME.match(line)
            if frame is not None:
                self._frames.append(frame[1])
                continue
            self.finish()
            stack = _TRACE.match(line)
            if stack is not None:
                self._task = stack[1]
                continue
            event = _EVENT.match(line)
            if event is not None and event[4] == "begin":
                self._waiting[event[1]] = (event[5], "SPIN" in event[6] and "MUTEX" not in event[6])

    def finish(self) -> None:
        """Count the stack that was read last."""
        waiting = self._waiting.pop(self._task, None) if self._frames else None
        if waiting is not None:
            address, spins = waiting
            self._seen[address, waited_for(self._frames, spins=spins)] += 1
            self.stacks += 1
        self._frames = []

    def addresses(self) -> dict[str, Lock]:
        """Addresses of mount locks that were seen often enough and never as another lock."""
        by_address: dict[str, set[Lock]] = {}
        for address, lock in self._seen:
            by_address.setdefault(address, set()).add(lock)
        return {
            address: lock
            for (address, lock), count in self._seen.items()
            if lock in MOUNT_LOCKS and count >= _SURE and by_address[address] == {lock}
        }


class LockWatch:
    """Counts waits for the mount locks as soon as it knows them; None until then. A trace instance of its own.

    Kernel: 5.19 for the events. Raises: MissingFeature without tracefs.
    """

    def __init__(self) -> None:
        self._instance = TraceInstance("locks")
        self.available = self._instance.has(_BEGIN)
        self._instance.set_option("hash-ptr", False)
        self._pipe = self._instance.open_pipe()
        self._rest = b""
        self._known: dict[str, Lock] = {}
        self._learning = StackLines()
        self._lessons: deque[float] = deque(maxlen=_LESSONS)
        self._begun: dict[tuple[str, str], int] = {}

    def sample(self, now_s: float, *, busy: bool) -> tuple[LockRate, ...] | None:
        """Waits since the last call; None while nothing is known. `busy`: somebody mounts, so that one can learn."""
        counted = self._count(self._lines()) if self._known else None
        if busy and self.available and len(self._known) < len(MOUNT_LOCKS) and self._may_learn(now_s):
            self._learn()
        return counted

    def _may_learn(self, now_s: float) -> bool:
        if len(self._lessons) == _LESSONS and now_s - self._lessons[0] < _LESSONS_IN_S:
            return False
        self._lessons.append(now_s)
        return True

    def _learn(self) -> None:
        """Record all contended waits with their stacks for a moment. What is recorded meanwhile is counted nowhere."""
        for event in (_BEGIN, _END):
            self._instance.filter(event, "0")
        self._instance.set_option("stacktrace", True)
        self._instance.enable(_BEGIN)
        time.sleep(_LEARN_FOR_S)
        self._instance.disable(_BEGIN)
        self._instance.set_option("stacktrace", False)
        self._learning.take(self._lines())
        self._learning.finish()
        self._known = self._learning.addresses()
        if self._known:
            self._begun.clear()
            condition = " || ".join(f"lock_addr == 0x{address}" for address in self._known)
            for event in (_BEGIN, _END):
                self._instance.enable(event, condition=condition)

    def _count(self, lines: Iterable[str]) -> tuple[LockRate, ...]:
        waits: Counter[Lock] = Counter()
        total_us: Counter[Lock] = Counter()
        for line in lines:
            event = _EVENT.match(line)
            if event is None or event[5] not in self._known:
                continue
            key = (event[1], event[5])
            at_us = int(event[2]) * 1_000_000 + int(event[3])
            if event[4] == "begin":
                self._begun.setdefault(key, at_us)
                continue
            begun_us = self._begun.pop(key, None)
            if begun_us is not None:
                waits[self._known[event[5]]] += 1
                total_us[self._known[event[5]]] += at_us - begun_us
        known = dict.fromkeys(self._known.values())
        return tuple(LockRate(str(lock), waits[lock], round(total_us[lock] / 1000, 3)) for lock in known)

    def _lines(self) -> Iterable[str]:
        lines, self._rest = self._instance.read_lines(self._pipe, self._rest)
        return lines

    def close(self) -> None:
        """Remove the instance. Closing twice is fine."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            self._instance.close()
