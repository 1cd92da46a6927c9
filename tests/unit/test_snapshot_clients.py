"""The bench's clients of a snapshot service: what they send, what is an answer to them, and what they say of others."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.clients import Load, Service, build_client, build_floor_service, build_go_client, call, serving
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    GRPC,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    header,
)

SERVICE = "containerd.services.snapshots.v1.Snapshots"
MOUNTS = wire.MountsResponse(mounts=[wire.Mount(type="bind", source="/", options=["rw", "rbind"])])
MAPPING = "0:1048576:65536"
WAIT_S = 60
SANITIZED = ("-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fsanitize=address,undefined")


@pytest.fixture(scope="session")
def light_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_client(str(tmp_path_factory.mktemp("light")), *SANITIZED)


@pytest.fixture(scope="session")
def go_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_go_client(str(tmp_path_factory.mktemp("go")))


@pytest.fixture(scope="session", params=["light_client", "go_client"])
def client(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def hasty_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The light one, which gives up after a second."""
    return build_client(str(tmp_path_factory.mktemp("hasty")), *SANITIZED, "-DDEADLINE_S=1")


@dataclass
class Fake:
    """A service on grpcio that writes down what it is asked; `answer` may abort, wait or return another message."""

    answer: Callable[[str, Any, grpc.ServicerContext], Any] = lambda name, request, context: (
        wire.Empty() if name == "Remove" else MOUNTS
    )
    seen: list[tuple[str, Any]] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)

    def _handler(self, name: str, request: Any) -> Any:
        def take(message: Any, context: grpc.ServicerContext) -> Any:
            self.seen.append((name, message))
            self.metadata.append(dict(context.invocation_metadata()))
            return self.answer(name, message, context)

        return grpc.unary_unary_rpc_method_handler(take, request.FromString, lambda m: m.SerializeToString())

    @contextmanager
    def served(self, path: Path, *options: tuple[str, Any]) -> Iterator[str]:
        server = grpc.server(ThreadPoolExecutor(64), options=options)
        requests = {"Prepare": wire.CreateRequest, "Mounts": wire.KeyRequest, "Remove": wire.KeyRequest}
        handlers = {name: self._handler(name, request) for name, request in requests.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_insecure_port(f"unix:{path}")
        server.start()
        try:
            yield str(path)
        finally:
            server.stop(None).wait()


def refused(client: str, path: str, *words: str) -> str:
    """What a client says that exits 1."""
    command = [client, path, *(words or ("1", "1", "parent", "flatmount", "plain"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "mapped"])
def test_a_cycle_is_prepare_mounts_and_remove_of_its_own_key(client: str, mapped: bool, tmp_path: Path) -> None:
    fake = Fake()
    with fake.served(tmp_path / "s") as path:
        served = call(client, Service(path, "sha256:abc", "flatmount", mapped), Load(3, 10), connections=2)
    calls: dict[str, list[tuple[str, Any]]] = {}
    for name, message in fake.seen:
        calls.setdefault(message.key, []).append((name, message))
    labels = {"containerd.io/gc.root": "bench"}
    if mapped:
        labels |= {f"containerd.io/snapshot/{kind}mapping": MAPPING for kind in ("uid", "gid")}
    assert len(calls) == 10
    for key, of_key in calls.items():
        named = wire.KeyRequest(snapshotter="flatmount", key=key)
        created = wire.CreateRequest(snapshotter="flatmount", key=key, parent="sha256:abc", labels=labels)
        assert of_key == [("Prepare", created), ("Mounts", named), ("Remove", named)]
    assert {one["containerd-namespace"] for one in fake.metadata} == {"default"}
    assert 0 < served.p50_ms <= served.p99_ms <= served.max_ms
    for p50, p99, most in zip(served.each_p50_ms, served.each_p99_ms, served.each_max_ms, strict=True):
        assert 0 < p50 <= p99 <= most <= served.max_ms
    assert served.calls_per_second > 0 < served.cpu_us_per_call


def test_so_many_cycles_are_under_way_as_asked(client: str, tmp_path: Path) -> None:
    """Prepare answers when four wait for it, so fewer would wait for ever; and no more than four ever call."""
    barrier, lock = threading.Barrier(4), threading.Lock()
    under_way, most = 0, 0

    def answer(name: str, _: Any, __: Any) -> Any:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        if name == "Prepare":
            barrier.wait(WAIT_S)
        with lock:
            under_way -= 1
        return wire.Empty() if name == "Remove" else MOUNTS

    with Fake(answer).served(tmp_path / "s") as path:
        call(client, Service(path, "", "none"), Load(4, 20))
    assert most == 4


def test_a_burst_begins_at_once_and_the_next_one_when_it_has_ended(client: str, tmp_path: Path) -> None:
    barrier = threading.Barrier(5)

    def answer(name: str, _: Any, __: Any) -> Any:
        if name == "Prepare":
            barrier.wait(WAIT_S)
        return wire.Empty() if name == "Remove" else MOUNTS

    fake = Fake(answer)
    with fake.served(tmp_path / "s") as path:
        call(client, Service(path, "", "none"), Load(5, 15, burst=True))
    for first in (0, 15, 30):
        burst = [name for name, _ in fake.seen[first : first + 15]]
        assert sorted(burst) == ["Mounts"] * 5 + ["Prepare"] * 5 + ["Remove"] * 5
        assert len({message.key for _, message in fake.seen[first : first + 15]}) == 5


@pytest.mark.parametrize("failing", ["Prepare", "Mounts", "Remove"])
def test_a_call_that_is_refused_is_named_with_the_reason(client: str, failing: str, tmp_path: Path) -> None:
    def answer(name: str, _: Any, context: grpc.ServicerContext) -> Any:
        if name == failing:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "é is taken, 100%")
        return wire.Empty() if name == "Remove" else MOUNTS

    with Fake(answer).served(tmp_path / "s") as path:
        said = refused(client, path)
    assert re.search(f"^snapshot_client: {failing} of bench-[0-9]+-0: .*(grpc-status 6:|AlreadyExists)", said)
    assert said.endswith(" é is taken, 100%\n")


def test_an_answer_without_mounts_is_none(client: str, tmp_path: Path) -> None:
    with Fake(lambda name, *_: wire.Empty() if name == "Remove" else wire.MountsResponse()).served(tmp_path / "s") as p:
        assert "no mounts" in refused(client, p)


WIDE = wire.MountsResponse(mounts=[wire.Mount(type="overlay", options=["x" * (1 << 20)])])


def test_answers_wider_than_a_window_are_taken(client: str, tmp_path: Path) -> None:
    fake = Fake(lambda name, *_: wire.Empty() if name == "Remove" else WIDE)
    with fake.served(tmp_path / "s") as path:
        call(client, Service(path, "p" * 900, "none"), Load(10, 30))
    assert len(fake.seen) == 90


def test_a_service_that_takes_few_calls_at_once_gets_them_all(light_client: str, tmp_path: Path) -> None:
    """It refuses some all the same, since it still counts those that it has just answered; they are asked again."""
    fake = Fake()
    with fake.served(tmp_path / "s", ("grpc.max_concurrent_streams", 2)) as path:
        call(light_client, Service(path, "", "none"), Load(10, 30))
    assert len(fake.seen) == 90


def test_a_service_that_is_not_there_is_said(client: str, tmp_path: Path) -> None:
    assert f"connect to {tmp_path}/none" in refused(client, f"{tmp_path}/none")


@pytest.mark.parametrize(
    "words",
    [
        "0 1 parent none plain",
        "1 x parent none plain",
        "1 1 parent none other",
        "1 1 parent none plain open",
        "4 6 parent none plain burst",
        "1 1 parent none plain closed 0",
        "1 1 parent none",
    ],
)
def test_words_that_mean_nothing_are_told_so(client: str, words: str) -> None:
    done = subprocess.run([client, "/none", *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: snapshot_client SOCKET")


def test_calls_that_are_never_answered_end_the_client(hasty_client: str, tmp_path: Path) -> None:
    over = threading.Event()
    with Fake(lambda *_: over.wait(WAIT_S) and MOUNTS).served(tmp_path / "s") as path:
        try:
            said = refused(hasty_client, path, "2", "5", "parent", "none", "plain")
        finally:
            over.set()
    assert said == "snapshot_client: 1 s have passed: 0 cycles have ended and 2 have not\n"


# A service of bare frames, for what grpcio never sends.
STATUS_200, STATUS_500 = b"\x88", b"\x8e"  # HPACK's static table


@contextmanager
def bare(
    path: Path, answer: Callable[[int], bytes], *, settings: bytes = b""
) -> Iterator[list[tuple[int, int, int, bytes]]]:
    """Serve one connection: `answer(stream)` is sent when a request is whole. Yields the frames that came."""
    came: list[tuple[int, int, int, bytes]] = []
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(WAIT_S)

        def serve() -> None:
            # A client that has seen enough leaves in the middle of what it is told.
            with suppress(ConnectionError), listener.accept()[0] as peer, peer.makefile("rb") as reader:
                peer.sendall(frame(SETTINGS, 0, 0, settings))
                reader.read(len(PREFACE))
                while len(head := reader.read(9)) == 9:
                    length = int.from_bytes(head[:3], "big")
                    kind, flags, stream = struct.unpack(">BBI", head[3:])
                    came.append((kind, flags, stream, reader.read(length)))
                    if kind == DATA and flags & END_STREAM:
                        peer.sendall(answer(stream))
                    elif kind == DATA:
                        peer.sendall(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", length)))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield came
        finally:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_split_headers_interim_answers_pings_and_empty_frames_are_understood(client: str, tmp_path: Path) -> None:
    def answer(stream: int) -> bytes:
        message = b"" if stream == 5 else MOUNTS.SerializeToString()
        body = struct.pack(">BI", 0, len(message)) + message
        trailers = header("grpc-status", "0")
        return b"".join(
            (
                frame(PING, 0, 0, b"01234567"),
                frame(HEADERS, 0, stream, STATUS_200),
                frame(CONTINUATION, 0, stream, GRPC[:5]),
                frame(CONTINUATION, END_HEADERS, stream, GRPC[5:]),
                *(frame(DATA, 0, stream, body[i : i + 1]) for i in range(len(body))),
                frame(DATA, 0, stream),
                frame(HEADERS, END_STREAM, stream, trailers[:3]),
                frame(CONTINUATION, END_HEADERS, stream, trailers[3:]),
            )
        )

    with bare(tmp_path / "s", answer) as came:
        call(client, Service(f"{tmp_path}/s", "", "none"), Load(1, 1))
    assert [stream for kind, flags, stream, _ in came if kind == DATA and flags & END_STREAM] == [1, 3, 5]
    # Of the last one nobody may be left to answer.
    assert [body for kind, flags, _, body in came if kind == PING and flags == ACK][:2] == [b"01234567"] * 2


def whole(stream: int, headers: bytes, body: bytes, trailers: bytes) -> bytes:
    return (
        frame(HEADERS, END_HEADERS, stream, headers)
        + frame(DATA, 0, stream, body)
        + frame(HEADERS, END_HEADERS | END_STREAM, stream, trailers)
    )


MESSAGE = struct.pack(">BI", 0, len(MOUNTS.SerializeToString())) + MOUNTS.SerializeToString()
FINE = header("grpc-status", "0")
GONE = header("grpc-status", "5") + header("grpc-message", "gone")


def test_a_request_goes_in_pieces_where_the_window_is_narrow(client: str, tmp_path: Path) -> None:
    narrow = struct.pack(">HI", INITIAL_WINDOW_SIZE, 7)
    with bare(tmp_path / "s", lambda s: whole(s, STATUS_200 + GRPC, MESSAGE, FINE), settings=narrow) as came:
        call(client, Service(f"{tmp_path}/s", "parent", "none"), Load(1, 1))
    pieces = [body for kind, _, stream, body in came if (kind, stream) == (DATA, 1)]
    assert max(map(len, pieces)) == 7
    created = wire.CreateRequest.FromString(b"".join(pieces)[5:])
    assert (created.parent, dict(created.labels)) == ("parent", {"containerd.io/gc.root": "bench"})


def hang_up(_: int) -> bytes:
    raise ConnectionError


WRONG = {
    "the connection: ": hang_up,
    "HTTP status 500": lambda s: frame(HEADERS, END_HEADERS | END_STREAM, s, STATUS_500 + header("server", "x")),
    "is not application/grpc": lambda s: whole(s, STATUS_200 + header("content-type", "text/html"), MESSAGE, FINE),
    "no grpc-status": lambda s: whole(s, STATUS_200 + GRPC, MESSAGE, header("x", "y")),
    "grpc-status 5: gone": lambda s: frame(HEADERS, END_HEADERS | END_STREAM, s, STATUS_200 + GRPC + GONE),
    "no message": lambda s: whole(s, STATUS_200 + GRPC, b"", FINE),
    "a compressed one": lambda s: whole(s, STATUS_200 + GRPC, b"\1" + MESSAGE[1:], FINE),
    "a message of 22 bytes in 21": lambda s: whole(s, STATUS_200 + GRPC, MESSAGE[:-1], FINE),
    "stream ended: CANCEL": lambda s: frame(RST_STREAM, 0, s, struct.pack(">I", 8)),
    "stream ended: REFUSED_STREAM": lambda s: frame(RST_STREAM, 0, s, struct.pack(">I", 7)),
    "says goodbye: ENHANCE_YOUR_CALM: too_many": lambda s: frame(GOAWAY, 0, 0, struct.pack(">II", 0, 11) + b"too_many"),
    "not HTTP/2": lambda s: frame(PING, 0, 1, b"01234567"),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_no_answer_is_said(light_client: str, said: str, tmp_path: Path) -> None:
    with bare(tmp_path / "s", WRONG[said]):
        assert said in refused(light_client, f"{tmp_path}/s")


def test_the_floor_answers_every_call_with_what_a_client_can_read(client: str, tmp_path: Path) -> None:
    program, path = build_floor_service(str(tmp_path), *SANITIZED), f"{tmp_path}/s"
    with serving([program, path], path):
        served = call(client, Service(path, "parent", "none", mapped=True), Load(50, 500), connections=3)
        with grpc.insecure_channel(f"unix:{path}") as channel:
            for name, expected in (("Prepare", MOUNTS), ("Mounts", MOUNTS), ("Remove", wire.Empty())):
                ask = channel.unary_unary(f"/{SERVICE}/{name}", lambda m: b"", type(expected).FromString)
                assert ask(None, timeout=WAIT_S) == expected
    assert served.calls_per_second > 0
