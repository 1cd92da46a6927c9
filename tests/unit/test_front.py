"""The front of the snapshot service: what clients get, good ones and others, and that no one is in another's way."""

from __future__ import annotations

import os
import random
import re
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from flatmount.snapshotter._front import Front
from tests import frames
from tests.conftest import SOAK
from tests.frames import GRPC, header, message
from tests.fronting import (
    ECHO,
    GET,
    MOST_BYTES,
    OTHER,
    WAIT_S,
    Act,
    Bare,
    Behind,
    Entry,
    as_process,
    asking,
    echo,
    hold,
    until,
)

MOST_CLIENTS = 1024
LONG = ((f"grpc.max_{way}_message_length", -1) for way in ("send", "receive"))
OPTIONS = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1), *LONG)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


class Client:
    """grpcio's, with messages of bytes."""

    def __init__(self, path: Path | str) -> None:
        self.channel = grpc.insecure_channel(f"unix:{path}", options=OPTIONS)

    def ask(self, message: bytes, path: str = ECHO, **more: object) -> bytes:
        return bytes(self.channel.unary_unary(path)(message, timeout=WAIT_S, **more))

    def refused(self, message: bytes = b"", path: str = ECHO, **more: object) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as raised:
            self.ask(message, path, **more)
        return raised.value.code().name, raised.value.details()  # type: ignore[attr-defined]


@contextmanager
def client_of(path: Path | str) -> Iterator[Client]:
    client = Client(path)
    with client.channel:
        yield client


def ending(status: int, told: str) -> Act:
    return lambda front, entry: front.end(entry[0], status, told)


# What is answered.


@pytest.mark.parametrize("size", [0, 1, 16379, 16384, 65536, 1 << 20, 4 << 20])
def test_a_message_comes_back(size: int, path: Path) -> None:
    sent = random.Random(size).randbytes(size)
    with Behind(path), client_of(path) as client:
        assert client.ask(sent) == sent


def test_narrow_windows_are_kept_and_everything_comes(path: Path) -> None:
    """The client opens its window by what it took: a front that sent more is seen, and one that forgot hangs."""
    sent = random.Random(1).randbytes(5000)
    narrow = struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 7)
    with Behind(path) as behind, Bare(behind.path, narrow) as bare:
        bare.ask(1, message(sent))
        pieces = []
        for kind, flags, stream, body in bare.rest():
            if (kind, stream) == (frames.DATA, 1):
                pieces.append(body)
            if (kind, stream) == (frames.HEADERS, 1) and flags & frames.END_STREAM:
                break
    assert b"".join(pieces) == message(sent)
    assert max(map(len, pieces)) == 7


def test_long_messages_cross_on_one_connection(path: Path) -> None:
    sent = [random.Random(size).randbytes(size << 18) for size in range(1, 17)]
    with Behind(path), client_of(path) as client, ThreadPoolExecutor(len(sent)) as pool:
        assert list(pool.map(client.ask, sent)) == sent


