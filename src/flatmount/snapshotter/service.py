"""The wire: containerd.services.snapshots.v1.Snapshots and grpc.health.v1.Health over the snapshot service.

Every call has a deadline, its own or the configured one, whichever is nearer. What a call began is finished even when
its client is gone, so that a lost connection leaves nothing half-way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from flatmount.errors import FlatmountError, InUse, MissingFeature, StoreError, UsageError, from_os_error
from flatmount.snapshotter.metrics import Metrics
from flatmount.snapshotter.model import (
    Info,
    InvalidRequest,
    Kind,
    Mount,
    Precondition,
    SnapshotExists,
    SnapshotNotFound,
)
from flatmount.snapshotter.snapshots import Snapshots
from flatmount.snapshotter.wire import snapshots_pb2 as wire

log = logging.getLogger("flatmount.snapshotter")
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "containerd.services.snapshots.v1.Snapshots"
HEALTH = "grpc.health.v1.Health"
_LIST_BLOCK = 100

_CODES: tuple[tuple[type[FlatmountError], grpc.StatusCode], ...] = (
    (SnapshotNotFound, grpc.StatusCode.NOT_FOUND),
    (SnapshotExists, grpc.StatusCode.ALREADY_EXISTS),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (Precondition, grpc.StatusCode.FAILED_PRECONDITION),
    (InUse, grpc.StatusCode.FAILED_PRECONDITION),
    (MissingFeature, grpc.StatusCode.FAILED_PRECONDITION),
    (StoreError, grpc.StatusCode.UNAVAILABLE),
)


def code_of(error: FlatmountError) -> grpc.StatusCode:
    """The status code that containerd turns back into the error it knows."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


