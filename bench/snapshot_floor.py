"""The floor under a snapshot service on grpcio: one that answers and does nothing. SOCKET; runs until it is killed."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

from flatmount.snapshotter.wire import snapshots_pb2 as wire

_SERVICE = "containerd.services.snapshots.v1.Snapshots"


async def _serve(socket: str) -> None:
    server = grpc.aio.server()
    mounts = wire.MountsResponse(mounts=[wire.Mount(type="bind", source="/", options=("rw", "rbind"))])
    methods = {
        "Prepare": (wire.CreateRequest, mounts),
        "Mounts": (wire.KeyRequest, mounts),
        "Remove": (wire.KeyRequest, wire.Empty()),
    }

    def handler(request: Any, answer: Any) -> Any:
        async def call(_: Any, __: Any) -> Any:
            return answer

        return grpc.unary_unary_rpc_method_handler(call, request.FromString, lambda m: m.SerializeToString())

    handlers = {name: handler(request, answer) for name, (request, answer) in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
