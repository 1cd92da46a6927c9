"""The wire: containerd.services.snapshots.v1.Snapshots and grpc.health.v1.Health over the snapshot service.

The front (native/front) speaks HTTP/2 and hands calls over, many at a time; each is begun at once, and most are
answered without a task of their own. Every call has a deadline, its own or the configured one, whichever is nearer.
What a call began is finished even when its client is gone, so that a lost connection leaves nothing half-way.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import IntEnum
from functools import lru_cache
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from flatmount.errors import FlatmountError, InUse, MissingFeature, StoreError, UsageError, from_os_error
from flatmount.snapshotter._front import Front
from flatmount.snapshotter.metrics import Metrics
from flatmount.snapshotter.model import (
    Info,
    InvalidRequest,
    Kind,
    Mount,
    Precondition,
    SnapshotExists,
    SnapshotNotFound,
    Usage,
)
from flatmount.snapshotter.snapshots import Done, Snapshots
from flatmount.snapshotter.wire import snapshots_pb2 as wire

log = logging.getLogger("flatmount.snapshotter")

SERVICE = "containerd.services.snapshots.v1.Snapshots"
HEALTH = "grpc.health.v1.Health"
_LIST_BLOCK = 100
_MOST_REQUEST_BYTES = 16 << 20
# How exactly deadlines are kept, and how often a health watcher's answer is looked at.
_LOOK_EVERY_S = 0.05
_WATCH_EVERY_S = 1.0
_CLOSE_MS = 100
# Tags of MountsResponse and Mount: number and wire type of a field (wire/snapshots.proto).
_MOUNT, _TYPE, _SOURCE, _OPTION = (bytes((number << 3 | 2,)) for number in (1, 1, 2, 4))
_ONE_BYTE = tuple(bytes((value,)) for value in range(128))
# So many answers are enough to send some, while the others of a burst are still made.
_FLUSH_AT = 16


class Code(IntEnum):
    """gRPC's status codes, those that are used here."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14


_CODES: tuple[tuple[type[FlatmountError], Code], ...] = (
    (SnapshotNotFound, Code.NOT_FOUND),
    (SnapshotExists, Code.ALREADY_EXISTS),
    (InvalidRequest, Code.INVALID_ARGUMENT),
    (UsageError, Code.INVALID_ARGUMENT),
    (Precondition, Code.FAILED_PRECONDITION),
    (InUse, Code.FAILED_PRECONDITION),
    (MissingFeature, Code.FAILED_PRECONDITION),
    (StoreError, Code.UNAVAILABLE),
)
_NAMES = {code: code.name for code in Code}
_EXPECTED = frozenset((Code.OK, Code.NOT_FOUND, Code.ALREADY_EXISTS))


