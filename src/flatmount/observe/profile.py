"""The incident recorder: stacks on the processors, waits for locks with their stacks, mount calls, and the table's
length, all on one clock."""

from __future__ import annotations

import os
import resource
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from flatmount.errors import FlatmountError
from flatmount.observe.mount_calls import CALLS, EXEC, NEW_TASK
from flatmount.observe.perf import CONTENTION, SAMPLE_HZ, SWITCH, PerfRecord, Samples, Wait
from flatmount.observe.processes import read_place
from flatmount.observe.profile_results import CpuStack, LockWaits, Moment, ProcessOperations, Profile, WaitStack
from flatmount.observe.symbols import Lock, Work, normal, working_on
from flatmount.observe.trace import Tally, table_length
from flatmount.observe.tracefs import Reader, TraceInstance
from flatmount.storm.host import now_utc, this_host

_MOMENT_S = 0.1
_MOST_STACKS = 5000
_TRACING = ("__traceiter_", "trace_event_", "__probestub_", "perf_trace_")  # the recorder's own frames
_ROOTS = ("entry_SYSCALL_64_after_hwframe", "do_syscall_64", "x64_sys_call", "ret_from_fork_asm", "ret_from_fork")


@dataclass(slots=True)
class _Sampler:
    """A thread that reads the table's length and the kernel's pressure totals ten times a second."""

    process: int
    taken: list[tuple[int, int | None, int | None, int | None]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="profile-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            now = time.monotonic_ns()
            self.taken.append((now, table_length(self.process), _pressure_us("cpu"), _pressure_us("memory")))
            if self._stop.wait(_MOMENT_S):
                return


class Recorder:
    """Records the whole machine from `start` until `stop`, which returns the profile. A context manager.

    What cannot be recorded here is left out and named in the profile: perf that is missing, events that the kernel does
    not have. Kernel: lock events 5.19; the rest any. Needs root.
    """

    def __init__(self, command: Sequence[str] = ()) -> None:
        """`command` is what the profile says it was taken of; nothing is run."""
        self._command = tuple(command)
        self._missing: list[str] = []
        self._lines: list[str] = []
        self._directory = tempfile.TemporaryDirectory(prefix="flatmount-profile-")
        self._perf: PerfRecord | None = None
        self._instance: TraceInstance | None = None
        self._reader: Reader | None = None
        self._sampler = _Sampler(os.getpid())
        self._begun_ns = 0
        self._cpu_before = 0.0
        self._taken_at = ""

    def start(self) -> None:
        """Begin to record. Returns when everything does that can."""
        self._taken_at = now_utc()
        contention = switches = False
        try:
            self._instance = TraceInstance("profile")
            for call in CALLS:
                self._instance.enable(f"syscalls/sys_enter_{call}")
                self._instance.enable(f"syscalls/sys_exit_{call}")
            for event in (NEW_TASK, EXEC):
                self._instance.enable(event)
            self._missing += [f"the event {name}" for name in self._instance.missing]
            contention, switches = self._instance.has(CONTENTION), self._instance.has(SWITCH)
        except FlatmountError as error:
            self._missing.append(f"mount calls: {error}")
        if not contention:
            self._missing.append("lock waits: this kernel has no lock:contention_begin event (Linux 5.19)")
        if not switches:
            self._missing.append("grace periods: this kernel has no sched:sched_switch event")
        try:
            path = os.path.join(self._directory.name, "perf.data")
            self._perf = PerfRecord(path, contention=contention, switches=switches)
        except FlatmountError as error:
            self._missing.append(f"stacks and lock waits: {error}")
        self._cpu_before = _own_cpu_s()
        if self._instance is not None:
            self._reader = Reader(self._instance, self._lines.append)
        self._begun_ns = time.monotonic_ns()
        self._sampler.start()

    def watch_table_of(self, process: int) -> None:
        """Take the table's length in this process's mount namespace from now on, instead of in our own."""
        self._sampler.process = process

    def stop(
        self, *, root_process: int | None = None, same_program: bool = False, exit_code: int | None = None
    ) -> Profile:
        """End the recording and evaluate it.

        Args:
            root_process: what descends from this process is the command's.
            same_program: only what still runs the program that `root_process` does.
            exit_code: of the command.
        """
        ended_ns = time.monotonic_ns()
        self._sampler.stop()
        if self._reader is not None:
            self._reader.finish()
        own_cpu_s = _own_cpu_s() - self._cpu_before
        samples = Samples()
        if self._perf is not None:
            try:
                self._perf.stop()
                with self._perf.script() as script:
                    assert script.stdout
                    samples.take(script.stdout)
            except FlatmountError as error:
                self._missing.append(f"stacks and lock waits: {error}")
        tally = Tally(length_of=lambda process: None, ignored=frozenset((os.getpid(),)))
        for line in self._lines:
            tally.take(line)
        family = frozenset[int]()
        if root_process is not None:
            family = tally.descendants(root_process, same_program=same_program)
        seconds = (ended_ns - self._begun_ns) / 1e9
        # perf runs a little longer at both ends than the rest does.
        window = range(self._begun_ns, ended_ns)
        waits = [wait for wait in samples.waits if wait.at_ns in window]
        return Profile(
            taken_at=self._taken_at,
            host=this_host(),
            seconds=round(seconds, 3),
            command=self._command,
            exit_code=exit_code,
            sample_hz=SAMPLE_HZ,
            waits=lock_waits(waits, family),
            cpu=cpu_stacks((one.name, one.stack, one.process in family) for one in samples.cpu if one.at_ns in window),
            wait_stacks=wait_stacks(waits),
            operations=tuple(
                ProcessOperations(
                    one.process, one.command, str(read_place(one.process)), one.process in family, one.calls
                )
                for one in tally.processes()
            ),
            moments=moments(self._sampler.taken, waits, self._begun_ns, seconds),
            missing=tuple(self._missing),
            lost=self._instance.lost() if self._instance is not None else 0,
            cost_cpu_s=round(own_cpu_s + (self._perf.cpu_s if self._perf is not None else 0.0), 3),
        )

    def close(self) -> None:
        """Stop what still runs and remove the recording. Closing twice is fine."""
        self._sampler.stop()
        if self._reader is not None:
            self._reader.finish()
        if self._instance is not None:
            self._instance.close()
        if self._perf is not None:
            self._perf.close()
        self._directory.cleanup()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def folded(name: str, stack: Sequence[str]) -> str:
    """A stack as flame graph tools take it: root first, joined by `;`, the process in front."""
    frames = [normal(frame) for frame in reversed(stack) if not frame.startswith(_TRACING)]
    while frames and frames[0] in _ROOTS:
        frames.pop(0)
    return ";".join((name.replace(";", ":"), *(frame.replace(";", ":") for frame in frames or ["[user]"])))


def cpu_stacks(samples: Iterable[tuple[str, tuple[str, ...], bool]]) -> tuple[CpuStack, ...]:
    """Samples by stack, the most first. `samples` are (process name, stack leaf first, whether the command's)."""
    counts: dict[tuple[str, Work, bool], int] = defaultdict(int)
    known: dict[tuple[str, tuple[str, ...]], tuple[str, Work]] = {}
    for name, stack, of_command in samples:
        place = known.get((name, stack))
        if place is None:
            place = known[name, stack] = (folded(name, stack), working_on(stack))
        counts[*place, of_command] += 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:_MOST_STACKS]
    return tuple(CpuStack(text, work, number, ours) for (text, work, ours), number in ordered)


