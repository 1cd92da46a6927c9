"""One burst: many containers started at once, and undone again when all of them stand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from flatmount.errors import FlatmountError, from_os_error
from flatmount.kernel.executor import adopt_thread
from flatmount.rootfs.assembler import Assembler, Rootfs
from flatmount.rootfs.ranges import RangePool
from flatmount.storm.containers import Container, start


@dataclass(frozen=True, slots=True)
class Started:
    """A container that stands, and how long it took."""

    container: Container
    rootfs: Rootfs
    latency_ns: int


@dataclass(slots=True)
class Burst:
    """What a burst left standing, and what failed. Times are of CLOCK_MONOTONIC."""

    start_ns: int = 0
    end_ns: int = 0
    started: list[Started] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run_burst(
    wanted: Sequence[Container],
    assembler: Assembler,
    *,
    concurrency: int,
    copies: int,
    timeout_s: float,
    admit: int | None,
    stop: threading.Event,
    begin_ns: int = 0,
) -> Burst:
    """Start all containers, at most `concurrency` at a time, and return when the last one stands or failed.

    A container's latency counts from its request: the moment one of the `concurrency` requesters is free for it. With
    `admit`, a request may have to wait until fewer than that many are being assembled; the wait is part of its latency.
    One that takes longer than `timeout_s` failed, as it has for whoever waited; it is undone with the others. When
    `stop` is set, no further container is begun. Nothing begins before `begin_ns`.
    """
    burst = Burst()
    waiting = iter(wanted)
    lock = threading.Lock()
    gate = threading.Semaphore(admit) if admit else nullcontext()

    def one(container: Container) -> None:
        asked_ns = time.monotonic_ns()
        with gate:
            rootfs = start(container, assembler, copies=copies)
        now_ns = time.monotonic_ns()
        with lock:
            burst.started.append(Started(container, rootfs, now_ns - asked_ns))

    def requester() -> None:
        while not stop.is_set():
            with lock:
                container = next(waiting, None)
            if container is None:
                return
            try:
                one(container)
            except FlatmountError as error:
                with lock:
                    burst.failures.append(_in_general(error, container))
            except OSError as error:
                with lock:
                    burst.failures.append(_in_general(from_os_error(error, "start"), container))

    burst.start_ns = together(concurrency, requester, stop, begin_ns)
    burst.end_ns = time.monotonic_ns()
    late = sum(one.latency_ns > timeout_s * 1e9 for one in burst.started)
    burst.failures += [f"took longer than the time-out of {timeout_s:g} s"] * late
    return burst


def _in_general(error: FlatmountError, container: Container) -> str:
    """A failure without the container's name, so that a hundred of a kind are one message."""
    return str(error).replace(container.target, "ROOT").replace(container.name, "NAME")


@dataclass(frozen=True, slots=True)
class NotUndone:
    """A root file system that still stands, and why."""

    target: str
    why: str


def undo_burst(burst: Burst, pool: RangePool, *, concurrency: int) -> tuple[dict[str, int], int, list[NotUndone]]:
    """Undo what stands, as many at a time as were started, and let its ranges go.

    Returns nanoseconds by container, mount operations, and what could not be undone.
    """
    left = iter(list(burst.started))
    lock = threading.Lock()
    took: dict[str, int] = {}
    operations = 0
    problems: list[NotUndone] = []

    def undoer() -> None:
        nonlocal operations
        while True:
            with lock:
                one = next(left, None)
            if one is None:
                return
            begun = time.perf_counter_ns()
            try:
                outcome = one.rootfs.undo()
            except FlatmountError as error:
                with lock:
                    problems.append(NotUndone(one.container.target, error.line()))
                continue
            except OSError as error:
                with lock:
                    why = from_os_error(error, f"undo {one.container.name}:").line()
                    problems.append(NotUndone(one.container.target, why))
                continue
            pool.drop(one.container.mapping)
            with lock:
                took[one.container.name] = time.perf_counter_ns() - begun
                operations += outcome.mount_operations if outcome else 0

    together(concurrency, undoer, threading.Event())
    return took, operations, problems


def together(count: int, work: Callable[[], None], stop: threading.Event, begin_ns: int = 0) -> int:
    """Run `work` on `count` threads that begin at one moment, not before `begin_ns`; returns that moment."""
    ready = threading.Barrier(count + 1)
    errors: list[BaseException] = []

    def body() -> None:
        try:
            adopt_thread()
            ready.wait()
            work()
        except BaseException as error:
            errors.append(error)
            stop.set()
            ready.abort()

    threads = [threading.Thread(target=body, name=f"storm-{i}") for i in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(max(0, begin_ns - time.monotonic_ns()) / 1e9)
    with suppress(threading.BrokenBarrierError):
        ready.wait()
    begun_ns = time.monotonic_ns()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return begun_ns
