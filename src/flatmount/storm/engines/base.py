"""What an engine is to a storm, and how a container says that it runs."""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self

from flatmount.errors import FlatmountError
from flatmount.plan.mapping import Mapping
from flatmount.runtime.launch import SHIM

INSIDE: Final = "/.flatmount"


@dataclass(frozen=True, slots=True)
class Ask:
    """One container of a storm: its name, its host ids, and whether it runs until it is ended."""

    name: str
    mapping: Mapping
    holds: bool

    @property
    def arguments(self) -> tuple[str, ...]:
        """What it executes: the program that says so, from the directory that every engine puts at INSIDE."""
        return (f"{INSIDE}/shim", "first", f"{INSIDE}/fifo", self.name, "wait" if self.holds else "end")


class Engine(Protocol):
    """Starts one container and undoes it, from any number of threads at once. Open as long as the context is."""

    name: str

    def start(self, ask: Ask) -> Any:
        """Start a container; returns what `undo` takes, when the engine itself is done. Raises: FlatmountError."""

    def undo(self, started: Any) -> None:
        """End the container and leave nothing of it. Raises: FlatmountError."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Arrivals:
    """Hears from containers when they ran their first instruction, through a fifo that all of them have.

    `directory` holds the fifo and a program that writes its clock there before anything else. A context manager.
    """

    def __init__(self, directory: str) -> None:
        """Make `directory`, which must not exist; every user may enter it."""
        self.directory = directory
        os.mkdir(directory, 0o755)
        shutil.copy(SHIM, f"{directory}/shim")
        os.chmod(f"{directory}/shim", 0o755)
        os.mkfifo(f"{directory}/fifo")
        os.chmod(f"{directory}/fifo", 0o666)
        # For reading and writing, so that it never ends while no container has it open.
        self._fifo = os.open(f"{directory}/fifo", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop, self._stopped = os.pipe2(os.O_CLOEXEC)
        self._arrived: dict[str, int] = {}
        self._heard = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="storm-arrivals")
        self._thread.start()

    def wait(self, name: str, deadline_s: float) -> int:
        """The moment (CLOCK_MONOTONIC, ns) of a container's first instruction.

        Raises: FlatmountError where nothing was heard by `deadline_s` (time.monotonic()).
        """
        with self._heard:
            while name not in self._arrived:
                left = deadline_s - time.monotonic()
                if left <= 0:
                    raise FlatmountError("a container was started and did not say so in time")
                self._heard.wait(left)
            return self._arrived.pop(name)

    def close(self) -> None:
        """Stop listening."""
        os.close(self._stopped)
        self._thread.join()
        for fd in (self._fifo, self._stop):
            os.close(fd)

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        rest = b""
        poll = select.poll()
        poll.register(self._fifo, select.POLLIN)
        poll.register(self._stop, select.POLLHUP)
        while True:
            ready = dict(poll.poll())
            if self._stop in ready:
                return
            with suppress(BlockingIOError):
                *lines, rest = (rest + os.read(self._fifo, 1 << 16)).split(b"\n")
                with self._heard:
                    for line in lines:
                        at, _, name = line.decode().partition(" ")
                        self._arrived[name] = int(at)
                    self._heard.notify_all()
