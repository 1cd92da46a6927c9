"""The snapshot service's front with a few lines behind it, and a client of bare frames for it.

`python -m tests.fronting SOCKET` is such a service as a process: it echoes until its input ends, and then prints how
many seconds of processor time that took.
"""

from __future__ import annotations

import os
import queue
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from flatmount.snapshotter._front import Front
from tests import frames
from tests.waiting import listens

PATHS = ("/test.Front/Echo", "/test.Front/Other")
ECHO, OTHER = PATHS
WAIT_S = 60
MOST_BYTES = 5 << 20
POST, GET, HTTP = b"\x83", b"\x82", b"\x86"  # HPACK's static table

T = TypeVar("T")
Entry = tuple[int, int, float, bytes]
Act = Callable[[Front, Entry], None]


def echo(front: Front, entry: Entry) -> None:
    front.send(entry[0], entry[3], True)


def hold(front: Front, entry: Entry) -> None:
    """Whoever asks waits."""


class Behind:
    """A front on `path` and the thread that it belongs to, which lets `act` answer each call.

    `calls` are what it took, where it `keeps` them, and `gone` the calls whose clients left. A context manager.
    """

    paths: tuple[str | tuple[str, str | None, bool] | tuple[str, str | None, bool, int], ...] = PATHS

    def __init__(self, path: Path | str, act: Act = echo, *, keeps: bool = True, most_s: float = 0.0) -> None:
        self.path = str(path)
        self.calls: list[Entry] = []
        self.gone: list[int] = []
        self._act, self._keeps = act, keeps
        self._todo: queue.SimpleQueue[Callable[[Front], None] | None] = queue.SimpleQueue()
        self._wake = os.eventfd(0)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.path)
            listening.listen()
            self.listening = listening.fileno()
            self._front = Front(listening.fileno(), self.paths, MOST_BYTES, most_s)
            listening.detach()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def native_id(self) -> int | None:
        """Of the thread."""
        return self._thread.native_id

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, grace_ms: int = 100) -> None:
        """Let go of everybody; the second time nothing happens."""
        if self._thread.is_alive():
            self._todo.put(lambda front: front.close(grace_ms))
            self._todo.put(None)
            os.eventfd_write(self._wake, 1)
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()
            os.close(self._wake)

    def do(self, what: Callable[[Front], T]) -> T:
        """Have the thread do something, and wait for it."""
        done: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

        def doing(front: Front) -> None:
            try:
                done.put(what(front))
            except Exception as error:
                done.put(error)

        self.later(doing)
        result = done.get(timeout=WAIT_S)
        if isinstance(result, Exception):
            raise result
        return result

    def later(self, what: Callable[[Front], None]) -> None:
        """Have the thread do something."""
        self._todo.put(what)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        poll = select.poll()
        ready = self._front.fileno()
        poll.register(ready, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == ready:
                    for entry in self._front.take():
                        self._take(entry)
                    self._front.flush()
                    continue
                os.eventfd_read(self._wake)
                while not self._todo.empty():
                    what = self._todo.get()
                    if what is None:
                        return
                    what(self._front)

    def _take(self, entry: Entry) -> None:
        if entry[1] < 0:
            self.gone.append(entry[0])
        else:
            if self._keeps:
                self.calls.append(entry)
            self._act(self._front, entry)


def until(met: Callable[[], object]) -> None:
    """Wait for it."""
    end = time.monotonic() + WAIT_S
    while not met():
        assert time.monotonic() < end
        time.sleep(0.002)


class Bare:
    """A client of bare frames, which takes answers of any length. A context manager."""

    def __init__(self, path: str, settings: bytes = b"", *, begin: bool = True, receive_bytes: int = 0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.connect(path)
        self.socket.settimeout(WAIT_S)
        self._reader = self.socket.makefile("rb")
        if begin:
            self.say(frames.PREFACE, frames.frame(frames.SETTINGS, 0, 0, settings))

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self.socket.close()

    def say(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def ask(
        self,
        stream: int,
        body: bytes | None = b"",
        *,
        path: str = ECHO,
        more: bytes = frames.GRPC,
        method: bytes = POST,
    ) -> None:
        """Send a whole request, or with `body` None only its beginning."""
        self.say(asking(stream, path=path, more=more, method=method))
        if body is not None:
            self.say(frames.frame(frames.DATA, frames.END_STREAM, stream, body))

    def next(self) -> tuple[int, int, int, bytes] | None:
        """Kind, flags, stream and body of the next frame; None at the end. Windows are opened again."""
        try:
            head = self._reader.read(9)
            if len(head) < 9:
                return None
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            body = self._reader.read(int.from_bytes(head[:3], "big"))
        except ConnectionError:
            return None
        if kind == frames.DATA and body:
            opened = struct.pack(">I", len(body))
            with suppress(ConnectionError):  # it has said all and left
                self.say(*(frames.frame(frames.WINDOW_UPDATE, 0, which, opened) for which in (0, stream)))
        return kind, flags, stream, body

    def rest(self) -> Iterator[tuple[int, int, int, bytes]]:
        while (one := self.next()) is not None:
            yield one

    def answer(self, stream: int) -> tuple[list[bytes], bytes]:
        """The blocks of headers and the data of an answer. Raises ConnectionError where it does not come."""
        blocks, data = [], b""
        for kind, flags, which, body in self.rest():
            if which == stream and kind == frames.HEADERS:
                blocks.append(body)
            elif which == stream and kind == frames.DATA:
                data += body
            elif which == stream and kind == frames.RST_STREAM:
                break
            if which == stream and kind in (frames.HEADERS, frames.DATA) and flags & frames.END_STREAM:
                return blocks, data
        raise ConnectionError("there is no answer")

    def echoed(self, stream: int, text: bytes = b"still there") -> bool:
        """Whether a call is answered."""
        self.ask(stream, frames.message(text))
        return self.answer(stream)[1] == frames.message(text)

    def ends(self, count: int) -> None:
        """Wait for the ends of so many answers, in any order."""
        while count:
            kind, flags, *_ = self.next() or pytest.fail("answers are missing")
            count -= kind in (frames.DATA, frames.HEADERS) and flags & frames.END_STREAM

    def ended(self) -> bool:
        """Wait for the front to hang up."""
        return all(True for _ in self.rest())


def asking(stream: int, *, path: str = ECHO, more: bytes = frames.GRPC, method: bytes = POST) -> bytes:
    """The beginning of a request to the authority x."""
    fields = method + HTTP + b"\x01\x01x\x04" + bytes([len(path)]) + path.encode() + more
    return frames.frame(frames.HEADERS, frames.END_HEADERS, stream, fields)


@contextmanager
def as_process(path: Path, **environment: str) -> Iterator[Callable[[], tuple[int, str]]]:
    """`main` on `path`. Yields what ends it and returns its status and what it printed, errors included."""
    command = [sys.executable, "-m", "tests.fronting", str(path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
    ) as process:
        ended: list[tuple[int, str]] = []

        def end() -> tuple[int, str]:
            if not ended:
                said = process.communicate(timeout=WAIT_S)[0]
                ended.append((process.returncode, said))
            return ended[0]

        try:
            until(lambda: listens(path) or process.poll() is not None)
            yield end
        finally:
            if process.poll() is None and not ended:
                process.kill()


def main(path: str) -> None:
    most = os.environ.get("FRONTING_DESCRIPTORS")
    if most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(most), int(most)))
    begun_s = time.process_time()
    with Behind(path, keeps=False):
        sys.stdin.read()
    print(time.process_time() - begun_s)


if __name__ == "__main__":
    main(sys.argv[1])