TOLD = {
    "printable": "".join(map(chr, range(0x20, 0x7F))),
    "control": "".join(map(chr, range(0x20))) + "\x7f",
    "percent": "100% %41 %%",
    "lines": "one\ntwo\r\n\tthree\n",
    "beyond": "".join(map(chr, range(0x80, 0x180))) + "é ✓ 💾",
    "none": "",
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_what_is_told_of_an_error_arrives(told: str, path: Path) -> None:
    with Behind(path, ending(9, told)), client_of(path) as client:
        assert client.refused() == ("FAILED_PRECONDITION", told)


def test_a_name_that_is_no_text_is_told_all_the_same(path: Path) -> None:
    name = os.fsdecode(b"a\xffb")
    with Behind(path, ending(5, name)), client_of(path) as client:
        assert client.refused() == ("NOT_FOUND", r"a\udcffb")


@pytest.mark.parametrize("shift", range(4))
def test_what_is_too_long_to_tell_is_cut_between_letters(shift: int, path: Path) -> None:
    told = "x" * shift + "é✓" * 5000
    with Behind(path, ending(9, told)), client_of(path) as client:
        status, got = client.refused()
    assert status == "FAILED_PRECONDITION"
    assert len(got) > 500
    assert told.startswith(got)


@pytest.mark.parametrize("status", range(1, 17))
def test_every_status_arrives(status: int, path: Path) -> None:
    with Behind(path, ending(status, "why")), client_of(path) as client:
        code = next(code for code in grpc.StatusCode if code.value[0] == status)
        assert client.refused() == (code.name, "why")


def test_answers_go_out_in_any_order(path: Path) -> None:
    """Nobody is answered before all have asked, on four connections, and the last one is answered first."""
    each, clients = 200, 4
    waiting: list[Entry] = []

    def act(front: Front, entry: Entry) -> None:
        waiting.append(entry)
        if len(waiting) == each * clients:
            for one in reversed(waiting):
                echo(front, one)

    with Behind(path, act) as behind, ExitStack() as stack:
        asked = {}
        for number in range(clients):
            client = stack.enter_context(client_of(path))
            call = client.channel.unary_unary(ECHO)
            for turn in range(each):
                text = f"{number}-{turn}".encode()
                asked[text] = call.future(text, timeout=WAIT_S)
        assert {text: future.result() for text, future in asked.items()} == {text: text for text in asked}
        assert len({call for call, *_ in behind.calls}) == each * clients
        assert behind.gone == []


def test_a_stream_is_messages_and_an_end_that_comes_later(path: Path) -> None:
    with Behind(path, hold) as behind, client_of(path) as client:
        answers = client.channel.unary_stream(ECHO)(b"", timeout=WAIT_S)
        until(lambda: behind.calls)
        call = behind.calls[0][0]
        for number in range(500):
            text = f"{number}".encode() * (number % 50)

            def tell(front: Front, text: bytes = text) -> None:
                front.send(call, text, False)
                front.flush()

            behind.later(tell)
            if number % 100 == 0:
                assert next(answers) == text
            elif number % 100 == 1:
                passed = [text]
            else:
                passed.append(text)
            if number % 100 == 99:
                assert [next(answers) for _ in passed] == passed

        def end(front: Front) -> None:
            front.end(call, 0, "")
            front.flush()

        behind.later(end)
        assert list(answers) == []
        assert answers.code() is grpc.StatusCode.OK
        assert behind.gone == []


def test_a_stream_may_end_in_an_error(path: Path) -> None:
    def act(front: Front, entry: Entry) -> None:
        front.send(entry[0], b"one", False)
        front.send(entry[0], b"two", False)
        front.end(entry[0], 13, "no more")

    with Behind(path, act), client_of(path) as client:
        answers = client.channel.unary_stream(ECHO)(b"", timeout=WAIT_S)
        assert (next(answers), next(answers)) == (b"one", b"two")
        with pytest.raises(grpc.RpcError):
            next(answers)
        assert (answers.code(), answers.details()) == (grpc.StatusCode.INTERNAL, "no more")


def test_what_is_answered_after_the_end_is_dropped(path: Path) -> None:
    def act(front: Front, entry: Entry) -> None:
        echo(front, entry)
        front.send(entry[0], b"another", True)
        front.end(entry[0], 13, "late")

    with Behind(path, act), client_of(path) as client:
        assert [client.ask(text) for text in (b"a", b"b")] == [b"a", b"b"]


def test_each_path_has_its_place(path: Path) -> None:
    with Behind(path) as behind, client_of(path) as client:
        client.ask(b"a", ECHO)
        client.ask(b"b", OTHER)
    assert [(place, text) for _, place, _, text in behind.calls] == [(0, b"a"), (1, b"b")]


def test_a_ping_comes_back(path: Path) -> None:
    with Behind(path) as behind, Bare(behind.path) as bare:
        bare.say(frames.frame(frames.PING, 0, 0, b"01234567"))
        assert (frames.PING, frames.ACK, 0, b"01234567") in bare.rest()


# What is refused.


def test_a_request_that_is_too_long_is_refused_and_the_connection_goes_on(path: Path) -> None:
    with Behind(path) as behind, client_of(path) as client:
        assert client.refused(bytes(MOST_BYTES + 1)) == ("RESOURCE_EXHAUSTED", "the request is too long")
        assert len(client.ask(bytes(MOST_BYTES))) == MOST_BYTES
        assert client.ask(b"short") == b"short"
    assert [len(text) for *_, text in behind.calls] == [MOST_BYTES, 5]


def test_an_unknown_path_is_not_implemented(path: Path) -> None:
    with Behind(path) as behind, client_of(path) as client:
        for unknown in (ECHO + "s", ECHO[:-1], "/", ECHO.lower()):
            assert client.refused(path=unknown) == ("UNIMPLEMENTED", "there is no such call here")
        assert client.ask(b"a") == b"a"
    assert len(behind.calls) == 1


def test_what_is_compressed_is_not_implemented(path: Path) -> None:
    with Behind(path) as behind, client_of(path) as client:
        refused = client.refused(b"a" * 1000, compression=grpc.Compression.Gzip)
        assert refused == ("UNIMPLEMENTED", "compressed requests are not taken")
    assert behind.calls == []


NO_MESSAGE = {
    "nothing": b"",
    "half a head": b"\0\0\0\0",
    "too short": message(b"abc")[:-1],
    "two": message(b"abc") + message(b"abc"),
    "endless": b"\0\xff\xff\xff\xffabc",
}


@pytest.mark.parametrize("body", NO_MESSAGE.values(), ids=NO_MESSAGE)
def test_a_body_that_is_no_single_message_is_an_error(body: bytes, path: Path) -> None:
    """Told in the same bytes as by a service that ends a call so."""
    blocks = []
    with Behind(path, ending(13, "a request is one message, and this is not")) as behind:
        for asked in (message(b""), body):
            with Bare(behind.path) as bare:
                bare.ask(1, asked)
                blocks.append(bare.answer(1))
    assert blocks[0] == blocks[1]
    assert len(behind.calls) == 1


def test_a_request_without_a_body_is_an_error(path: Path) -> None:
    with Behind(path, ending(13, "a request is one message, and this is not")) as behind:
        with Bare(behind.path) as bare:
            beginning = asking(1)
            bare.say(beginning[:4], bytes([beginning[4] | frames.END_STREAM]), beginning[5:])
            without = bare.answer(1)
        with Bare(behind.path) as bare:
            bare.ask(1, message(b""))
            assert bare.answer(1) == without
    assert len(behind.calls) == 1


@pytest.mark.parametrize(
    ("method", "more"),
    [(GET, GRPC), (b"\x83", b""), (b"\x83", header("content-type", "application/json"))],
    ids=["GET", "no type", "JSON"],
)
def test_what_is_not_grpc_is_an_unsupported_type(method: bytes, more: bytes, path: Path) -> None:
    with Behind(path) as behind, Bare(behind.path) as bare:
        bare.ask(1, message(b"a"), method=method, more=more)
        assert bare.answer(1) == ([b"\x48\x03415"], b"")
        assert bare.echoed(3)
    assert len(behind.calls) == 1


# Deadlines.

NONE = (-1.0, -1.0)
TIMES = {
    "2H": (7100, 7200),
    "3M": (100, 180),
    "90S": (30, 90),
    "90000m": (30, 90),
    "90000000u": (30, 90),
    "99999999n": (0, 0.1),
    "00000090S": (30, 90),
    "0S": (0, 0),
    "1n": (0, 0),
    "9999999M": (5e8, 6e8),
    "99999999M": NONE,
    "99999999H": NONE,
    "": NONE,
    "S": NONE,
    "9": NONE,
    "90": NONE,
    "90s": NONE,
    "-9S": NONE,
    "9 S": NONE,
    "1.5S": NONE,
    "SS": NONE,
    "999999999S": NONE,
    "9" * 100 + "S": NONE,
}


def test_the_time_that_a_client_gives_is_told(path: Path) -> None:
    with Behind(path) as behind, Bare(behind.path) as bare:
        for number, value in enumerate(TIMES):
            bare.ask(2 * number + 1, message(value.encode()), more=GRPC + header("grpc-timeout", value))
            bare.answer(2 * number + 1)
        assert bare.echoed(2 * len(TIMES) + 1, b"none")
    left = {text.decode(): left_s for *_, left_s, text in behind.calls}
    assert left.pop("none") == -1
    assert {value for value, (least, most) in TIMES.items() if not least <= left[value] <= most} == set()


# Clients that leave.


def test_a_cancelled_call_is_told_once_and_an_answered_one_never(path: Path) -> None:
    cancel = struct.pack(">I", frames.CANCEL)
    act = lambda front, entry: None if entry[3] == b"hold" else echo(front, entry)  # noqa: E731
    with Behind(path, act) as behind, Bare(behind.path) as bare:
        for stream in (1, 3, 5):
            bare.ask(stream, message(b"hold"))
        assert bare.echoed(7)
        bare.say(*(frames.frame(frames.RST_STREAM, 0, stream, cancel) for stream in (3, 3, 7)))
        until(lambda: behind.gone)
        assert bare.echoed(9)
        held = {call for call, _, _, text in behind.calls if text == b"hold"}
        assert len(behind.gone) == 1
        assert set(behind.gone) < held
        bare.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: len(behind.gone) >= 3)
        with Bare(behind.path) as other:
            assert other.echoed(1)
    assert sorted(behind.gone) == sorted(held)


