"""The kernel's trace events through an instance of tracefs of our own.

An instance has buffers, filters and switches of its own, so whatever else traces on the machine is left alone. tracefs
is reached through a detached mount of it: nothing appears in any mount table, mounted there or not.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel.executor import run_once
from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.plan.operations import FsConfigCreate, FsMount, FsOpen, MountPlan, Slot

_PREFIX = "flatmount-"
_CONTEXT, _MOUNT = Slot("context"), Slot("mount")
_BUFFER_KIB = 64 * 1024  # over all processors
_MOST_KIB, _LEAST_KIB = 4096, 256  # for each
_READ_BYTES = 1 << 16
_POLL_MS = 100


class TraceInstance:
    """An instance of tracefs, empty and switched on; gone when the context is left.

    What killed processes left of theirs is removed first. A context manager.

    Kernel: tracefs with instances 4.1; CAP_SYS_ADMIN; not under lockdown's confidentiality mode.
    """

    __slots__ = ("_directory", "_name", "_tracefs", "missing")

    def __init__(self, purpose: str) -> None:
        """Make the instance. Raises: MissingFeature where there is no tracefs or it may not be used."""
        self.missing: list[str] = []
        self._tracefs = _detached_tracefs()
        try:
            instances = f"/proc/self/fd/{self._tracefs}/instances"
            for stale in os.listdir(instances):
                if stale.startswith(_PREFIX) and owner_is_gone(stale):
                    with suppress(OSError):
                        os.rmdir(f"{instances}/{stale}")
            self._name = owned_name(f"{_PREFIX}{purpose}-{threading.get_native_id()}")
            self._directory = f"{instances}/{self._name}"
            os.mkdir(self._directory)
        except OSError as error:
            os.close(self._tracefs)
            raise MissingFeature(
                f"an instance of tracefs: {error.strerror}", hint="another tracer or a security module is in the way"
            ) from error
        self.set_option("event-fork", True)
        self.set_option("record-tgid", True)
        self.set_option("irq-info", False)
        processors = os.cpu_count() or 1
        self._write("trace_clock", "mono")
        self._write("buffer_size_kb", str(max(_LEAST_KIB, min(_MOST_KIB, _BUFFER_KIB // processors))))

    def enable(self, event: str, *, condition: str = "") -> bool:
        """Switch on `group/name`, for events that meet `condition` (a filter of the kernel's).

        Returns False, and keeps the name in `missing`, where this kernel has no such event or refuses the filter.
        """
        try:
            if condition:
                self.filter(event, condition)
            self._write(f"events/{event}/enable", "1")
        except OSError:
            self.missing.append(event)
            return False
        return True

    def has(self, event: str) -> bool:
        """Whether this kernel has `group/name`."""
        return os.path.isdir(f"{self._directory}/events/{event}")

    def filter(self, event: str, condition: str) -> None:
        """Record `group/name` only where the condition is met; "0" for always. Raises: OSError."""
        self._write(f"events/{event}/filter", condition)

    def disable(self, event: str) -> None:
        """Switch `group/name` off."""
        self._write(f"events/{event}/enable", "0")

    def follow(self, threads: Iterable[int]) -> None:
        """Keep only events of these threads, and of threads and processes that they start from now on."""
        self._write("set_event_pid", " ".join(map(str, threads)))

    def set_option(self, name: str, on: bool) -> None:
        """Switch an option of the instance; one that the kernel does not have stays off."""
        with suppress(OSError):
            self._write(f"options/{name}", "1" if on else "0")

    def stop(self) -> None:
        """Record nothing any more; what waits in the buffers can still be read."""
        self._write("tracing_on", "0")

    def lost(self) -> int:
        """Events that were overwritten before anybody read them, or for which there was no room."""
        lost = 0
        for processor in os.listdir(f"{self._directory}/per_cpu"):
            with open(f"{self._directory}/per_cpu/{processor}/stats", encoding="ascii") as file:
                facts = dict(line.strip().split(": ") for line in file)
            lost += int(facts["overrun"]) + int(facts["dropped events"])
        return lost

    def open_pipe(self) -> int:
        """A descriptor of `trace_pipe` that does not block; the caller's, to be closed before the instance."""
        return os.open(f"{self._directory}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def read_lines(self, pipe: int, rest: bytes) -> tuple[list[str], bytes]:
        """Whole lines that wait in a pipe of this instance, and what is left of the last one; `rest` is from before."""
        chunks = [rest]
        while True:
            try:
                chunk = os.read(pipe, _READ_BYTES)
            except BlockingIOError:
                break
            if not chunk:
                break
            chunks.append(chunk)
        *lines, rest = b"".join(chunks).split(b"\n")
        return [line.decode(errors="replace") for line in lines], rest

    def close(self) -> None:
        """Remove the instance. Closing twice is fine."""
        if self._tracefs < 0:
            return
        try:
            with suppress(OSError):
                self._write("events/enable", "0")
            os.rmdir(self._directory)
        finally:
            os.close(self._tracefs)
            self._tracefs = -1

    def _write(self, name: str, value: str) -> None:
        with open(f"{self._directory}/{name}", "w", encoding="ascii") as file:
            file.write(value)

    def __enter__(self) -> TraceInstance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reader:
    """A thread that takes lines from an instance's pipe as they come and hands each of them to `take`.

    Lines come in the order of their times. A context manager; the thread has read everything recorded until then when
    `finish` returns.
    """

    __slots__ = ("_error", "_instance", "_pipe", "_stop", "_take", "_thread")

    def __init__(self, instance: TraceInstance, take: Callable[[str], None]) -> None:
        self._instance = instance
        self._take = take
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._pipe = instance.open_pipe()
        self._thread = threading.Thread(target=self._read, name="trace-reader", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Stop the instance, read what is left, and raise what `take` raised, if it did."""
        if self._pipe < 0:
            return
        self._instance.stop()
        self._stop.set()
        self._thread.join()
        os.close(self._pipe)
        self._pipe = -1
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        try:
            for line in pipe_lines(self._pipe, self._stop):
                self._take(line)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


def pipe_lines(pipe: int, stop: threading.Event) -> Iterable[str]:
    """Lines from a pipe of an instance until `stop` is set and nothing is left."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    rest = b""
    while True:
        last = stop.is_set()
        try:
            chunk = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            chunk = b""
        if chunk:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
        elif last:
            return
        else:
            poll.poll(_POLL_MS)


def _detached_tracefs() -> int:
    plan = MountPlan((FsOpen(_CONTEXT, "tracefs"), FsConfigCreate(_CONTEXT), FsMount(_MOUNT, _CONTEXT)), (_MOUNT,))
    try:
        return run_once(plan).outputs[0]
    except FlatmountError as error:
        raise MissingFeature(
            f"tracefs: {error}", hint="it takes root, CONFIG_FTRACE, and a kernel that is not locked down"
        ) from error