def wait_stacks(waits: Sequence[Wait]) -> tuple[WaitStack, ...]:
    """Waits by stack, the most time first."""
    sums: dict[tuple[str, Lock], list[int]] = defaultdict(lambda: [0, 0])
    for wait in waits:
        entry = sums[folded(wait.name, wait.stack), wait.lock]
        entry[0] += 1
        entry[1] += wait.took_ns
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])[:_MOST_STACKS]
    return tuple(WaitStack(text, lock, count, round(ns / 1e3, 1)) for (text, lock), (count, ns) in ordered)


def lock_waits(waits: Sequence[Wait], family: frozenset[int]) -> tuple[LockWaits, ...]:
    """Waits by lock and process, the most time first."""
    sums: dict[tuple[Lock, int, str], list[int]] = defaultdict(list)
    for wait in waits:
        sums[wait.lock, wait.process, wait.name].append(wait.took_ns)
    found = [
        LockWaits(lock, process, name, process in family, len(took), _us(sum(took)), _us(max(took)))
        for (lock, process, name), took in sums.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.total_us))


def _us(nanoseconds: int) -> float:
    return round(nanoseconds / 1e3, 1)


def moments(
    taken: Sequence[tuple[int, int | None, int | None, int | None]],
    waits: Sequence[Wait],
    begun_ns: int,
    seconds: float,
) -> tuple[Moment, ...]:
    """The recording in tenths of a second."""
    count = max(1, int(seconds / _MOMENT_S) + 1)
    waited: dict[tuple[int, Lock], float] = defaultdict(float)
    for wait in waits:
        waited[int((wait.at_ns - begun_ns) / 1e9 / _MOMENT_S), wait.lock] += wait.took_ns / 1e6
    sampled = {int((at_ns - begun_ns) / 1e9 / _MOMENT_S): (at_ns, *values) for at_ns, *values in taken}
    found = []
    for index in range(count):
        now, later = sampled.get(index), sampled.get(index + 1)
        found.append(
            Moment(
                at_s=round(index * _MOMENT_S, 1),
                mounts=now[1] if now else None,
                namespace_sem_ms=round(waited[index, Lock.NAMESPACE_SEM], 3),
                mount_lock_ms=round(waited[index, Lock.MOUNT_LOCK], 3),
                grace_period_ms=round(waited[index, Lock.GRACE_PERIOD], 3),
                cpu_pressure=_percent(now, later, 2),
                memory_pressure=_percent(now, later, 3),
            )
        )
    return tuple(found)


def _percent(now: tuple[int | None, ...] | None, later: tuple[int | None, ...] | None, place: int) -> float | None:
    if now is None or later is None:
        return None
    before, after, begun, ended = now[place], later[place], now[0], later[0]
    if before is None or after is None or begun is None or ended is None or ended <= begun:
        return None
    return round(min(100.0, (after - before) * 1000 / (ended - begun) * 100), 1)


def _pressure_us(what: str) -> int | None:
    with suppress(OSError, ValueError, IndexError), open(f"/proc/pressure/{what}", encoding="ascii") as file:
        return int(file.readline().rpartition("total=")[2])
    return None


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
