"""Daemons that a trace, a storm or a proof starts for itself, with their output in a file, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from flatmount.errors import FlatmountError
from flatmount.kernel.process import start_time

_START_S = 30.0
_GONE_S = 5.0
# A program's name is among its first words: `python -P -m flatmount snapshotter`.
_NAME_WORDS = 5
SHIMS = ("containerd-shim",)


def start_program(
    command: Sequence[str], log: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a daemon whose output goes to the file `log`. The process is the caller's to end.

    It has a process group of its own: what a terminal interrupts is the command, which then takes away in order what
    the daemon has made.
    """
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, process_group=0
        )


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes], log: str) -> None:
    """Wait until a daemon is there. Raises: FlatmountError with its last line, when it ends or takes too long."""
    deadline = time.monotonic() + _START_S
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            with open(log, encoding="utf-8", errors="replace") as file:
                said = file.read().strip().splitlines()
            raise FlatmountError(f"it does not start: {said[-1] if said else 'it said nothing'}", hint=f"see {log}")
        time.sleep(0.02)


def end_program(process: subprocess.Popen[bytes]) -> None:
    """End a daemon, and wait for it."""
    process.terminate()
    try:
        process.wait(_START_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def afterwards(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` when the block is left. Raises: what `undo` raises, unless the block has been left by an error.

    Nothing takes the place of what ended the block, least of all of an interruption.
    """
    try:
        yield
    except BaseException:
        with suppress(FlatmountError):
            undo()
        raise
    undo()


def kill_those_of(place: str, programs: Sequence[str] = SHIMS) -> None:
    """Kill `programs` that have a path below `place` among their arguments, with their children; wait until they ended.

    containerd's shims outlive it, and their children are the containers' first processes: whoever was started for one
    proof or storm goes with it. Needs root for processes of others.
    """
    base, names = f"{place}/".encode(), [program.encode() for program in programs]
    parents: dict[int, int] = {}
    found: set[int] = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                parents[pid] = int(file.read().rpartition(b")")[2].split()[1])
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            called = [word for word in words[:_NAME_WORDS] if not word.startswith(base)]
            if any(name in word for name in names for word in called) and any(word.startswith(base) for word in words):
                found.add(pid)
    found -= {os.getpid()}
    found |= {pid for pid, parent in parents.items() if parent in found}
    for pid in found:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_S
    while any(start_time(pid) is not None for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
