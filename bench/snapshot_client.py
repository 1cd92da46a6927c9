"""A client of a snapshot service, in a process of its own: SOCKET IN_FLIGHT CYCLES PARENT SNAPSHOTTER MAPPED.

One cycle is Prepare, Mounts and Remove, as containerd calls them for a container. Prints one JSON object. With SERVE as
the only word behind the socket it is the floor instead: a service on the same library that does nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from typing import Any

import grpc

from flatmount.snapshotter.wire import snapshots_pb2 as wire

_SERVICE = "containerd.services.snapshots.v1.Snapshots"
_METHODS = (
    ("Prepare", wire.CreateRequest, wire.MountsResponse),
    ("Mounts", wire.KeyRequest, wire.MountsResponse),
    ("Remove", wire.KeyRequest, wire.Empty),
)


async def _serve(socket: str) -> None:
    server = grpc.aio.server()
    mounts = wire.MountsResponse(mounts=[wire.Mount(type="bind", source="/", options=("rw", "rbind"))])
    answers = {"Prepare": mounts, "Mounts": mounts, "Remove": wire.Empty()}

    def handler(name: str, request: Any) -> Any:
        async def call(_: Any, __: Any) -> Any:
            return answers[name]

        return grpc.unary_unary_rpc_method_handler(call, request.FromString, lambda m: m.SerializeToString())

    handlers = {name: handler(name, request) for name, request, _ in _METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await server.wait_for_termination()


async def _call(
    socket: str, in_flight: int, cycles: int, parent: str, snapshotter: str, mapped: bool
) -> dict[str, Any]:
    took: list[float] = []
    each: list[list[float]] = [[], [], []]
    numbers = iter(range(cycles))
    metadata = (("containerd-namespace", "default"),)
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        prepare, mounts, remove = (
            channel.unary_unary(f"/{_SERVICE}/{name}", request.SerializeToString, answer.FromString)
            for name, request, answer in _METHODS
        )

        async def worker() -> None:
            for number in numbers:
                key = f"bench-{os.getpid()}-{number}"
                mapping = f"0:{1 << 20}:65536"
                labels = {f"containerd.io/snapshot/{kind}mapping": mapping for kind in ("uid", "gid")} if mapped else {}
                labels["containerd.io/gc.root"] = "bench"  # containerd would collect it while we use it
                create = wire.CreateRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
                of_key = wire.KeyRequest(snapshotter=snapshotter, key=key)
                times = [time.perf_counter()]
                for call, request in ((prepare, create), (mounts, of_key), (remove, of_key)):
                    await call(request, metadata=metadata)
                    times.append(time.perf_counter())
                took.append(times[-1] - times[0])
                for which, (begun, ended) in enumerate(itertools.pairwise(times)):
                    each[which].append(ended - begun)

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        seconds = time.perf_counter() - begun
    return {
        "calls_per_second": 3 * cycles / seconds,
        "p50_ms": _share(took, 0.5),
        "p99_ms": _share(took, 0.99),
        "each_p50_ms": [_share(values, 0.5) for values in each],
        "each_p99_ms": [_share(values, 0.99) for values in each],
    }


def _share(values: list[float], share: float) -> float:
    return sorted(values)[int((len(values) - 1) * share)] * 1e3


def main() -> None:
    """Serve, or call and print."""
    socket, *words = sys.argv[1:]
    if words == ["SERVE"]:
        asyncio.run(_serve(socket))
        return
    in_flight, cycles, parent, snapshotter, mapped = words
    print(json.dumps(asyncio.run(_call(socket, int(in_flight), int(cycles), parent, snapshotter, mapped == "mapped"))))


if __name__ == "__main__":
    main()
