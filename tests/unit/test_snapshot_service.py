"""The snapshot service between its front and the snapshots: deadlines, streams, and what goes wrong in a call."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from flatmount.snapshotter.model import Info, Kind, SnapshotNotFound, Usage
from flatmount.snapshotter.service import HEALTH, SERVICE, Service
from flatmount.snapshotter.snapshots import Snapshots
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.fronting import WAIT_S, until
from tests.snapshotting import Client, Refused

SERVING, NOT_SERVING = wire.HealthResponse.SERVING, wire.HealthResponse.NOT_SERVING


class Few:
    """Snapshots of which only what a test needs is there."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.begun = 0
        self.cleaned = 0
        self.cancelled = 0
        self.infos: list[Info] = []

    def keep_answers(self, keeps: object) -> None:
        pass

    def mounts_soon(self, key: str, done: Callable[[Any], None]) -> bool:
        if key == "at once":
            raise ZeroDivisionError("at once")
        return False

    async def mounts(self, key: str) -> None:
        raise SnapshotNotFound(f"{key} is not there")

    async def stat(self, key: str) -> Info:
        raise ZeroDivisionError("later")

    async def usage(self, key: str) -> Usage:
        raise OSError(28, "No space left on device")

    async def cleanup(self) -> None:
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.cleaned += 1

    async def list(self, filters: tuple[str, ...]) -> list[Info]:
        return self.infos


class Served:
    """A service on a loop of its own."""

    def __init__(self, path: Path, deadline_s: float) -> None:
        self.few = Few()
        self.service = Service(cast(Snapshots, self.few), deadline_s)
        self.path = path
        self.serving = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.over = asyncio.Event()
        self.grace_s = 0.5

    async def run(self) -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(self.path))
        listening.listen()
        self.service.serve(listening)
        self.serving.set()
        await self.over.wait()
        await self.service.close(self.grace_s)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def do(self, what: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(what)

    def end(self) -> None:
        self.do(self.over.set)


@contextmanager
def served(path: Path, deadline_s: float = WAIT_S) -> Iterator[Served]:
    one = Served(path, deadline_s)
    thread = threading.Thread(target=one.loop.run_until_complete, args=(one.run(),))
    thread.start()
    try:
        assert one.serving.wait(WAIT_S)
        yield one
    finally:
        one.end()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        one.loop.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_a_deadline_is_told_while_the_work_goes_on(path: Path) -> None:
    """The service's own, nearer than the client's."""
    with served(path, 0.2) as one, Client(path) as client:
        with pytest.raises(Refused, match=r"Cleanup has taken 0.2 s; it goes on") as refused:
            client.cleanup()
        assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (one.few.cleaned, one.few.cancelled) == (0, 0)
        one.do(one.few.go_on.set)
        until(lambda: one.few.cleaned)
        assert client.health() == SERVING


def test_what_a_client_that_left_began_is_finished(path: Path) -> None:
    with served(path) as one:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            clean = channel.unary_unary(
                f"/{SERVICE}/Cleanup", wire.CleanupRequest.SerializeToString, wire.Empty.FromString
            )
            call = clean.future(wire.CleanupRequest(), timeout=WAIT_S)
            until(lambda: one.few.begun)
            call.cancel()
        one.do(one.few.go_on.set)
        until(lambda: one.few.cleaned)


def test_a_watcher_is_told_when_health_changes(path: Path) -> None:
    def become(healthy: bool) -> None:
        one.service.healthy = healthy

    with served(path, 0.1) as one, grpc.insecure_channel(f"unix:{path}") as channel:
        watch = channel.unary_stream(
            f"/{HEALTH}/Watch", wire.HealthRequest.SerializeToString, wire.HealthResponse.FromString
        )
        answers = watch(wire.HealthRequest(), timeout=WAIT_S)
        told = []
        for healthy in (False, True, True):
            told.append(next(answers).status)
            one.do(lambda healthy=healthy: become(healthy))
        assert told == [SERVING, NOT_SERVING, SERVING]
        (unknown,) = watch(wire.HealthRequest(service="other"), timeout=WAIT_S)
        assert unknown.status == wire.HealthResponse.SERVICE_UNKNOWN
        one.end()
        with pytest.raises(grpc.RpcError) as ended:
            next(answers)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("count", [0, 1, 100, 101, 250])
def test_a_list_comes_in_blocks_of_a_hundred(count: int, path: Path) -> None:
    names = [f"name-{number}" for number in range(count)]
    with served(path) as one, grpc.insecure_channel(f"unix:{path}") as channel:
        one.few.infos = [Info(name, "", Kind.COMMITTED, 1, 1, {"a": "b"}) for name in names]
        ask = channel.unary_stream(f"/{SERVICE}/List", wire.ListRequest.SerializeToString, wire.ListResponse.FromString)
        blocks = [[info.name for info in block.info] for block in ask(wire.ListRequest(), timeout=WAIT_S)]
    assert blocks == [names[at : at + 100] for at in range(0, count, 100)]


@pytest.mark.parametrize(
    ("call", "code", "told"),
    [
        (lambda client: client.mounts("at once"), grpc.StatusCode.INTERNAL, "Mounts: ZeroDivisionError('at once')"),
        (lambda client: client.stat("any"), grpc.StatusCode.INTERNAL, "Stat: ZeroDivisionError('later')"),
    ],
    ids=["at once", "later"],
)
def test_an_error_of_ours_is_told_and_logged(
    call: Callable[[Client], object],
    code: grpc.StatusCode,
    told: str,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served(path), Client(path) as client, caplog.at_level(logging.ERROR, "flatmount.snapshotter"):
        with pytest.raises(Refused) as refused:
            call(client)
        assert (refused.value.code, refused.value.details) == (code, told)
        (record,) = [record for record in caplog.records if record.name == "flatmount.snapshotter"]
        assert record.exc_info is not None
        assert record.exc_info[0] is ZeroDivisionError
        assert client.health() == SERVING


def test_an_error_that_is_known_is_not_logged_as_one_of_ours(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(path), Client(path) as client, caplog.at_level(logging.ERROR, "flatmount.snapshotter"):
        with pytest.raises(Refused, match=r"NOT_FOUND: .*other is not there"):
            client.mounts("other")
        with pytest.raises(Refused, match=r"UNAVAILABLE: .*No space left on device"):
            client.usage("any")
        assert [record for record in caplog.records if record.name == "flatmount.snapshotter"] == []


def test_a_request_that_cannot_be_read_is_an_error(path: Path) -> None:
    with served(path), grpc.insecure_channel(f"unix:{path}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/Stat")(b"\xff\xff\xff", timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert refused.value.details() == "the request cannot be read"
