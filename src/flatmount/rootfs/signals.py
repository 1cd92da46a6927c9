"""Work that a signal must not cut in two."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undivided() -> Iterator[Callable[[], bool]]:
    """Hold back SIGINT, SIGTERM and SIGHUP until the block is left; they arrive then.

    Python raises KeyboardInterrupt between any two of its instructions: between a mount that was made and the variable
    that was to know of it, too. The block is given a function that says whether a signal waits, so that it can undo
    what nobody wants any more. Other threads than the main one have no signals, and nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {one: signal.signal(one, note) for one in _ENDING if signal.getsignal(one) != signal.SIG_IGN}
    try:
        yield lambda: bool(waiting)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        for number in dict.fromkeys(waiting):
            os.kill(os.getpid(), number)