def test_answers_to_calls_that_have_gone_are_dropped(path: Path) -> None:
    """And to such as there never were."""
    with Behind(path, hold) as behind, Bare(behind.path) as staying:
        staying.ask(1, message(b"a"))
        until(lambda: behind.calls)
        for turn in range(20):
            with Bare(behind.path) as bare:
                for stream in range(1, 41, 2):
                    bare.ask(stream, message(b"b"))
                until(lambda turn=turn: len(behind.calls) == 1 + 20 * (turn + 1))
        until(lambda: len(behind.gone) == 400)

        def answer_all(front: Front) -> None:
            for call in (*behind.gone, 0, 1, 2**32 - 1, 2**64 - 1, *(random.randrange(2**64) for _ in range(1000))):
                front.send(call, b"late", False)
                front.end(call, 5, "later")
            echo(front, behind.calls[0])
            front.flush()

        behind.later(answer_all)
        assert staying.answer(1)[1] == message(b"a")


def test_a_client_that_stops_sending_has_left(path: Path) -> None:
    with Behind(path, hold) as behind, Bare(behind.path) as bare:
        bare.ask(1, message(b"a"))
        until(lambda: behind.calls)
        bare.socket.shutdown(socket.SHUT_WR)
        assert bare.ended()
        until(lambda: behind.gone)
    assert behind.gone == [behind.calls[0][0]]


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(100), b"\xff" * 70000])
def test_who_speaks_something_else_is_let_go(garbage: bytes, path: Path) -> None:
    with Behind(path) as behind, Bare(behind.path) as good:
        assert good.echoed(1)
        with Bare(behind.path, begin=False) as bad:
            try:
                bad.say(garbage)
                assert bad.ended()
            except BrokenPipeError:
                pass  # it was let go in the middle of it
        assert good.echoed(3)


