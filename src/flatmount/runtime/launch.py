"""Starting the shim, and what it tells.

The shim is a small static program. It is started without forking this process (posix_spawn shares its memory until the
shim runs), enters the template namespace, and starts the runtime there; no Python runs between here and the container.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from flatmount.errors import FlatmountError

SHIM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernel", "flatmount-shim")
START_S = 60.0
_GIVE_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a runtime. Every descriptor is borrowed.

    Attributes:
        directory: the container's, absolute; the runtime writes `pid` there, the shim `exit` and `log`.
        command: the runtime's absolute path and its arguments; it must leave the container running and end.
        owner: the host's ids of the container's user, to whom its output pipes belong.
        log_bytes: how much of its output is kept; 0 is nothing.
        foreground: our standard streams are the container's too; else its input is empty.
        bound: the container is killed when we are, or close what `launch` returns.
        terminal: the runtime sends a terminal to the socket `console` in the directory.
        template: a mount namespace; the runtime starts in a copy of it.
        trees: detached mounts and where in that copy they go.
        lock: kept open for as long as the shim lives.
        after: executed by the shim when all is over.
    """

    directory: str
    command: tuple[str, ...]
    owner: tuple[int, int]
    log_bytes: int
    foreground: bool
    bound: bool = False
    terminal: bool = False
    template: int | None = None
    trees: tuple[tuple[int, str], ...] = ()
    lock: int | None = None
    after: tuple[str, ...] = ()


class StartFailed(FlatmountError):
    """The shim could not start the runtime: `step` is what it tried, `errno` the kernel's word for it."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(f"start the runtime: {step}: {os.strerror(code)}")
        self.step = step
        self.errno = code


class RuntimeRefused(FlatmountError):
    """The runtime ended without a container; its own words are in its log."""


@dataclass(slots=True)
class Running:
    """A container that runs, with the shim beside it. `pid` is the container's first process.

    `executed` turns false where it ended without having become its command, which runc reports as a start.
    """

    shim: int
    pid: int
    _report: int
    _rest: bytes = b""
    executed: bool = True

    def wait(self) -> int:
        """Wait until the container ended. Returns its exit code, 128 and the signal's number where one ended it; 126 or
        127 where it never became its command.

        Raises: FlatmountError where the shim was killed, and with it the answer.
        """
        code: int | None = None
        while code is None:
            word, number, more = self._next(None)
            if word == "exited":
                code = number
                self.executed = more != "unexecuted"
            elif word == "":
                raise FlatmountError("the container's shim was killed", hint="the next command clears up after it")
        self.close()
        return code

    def send(self, number: int) -> None:
        """Pass a signal on to the container, through the shim. A shim that is gone is no error."""
        with suppress(ProcessLookupError):
            os.kill(self.shim, number)

    def close(self) -> None:
        """Let go of the shim: wait for it if it ended, else leave it to whoever reaps orphans."""
        if self._report >= 0:
            os.close(self._report)
            self._report = -1

    def reap(self) -> None:
        """Wait for the shim's own end, which follows the container's."""
        with suppress(ChildProcessError):
            os.waitpid(self.shim, 0)

    def _next(self, deadline: float | None) -> tuple[str, int, str]:
        """The next line of the report; an empty word where no more will come, "late" past the deadline."""
        while b"\n" not in self._rest:
            if deadline is not None:
                poll = select.poll()
                poll.register(self._report, select.POLLIN)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return "late", 0, ""
            more = os.read(self._report, 4096)
            if not more:
                return "", 0, ""
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        word, number, *more_words = line.decode().split(" ", 2)
        return word, int(number), more_words[0] if more_words else ""


def launch(wanted: Launch, *, timeout_s: float = START_S) -> Running:
    """Start the shim and wait until the container runs.

    Raises: StartFailed, RuntimeRefused; FlatmountError where it takes longer than `timeout_s`. Nothing runs then that
    the runtime itself did not leave.
    """
    report, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        lent = [write_end, *(fd for fd, _ in wanted.trees)]
        lent += (fd for fd in (wanted.template, wanted.lock) if fd is not None)
        shim = os.posix_spawn(SHIM, _arguments(wanted, write_end), os.environ, file_actions=_streams(wanted, lent))
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(write_end)
    running = Running(shim, 0, report)
    try:
        word, number, more = running._next(time.monotonic() + timeout_s)
        if word == "started":
            running.pid = number
            return running
        _end(running, word == "late")
        if word == "error":
            raise StartFailed(more, number)
        if word == "failed":
            raise RuntimeRefused(f"the runtime ended with {number}")
        what = f"took longer than {timeout_s:g} s" if word == "late" else "was killed"
        raise FlatmountError(f"starting the container {what}", hint="look whether the machine is overloaded")
    except BaseException:
        if not running.pid:
            _end(running, True)
        raise


def _end(running: Running, kill: bool) -> None:
    """Nothing of a start that failed is left to itself: asked twice, the shim kills the runtime and ends."""
    if running._report < 0:
        return
    deadline = time.monotonic() + _GIVE_UP_S
    while kill and time.monotonic() < deadline:
        running.send(signal.SIGTERM)
        if running._next(time.monotonic() + 0.2)[0] != "late":
            break
    else:
        if kill:
            running.send(signal.SIGKILL)
    running.reap()
    running.close()


def _arguments(wanted: Launch, report: int) -> list[str]:
    words = [SHIM, "run", "--state", wanted.directory, "--report", str(report)]
    words += ("--owner", f"{wanted.owner[0]}:{wanted.owner[1]}", "--log", str(wanted.log_bytes))
    if wanted.template is not None:
        words += ("--template", str(wanted.template))
    for fd, path in wanted.trees:
        words += ("--tree", f"{fd}:{path}")
    if wanted.foreground:
        words.append("--forward")
    if wanted.bound:
        words.append("--bound")
    if wanted.terminal:
        words.append("--console")
    if wanted.after:
        words += ("--after", *wanted.after, ";")
    return [*words, "--", *wanted.command]


def _streams(wanted: Launch, lent: Sequence[int]) -> list[tuple[int, int, int] | tuple[int, int, str, int, int]]:
    # A descriptor put on itself loses its close-on-exec mark, in the child only.
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_DUP2, fd, fd) for fd in lent
    ]
    if not wanted.foreground:
        actions += ((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3))
    return actions
