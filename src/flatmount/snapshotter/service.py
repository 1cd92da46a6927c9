"""The wire: containerd.services.snapshots.v1.Snapshots and grpc.health.v1.Health over the snapshot service.

The front (native/front) speaks HTTP/2 and hands calls over, many at a time; each is begun at once, and most are
answered without a task of their own. Every call has a deadline, its own or the configured one, whichever is nearer,
which the front keeps even while we are busy. What a call began is finished even when its client is gone, so that a lost
connection leaves nothing half-way.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from enum import IntEnum
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from flatmount.errors import FlatmountError, InUse, MissingFeature, StoreError, UsageError, from_os_error
from flatmount.snapshotter._front import Front, mounts_response
from flatmount.snapshotter.metrics import Answered
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
from flatmount.snapshotter.snapshots import Snapshots
from flatmount.snapshotter.wire import snapshots_pb2 as wire

log = logging.getLogger("flatmount.snapshotter")

SERVICE = "containerd.services.snapshots.v1.Snapshots"
HEALTH = "grpc.health.v1.Health"
_LIST_BLOCK = 100
_MOST_REQUEST_BYTES = 16 << 20
# How often a health watcher's answer is looked at.
_WATCH_EVERY_S = 1.0
_CLOSE_MS = 100
# So many answers are enough to send some, while the others of a burst are still made.
_FLUSH_AT = 16


class Code(IntEnum):
    """gRPC's status codes, those that are used here."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
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
_NAMES: dict[int, str] = {code.value: code.name for code in Code}
_EXPECTED = frozenset((Code.OK, Code.NOT_FOUND, Code.ALREADY_EXISTS))