@pytest.mark.parametrize("cut", [0, 10, 24, 30, 40])
def test_who_stops_in_the_middle_holds_nobody_up(cut: int, path: Path) -> None:
    beginning = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0) + asking(1)
    with Behind(path) as behind, Bare(behind.path, begin=False) as silent, Bare(behind.path) as good:
        silent.say(beginning[:cut])
        assert good.echoed(1)
        silent.say(beginning[cut:], frames.frame(frames.DATA, frames.END_STREAM, 1, message(b"at last")))
        assert silent.answer(1)[1] == message(b"at last")


# Clients in the way.


def deaf(behind: Behind, calls: int = 8, size: int = 1 << 20) -> Bare:
    """A client that takes any number of bytes and reads none; the calls that it made are answered."""
    bare = Bare(behind.path, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 2**31 - 1), receive_bytes=4096)
    bare.say(frames.frame(frames.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1 - 65535)))
    for stream in range(1, 2 * calls, 2):
        bare.ask(stream, message(struct.pack(">I", size)), path=OTHER)
    return bare


def blow_up(front: Front, entry: Entry) -> None:
    """OTHER is answered with as many bytes as its message says."""
    front.send(entry[0], bytes(struct.unpack(">I", entry[3])[0]) if entry[1] else entry[3], True)