class Service:
    """Answers calls. `healthy` is what the health service says."""

    def __init__(self, snapshots: Snapshots, metrics: Metrics, deadline_s: float) -> None:
        self._snapshots = snapshots
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._running: set[asyncio.Future[Any]] = set()
        self.healthy = True

    def handlers(self) -> Iterator[grpc.GenericRpcHandler]:
        """What a gRPC server is given."""
        calls = (
            ("Prepare", wire.CreateRequest, self._prepare),
            ("View", wire.CreateRequest, self._view),
            ("Commit", wire.CommitRequest, self._commit),
            ("Remove", wire.KeyRequest, self._remove),
            ("Stat", wire.KeyRequest, self._stat),
            ("Update", wire.UpdateRequest, self._update),
            ("Usage", wire.KeyRequest, self._usage),
            ("Cleanup", wire.CleanupRequest, self._cleanup),
        )
        methods = {
            name: grpc.unary_unary_rpc_method_handler(self._told(name, answer), request.FromString, _serialized)
            for name, request, answer in calls
        }
        # The call that containerd makes most is answered without a task of its own where nothing has to be waited for.
        methods["Mounts"] = grpc.unary_unary_rpc_method_handler(
            self._mounts_call, wire.KeyRequest.FromString, _serialized
        )
        methods["List"] = grpc.unary_stream_rpc_method_handler(self._list, wire.ListRequest.FromString, _serialized)
        yield grpc.method_handlers_generic_handler(SERVICE, methods)
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, wire.HealthRequest.FromString, _serialized),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, wire.HealthRequest.FromString, _serialized),
        }
        yield grpc.method_handlers_generic_handler(HEALTH, health)

    async def finish(self, grace_s: float) -> None:
        """Wait for what calls began, but not longer than `grace_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)

    # Calls.

    async def _prepare(self, request: wire.CreateRequest) -> wire.MountsResponse:
        mount = await self._snapshots.create(Kind.ACTIVE, request.key, request.parent, dict(request.labels))
        return _mounts(mount)

    async def _view(self, request: wire.CreateRequest) -> wire.MountsResponse:
        return _mounts(await self._snapshots.create(Kind.VIEW, request.key, request.parent, dict(request.labels)))

    async def _mounts_call(self, request: wire.KeyRequest, context: Context) -> wire.MountsResponse:
        begun = time.perf_counter()
        ready = self._snapshots.mounts_at_once(request.key)
        if ready is None:
            return await self._bounded("Mounts", self._mounts(request), request, context)
        self._ended("Mounts", request, grpc.StatusCode.OK, begun)
        return _mounts(ready)

    async def _mounts(self, request: wire.KeyRequest) -> wire.MountsResponse:
        return _mounts(await self._snapshots.mounts(request.key))

    async def _commit(self, request: wire.CommitRequest) -> wire.Empty:
        await self._snapshots.commit(request.name, request.key, request.parent, dict(request.labels))
        return wire.Empty()

    async def _remove(self, request: wire.KeyRequest) -> wire.Empty:
        await self._snapshots.remove(request.key)
        return wire.Empty()

    async def _stat(self, request: wire.KeyRequest) -> wire.InfoResponse:
        return wire.InfoResponse(info=_info(await self._snapshots.stat(request.key)))

    async def _update(self, request: wire.UpdateRequest) -> wire.InfoResponse:
        paths = tuple(request.update_mask.paths)
        info = await self._snapshots.update(request.info.name, dict(request.info.labels), paths)
        return wire.InfoResponse(info=_info(info))

    async def _usage(self, request: wire.KeyRequest) -> wire.UsageResponse:
        usage = await self._snapshots.usage(request.key)
        return wire.UsageResponse(size=usage.size_bytes, inodes=usage.inodes)

    async def _cleanup(self, request: wire.CleanupRequest) -> wire.Empty:
        await self._snapshots.cleanup()
        return wire.Empty()

    async def _list(self, request: wire.ListRequest, context: Context) -> AsyncIterator[wire.ListResponse]:
        async def found() -> list[Info]:
            return await self._snapshots.list(tuple(request.filters))

        infos = await self._bounded("List", found(), request, context)
        for at in range(0, len(infos), _LIST_BLOCK):
            yield wire.ListResponse(info=map(_info, infos[at : at + _LIST_BLOCK]))

    async def _check(self, request: wire.HealthRequest, context: Context) -> wire.HealthResponse:
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r} here")
        return self._health()

    async def _watch(self, request: wire.HealthRequest, context: Context) -> AsyncIterator[wire.HealthResponse]:
        if request.service not in ("", SERVICE):
            yield wire.HealthResponse(status=wire.HealthResponse.SERVICE_UNKNOWN)
            return
        told: bool | None = None
        while True:
            if told is not self.healthy:
                told = self.healthy
                yield self._health()
            await asyncio.sleep(1)

    def _health(self) -> wire.HealthResponse:
        status = wire.HealthResponse.SERVING if self.healthy else wire.HealthResponse.NOT_SERVING
        return wire.HealthResponse(status=status)

    # Within.

    def _told(self, name: str, answer: Callable[[Any], Awaitable[T]]) -> Callable[[Any, Context], Awaitable[T]]:
        async def call(request: Any, context: Context) -> T:
            return await self._bounded(name, answer(request), request, context)

        return call

    async def _bounded(self, name: str, work: Awaitable[T], request: Any, context: Context) -> T:
        """Wait for `work` until the deadline; it goes on behind our back when that passes. Errors become status."""
        begun = time.perf_counter()
        code = grpc.StatusCode.OK
        deadline_s = min(self._deadline_s, left) if (left := context.time_remaining()) is not None else self._deadline_s
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._forget)
        try:
            # Not wait_for(): that would cancel the work, or take a second task to shield it.
            done, _ = await asyncio.wait((task,), timeout=deadline_s)
            if done:
                return task.result()
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            told = f"{name} has taken {deadline_s:.1f} s; it goes on; see whether the store's disk answers"
        except FlatmountError as error:
            code, told = code_of(error), error.line()
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except OSError as error:
            # A disk that does not do what it is told is not the request's fault, and may do it later.
            code, told = grpc.StatusCode.UNAVAILABLE, from_os_error(error, name).line()
        except Exception as error:
            log.exception("a call failed", extra={"call": name})
            code, told = grpc.StatusCode.INTERNAL, f"{name}: {error!r}"
        finally:
            self._ended(name, request, code, begun)
        await context.abort(code, told)
        raise AssertionError("abort raises")

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # told to the client, if there still is one

    def _ended(self, name: str, request: Any, code: grpc.StatusCode, begun: float) -> None:
        seconds = time.perf_counter() - begun
        self._metrics.count(name, code.name, seconds)
        expected = code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS)
        level = logging.DEBUG if expected else logging.WARNING
        if log.isEnabledFor(level):
            extra = {"call": name, "key": getattr(request, "key", ""), "code": code.name, "ms": round(seconds * 1e3, 2)}
            log.log(level, "call", extra=extra)


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _mounts(mount: Mount) -> wire.MountsResponse:
    return wire.MountsResponse(mounts=[wire.Mount(type=mount.type, source=mount.source, options=mount.options)])


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
