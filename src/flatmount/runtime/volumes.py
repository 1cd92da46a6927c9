"""Volumes: clones of the host's directories, their owners moved into the container's range by us.

Runtimes before 2023 cannot id-map a bind mount. So the clone is made and mapped here, and attached where the bundle
says that the volume's source is: in the container's own copy of the template, or in the host's table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flatmount.errors import OperationFailed
from flatmount.kernel.executor import run_once
from flatmount.kernel.namespaces import Namespace
from flatmount.plan.operations import (
    USER_NAMESPACE,
    MountAttribute,
    MountPlan,
    MountSetattr,
    MoveMount,
    OpenTree,
    Operation,
    Slot,
)
from flatmount.runtime.bundle import VOLUMES
from flatmount.runtime.request import Attachment, Volume

_TREE = Slot("volume")


def plan(volume: Volume, place: str | None) -> MountPlan:
    """Clone the volume's source with everything mounted below it, and attach that at `place`, or hand it over."""
    operations: list[Operation] = [OpenTree(_TREE, volume.source, recursive=True)]
    if volume.id_mapped or volume.read_only:
        attributes = MountAttribute.RDONLY if volume.read_only else MountAttribute.NONE
        userns = USER_NAMESPACE if volume.id_mapped else None
        operations.append(MountSetattr(_TREE, attributes, userns, recursive=True))
    if place is None:
        return MountPlan(tuple(operations), outputs=(_TREE,))
    return MountPlan((*operations, MoveMount(_TREE, place)))


@contextmanager
def prepared(
    volumes: Sequence[Volume], namespace: Namespace, bundle: str, attachment: Attachment
) -> Iterator[tuple[tuple[int, str], ...]]:
    """Make each volume's place in the bundle, and its clone: attached there in the host's table, or detached.

    Gives the detached clones with their places; they are closed afterwards. What is attached stays, also after an
    error: it goes with the bundle. Raises: OperationFailed, with a hint where a file system cannot be id-mapped.
    """
    detached: list[tuple[int, str]] = []
    try:
        for number, volume in enumerate(volumes):
            place = f"{bundle}/{VOLUMES}/{number}"
            # Whoever looks sees what the volume is: a file can only be attached on a file.
            if os.path.isdir(volume.source):
                os.mkdir(place, 0o711)
            else:
                os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            outputs = _clone(volume, namespace, place if attachment is Attachment.HOST else None)
            detached += ((fd, place) for fd in outputs)
        yield tuple(detached)
    finally:
        for fd, _ in detached:
            os.close(fd)


def _clone(volume: Volume, namespace: Namespace, place: str | None) -> tuple[int, ...]:
    try:
        return run_once(plan(volume, place), {USER_NAMESPACE: namespace.fileno()}).outputs
    except OperationFailed as failure:
        if volume.id_mapped and failure.operation == "mount_setattr":
            failure.hint = f"its file system may not take that: --volume {volume.source}:{volume.destination}:noidmap"
        raise