def test_a_client_that_never_reads_holds_nobody_up(path: Path) -> None:
    with Behind(path, blow_up) as behind:
        with deaf(behind) as bare:
            until(lambda: len(behind.calls) == 8)
            with Bare(behind.path) as good:
                for stream in range(1, 201, 2):
                    assert good.echoed(stream)
            assert len(bare.answer(1)[1]) == (1 << 20) + 5  # it has waited, and is sent when somebody reads
        with Bare(behind.path) as good:
            assert good.echoed(1)


@contextmanager
def crowd(path: Path, count: int = MOST_CLIENTS, *, busy: int = 0, descriptors: int = 4096) -> Iterator[list[Bare]]:
    """So many clients of a front in a process of its own, the first of which have begun a call."""
    with as_process(path, FRONTING_DESCRIPTORS=str(descriptors)) as end:
        with ExitStack() as stack:
            clients = [stack.enter_context(Bare(str(path))) for _ in range(count)]
            assert all(client.echoed(1) for client in clients)
            for client in clients[:busy]:
                client.ask(3, None)
            yield clients
        assert end()[0] == 0


def finish_call(client: Bare) -> bool:
    """Whether a call that was begun is answered."""
    client.say(frames.frame(frames.DATA, frames.END_STREAM, 3, message(b"at last")))
    return client.answer(3)[1] == message(b"at last")


def asked_to_go(client: Bare) -> bool:
    """Wait until it is told to open no more streams, and may still finish those it has opened."""
    last = next(body for kind, _, _, body in client.rest() if kind == frames.GOAWAY)
    return last == struct.pack(">II", 2**31 - 1, 0)


def test_who_has_been_silent_longest_makes_room(path: Path) -> None:
    with crowd(path, busy=1) as clients:
        assert clients[1].echoed(3)
        with Bare(str(path)) as newcomer, Bare(str(path)) as another:
            assert newcomer.echoed(1)
            assert another.echoed(1)
            assert all(asked_to_go(client) for client in clients[2:4])
            assert clients[2].echoed(3), "what crosses with the question is answered"
            clients[2].socket.shutdown(socket.SHUT_WR)
            assert clients[2].ended()
            # Who does not go is let go, and told to which of its streams somebody has listened.
            last = [body for kind, _, _, body in clients[3].rest() if kind == frames.GOAWAY]
            assert last == [struct.pack(">II", 1, 0)]
            for number in set(range(4, MOST_CLIENTS)) | {1}:
                assert clients[number].echoed(5)
            assert finish_call(clients[0])
            assert newcomer.echoed(3)