def code_of(error: FlatmountError) -> Code:
    """The status code that containerd turns back into the error it knows."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Code.INTERNAL)


class _Call:
    """One call under way. `finished` when its client has been told how it ended."""

    __slots__ = ("begun", "deadline", "finished", "key", "number", "service", "task", "way")

    def __init__(self, service: Service, number: int, way: _Way, key: str, begun: float, deadline: float) -> None:
        self.service = service
        self.number = number
        self.way = way
        self.key = key
        self.begun = begun
        self.deadline = deadline
        self.finished = False
        self.task: asyncio.Task[None] | None = None

    def done(self, result: Any) -> None:
        """It has come to `result`, or to an error."""
        self.service.ended(self, result)


class _Way:
    """How one call of the interface is answered.

    `begin` begins it and tells `done`, or returns a coroutine that the answer is the result of, or (`streams`) which
    sends what there is by itself.
    """

    __slots__ = ("answer", "begin", "name", "path", "request", "streams")

    def __init__(
        self,
        path: str,
        request: Callable[[bytes], Any],
        begin: Callable[[Any, _Call], Coroutine[Any, Any, Any] | None],
        answer: Callable[[Any], bytes] = bytes,
        *,
        streams: bool = False,
    ) -> None:
        self.path = path
        self.name = path.rpartition("/")[2]
        self.request = request
        self.begin = begin
        self.answer = answer
        self.streams = streams


class Service:
    """Answers calls. `healthy` is what the health service says. Belongs to the event loop that it serves on."""

    def __init__(self, snapshots: Snapshots, metrics: Metrics, deadline_s: float) -> None:
        self._snapshots = snapshots
        self._metrics = metrics
        self._deadline_s = deadline_s
        self.healthy = True
        self._front: Front | None = None
        # Calls that have not come to an end on our side, told or not.
        self._running: dict[int, _Call] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._flushing = False
        self._unflushed = 0
        own, health = f"/{SERVICE}/", f"/{HEALTH}/"
        self._ways = (
            _Way(own + "Prepare", wire.CreateRequest.FromString, self._prepare, _mounts),
            _Way(own + "Mounts", wire.KeyRequest.FromString, self._mounts, _mounts),
            _Way(own + "Remove", wire.KeyRequest.FromString, self._remove, _nothing),
            _Way(own + "View", wire.CreateRequest.FromString, self._view, _mounts),
            _Way(own + "Commit", wire.CommitRequest.FromString, self._commit, _nothing),
            _Way(own + "Stat", wire.KeyRequest.FromString, self._stat, _info_answer),
            _Way(own + "Update", wire.UpdateRequest.FromString, self._update, _info_answer),
            _Way(own + "Usage", wire.KeyRequest.FromString, self._usage, _usage),
            _Way(own + "Cleanup", wire.CleanupRequest.FromString, self._cleanup, _nothing),
            _Way(own + "List", wire.ListRequest.FromString, self._list, streams=True),
            _Way(health + "Check", wire.HealthRequest.FromString, self._check),
            _Way(health + "Watch", wire.HealthRequest.FromString, self._watch, streams=True),
        )

    def serve(self, listening: socket.socket) -> None:
        """Answer whoever connects to `listening`, which is the service's from now on. Raises: OSError."""
        self._loop = asyncio.get_running_loop()
        listening.setblocking(False)
        paths = tuple(way.path for way in self._ways)
        self._front = Front(listening.fileno(), paths, _MOST_REQUEST_BYTES)
        listening.detach()
        self._loop.add_reader(self._front.fileno(), self._take)

    async def close(self, grace_s: float) -> None:
        """Wait for what calls began, but not longer than `grace_s`, and let every client go."""
        front = self._front
        if front is None:
            return
        for call in tuple(self._running.values()):
            if call.way.streams and call.task is not None:
                call.task.cancel()
        until = self._loop.time() + grace_s
        while self._running and self._loop.time() < until:
            await asyncio.sleep(0.01)
        self._flush()
        self._front = None
        self._loop.remove_reader(front.fileno())
        await asyncio.to_thread(front.close, _CLOSE_MS)

    # From the front, and back.

    def _take(self) -> None:
        front = self._front
        if front is None:
            return
        now = time.perf_counter()
        self._flushing = True
        try:
            for number, place, left_s, message in front.take():
                if place < 0:
                    self._left(number)
                else:
                    self._begin(number, self._ways[place], left_s, message, now)
        finally:
            self._flush()

    def _begin(self, number: int, way: _Way, left_s: float, message: bytes, now: float) -> None:
        deadline_s = self._deadline_s if left_s < 0 else min(self._deadline_s, left_s)
        call = _Call(self, number, way, "", now, now + deadline_s)
        try:
            request = way.request(message)
            call.key = getattr(request, "key", "")
            self._running[number] = call
            work = way.begin(request, call)
        except Exception as error:
            call.done(error)
            return
        if work is not None:
            call.task = self._loop.create_task(self._work(call, work))
        if number in self._running and self._looking is None:
            self._looking = self._loop.call_later(_LOOK_EVERY_S, self._look)

    async def _work(self, call: _Call, work: Awaitable[Any]) -> None:
        try:
            result = await work
        except asyncio.CancelledError:
            call.done(_Cancelled("the service ends"))
            raise
        except Exception as error:
            result = error
        call.done(result)

    def ended(self, call: _Call, result: Any) -> None:
        """A call has come to its end on our side: tell its client, unless that was told something already."""
        self._running.pop(call.number, None)
        if call.finished:
            return
        if not isinstance(result, BaseException):
            try:
                answer = b"" if call.way.streams else call.way.answer(result)
            except Exception as error:
                result = error
        if isinstance(result, BaseException):
            self._refuse(call, *_told(call, result))
            return
        call.finished = True
        if self._front is not None:
            if call.way.streams:
                self._front.end(call.number, Code.OK, "")
            else:
                self._front.send(call.number, answer, True)
            self._flush_soon()
        self._count(call, Code.OK)

    def _refuse(self, call: _Call, code: Code, told: str) -> None:
        call.finished = True
        if self._front is not None:
            self._front.end(call.number, code, told.replace("\0", "?"))
            self._flush_soon()
        self._count(call, code)

    def _left(self, number: int) -> None:
        call = self._running.get(number)
        if call is None or call.finished:
            return
        call.finished = True
        self._count(call, Code.CANCELLED)
        if call.way.streams and call.task is not None:
            call.task.cancel()

    def _look(self) -> None:
        """Tell those whose time is up. What they asked for goes on."""
        now = time.perf_counter()
        self._looking = None
        for call in tuple(self._running.values()):
            if call.deadline <= now and not call.finished and call.way.path != f"/{HEALTH}/Watch":
                spent_s = call.deadline - call.begun
                told = f"{call.way.name} has taken {spent_s:.1f} s; it goes on; see whether the store's disk answers"
                self._refuse(call, Code.DEADLINE_EXCEEDED, told)
        if self._running:
            self._looking = self._loop.call_later(_LOOK_EVERY_S, self._look)

    def _flush_soon(self) -> None:
        self._unflushed += 1
        if self._unflushed >= _FLUSH_AT:
            self._unflushed = 0
            if self._front is not None:
                self._front.flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._unflushed = 0
        if self._front is not None:
            self._front.flush()

    def _count(self, call: _Call, code: Code) -> None:
        seconds = time.perf_counter() - call.begun
        self._metrics.count(call.way.name, _NAMES[code], seconds)
        level = logging.DEBUG if code in _EXPECTED else logging.WARNING
        if log.isEnabledFor(level):
            extra = {"call": call.way.name, "key": call.key, "code": code.name, "ms": round(seconds * 1e3, 2)}
            log.log(level, "call", extra=extra)

    # Calls.

    def _prepare(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any] | None:
        return self._create(Kind.ACTIVE, request, call.done)

    def _view(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any] | None:
        return self._create(Kind.VIEW, request, call.done)

    def _create(self, kind: Kind, request: Any, done: Done) -> Coroutine[Any, Any, Any] | None:
        wanted = (kind, request.key, request.parent, dict(request.labels))
        return None if self._snapshots.create_soon(*wanted, done) else self._snapshots.create(*wanted)

    def _mounts(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any] | None:
        return None if self._snapshots.mounts_soon(request.key, call.done) else self._snapshots.mounts(request.key)

    def _remove(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any] | None:
        return None if self._snapshots.remove_soon(request.key, call.done) else self._snapshots.remove(request.key)

    def _commit(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any]:
        return self._snapshots.commit(request.name, request.key, request.parent, dict(request.labels))

    def _stat(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any]:
        return self._snapshots.stat(request.key)

    def _update(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any]:
        paths = tuple(request.update_mask.paths)
        return self._snapshots.update(request.info.name, dict(request.info.labels), paths)

    def _usage(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any]:
        return self._snapshots.usage(request.key)

    def _cleanup(self, request: Any, call: _Call) -> Coroutine[Any, Any, Any]:
        return self._snapshots.cleanup()

    async def _list(self, request: Any, call: _Call) -> None:
        infos = await self._snapshots.list(tuple(request.filters))
        for at in range(0, len(infos), _LIST_BLOCK):
            self._send(call, wire.ListResponse(info=map(_info, infos[at : at + _LIST_BLOCK])).SerializeToString())
            await asyncio.sleep(0)  # others have their turn

    def _check(self, request: Any, call: _Call) -> None:
        if request.service not in ("", SERVICE):
            raise SnapshotNotFound(f"there is no service {request.service!r} here")
        call.done(self._health())

    async def _watch(self, request: Any, call: _Call) -> None:
        if request.service not in ("", SERVICE):
            unknown = wire.HealthResponse(status=wire.HealthResponse.SERVICE_UNKNOWN)
            self._send(call, unknown.SerializeToString())
            return
        told: bool | None = None
        while True:
            if told is not self.healthy:
                told = self.healthy
                self._send(call, self._health())
            await asyncio.sleep(_WATCH_EVERY_S)

    def _health(self) -> bytes:
        status = wire.HealthResponse.SERVING if self.healthy else wire.HealthResponse.NOT_SERVING
        return bytes(wire.HealthResponse(status=status).SerializeToString())

    def _send(self, call: _Call, message: bytes) -> None:
        if self._front is not None and not call.finished:
            self._front.send(call.number, message, False)
            self._flush_soon()


