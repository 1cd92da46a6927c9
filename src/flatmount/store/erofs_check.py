"""An EROFS image of the store held against its layers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flatmount.errors import OperationFailed
from flatmount.kernel.executor import run_once
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import Parameter
from flatmount.store.disk import Disk
from flatmount.store.image_file import digest_of
from flatmount.store.verify import Entries, flat_differences
from flatmount.strategies import pin_superblock

_NOWHERE = "/dev/null"  # an image's files are no links to a layer's: each is compared as a copy is


def erofs_differences(
    disk: Disk, path: str, digest: str, layers: Sequence[tuple[str, Entries]], *, content: bool
) -> Iterator[str]:
    """How the image at `path` differs from what was built, and from its layers, bottom to top with their entries.

    With `content`, the file is read and its digest compared; then, where the kernel mounts it from its file, every
    entry in it. Elsewhere its digest alone says that it is what was built.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=disk.data_fd)
    except FileNotFoundError:
        yield "it is missing"
        return
    try:
        if not content:
            return
        if digest_of(fd) != digest:
            yield "its content is not what was built"
            return
    finally:
        os.close(fd)
    with _mounted(disk, path) as root:
        if root is not None:
            yield from flat_differences(root, ".", [(_NOWHERE, entries) for _, entries in layers])


@contextmanager
def _mounted(disk: Disk, path: str) -> Iterator[int | None]:
    """A descriptor of the image's root, mounted nowhere, or None where that cannot be."""
    plan = pin_superblock(HostFacts(detached_layers=True))
    try:
        outcome = run_once(plan, parameters={Parameter.DATA: disk.data, Parameter.IMAGE: path})
    except OperationFailed:
        yield None
        return
    try:
        yield outcome.outputs[0]
    finally:
        os.close(outcome.outputs[0])