def test_silent_clients_that_stay_keep_nobody_out(path: Path) -> None:
    """Each newcomer is served at once, however many there are that neither say anything nor go."""
    with crowd(path) as clients, ExitStack() as stack:
        for _ in range(2 * MOST_CLIENTS + 100):
            assert stack.enter_context(Bare(str(path))).echoed(1)
        assert all(client.ended() for client in clients)


def test_who_has_a_call_under_way_stays_and_one_more_is_refused(path: Path) -> None:
    with crowd(path, busy=MOST_CLIENTS) as clients:
        # The front has read a beginning when it has answered what came after it.
        assert all(client.echoed(5) for client in clients)
        with Bare(str(path), begin=False) as one_more:
            assert one_more.next() is None
        assert all(finish_call(client) for client in clients)
        with Bare(str(path)) as instead:
            assert instead.echoed(1)


def test_a_grpc_client_that_was_let_go_comes_back_without_a_failed_call(path: Path) -> None:
    """As containerd's, which is silent for long; also where its call crosses with the question to go.

    All but three places are of busy clients. In each turn the two others are taken by clients that have spoken since,
    and one more comes at the moment of the call.
    """
    options = (("grpc.use_local_subchannel_pool", 1),)  # and what grpc does by itself, retries among it
    chance = random.Random(1)
    served = 0

    def come(after_s: float) -> Bare:
        time.sleep(after_s)
        newcomer = Bare(str(path))
        nonlocal served
        served += newcomer.echoed(1)
        return newcomer

    with (
        crowd(path, MOST_CLIENTS - 3, busy=MOST_CLIENTS - 3) as clients,
        grpc.insecure_channel(f"unix:{path}", options=options) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        assert all(client.echoed(5) for client in clients)
        ask = channel.unary_unary(ECHO)
        turns = 2000 if SOAK else 150
        for turn in range(turns):
            assert ask(b"calm", timeout=WAIT_S) == b"calm"
            others = [Bare(str(path)) for _ in range(2)]
            assert all(other.echoed(1) for other in others)
            coming = pool.submit(come, chance.random() * 0.0006)
            time.sleep(chance.random() * 0.0006)
            assert ask(b"%d" % turn, timeout=WAIT_S) == b"%d" % turn
            for other in (*others, coming.result()):
                with other:
                    other.socket.shutdown(socket.SHUT_WR)
                    assert other.ended()
        assert served == turns
        assert all(finish_call(client) for client in clients)


def test_without_descriptors_silent_clients_make_room(path: Path) -> None:
    """One at a time: the descriptor of one who was asked to go is there when it has gone."""
    with crowd(path, 20, descriptors=40) as clients, ExitStack() as stack:
        newcomers = 0
        while not select.select([clients[1].socket], [], [], 0)[0]:
            assert stack.enter_context(Bare(str(path))).echoed(1)
            newcomers += 1
            assert newcomers < 40
        assert clients[0].ended()
        assert asked_to_go(clients[1])
        assert all(client.echoed(3) for client in clients[2:])


def test_without_descriptors_it_serves_whom_it_has_and_waits_for_more(path: Path) -> None:
    with as_process(path, FRONTING_DESCRIPTORS="40") as end:
        with ExitStack() as stack:
            clients = [stack.enter_context(Bare(str(path))) for _ in range(20)]
            for client in clients:
                client.ask(1, None)
            assert all(client.echoed(3) for client in clients)
            # These come as far as the queue of the kernel.
            waiting = [stack.enter_context(Bare(str(path))) for _ in range(20)]
            for client in waiting:
                client.ask(3, None)
            until_s = time.monotonic() + 1
            stream = 5
            while time.monotonic() < until_s:
                assert clients[0].echoed(stream)
                stream += 2
                time.sleep(0.1)
            for client in clients:
                client.socket.shutdown(socket.SHUT_RDWR)
            assert all(finish_call(client) for client in waiting)
        status, said = end()
    assert status == 0
    spent_s = float(said)
    assert spent_s < 0.7, "a second without descriptors is not spent looking for them"


def test_a_connection_that_another_takes_is_not_waited_for(path: Path) -> None:
    """The queue of connections may be shared, and be empty when the front has been told of one."""
    with Behind(path) as behind:
        assert not os.get_blocking(behind.listening)


# The end.


def test_what_was_answered_is_sent_before_it_closes(path: Path) -> None:
    """Also what does not go into a window at once."""
    sizes = (10, 100_000, 3_000_000)
    with ExitStack() as stack:
        behind = stack.enter_context(Behind(path, hold))
        clients = [stack.enter_context(Bare(behind.path)) for _ in sizes]
        for client, size in zip(clients, sizes, strict=True):
            client.ask(1, message(struct.pack(">I", size)), path=OTHER)
        until(lambda: len(behind.calls) == len(sizes))
        with ThreadPoolExecutor(len(sizes)) as pool:
            answers = [pool.submit(client.answer, 1) for client in clients]
            behind.later(lambda front: [blow_up(front, entry) for entry in behind.calls] and None)
            behind.close(WAIT_S * 1000)
            assert [len(answer.result(WAIT_S)[1]) - 5 for answer in answers] == list(sizes)
        assert all(client.ended() for client in clients)


@pytest.mark.parametrize("grace_ms", [0, 50])
def test_a_client_that_never_reads_does_not_keep_it_from_closing(grace_ms: int, path: Path) -> None:
    """And another one behind it gets what is its own."""
    with Behind(path, blow_up) as behind, deaf(behind), Bare(behind.path) as good:
        until(lambda: len(behind.calls) == 8)
        good.ask(1, message(b"last words"))
        until(lambda: len(behind.calls) == 9)
        behind.close(grace_ms)
        assert good.answer(1)[1] == message(b"last words")
        assert good.ended()


def test_calls_that_nobody_answers_do_not_keep_it_from_closing(path: Path) -> None:
    with Behind(path, hold) as behind, Bare(behind.path) as bare:
        bare.ask(1, message(b"a"))
        until(lambda: behind.calls)
        behind.close(10**9)
        assert bare.ended()


def test_a_closed_front_says_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        front = Front(os.dup(listening.fileno()), (ECHO,), 10)
    front.close(0)
    front.close(0)
    for use in (front.fileno, front.take, front.flush, lambda: front.send(1, b"", True), lambda: front.end(1, 0, "")):
        with pytest.raises(ValueError, match="the front is closed"):
            use()


def test_what_cannot_be_served_is_an_error() -> None:
    """And the descriptor is still its owner's."""
    with open(os.devnull) as no_socket:
        with pytest.raises(OSError):
            Front(no_socket.fileno(), (ECHO,), 10)
        os.fstat(no_socket.fileno())
    with pytest.raises(OSError):
        Front(-1, (ECHO,), 10)
    with pytest.raises(TypeError):
        Front(0, (1,), 10)  # type: ignore[arg-type]


# What is left behind.


def held() -> Counter[str]:
    """Descriptors and threads of this process."""
    links = ["thread"] * len(os.listdir("/proc/self/task"))
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the listing's own
    return Counter(re.sub(r"\d+", "", link) for link in links)


def test_no_descriptor_and_no_thread_stays(path: Path) -> None:
    before = held()
    for turn in range(10):
        place = path.with_name(f"s{turn}")
        with Behind(place, blow_up) as behind, ExitStack() as stack:
            for number in range(10):
                bare = stack.enter_context(Bare(behind.path))
                assert bare.echoed(1)
                bare.ask(3, None)
                if number % 2:
                    bare.say(b"\xff" * 100)
            stack.enter_context(deaf(behind))
            with Bare(behind.path, begin=False) as bad:
                bad.say(b"x" * 100)
                assert bad.ended()
            if turn % 2:
                stack.close()
    until(lambda: held() <= before)  # what another test left for a while may go meanwhile


def test_signals_are_for_the_interpreters_own_threads(path: Path) -> None:
    before = set(os.listdir("/proc/self/task"))
    with Behind(path) as behind:
        until(lambda: len(set(os.listdir("/proc/self/task")) - before) == 2)
        blocked = []
        for task in set(os.listdir("/proc/self/task")) - before - {str(behind.native_id)}:
            status = Path(f"/proc/self/task/{task}/status").read_text()
            blocked.append(int(re.search(r"^SigBlk:\s*(\w+)$", status, re.M)[1], 16))
    assert len(blocked) == 1
    for number in (1, 2, 15):
        assert blocked[0] >> (number - 1) & 1


def test_memory_does_not_grow_with_calls(path: Path) -> None:
    """In a process of its own, on a hundred connections in turn and with errors among them."""

    def resident_kib() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"^VmRSS:\s*(\d+) kB$", status, re.M)[1])

    with as_process(path) as end:
        with Bare(str(path)) as bare:
            pid = struct.unpack("iii", bare.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        sizes = []
        for turn in range(100):
            with Bare(str(path)) as bare:
                for stream in range(1, 401, 4):
                    bare.ask(stream, message(bytes(1000)))
                    bare.ask(stream + 2, message(b""), path="/no")
                bare.ends(200)
            if turn in (24, 99):
                sizes.append(resident_kib())
        assert end()[0] == 0
    assert sizes[1] - sizes[0] < 4096


# Nonsense.

KINDS = (*range(10), 0x0C, 0xFA)


def nonsense(chance: random.Random) -> bytes:
    """A frame that may be right, or almost right, or not at all."""
    kind, stream = chance.choice(KINDS), chance.choice((0, 1, 3, 5, 7, 2, 2**31 - 1))
    turn = chance.randrange(8)
    if turn == 0:
        return asking(stream or 1, path=chance.choice((ECHO, OTHER, "/no")))
    if turn == 1:
        body = message(chance.randbytes(chance.randrange(2000)))
        return frames.frame(frames.DATA, frames.END_STREAM, stream or 1, body)
    if turn == 2:
        return frames.frame(frames.WINDOW_UPDATE, 0, stream, struct.pack(">I", chance.randrange(2**32)))
    if turn == 3:
        pairs = (struct.pack(">HI", chance.randrange(9), chance.randrange(2**32)) for _ in range(chance.randrange(4)))
        return frames.frame(frames.SETTINGS, chance.randrange(2), 0, b"".join(pairs))
    if turn == 4:
        return frames.frame(frames.RST_STREAM, 0, stream, chance.randbytes(4))
    whole = frames.frame(
        kind, chance.choice((0, 1, 4, 5, 8, 0x20, 0xFF)), stream, chance.randbytes(chance.randrange(40))
    )
    if turn == 5:
        whole = whole[: chance.randrange(len(whole) + 1)]
    return whole


def test_nonsense_ends_nothing_but_its_own_connection(seed: int, path: Path) -> None:
    """Two seconds of it, and a good client beside it; sixty in `make soak`."""
    chance = random.Random(seed)
    rounds = 0
    with as_process(path) as end:
        with Bare(str(path)) as good:
            until_s = time.monotonic() + (60 if SOAK else 2)
            while time.monotonic() < until_s or rounds <= 50:
                with Bare(str(path)) as bad:
                    bad.socket.setblocking(False)
                    try:
                        for _ in range(chance.randrange(1, 40)):
                            bad.socket.send(nonsense(chance))
                            if not chance.randrange(4):
                                bad.socket.recv(1 << 16)
                    except (BrokenPipeError, ConnectionResetError, BlockingIOError):
                        pass  # it has been let go, or has nothing to read
                assert good.echoed(2 * rounds + 1)
                rounds += 1
        status, said = end()
    assert status == 0, said
