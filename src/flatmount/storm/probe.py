"""The health probe: a process of its own that does, ten times a second, what a health check has to do.

A round reads the whole mount table and starts a process. Its latency counts from when the round was *due*: a
round that starts late because the one before was stuck has waited too, so a stall of three seconds shows as
thirty slow rounds and not as a single one. Beside that, a thread counts the mounts in the table fifty times a
second.

    python -m flatmount.storm.probe PARENT_PID

writes `round DUE_NS MS` and `mounts AT_NS COUNT` lines (CLOCK_MONOTONIC) until its standard input is readable
or closed.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from flatmount.kernel.mounts import die_with_parent, mount_count
from flatmount.storm.child import Child

ROUNDS_PER_S = 10
SAMPLES_PER_S = 50
_CATCH_UP_S = 60.0
_PERIOD_NS = 1_000_000_000 // ROUNDS_PER_S


@dataclass(frozen=True, slots=True)
class ProbeWindow:
    """What the probe saw from one moment to another: (seconds from the first, value) pairs.

    `rounds` has the rounds that were due then with their milliseconds, however late they ended; `mounts` the
    table's length.
    """

    rounds: tuple[tuple[float, float], ...]
    mounts: tuple[tuple[float, int], ...]


class HealthProbe:
    """The probe's process, running in the calling thread's mount namespace while the context is open.

    Costs 5 % of one processor beside 1,000 mounts and 30 % beside 10,000 (bench/observe.py). The thread that opens it
    has to outlive it.
    """

    __slots__ = ("_child", "_mounts", "_rounds")

    def __init__(self) -> None:
        """Start the probe and wait for its first round. Raises: FlatmountError where it does not start."""
        self._rounds: list[tuple[int, float]] = []
        self._mounts: list[tuple[int, int]] = []
        self._child = Child(__name__)
        try:
            while not self._rounds:
                self._child.wait_for_output()
                self._read()
        except BaseException:
            self._child.close()
            raise

    def between(self, start_ns: int, end_ns: int) -> ProbeWindow:
        """What was seen between two values of `time.monotonic_ns()`.

        Waits until every round that was due by then has ended: a tenth of a second, or as long as the machine
        needs to catch up. Raises: FlatmountError after a minute of that, or where the process died.
        """
        deadline = time.monotonic() + _CATCH_UP_S
        while self._rounds[-1][0] <= end_ns:
            self._child.wait_for_output(max(0.1, deadline - time.monotonic()))
            self._read()
        window = range(start_ns, end_ns + 1)
        return ProbeWindow(
            rounds=tuple(
                (max(0, due - start_ns) / 1e9, ms)
                for due, ms in self._rounds
                # One that was due before and still ran has felt it too.
                if due <= end_ns and due + ms * 1e6 >= start_ns
            ),
            mounts=tuple(((at - start_ns) / 1e9, count) for at, count in self._mounts if at in window),
        )

    def next_round_ns(self) -> int:
        """When the next round is due, as `time.monotonic_ns()` has it: a burst begun just before meets one."""
        self._read()
        last = self._rounds[-1][0]
        return last + ((time.monotonic_ns() - last) // _PERIOD_NS + 1) * _PERIOD_NS

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        self._child.close()

    def _read(self) -> None:
        for line in self._child.new_lines():
            kind, at, value = line.split()
            if kind == "round":
                self._rounds.append((int(at), float(value)))
            else:
                self._mounts.append((int(at), int(value)))

    def __enter__(self) -> HealthProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rounds(program: str) -> None:
    due = time.monotonic_ns()
    while not select.select([0], [], [], max(0, due - time.monotonic_ns()) / 1e9)[0]:
        with open("/proc/self/mountinfo", "rb", buffering=0) as file:
            file.read()
        os.waitpid(os.posix_spawn(program, [program], {}), 0)
        _write(f"round {due} {(time.monotonic_ns() - due) / 1e6:.3f}\n")
        due += _PERIOD_NS


def _samples() -> None:
    period_ns = 1_000_000_000 // SAMPLES_PER_S
    due = time.monotonic_ns()
    while True:
        count = mount_count()
        now = time.monotonic_ns()
        _write(f"mounts {now} {count}\n")
        # A sample that was missed is not made up for: it would only say what the next one says.
        due = max(due + period_ns, now)
        time.sleep((due - now) / 1e9)


def _write(line: str) -> None:
    os.write(1, line.encode())


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    program = shutil.which("true") or "/bin/true"
    threading.Thread(target=_samples, daemon=True).start()
    _rounds(program)


if __name__ == "__main__":
    main()