def code_of(error: FlatmountError) -> Code:
    """The status code that containerd turns back into the error it knows."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Code.INTERNAL)


class _Way:
    """How one call of the interface is answered.

    `begin` gets the call's number and its fields. It answers by itself, now or later, or returns a coroutine whose
    result `answer` makes the answer of; of one that `streams`, which sends what there is, only the end. With `kept_by`,
    the number of a field, the front gives answers that are kept for its string.
    """

    __slots__ = ("answer", "begin", "fields", "kept_by", "name", "path", "streams")

    def __init__(
        self,
        path: str,
        fields: str | None,
        begin: Callable[..., Coroutine[Any, Any, Any] | None],
        answer: Callable[[Any], bytes] = bytes,
        *,
        streams: bool = False,
        kept_by: int = 0,
    ) -> None:
        self.kept_by = kept_by
        self.path = path
        self.name = path.rpartition("/")[2]
        self.fields = fields
        self.begin = begin
        self.answer = answer
        self.streams = streams


class Service:
    """Answers calls. `healthy` is what the health service says. Belongs to the event loop that it serves on."""

    def __init__(self, snapshots: Snapshots, deadline_s: float) -> None:
        self._snapshots = snapshots
        self._deadline_s = deadline_s
        self.healthy = True
        self._front: Front | None = None
        self._streaming: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushing = False
        self._unflushed = 0
        own, health = f"/{SERVICE}/", f"/{HEALTH}/"
        # Fields by number, of the messages in wire/snapshots.proto; whole messages where there are other ones.
        create, of_key = "2s 3s 4m", "2s"
        self._ways = (
            _Way(own + "Prepare", create, self._prepare, _mounts),
            _Way(own + "Mounts", of_key, self._mounts, _mounts, kept_by=2),
            _Way(own + "Remove", of_key, self._remove, _nothing),
            _Way(own + "View", create, self._view, _mounts),
            _Way(own + "Commit", "2s 3s 5s 4m", self._commit, _nothing),
            _Way(own + "Stat", of_key, self._stat, _info_answer),
            _Way(own + "Update", None, self._update, _info_answer),
            _Way(own + "Usage", of_key, self._usage, _usage),
            _Way(own + "Cleanup", "", self._cleanup, _nothing),
            _Way(own + "List", None, self._list, streams=True),
            _Way(health + "Check", "1s", self._check),
            _Way(health + "Watch", "1s", self._watch, streams=True),
        )

    def serve(self, listening: socket.socket) -> None:
        """Answer whoever connects to `listening`, which is the service's from now on. Raises: OSError."""
        self._loop = asyncio.get_running_loop()
        paths = tuple((way.path, way.fields, way.name == "Watch", way.kept_by) for way in self._ways)
        self._front = Front(listening.fileno(), paths, _MOST_REQUEST_BYTES, self._deadline_s)
        listening.detach()
        self._snapshots.keep_answers(self)
        self._loop.add_reader(self._front.fileno(), self._take)

    async def close(self, grace_s: float) -> None:
        """Wait for what calls began, but not longer than `grace_s`, and let every client go."""
        front = self._front
        if front is None:
            return
        for task in self._streaming.values():
            task.cancel()
        until = self._loop.time() + grace_s
        while (front.running() or self._tasks) and self._loop.time() < until:
            await asyncio.sleep(0.01)
        self._flush()
        self._front = None
        self._snapshots.keep_answers(None)
        self._loop.remove_reader(front.fileno())
        await asyncio.to_thread(front.close, _CLOSE_MS)

    def answered(self) -> Iterator[Answered]:
        """What was answered until now, call by call."""
        if self._front is None:
            return
        for place, way in enumerate(self._ways):
            codes, within, seconds = self._front.counts(place)
            named = {_NAMES.get(code, str(code)): count for code, count in enumerate(codes) if count}
            yield Answered(way.name, named, within, seconds)

    # What the front may say without us.

    def keep(self, key: str, mount: Mount) -> None:
        """Answer Mounts for `key` with this until it is forgotten."""
        if self._front is not None:
            self._front.keep(key, _mounts(mount))

    def forget(self, *keys: str) -> None:
        """What is kept for these keys, or without any for all, is nobody's answer any more."""
        if self._front is not None:
            for key in keys:
                self._front.forget(key)
            if not keys:
                self._front.forget()

    # From the front, and back.

    def _take(self) -> None:
        front = self._front
        if front is None:
            return
        self._flushing = True
        try:
            for call, place, _, fields in front.take():
                if place < 0:
                    self._left(call)
                    continue
                way = self._ways[place]
                try:
                    work = way.begin(call, *fields) if way.fields is not None else way.begin(call, fields)
                except Exception as error:
                    self._refuse(call, way, error)
                    continue
                if work is not None:
                    self._start(call, way, work)
        finally:
            self._flush()

    def _start(self, call: int, way: _Way, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(self._work(call, way, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if way.streams:
            self._streaming[call] = task

    async def _work(self, call: int, way: _Way, work: Awaitable[Any]) -> None:
        try:
            self._done(call, way, await work)
        except asyncio.CancelledError:
            if call in self._streaming:  # it is we who leave
                self._refuse(call, way, _Ending("the service ends"))
            raise
        except Exception as error:
            self._refuse(call, way, error)
        finally:
            self._streaming.pop(call, None)

    def _done(self, call: int, way: _Way, result: Any) -> None:
        """A call has come to its end; who has left, or was told that it takes too long, is not told again."""
        if isinstance(result, BaseException):
            self._refuse(call, way, result)
        elif self._front is not None:
            if way.streams:
                self._front.end(call, Code.OK, "")
            else:
                self._front.send(call, way.answer(result), True)
            self._flush_soon()

    def _refuse(self, call: int, way: _Way, error: BaseException) -> None:
        code, told = _told(way.name, error)
        if code not in _EXPECTED:
            log.warning("call", extra={"call": way.name, "code": code.name, "reason": told})
        if self._front is not None:
            self._front.end(call, code, told)
            self._flush_soon()

    def _left(self, call: int) -> None:
        task = self._streaming.pop(call, None)
        if task is not None:
            task.cancel()

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

    # Calls.

    def _prepare(self, call: int, key: str, parent: str, labels: dict[str, str]) -> Coroutine[Any, Any, Any] | None:
        return self._create(call, self._ways[0], Kind.ACTIVE, key, parent, labels)

    def _view(self, call: int, key: str, parent: str, labels: dict[str, str]) -> Coroutine[Any, Any, Any] | None:
        return self._create(call, self._ways[3], Kind.VIEW, key, parent, labels)

    def _create(
        self, call: int, way: _Way, kind: Kind, key: str, parent: str, labels: dict[str, str]
    ) -> Coroutine[Any, Any, Any] | None:
        if self._snapshots.create_soon(kind, key, parent, labels, partial(self._done, call, way)):
            return None
        return self._snapshots.create(kind, key, parent, labels)

    def _mounts(self, call: int, key: str) -> Coroutine[Any, Any, Any] | None:
        done = partial(self._done, call, self._ways[1])
        return None if self._snapshots.mounts_soon(key, done) else self._snapshots.mounts(key)

    def _remove(self, call: int, key: str) -> Coroutine[Any, Any, Any] | None:
        done = partial(self._done, call, self._ways[2])
        return None if self._snapshots.remove_soon(key, done) else self._snapshots.remove(key)

    def _commit(self, call: int, name: str, key: str, parent: str, labels: dict[str, str]) -> Coroutine[Any, Any, Any]:
        return self._snapshots.commit(name, key, parent, labels)

    def _stat(self, call: int, key: str) -> Coroutine[Any, Any, Any]:
        return self._snapshots.stat(key)

    def _update(self, call: int, message: bytes) -> Coroutine[Any, Any, Any]:
        request = wire.UpdateRequest.FromString(message)
        paths = tuple(request.update_mask.paths)
        return self._snapshots.update(request.info.name, dict(request.info.labels), paths)

    def _usage(self, call: int, key: str) -> Coroutine[Any, Any, Any]:
        return self._snapshots.usage(key)

    def _cleanup(self, call: int) -> Coroutine[Any, Any, Any]:
        return self._snapshots.cleanup()

    async def _list(self, call: int, message: bytes) -> None:
        infos = await self._snapshots.list(tuple(wire.ListRequest.FromString(message).filters))
        for at in range(0, len(infos), _LIST_BLOCK):
            self._send(call, wire.ListResponse(info=map(_info, infos[at : at + _LIST_BLOCK])).SerializeToString())
            await asyncio.sleep(0)  # others have their turn

    def _check(self, call: int, service: str) -> None:
        if service not in ("", SERVICE):
            raise SnapshotNotFound(f"there is no service {service!r} here")
        self._done(call, self._ways[-2], self._health())

    async def _watch(self, call: int, service: str) -> None:
        if service not in ("", SERVICE):
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

    def _send(self, call: int, message: bytes) -> None:
        if self._front is not None:
            self._front.send(call, message, False)
            self._flush_soon()


class _Ending(FlatmountError):
    """The service ends before the call does."""


def _told(name: str, error: BaseException) -> tuple[Code, str]:
    """The status of an error of the call `name`, and what its client is told."""
    if isinstance(error, _Ending):
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


def _mounts(mount: Mount) -> bytes:
    return mounts_response(*mount)


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
