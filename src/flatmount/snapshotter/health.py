"""Asking a snapshot service whether it serves."""

from __future__ import annotations

import grpc

from flatmount.snapshotter.wire import snapshots_pb2 as wire


def answers(socket: str, *, timeout_s: float = 3.0) -> bool:
    """Whether the service at `socket` says that it is serving."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check", wire.HealthRequest.SerializeToString, wire.HealthResponse.FromString
        )
        try:
            status = check(wire.HealthRequest(), timeout=timeout_s).status
        except grpc.RpcError:
            return False
    return bool(status == wire.HealthResponse.SERVING)
