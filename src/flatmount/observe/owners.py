"""Whose a mount is, told from where it is: engines, Kubernetes, temporary mounts of assemblies, ourselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum


class Owner(StrEnum):
    """Who made a mount and has to take it off."""

    KUBELET = "kubelet"
    CONTAINERD = "containerd"
    PODMAN = "podman or CRI-O"
    DOCKER = "docker"
    RUNC = "runc"
    FLATMOUNT = "flatmount"
    SYSTEM = "the system"


# Mounts that an assembly makes and removes again within milliseconds, by who makes them. Names: containerd's
# core/mount (id-mapped layers), containers/storage (drivers/overlay, `mapped`), runc's nsenter.
_TEMPORARY = (
    (re.compile(r"/ovl-idmapped\d+(?:/|$)"), Owner.CONTAINERD),
    (re.compile(r"/containers/storage/overlay/[^/]+/mapped(?:/|$)"), Owner.PODMAN),
    (re.compile(r"/runc\.[0-9A-Za-z]{6}$"), Owner.RUNC),
    (re.compile(r"/work/storm\.\d+-\d+/tmp/"), Owner.FLATMOUNT),
)
# containerd's WithTempMount (core/mount): while a layer is unpacked or compared, or its owners are changed.
_LAYER_WORK = re.compile(r".*?/containerd-mount\d+(?=/|$)")
_PLACES = (
    (re.compile(r"^/var/lib/kubelet(?:/|$)"), Owner.KUBELET),
    (
        re.compile(r"^(?:/run|/var/run|/var/lib)/(?:k3s/)?containerd(?:/|$)|/rancher/k3s/agent/containerd/"),
        Owner.CONTAINERD,
    ),
    (re.compile(r"^(?:/run|/var/lib)/containers(?:/|$)|/\.local/share/containers/"), Owner.PODMAN),
    (re.compile(r"^(?:/run|/var/lib)/docker(?:/|$)"), Owner.DOCKER),
    (re.compile(r"^(?:/run|/var/lib)/flatmount(?:/|$)"), Owner.FLATMOUNT),
)


def temporary_owner(mount_point: str) -> Owner | None:
    """Who makes mounts at such a place for the time of an assembly only; None for any other place."""
    return next((owner for pattern, owner in _TEMPORARY if pattern.search(mount_point)), None)


def layer_work(mount_point: str) -> str | None:
    """The directory at which containerd has a layer mounted to work on it, for seconds or minutes; None elsewhere."""
    match = _LAYER_WORK.match(mount_point)
    return match[0] if match else None


def owner_of(mount_point: str) -> Owner:
    """Whose a mount at this place is."""
    if (owner := temporary_owner(mount_point)) is not None:
        return owner
    if layer_work(mount_point) is not None:
        return Owner.CONTAINERD
    return next((owner for pattern, owner in _PLACES if pattern.search(mount_point)), Owner.SYSTEM)


def by_owner(mount_points: Iterable[str]) -> dict[Owner, int]:
    """How many of these mounts each owner has, most first."""
    return dict(Counter(map(owner_of, mount_points)).most_common())
