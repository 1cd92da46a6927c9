"""Deleting what the book no longer knows: all that can go goes, and what cannot is told."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from flatmount.errors import from_os_error
from flatmount.kernel.tree import RemovedTree
from flatmount.store.disk import Disk
from flatmount.store.model import Removed


def take_away(disk: Disk, names: tuple[str, ...], images: tuple[str, ...], trees: Sequence[str]) -> Removed:
    """Delete `trees`, relative to the data directory, with the entries of those that are layers.

    One that something is mounted in stays, out of sight, with everything in and behind that mount; the others go.
    """
    gone, stuck = [RemovedTree(0, 0)], []
    for tree in trees:
        kind, _, number = tree.partition("/")
        try:
            gone.append(disk.discard(tree))
            if kind == "layers":
                disk.drop_entries(int(number))
        except OSError as error:
            told = from_os_error(error, f"delete {tree}, now {disk.data}/trash/{kind}-{number}:").line()
            if error.errno in (errno.EXDEV, errno.EBUSY):
                told += "; unmount what is mounted in it, and the next command deletes it"
            stuck.append(told)
    return Removed(
        names=names,
        images=images,
        layers=sum(tree.startswith("layers/") for tree in trees),
        entries=sum(tree.entries for tree in gone),
        size_bytes=sum(tree.size_bytes for tree in gone),
        stuck=tuple(stuck),
    )
