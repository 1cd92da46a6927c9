"""The storm: each strategy in turn, paired and interleaved over repeats, in a mount namespace of its own."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from flatmount.errors import FlatmountError, MissingFeature, UsageError, from_os_error
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import MountEvents, mount_count
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.kernel.process import owned_name
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import Mount, MountFlag, MountPlan, Operation
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import specification
from flatmount.rootfs.ranges import RangePool
from flatmount.rootfs.workplace import workplace
from flatmount.store import Store, StoredImage
from flatmount.storm.burst import Burst, NotUndone, run_burst, undo_burst
from flatmount.storm.containers import MOST_CONTAINERS, Container, containers, image_files, merged_tree
from flatmount.storm.host import now_utc, this_host
from flatmount.storm.limits import allow_descriptors
from flatmount.storm.probe import HealthProbe
from flatmount.storm.results import (
    ContainerTimes,
    ImageFacts,
    MountOperations,
    RunResult,
    Settings,
    StormReport,
    measured,
)
from flatmount.storm.watcher import Watchers, WatcherTotals
from flatmount.strategies import Choice, Upper, flat

Progress = Callable[[str], None]

# Every burst begins this long before a round of the health probe is due, so that even a short one meets one.
_BEFORE_ROUND_NS = 2_000_000


class Interrupted(FlatmountError):
    """A signal ended the storm; everything it had made is undone, but for what `left` says."""

    def __init__(self, number: int, left: str = "everything is undone") -> None:
        super().__init__(f"interrupted; {left}")
        self.number = number
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True)
class Account:
    """What the kernel itself counted for a burst, or why it did not."""

    operations: int | None
    reason: str | None


def run_storm(
    store: Store,
    image: StoredImage,
    settings: Settings,
    *,
    facts: HostFacts,
    run: str,
    uppers: str | None,
    progress: Progress,
    account: bool = True,
) -> StormReport:
    """Run the whole storm.

    Unless `settings.on_host`, the calling thread (the main thread of a process without others) moves into a private
    copy of its mount namespace for good. A tmpfs of the storm's own holds targets, and uppers unless a directory is
    named for them. Everything is gone when it returns, also after SIGINT and SIGTERM.

    Args:
        facts: what the probes found for this store.
        run: the run directory, for the workplace.
        uppers: an existing directory in which the storm makes one for its uppers.
        progress: told what is going on, in a few words.
        account: first a burst of each strategy for the kernel's own count; who only wants the bursts leaves it out.

    What cannot be undone is said in the report: what was measured is not lost for it.
    Raises: FlatmountError; Interrupted.
    """
    _check(settings)
    allow_descriptors(settings.containers, settings.concurrency, layers=len(image.layers))
    taken_at = now_utc()
    if not settings.on_host:
        enter_private_mounts()
    elsewhere = () if uppers is None else (os.path.join(os.path.realpath(uppers), owned_name("flatmount-storm")),)
    report: StormReport | None = None
    standing = _Standing()
    try:
        with ExitStack() as stack:
            stop = stack.enter_context(stoppable())
            place = stack.enter_context(workplace(run, "storm", elsewhere=elsewhere))
            standing.place = place
            background_mounts(place, settings.background)
            uppers = elsewhere[0] if elsewhere else f"{place}/uppers"
            storm = _Storm(store, image, settings, facts, place, uppers, stop, standing)
            probe = stack.enter_context(HealthProbe())
            storm.prepare(progress, stack)
            unasked = Account(None, "not asked")
            accounts = {name: storm.account(name, progress) if account else unasked for name in settings.strategies}
            results = [
                storm.measure(name, repeat, accounts[name], probe, progress)
                for repeat in range(settings.repeats)
                for name in rotated(settings.strategies, repeat)
            ]
            name = image.name or image.digest
            facts_of_image = ImageFacts(name, len(image.layers), storm.entries)
            report = StormReport(taken_at, this_host(), facts_of_image, settings, tuple(results))
    except Interrupted as interrupted:
        if standing.lines:
            raise Interrupted(interrupted.number, standing.told()[0]) from None
        raise
    except (FlatmountError, OSError) as error:
        if report is None:
            raise
        # Everything was measured, and what all bursts shared could not be let go.
        said = error if isinstance(error, FlatmountError) else from_os_error(error, "end the storm:")
        return replace(report, not_undone=(*standing.told(), said.line()))
    return replace(report, not_undone=standing.told())


class _Standing:
    """What could not be undone, a line for each burst, and the storm's directory, which goes last."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.place = ""

    def told(self) -> tuple[str, ...]:
        """The lines, with what became of it when the directory went."""
        fate = f"gone with {self.place}"
        if os.path.lexists(self.place):
            fate = f"{self.place} is still there: the next `flatmount storm`, `mount` or `umount` clears it"
        return tuple(f"{line}; {fate}" for line in self.lines)