class _Cancelled(FlatmountError):
    """The service ends before the call does."""


def _told(call: _Call, error: BaseException) -> tuple[Code, str]:
    """The status of an error, and what its client is told."""
    name = call.way.name
    if isinstance(error, _Cancelled):
        return Code.UNAVAILABLE, error.line()
    if isinstance(error, FlatmountError):
        return code_of(error), error.line()
    if isinstance(error, DecodeError):
        return Code.INTERNAL, f"{name}: the request cannot be read"
    if isinstance(error, OSError):
        # A disk that does not do what it is told is not the request's fault, and may do it later.
        return Code.UNAVAILABLE, from_os_error(error, name).line()
    log.error("a call failed", exc_info=error, extra={"call": name})
    return Code.INTERNAL, f"{name}: {error!r}"


def _nothing(result: None) -> bytes:
    return b""


@lru_cache(maxsize=1024)  # a client that has prepared a snapshot asks for its mounts next
def _mounts(mount: Mount) -> bytes:
    """MountsResponse with one Mount, in a quarter of the time that building the messages takes."""
    body = _TYPE + _text(mount.type) + _SOURCE + _text(mount.source)
    for option in mount.options:
        body += _OPTION + _text(option)
    return _MOUNT + _varint(len(body)) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return _varint(len(data)) + data


def _varint(value: int) -> bytes:
    if value < 128:
        return _ONE_BYTE[value]
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _info_answer(info: Info) -> bytes:
    return bytes(wire.InfoResponse(info=_info(info)).SerializeToString())


def _usage(usage: Usage) -> bytes:
    return bytes(wire.UsageResponse(size=usage.size_bytes, inodes=usage.inodes).SerializeToString())


def _info(info: Info) -> wire.Info:
    return wire.Info(
        name=info.name,
        parent=info.parent,
        kind=info.kind.name,
        created_at=_timestamp(info.created_ns),
        updated_at=_timestamp(info.updated_ns),
        labels=dict(info.labels),
    )


def _timestamp(nanoseconds: int) -> Timestamp:
    seconds, rest = divmod(nanoseconds, 10**9)
    return Timestamp(seconds=seconds, nanos=rest)
