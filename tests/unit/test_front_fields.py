"""What the front reads of messages by itself, and what it counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.snapshotter._front import BOUNDS_S, Front
from flatmount.snapshotter.metrics import Answered, exposition
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.fronting import Behind, Entry, until

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
CREATE = ("/test.Front/Echo", "2s 3s 4m", False)


class Reading(Behind):
    """A front that reads fields, and answers each call with their repr."""

    paths = (CREATE, ("/test.Front/Other", None, True))

    def __init__(self, path: Path, *, most_s: float = 0.0, hold: bool = False) -> None:
        def act(front: Front, entry: Entry) -> None:
            if not hold:
                front.send(entry[0], repr(entry[3]).encode(), True)

        super().__init__(path, act, most_s=most_s)


def ask(path: Path, message: bytes, *, method: str = "/test.Front/Echo", timeout_s: float = 60) -> bytes:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        return bytes(channel.unary_unary(method)(message, timeout=timeout_s))


@given(
    requests=st.lists(
        st.tuples(TEXTS, TEXTS, TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=5)), min_size=1, max_size=20
    )
)
def test_fields_are_read_as_the_interface_has_them(
    requests: list[tuple[str, str, str, dict[str, str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("front") / "s"
    with Reading(path), grpc.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary("/test.Front/Echo")
        for snapshotter, key, parent, labels in requests:
            message = wire.CreateRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
            # A field that a later client may have, of each type that there is.
            unknown = b"\x50\x96\x01" + b"\x59" + bytes(8) + b"\x62\x02hi" + b"\x6d" + bytes(4)
            for data in (message.SerializeToString(), unknown + message.SerializeToString() + unknown):
                read: Any = eval(call(data, timeout=60))
                assert read == (key, parent, labels)


@pytest.mark.parametrize(
    "message",
    [
        b"\x12\x05abc",  # shorter than it says
        b"\x12",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length beyond everything
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a number of too many bytes
        b"\x12\x02\xff\xfe",  # no text
        b"\x22\x04\x0a\x05ab",  # an entry of a map that ends too soon
        b"\x22\x04\x0a\x02\xff\xff",
        b"\x13\x00",  # groups, which nobody sends any more
        b"\x07\x00",
        b"\x02\x00",  # no field has the number 0
        b"\x51\x00",
        b"\x55\x00",
    ],
)
def test_what_is_no_message_is_answered_and_nobody_is_asked(message: bytes, tmp_path: Path) -> None:
    with Reading(tmp_path / "s") as front:
        with pytest.raises(grpc.RpcError) as refused:
            ask(tmp_path / "s", message)
        assert refused.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
        assert ask(tmp_path / "s", b"\x12\x01k") == b"('k', '', {})"
        assert len(front.calls) == 1


def test_no_bytes_are_an_empty_message(tmp_path: Path) -> None:
    with Reading(tmp_path / "s"):
        assert ask(tmp_path / "s", b"") == b"('', '', {})"
        assert ask(tmp_path / "s", b"\x12\x01k", method="/test.Front/Other") == repr(b"\x12\x01k").encode()


def test_the_front_keeps_the_time_and_counts(tmp_path: Path) -> None:
    with Reading(tmp_path / "s", most_s=0.8, hold=True) as front:
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError, match=r"Echo has taken 0\.8 s; it goes on"):
            ask(tmp_path / "s", b"")
        assert time.monotonic() - begun >= 0.8
        # Its client's own time is nearer; whichever of the two tells it.
        with pytest.raises(grpc.RpcError) as refused:
            ask(tmp_path / "s", b"", timeout_s=0.4)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        # What may take any time is told by its client only.
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError):
            ask(tmp_path / "s", b"", method="/test.Front/Other", timeout_s=1.5)
        assert time.monotonic() - begun >= 1.4
        until(lambda: front.do(lambda one: one.running()) == 0)
        codes, within, seconds = front.do(lambda one: one.counts(0))
        assert sum(codes) == sum(within) == 2 and seconds > 0.85
        assert codes[4] + codes[1] == 2  # DEADLINE_EXCEEDED, or the client left first
        with pytest.raises(IndexError):
            front.do(lambda one: one.counts(2))


def test_the_exposition_adds_up() -> None:
    within = [0] * len(BOUNDS_S) + [0]
    within[0], within[3], within[-1] = 5, 2, 1
    text = exposition(
        [Answered("Stat", {}, within, 0.0), Answered("Mounts", {"OK": 7, "NOT_FOUND": 1}, within, 12.5)],
        BOUNDS_S,
        {"trees": ("trees", {"": 3, '{kind="x"}': 4})},
    )
    lines = text.splitlines()
    assert 'flatmount_snapshotter_calls_total{call="Mounts",code="OK"} 7' in lines
    assert 'flatmount_snapshotter_call_seconds_bucket{call="Mounts",le="0.001"} 5' in lines
    assert 'flatmount_snapshotter_call_seconds_bucket{call="Mounts",le="10.0"} 7' in lines
    assert 'flatmount_snapshotter_call_seconds_bucket{call="Mounts",le="+Inf"} 8' in lines
    assert 'flatmount_snapshotter_call_seconds_count{call="Mounts"} 8' in lines
    assert "Stat" not in text
    assert 'flatmount_snapshotter_trees{kind="x"} 4' in lines


class Keeping(Behind):
    """A front that has answers kept by the second field of its first call, and answers others with their field."""

    paths = (("/test.Front/Echo", "2s", False, 2), ("/test.Front/Other", "2s", False))

    def __init__(self, path: Path) -> None:
        super().__init__(path, lambda front, entry: front.send(entry[0], b"asked: " + entry[3][0].encode(), True))


def keyed(key: str, snapshotter: str = "any") -> bytes:
    return bytes(wire.CreateRequest(snapshotter=snapshotter, key=key).SerializeToString())


def test_what_is_kept_is_answered_until_it_is_forgotten(tmp_path: Path) -> None:
    with Keeping(tmp_path / "s") as behind, grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        call, other = (channel.unary_unary(path) for path in ("/test.Front/Echo", "/test.Front/Other"))

        def told(key: str) -> bytes:
            return bytes(call(keyed(key), timeout=20))

        assert told("a") == b"asked: a"
        behind.do(lambda front: front.keep("a", b"kept"))
        behind.do(lambda front: front.keep("", b"for nobody"))
        behind.do(lambda front: front.keep("\N{SNOWMAN}\0", b""))
        taken = len(behind.calls)
        assert [told("a"), told(""), told("\N{SNOWMAN}\0")] == [b"kept", b"for nobody", b""]
        assert call(keyed("b") + keyed("a"), timeout=20) == b"kept", "the last of a field counts"
        assert len(behind.calls) == taken, "nobody was asked"
        assert [told("\N{SNOWMAN}"), told("aa"), other(keyed("a"), timeout=20)] == [
            "asked: \N{SNOWMAN}".encode(),
            b"asked: aa",
            b"asked: a",
        ]
        with pytest.raises(grpc.RpcError, match="cannot be read"):
            call(keyed("a") + b"\x12\x50", timeout=20)
        behind.do(lambda front: front.keep("a", b"another"))
        behind.do(lambda front: front.forget("b"))
        assert told("a") == b"another"
        behind.do(lambda front: front.forget("a"))
        assert told("a") == b"asked: a"
        assert told("") == b"for nobody"
        behind.do(lambda front: front.forget())
        assert told("") == b"asked: "
        codes, within, _ = behind.do(lambda front: front.counts(0))
        assert codes[0] == sum(within) - codes[13] == 11
        assert behind.do(lambda front: front.running()) == 0


def test_so_many_answers_are_kept_and_no_more(tmp_path: Path) -> None:
    def keep(front: Front) -> None:
        for number in range(65_537):
            front.keep(str(number), str(number).encode())

    with Keeping(tmp_path / "s") as behind:
        behind.do(keep)
        assert ask(tmp_path / "s", keyed("65535")) == b"65535"
        assert ask(tmp_path / "s", keyed("65536")) == b"asked: 65536"
        behind.do(lambda front: front.keep("7", b"seven"))
        assert ask(tmp_path / "s", keyed("7")) == b"seven", "in the place of another one"
        behind.do(lambda front: front.forget("7"))
        behind.do(lambda front: front.keep("65536", b"room"))
        assert ask(tmp_path / "s", keyed("65536")) == b"room"


def test_keeping_and_forgetting_while_calls_go_on(tmp_path: Path) -> None:
    """Each call is told one of the two, whole, and after it is forgotten nobody is told what was kept."""
    with Keeping(tmp_path / "s") as behind, grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        call = channel.unary_unary("/test.Front/Echo")
        for number in range(300):
            kept = b"x" * (number * 37 % 5000)
            futures = [call.future(keyed("key"), timeout=20) for _ in range(10)]
            behind.do(lambda front, kept=kept: front.keep("key", kept))  # type: ignore[misc]
            futures += [call.future(keyed("key"), timeout=20) for _ in range(10)]
            assert {bytes(future.result()) for future in futures} <= {b"asked: key", kept}
            behind.do(lambda front: front.forget("key"))
            assert call(keyed("key"), timeout=20) == b"asked: key"
