"""Our own terminal while a container has it, and signals that are the container's."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

PASSED_ON: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
)


@contextmanager
def raw(wanted: bool, fd: int = 0) -> Iterator[None]:
    """Pass every key on as it is, where that is wanted and `fd` is a terminal; it is as before afterwards."""
    if not wanted or not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Relay:
    """Gives the signals that we get to a container, instead of us acting on them; those that come too early, later.

    A context manager; entered before the start, so that no moment is without it.
    """

    def __init__(self) -> None:
        self._send: Callable[[int], None] | None = None
        self._early: list[int] = []
        self._before: dict[int, signal._HANDLER] = {}

    def to(self, send: Callable[[int], None]) -> None:
        """From now on, `send` passes signals on."""
        self._send = send
        while self._early:
            send(self._early.pop(0))

    def __enter__(self) -> Relay:
        self._before = {number: signal.signal(number, self._take) for number in PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._send is None:
            self._early.append(number)
        else:
            self._send(number)
