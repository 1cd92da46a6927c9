"""Counting the mount calls of a command and everything it starts, for each process, from the kernel's trace events."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel.mounts import MountEvents, mount_count
from flatmount.observe.events import Event, parse_event
from flatmount.observe.mount_calls import (
    CALLS,
    CLONE_NEWNS,
    CLONE_THREAD,
    EXEC,
    NEW_TASK,
    Effect,
    call_name,
    effect_of,
)
from flatmount.observe.trace_results import CallCount, ProcessCalls, TraceRun
from flatmount.observe.tracefs import Reader, TraceInstance

NOT_FOUND, NOT_EXECUTABLE = 127, 126


def table_length(process: int) -> int | None:
    """Mounts in a process's namespace, or None where it is gone or may not be looked at."""
    try:
        return mount_count(pid=process)
    except (FlatmountError, OSError):
        return None


@dataclass(slots=True)
class _Count:
    done: int = 0
    failed: int = 0
    total_ns: int = 0
    longest_ns: int = 0


@dataclass(slots=True)
class Tally:
    """Adds up events, line by line. Pure but for `length_of`, which is asked at each copy of a mount namespace."""

    length_of: Callable[[int], int | None] = table_length
    ignored: frozenset[int] = frozenset()
    copies: int = 0
    table_lengths: list[int] = field(default_factory=list)
    _begun: dict[int, tuple[str, Effect | None, int]] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _called_as: dict[int, str] = field(default_factory=dict)
    _parents: dict[int, int] = field(default_factory=dict)
    _processes: dict[int, int] = field(default_factory=dict)
    _counts: dict[int, dict[tuple[str, Effect], _Count]] = field(default_factory=dict)
    _executed: set[int] = field(default_factory=set)

    def take(self, line: str) -> None:
        """Take one line as the kernel printed it."""
        event = parse_event(line)
        if event is None:
            return
        name = call_name(event)
        if name is not None:
            self._call(event, name)
        elif event.name == "task_newtask":
            self._new_task(event)
        elif event.name == "sched_process_exec":
            self._exec(event)

    def processes(self) -> tuple[ProcessCalls, ...]:
        """What was counted, for each process in the order of its first call."""
        return tuple(
            ProcessCalls(
                process,
                self._called_as[process],
                tuple(
                    CallCount(
                        call,
                        effect,
                        count.done,
                        count.failed,
                        _us(count.total_ns),
                        _us(count.longest_ns),
                    )
                    for (call, effect), count in counts.items()
                ),
            )
            for process, counts in self._counts.items()
            if process not in self.ignored
        )

    def descendants(self, root: int, *, same_program: bool = False) -> frozenset[int]:
        """Every task that descends from `root`, and itself, as far as it was started while events were taken.

        With `same_program` only those that still run what `root` does, and what descends from these.
        """
        family = {root}
        left_out = self._executed - family if same_program else set()
        # A parent's number is no smaller or larger than its child's: it may have been used again. So until none is new.
        while new := {task for task, parent in self._parents.items() if parent in family} - family - left_out:
            family |= new
        return frozenset(family)

    def _call(self, event: Event, name: str) -> None:
        returned = event.returned
        if returned is None:
            self._begun[event.thread] = (name, effect_of(name, event.arguments()), event.time_ns)
            return
        begun_name, effect, begun_ns = self._begun.pop(event.thread, ("", None, 0))
        if begun_name != name or effect is None:
            return
        self._count(event, name, effect, returned >= 0, event.time_ns - begun_ns)
        if effect is Effect.COPY and returned >= 0:
            self._copied(event.thread)

    def _new_task(self, event: Event) -> None:
        words = event.words()
        task, flags = int(words["pid"]), int(words["clone_flags"], 16)
        parent = self._process(event)
        self._parents[task] = event.thread
        if flags & CLONE_THREAD:
            self._processes[task] = parent
        else:
            self._processes[task] = task
            self._names[task] = self._names.get(parent, event.comm)
        if flags & CLONE_NEWNS:
            self._count(event, "clone", Effect.COPY, True, 0)
            self._copied(task)

    def _exec(self, event: Event) -> None:
        # What is executed through a descriptor (`/proc/self/fd/6`) keeps its name: a runtime that starts itself again.
        process = self._process(event)
        self._executed.add(process)
        name = os.path.basename(event.words().get("filename", ""))
        if name and not name.isdigit():
            self._names[process] = name

    def _count(self, event: Event, name: str, effect: Effect, done: bool, took_ns: int) -> None:
        process = self._process(event)
        self._called_as.setdefault(process, self._names.get(process, event.comm))
        count = self._counts.setdefault(process, {}).setdefault((name, effect), _Count())
        count.done += done
        count.failed += not done
        count.total_ns += took_ns
        count.longest_ns = max(count.longest_ns, took_ns)

    def _process(self, event: Event) -> int:
        """Whose thread it is.

        Where its start was seen, that tells. The kernel prints what it noted at a thread's last switch, for a thread
        that has made none yet the process of another that had its number before.
        """
        told = event.thread if event.process is None else event.process
        return self._processes.get(event.thread, told)

    def _copied(self, task: int) -> None:
        # The task itself is in the copy by now, and may have taken its mounts off already (a runtime does).
        self.copies += 1
        ancestor = self._parents.get(task)
        while ancestor is not None:
            length = self.length_of(ancestor)
            if length is not None:
                self.table_lengths.append(length)
                return
            ancestor = self._parents.get(ancestor)


