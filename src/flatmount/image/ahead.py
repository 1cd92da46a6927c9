"""A stream that is read on a thread of its own: what it costs to make its bytes runs beside what is done with them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

_PIECE_BYTES: Final = 1 << 18
_PIECES: Final = 8


class ReadAhead:
    """Calls `read` ahead of its own reader, a bounded number of pieces, until that returns none or raises.

    `read` is called on one thread only; what it raises is raised by `read` here, in its turn. `close` ends the thread:
    afterwards nobody but the caller uses what `read` reads from. Pieces that were read and not fetched are dropped.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._pieces: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flatmount-ahead", daemon=True)
        self._thread.start()

    def read(self, _: int) -> bytes:
        """The next piece, none at the end. Raises: whatever `read` of the stream does."""
        with self._changed:
            while not self._pieces and not self._ended:
                self._changed.wait()
            if self._pieces:
                if len(self._pieces) == _PIECES:
                    self._changed.notify()
                return self._pieces.popleft()
            if self._error is not None:
                raise self._error
            return b""

    def close(self) -> None:
        """Stop reading and wait for the call that is under way. A second time does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while piece := self._read(_PIECE_BYTES):
                with self._changed:
                    while len(self._pieces) == _PIECES and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    self._pieces.append(piece)
                    if len(self._pieces) == 1:
                        self._changed.notify()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
