"""Reading ahead: the same pieces in the same order, never too many, and nobody left when it is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from flatmount.errors import BadImage
from flatmount.image.ahead import ReadAhead

PIECES = [bytes([n % 251]) * (1 + n) for n in range(100)]


def stream(pieces: list[bytes], error: Exception | None = None) -> Callable[[int], bytes]:
    left = iter(pieces)

    def read(_: int) -> bytes:
        piece = next(left, b"")
        if not piece and error is not None:
            raise error
        return piece

    return read


def fetched(ahead: ReadAhead) -> list[bytes]:
    return list(iter(lambda: ahead.read(1), b""))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "flatmount-ahead"]


def test_pieces_come_in_their_order_and_then_the_end() -> None:
    ahead = ReadAhead(stream(PIECES))
    assert fetched(ahead) == PIECES
    assert ahead.read(1) == b""
    ahead.close()
    assert not threads()


def test_an_error_comes_after_what_was_read_before_it() -> None:
    ahead = ReadAhead(stream(PIECES, BadImage("broken")))
    assert [ahead.read(1) for _ in PIECES] == PIECES
    for _ in range(2):
        with pytest.raises(BadImage, match="broken"):
            ahead.read(1)
    ahead.close()


def test_it_waits_for_its_reader() -> None:
    read: list[bytes] = []
    source = stream(PIECES)

    def counted(size: int) -> bytes:
        read.append(source(size))
        return read[-1]

    ahead = ReadAhead(counted)
    ends = time.monotonic() + 60
    while len(read) < 9 and time.monotonic() < ends:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(read) == 9  # eight that wait, and one in its hand
    assert fetched(ahead) == PIECES
    ahead.close()


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_close_ends_the_thread_and_the_stream_goes_on_behind_it(taken: int) -> None:
    source = stream(PIECES)
    ahead = ReadAhead(source)
    assert [ahead.read(1) for _ in range(taken)] == PIECES[:taken]
    ahead.close()
    ahead.close()
    assert not threads()
    rest = list(iter(lambda: source(1), b""))
    assert rest == PIECES[len(PIECES) - len(rest) :]
    assert len(rest) >= len(PIECES) - taken - 10


def test_close_waits_for_the_call_that_is_under_way() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow(_: int) -> bytes:
        begun.set()
        assert go_on.wait(60)
        done.set()
        return b""

    ahead = ReadAhead(slow)
    assert begun.wait(60)
    closer = threading.Thread(target=ahead.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    go_on.set()
    closer.join(60)
    assert done.is_set()
    assert not closer.is_alive()
