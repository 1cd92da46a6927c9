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
# core/mount (temporary mounts, id-mapped layers), containers/storage (drivers/overlay, `mapped`), runc's nsenter.
_TEMPORARY = (
    (re.compile(r"/(?:ovl-idmapped|containerd-mount)\d+(?:/|$)"), Owner.CONTAINERD),
    (re.compile(r"/containers/storage/overlay/[^/]+/mapped(?:/|$)"), Owner.PODMAN),
    (re.compile(r"/runc\.[0-9A-Za-z]{6}$"), Owner.RUNC),
    (re.compile(r"/work/storm\.\d+-\d+/tmp/"), Owner.FLATMOUNT),
)
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


def owner_of(mount_point: str) -> Owner:
    """Whose a mount at this place is."""
    return temporary_owner(mount_point) or next(
        (owner for pattern, owner in _PLACES if pattern.search(mount_point)), Owner.SYSTEM
    )


def by_owner(mount_points: Iterable[str]) -> dict[Owner, int]:
    """How many of these mounts each owner has, most first."""
    return dict(Counter(map(owner_of, mount_points)).most_common())
