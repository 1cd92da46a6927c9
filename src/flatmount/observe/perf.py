"""perf as a recorder: what it is told to record, and its script's text as samples and waits.

perf and not a reader of our own: it copies stacks out of the kernel in binary and resolves their symbols, which costs
far less than the text of an event. It runs in a private mount namespace, in which tracefs is mounted where it is not:
perf believes a mount table that names tracefs, also where something else is mounted over it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel.executor import run_once
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.symbols import Lock, waited_for
from flatmount.plan.operations import Mount, MountPlan

SAMPLE_HZ = 199
CONTENTION = "lock/contention_begin"
SWITCH = "sched/sched_switch"

_TRACEFS = "/sys/kernel/tracing"  # where perf looks first
_START_S = 30.0
_STOP_S = 120.0
_HEADER = re.compile(r"\s*(.+?)\s+(\d+)/(\d+)\s+(\d+)\.(\d{9}):\s+(\S+):(?:\s+(.*))?\n?")
_SWITCH = re.compile(r"prev_pid=(\d+) .*prev_state=(\S+) ==> next_comm=.* next_pid=(\d+)")


def record_command(perf: str, output: str, *, contention: bool, switches: bool) -> list[str]:
    """The call of perf that records every processor, with kernel stacks only, on CLOCK_MONOTONIC."""
    command = [perf, "record", "-q", "-a", "-k", "CLOCK_MONOTONIC", "--kernel-callchains", "-g", "-o", output]
    command += ["-m", "1024", "-e", f"cpu-clock/freq={SAMPLE_HZ}/"]
    if contention:
        command += ["-e", "lock:contention_begin/call-graph=fp/", "-e", "lock:contention_end/call-graph=no/"]
    if switches:
        # Two of the same: stacks where a task begins to wait for what is no lock, and who runs when, without stacks.
        command += ["-e", "sched:sched_switch/call-graph=fp/", "--filter", "prev_state == 2"]
        command += ["-e", "sched:sched_switch/call-graph=no/"]
    return [*command, "--", "sh", "-c", "echo on; exec cat"]


class PerfRecord:
    """A running `perf record` of the whole machine. It ends when told, or when this process does."""

    def __init__(self, output: str, *, contention: bool, switches: bool) -> None:
        """Start it and wait until it records.

        Raises: MissingFeature where there is no perf, FlatmountError with perf's own words where it does not work.
        """
        perf = shutil.which("perf")
        if perf is None:
            raise MissingFeature("perf is not installed", hint="its package is often called linux-perf or perf")
        self.output = output
        self.perf = perf
        self.cpu_s = 0.0
        self._process = self._start(record_command(perf, output, contention=contention, switches=switches))
        assert self._process.stdout and self._process.stderr
        timer = threading.Timer(_START_S, self._process.kill)
        timer.start()
        ready = self._process.stdout.readline()
        timer.cancel()
        if not ready:
            said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise FlatmountError(f"perf record: {said[0] if said else 'it ended'}", hint="try it by hand")

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        made: list[subprocess.Popen[bytes] | BaseException] = []

        def start() -> None:
            try:
                enter_private_mounts()
                _show_tracefs()
                pipe = subprocess.PIPE
                made.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0))
            except BaseException as error:
                made.append(error)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        (result,) = made
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        """End the recording and wait until its file is whole."""
        assert self._process.stdin
        self._process.stdin.close()
        timer = threading.Timer(_STOP_S, self._process.kill)
        timer.start()
        _, status, usage = os.wait4(self._process.pid, 0)
        timer.cancel()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime
        if self._process.returncode not in (0, -signal.SIGTERM):
            assert self._process.stderr
            said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            raise FlatmountError(f"perf record ended with {self._process.returncode}: {said[-1] if said else ''}")

    def close(self) -> None:
        """Kill it if it still runs. Closing twice is fine."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()

    def script(self) -> subprocess.Popen[str]:
        """`perf script` over the recording; its standard output is for `Samples.take`."""
        command = [self.perf, "script", "-i", self.output, "--ns", "-F", "comm,pid,tid,time,event,ip,sym,trace"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")


def _show_tracefs() -> None:
    """Mount tracefs in the calling thread's private namespace unless it is there to be seen; perf says if it fails."""
    if not os.path.isdir(f"{_TRACEFS}/events"):
        with suppress(FlatmountError):
            run_once(MountPlan((Mount("tracefs", _TRACEFS, "tracefs"),)))


@dataclass(frozen=True, slots=True)
class CpuSample:
    """What a busy processor was doing: the process, and its kernel stack leaf first (empty in user space)."""

    process: int
    name: str
    at_ns: int
    stack: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """A task that waited: for which lock, from when, how long, with which stack (leaf first)."""

    process: int
    name: str
    at_ns: int
    took_ns: int
    lock: Lock
    stack: tuple[str, ...]


@dataclass(slots=True)
class Samples:
    """Samples and waits out of the text of `perf script`.

    A contended lock is a wait from `contention_begin` to `contention_end`. A grace period without a lock is a task that
    is switched out with a stack that waits for one, until it runs again; while a task is within a contended wait its
    sleep is that wait's and counts once.
    """

    cpu: list[CpuSample] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    # By task and address: one that sleeps for a semaphore may spin for the scheduler's lock meanwhile.
    _contended: dict[int, dict[str, tuple[int, bool, tuple[str, ...]]]] = field(default_factory=dict)
    _asleep: dict[int, tuple[int, int, str, tuple[str, ...]]] = field(default_factory=dict)
    _shared: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def take(self, lines: Iterable[str]) -> None:
        """Take the whole text."""
        head: tuple[str | None, ...] | None = None
        stack: list[str] = []
        for line in lines:
            if line[0] == "\t":
                stack.append(line.split(maxsplit=1)[1].rstrip("\n"))
            elif line != "\n":
                if head is not None:
                    self._event(head, stack)
                match = _HEADER.fullmatch(line)
                head = None if match is None else match.groups()
                stack = []
        if head is not None:
            self._event(head, stack)

    def _event(self, head: Sequence[str | None], frames: list[str]) -> None:
        name, process, thread, seconds, nanoseconds, event, text = (word or "" for word in head)
        at_ns = int(seconds) * 1_000_000_000 + int(nanoseconds)
        task = int(thread)
        if event == "lock:contention_begin":
            # `SPIN|MUTEX` is a mutex that somebody spins on before sleeping, which begins again without an end.
            spins = "SPIN" in text and "MUTEX" not in text
            pending = self._contended.setdefault(task, {})
            pending.setdefault(text.split(" ", 1)[0], (at_ns, spins, self._stack(frames)))
        elif event == "lock:contention_end":
            begun = self._contended.get(task, {}).pop(text.split(" ", 1)[0], None)
            if begun is not None:
                begun_ns, spins, stack = begun
                lock = waited_for(stack, spins=spins)
                self.waits.append(Wait(int(process), name, begun_ns, at_ns - begun_ns, lock, stack))
        elif event == "sched:sched_switch":
            self._switch(int(process), name, at_ns, text, frames)
        elif name != "swapper" and int(process):
            self.cpu.append(CpuSample(int(process), name, at_ns, self._stack(frames)))

    def _switch(self, process: int, name: str, at_ns: int, text: str, frames: list[str]) -> None:
        match = _SWITCH.search(text)
        if match is None:
            return
        out, state, into = int(match[1]), match[2], int(match[3])
        if frames and state.startswith("D") and not self._contended.get(out):
            stack = self._stack(frames)
            if waited_for(stack, spins=False) is Lock.GRACE_PERIOD:
                self._asleep[out] = (at_ns, process, name, stack)
        woken = self._asleep.pop(into, None)
        if woken is not None:
            begun_ns, process, name, stack = woken
            self.waits.append(Wait(process, name, begun_ns, at_ns - begun_ns, Lock.GRACE_PERIOD, stack))

    def _stack(self, frames: list[str]) -> tuple[str, ...]:
        stack = tuple(frames)
        return self._shared.setdefault(stack, stack)