def _us(nanoseconds: int) -> float:
    return round(nanoseconds / 1e3, 1)


def threads_of(process: int) -> tuple[int, ...]:
    """The threads of a process; none where it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return tuple(map(int, os.listdir(f"/proc/{process}/task")))
    return ()


def trace(
    command: Sequence[str],
    *,
    subject: str = "command",
    layers: int | None = None,
    also: Iterable[int] = (),
    work: Callable[[], int] | None = None,
    quiet: bool = False,
) -> TraceRun:
    """Run `command` to its end and count the mount calls of it and of everything that descends from it.

    Args:
        also: processes that serve it and are followed with their descendants too: a daemon.
        work: instead of starting `command`, what makes it happen; its result is the exit code. Mount calls of this
            process are then counted nowhere, those of `also` are.
        quiet: keep the command's output for the error message of a failed run.

    The exit code is the command's own, 128 + N after signal N, 127 where it is not found and 126 where it cannot be
    executed. What it leaves running is followed no longer.

    Raises: MissingFeature without system call events.
    Kernel: CONFIG_FTRACE_SYSCALLS, tracefs (see TraceInstance).
    """
    own = os.getpid()
    tally = Tally(ignored=frozenset((own,)))
    with TraceInstance("trace") as instance:
        instance.follow([*(() if work else threads_of(own)), *(t for process in also for t in threads_of(process))])
        for call in CALLS:
            instance.enable(f"syscalls/sys_enter_{call}")
            instance.enable(f"syscalls/sys_exit_{call}")
        if "syscalls/sys_enter_mount" in instance.missing:
            raise MissingFeature("the events of system calls", hint="it takes a kernel with CONFIG_FTRACE_SYSCALLS")
        for event in (NEW_TASK, EXEC):
            instance.enable(event)
        events, reason = _watched()
        with Reader(instance, tally.take):
            begun = time.monotonic()
            code = work() if work else _run(command, quiet)
            seconds = time.monotonic() - begun
        counts = events.counts() if events else None
        if events:
            events.close()
        return TraceRun(
            subject=subject,
            layers=layers,
            command=tuple(command),
            exit_code=code,
            seconds=round(seconds, 4),
            processes=tally.processes(),
            copies=tally.copies,
            table_lengths=tuple(tally.table_lengths),
            attached=counts.attached if counts else None,
            detached=counts.detached if counts else None,
            events_reason=reason,
            lost=instance.lost(),
            missing=tuple(name.removeprefix("syscalls/sys_") for name in instance.missing),
        )


def _watched() -> tuple[MountEvents | None, str | None]:
    try:
        return MountEvents(), None
    except FlatmountError as error:
        return None, str(error)


def _run(command: Sequence[str], quiet: bool) -> int:
    try:
        done = subprocess.run(command, check=False, capture_output=quiet)
    except FileNotFoundError:
        return NOT_FOUND
    except PermissionError:
        return NOT_EXECUTABLE
    if quiet and done.returncode:
        said = (done.stderr or done.stdout or b"").decode(errors="replace").strip().splitlines()
        raise FlatmountError(f"{command[0]} ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return done.returncode if done.returncode >= 0 else 128 - done.returncode
