"""Kubernetes' door, from its outside: a client that starts one pod with one container, as a kubelet does.

See: the public CRI, runtime.v1.RuntimeService and runtime.v1.ImageService.
"""

from __future__ import annotations

import time
from typing import Any

import grpc

from flatmount.errors import FlatmountError
from flatmount.plan.mapping import Mapping
from flatmount.snapshotter.wire import cri_pb2 as wire

_SERVICE = "runtime.v1.RuntimeService"
_IMAGES = "runtime.v1.ImageService"
_CALL_S = 60.0
_TOLD_S = 20.0


class Pods:
    """Calls on containerd's socket. A context manager; pods that it started are the caller's to remove."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")

    def __enter__(self) -> Pods:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def wait_for_image(self, image: str) -> None:
        """Wait until CRI knows an image that containerd has: it is told by an event. Raises: FlatmountError."""
        deadline = time.monotonic() + _TOLD_S
        request = wire.ImageStatusRequest(image=wire.ImageSpec(image=image))
        while not self._call("ImageStatus", request, wire.ImageStatusResponse, service=_IMAGES).HasField("image"):
            if time.monotonic() > deadline:
                raise FlatmountError(f"CRI does not know of {image}", hint="see containerd's log")
            time.sleep(0.05)

    def run(
        self, name: str, *, mapping: Mapping | None = None, own_network: bool = False
    ) -> tuple[str, wire.PodSandboxConfig]:
        """Start a pod in the engine's network, or in one of its own, as every pod in a user namespace is.

        Returns its id, and its configuration for `start`. Raises: FlatmountError with the engine's word.
        """
        config = wire.PodSandboxConfig(
            metadata=wire.PodSandboxMetadata(name=name, uid=name, namespace="flatmount"),
            linux=wire.LinuxPodSandboxConfig(
                cgroup_parent=f"/flatmount/{name}",
                security_context=wire.LinuxSandboxSecurityContext(namespace_options=_options(mapping, own_network)),
            ),
        )
        return self._call("RunPodSandbox", wire.RunPodSandboxRequest(config=config), wire.Id).id, config

    def start(self, pod: str, config: wire.PodSandboxConfig, image: str) -> str:
        """Start a container of `image` in a pod. Returns its id. Raises: FlatmountError."""
        options = config.linux.security_context.namespace_options
        container = wire.ContainerConfig(
            metadata=wire.ContainerMetadata(name="container"),
            image=wire.ImageSpec(image=image),
            linux=wire.LinuxContainerConfig(
                security_context=wire.LinuxContainerSecurityContext(namespace_options=options)
            ),
        )
        request = wire.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
        made: str = self._call("CreateContainer", request, wire.Id).id
        self._call("StartContainer", wire.Id(id=made), wire.Nothing)
        return made

    def remove(self, pod: str) -> None:
        """Stop a pod and remove it with its containers. Raises: FlatmountError."""
        self._call("StopPodSandbox", wire.Id(id=pod), wire.Nothing)
        self._call("RemovePodSandbox", wire.Id(id=pod), wire.Nothing)

    def _call(self, method: str, request: Any, answer: Any, *, service: str = _SERVICE) -> Any:
        call = self._channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        try:
            return call(request, timeout=_CALL_S)
        except grpc.RpcError as error:
            raise FlatmountError(f"{method}: {error.details()}", hint="see containerd's log") from None


def _options(mapping: Mapping | None, own_network: bool) -> wire.NamespaceOption:
    # The engine's network takes no plugin, but a user namespace cannot have it.
    network = wire.NODE if mapping is None and not own_network else wire.POD
    options = wire.NamespaceOption(network=network, pid=wire.CONTAINER, ipc=wire.POD)
    if mapping is not None:
        options.userns_options.CopyFrom(
            wire.UserNamespace(
                mode=wire.POD,
                uids=[wire.IDMapping(host_id=r.host, container_id=r.container, length=r.size) for r in mapping.uids],
                gids=[wire.IDMapping(host_id=r.host, container_id=r.container, length=r.size) for r in mapping.gids],
            )
        )
    return options