def _check(settings: Settings) -> None:
    if settings.containers > MOST_CONTAINERS:
        raise UsageError(
            f"{settings.containers} containers need more host ids than there are",
            hint=f"at most {MOST_CONTAINERS} have a range of 65536 ids each",
        )


def rotated(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    """Another order in each repeat, so that no strategy always runs after the same other one."""
    by %= len(names)
    return names[by:] + names[:by]


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP ask the storm to stop; it then undoes what stands, which an exception could cut short.

    A SIGHUP that is ignored (nohup) stays ignored.
    """
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Whether a signal asked us to end; `check` raises Interrupted if so."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.number = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.event.set()

    def check(self) -> None:
        if self.event.is_set():
            raise Interrupted(self.number)


def background_mounts(place: str, count: int) -> None:
    """Put `count` mounts of an empty directory into the table, beside each other as on a full node."""
    if not count:
        return
    os.mkdir(f"{place}/background")
    source = f"{place}/background/source"
    os.mkdir(source)
    operations: list[Operation] = []
    for i in range(count):
        os.mkdir(f"{place}/background/{i}")
        operations.append(Mount(source, f"{place}/background/{i}", None, MountFlag.BIND))
    run_once(MountPlan(tuple(operations)))


class _Storm:
    """What all bursts of one storm share."""

    def __init__(
        self,
        store: Store,
        image: StoredImage,
        settings: Settings,
        facts: HostFacts,
        place: str,
        uppers: str,
        stop: Stop,
        left: _Standing,
    ) -> None:
        self._store = store
        self._image = image
        self._settings = settings
        self._facts = facts
        self._place = place
        self._uppers = uppers
        self._stop = stop
        self._left = left
        self.entries = 0
        self._files: list[str] = []
        self._tree = ""
        self._bursts = 0

    def prepare(self, progress: Progress, stack: ExitStack) -> None:
        """Make what is made once for the image: its flat tree if a strategy takes it, and the storm's directories."""
        if flat.NAME in self._settings.strategies:
            progress("flat tree")
            self._store.ensure_flat(self._image)
        self._tree = stack.enter_context(merged_tree(self._store, self._image, self._facts))
        self._files, self.entries = image_files(self._tree)
        for directory in (f"{self._place}/roots", f"{self._place}/tmp", self._uppers):
            os.makedirs(directory, mode=0o711, exist_ok=True)
        self._stop.check()

    def _assembler(self, name: str, pool: RangePool) -> Assembler:
        scratch = f"{self._place}/tmp/ovl-"
        spec = specification(
            self._store,
            self._image,
            Choice(name, ""),
            upper=Upper.ELSEWHERE,
            make_target=True,
            scratch=scratch,
        )
        return Assembler(spec, name, pool, uppers=self._uppers, scratch=scratch, ephemeral=True)

    def _containers(self, repeat: int) -> tuple[Container, ...]:
        self._bursts += 1
        settings = self._settings
        return containers(
            settings.containers,
            self._tree,
            self._files,
            f"{self._place}/roots",
            seed=f"{settings.seed}-{repeat}",
            prefix=f"b{self._bursts}",
        )

    def account(self, name: str, progress: Progress) -> Account:
        """A burst that is not timed, for the kernel's own count of attach and detach events."""
        progress(f"{name}: the kernel's account")
        try:
            events = MountEvents()
        except MissingFeature as missing:
            return Account(None, str(missing))
        with events:
            pool = RangePool(self._store.data, self._facts)
            wanted = self._containers(0)
            before = events.counts()
            burst = self._burst(wanted, self._assembler(name, pool), copies=0)
            after = events.counts()
            self._undo(burst, pool, f"{name}, the kernel's account")
        if burst.failures:
            return Account(None, f"the burst that was counted had failures: {burst.failures[0]}")
        counted = after.attached + after.detached - before.attached - before.detached
        return Account(counted, None)

    def measure(self, name: str, repeat: int, account: Account, probe: HealthProbe, progress: Progress) -> RunResult:
        """One timed burst, with watchers and the health probe beside it."""
        settings = self._settings
        progress(f"repeat {repeat + 1} of {settings.repeats}: {name}")
        pool = RangePool(self._store.data, self._facts)
        assembler = self._assembler(name, pool)
        wanted = self._containers(repeat)
        if settings.ranges == "ahead":
            pool.prepare((one.mapping for one in wanted), pinned=assembler.pins)
        before = mount_count()
        gc.collect()
        with Watchers(settings.watchers) as watchers:
            begin_ns = probe.next_round_ns() - _BEFORE_ROUND_NS
            burst = self._burst(wanted, assembler, copies=settings.copies, begin_ns=begin_ns)
            standing = mount_count()
            totals = watchers.stop() if settings.watchers else WatcherTotals(0, 0, 0, 0.0)
        once = pool.mount_operations
        undo_ns, undo_operations = self._undo(burst, pool, f"{name}, repeat {repeat + 1}")
        window = probe.between(burst.start_ns, burst.end_ns)
        self._stop.check()
        in_time = [one for one in burst.started if one.latency_ns <= settings.timeout_s * 1e9]
        return measured(
            strategy=name,
            repeat=repeat,
            containers=settings.containers,
            concurrency=settings.concurrency,
            wall_s=(burst.end_ns - burst.start_ns) / 1e9,
            started=[
                ContainerTimes(
                    latency_ms=one.latency_ns / 1e6,
                    user_namespace_ms=one.rootfs.phases.range_ns / 1e6,
                    plan_ms=one.rootfs.phases.plan_ns / 1e6,
                    execute_ms=one.rootfs.phases.execute_ns / 1e6,
                    undo_ms=_ms(undo_ns.get(one.container.name)),
                )
                for one in in_time
            ],
            failures=burst.failures,
            mount_operations=MountOperations(
                planned_per_container=assembler.plan.mount_operations,
                executed=sum(one.rootfs.outcome.mount_operations for one in burst.started),
                kernel=account.operations,
                kernel_reason=account.reason,
                once=once,
            ),
            mounts_before=before,
            mounts_after=mount_count(),
            mounts=[*window.mounts, ((burst.end_ns - burst.start_ns) / 1e9, standing)],
            probe=window.rounds,
            watchers_cpu_s=totals.cpu_s,
            watchers_rereads=totals.rereads,
            undo_operations=undo_operations,
        )

    def _burst(self, wanted: tuple[Container, ...], assembler: Assembler, *, copies: int, begin_ns: int = 0) -> Burst:
        settings = self._settings
        return run_burst(
            wanted,
            assembler,
            concurrency=min(settings.concurrency, settings.containers),
            copies=copies,
            timeout_s=settings.timeout_s,
            admit=settings.admit,
            stop=self._stop.event,
            begin_ns=begin_ns,
        )

    def _undo(self, burst: Burst, pool: RangePool, which: str) -> tuple[dict[str, int], int]:
        settings = self._settings
        concurrency = min(settings.concurrency, settings.containers)
        undo_ns, operations, problems = undo_burst(burst, pool, concurrency=concurrency)
        pool.close()
        if problems:
            self._left.lines.append(_in_one_line(which, problems))
        self._stop.check()
        return undo_ns, operations


def _in_one_line(which: str, problems: Sequence[NotUndone]) -> str:
    first = problems[0]
    what = "a root file system" if len(problems) == 1 else f"{len(problems):,} root file systems"
    where = "" if first.target in first.why else f"{first.target}: "
    return f"{which}: {what} could not be undone: {where}{first.why}"


def _ms(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e6
