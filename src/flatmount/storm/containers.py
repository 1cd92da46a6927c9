"""The containers of one burst: what each is to be like, how it is started, and the proof that it was."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from flatmount.errors import FlatmountError
from flatmount.kernel.start import check_start
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.rootfs import RangePool, assemble
from flatmount.rootfs.assembler import Assembler, Rootfs
from flatmount.store import Store, StoredImage
from flatmount.strategies import Attach

FIRST_HOST_ID = 1 << 20
RANGE_SIZE = 1 << 16
MOST_CONTAINERS = ((1 << 32) - 2 - FIRST_HOST_ID) // RANGE_SIZE

_AS_THEY_ARE = Mapping.single(0, (1 << 32) - 1)
_READ_BYTES = 65536
_WRITTEN = "/.flatmount-storm"


@dataclass(frozen=True, slots=True)
class ProbeFile:
    """A regular file of the image: what a container must see when it reads it."""

    path: str  # absolute inside
    uid: int
    gid: int
    content: bytes  # its first 64 KiB


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a burst: a range, a name, a target and a probe file of its own."""

    name: str
    mapping: Mapping
    target: str
    probe: ProbeFile


@contextmanager
def merged_tree(store: Store, image: StoredImage, facts: HostFacts) -> Iterator[str]:
    """A path to the image's files as a container sees them, with the owners that the image gives them.

    The flat tree; where there is none yet, an overlay of the layers that is attached nowhere.
    """
    ready = store.flat_tree(image)
    if ready is not None:
        yield os.path.join(store.data, ready)
        return
    pool = RangePool(store.data, facts)
    with (
        closing(pool),
        assemble(store, image, _AS_THEY_ARE, attach=Attach.NONE, read_only=True, pool=pool) as rootfs,
    ):
        yield f"/proc/self/fd/{rootfs.descriptor}"


def image_files(tree: str) -> tuple[list[str], int]:
    """Regular files of a merged tree, relative to it, in a fixed order; and how many entries it has in all."""
    files: list[str] = []
    entries = 1
    for directory, subdirectories, names in os.walk(tree):
        subdirectories.sort()
        entries += len(subdirectories) + len(names)
        for name in sorted(names):
            path = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                files.append(os.path.relpath(path, tree))
    return files, entries


def containers(
    count: int, tree: str, files: Sequence[str], roots: str, *, seed: str, prefix: str
) -> tuple[Container, ...]:
    """`count` containers with ranges of their own; the seed picks each one's probe file."""
    if not files:
        raise FlatmountError("the image has no regular file that a container could read", hint="name another image")
    chosen = random.Random(seed).choices(files, k=count)
    return tuple(
        Container(
            name=f"{prefix}-{i}",
            mapping=Mapping.single(FIRST_HOST_ID + i * RANGE_SIZE, RANGE_SIZE),
            target=f"{roots}/{prefix}-{i}",
            probe=_probe_file(tree, path),
        )
        for i, path in enumerate(chosen)
    )


def _probe_file(tree: str, path: str) -> ProbeFile:
    with open(os.path.join(tree, path), "rb") as file:
        owner = os.fstat(file.fileno())
        return ProbeFile("/" + path, owner.st_uid, owner.st_gid, file.read(_READ_BYTES))


def start(container: Container, assembler: Assembler, *, copies: int) -> Rootfs:
    """Assemble a container's root file system, enter it, read its probe file and write a file.

    Returns only for one that passed; a root file system that did not is undone. Raises: FlatmountError.
    """
    rootfs = assembler.assemble(container.mapping, container.name, container.target)
    try:
        _verify(container, rootfs, copies)
    except BaseException:
        rootfs.undo()
        raise
    return rootfs


def _verify(container: Container, rootfs: Rootfs, copies: int) -> None:
    expected = container.probe
    seen = check_start(
        rootfs.range.namespace,
        container.target,
        expected.path,
        _WRITTEN,
        most_bytes=len(expected.content) or 1,
        copies=copies,
    )
    if (seen.uid, seen.gid) != (expected.uid, expected.gid):
        raise FlatmountError(
            f"inside {container.target}, {expected.path} belongs to {seen.uid}:{seen.gid}, "
            f"in the image to {expected.uid}:{expected.gid}"
        )
    if seen.content != expected.content:
        raise FlatmountError(f"inside {container.target}, {expected.path} reads otherwise than in the image")
    if seen.written_uid != 0:
        raise FlatmountError(f"inside {container.target}, a file written by root belongs to {seen.written_uid}")
