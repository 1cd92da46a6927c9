"""What is left on a node and by whom, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flatmount.observe.owners import Owner


class Kind(StrEnum):
    """Why something counts as left."""

    TEMPORARY = "temporary"  # of an assembly that is long over
    LAYER_WORK = "layer work"  # of containerd, for longer than it works on a layer; not ours to take off
    UNFINISHED = "unfinished"  # in a work directory of ours whose process is gone
    NAMESPACE = "namespace"  # a mount namespace that nobody is in


@dataclass(frozen=True, slots=True)
class Holder:
    """What keeps a leak alive: a process by its mount namespace or by a descriptor, or a mount on a file."""

    how: str
    pid: int | None
    name: str
    namespace: int | None
    processes: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The same mount in another mount namespace: the namespace's inode, a process in it, and mountinfo's id there."""

    namespace: int
    pid: int
    id: int


@dataclass(frozen=True, slots=True)
class Leak:
    """One mount (or namespace) that is left. `here` says whether it is in the table that was looked at first.

    `id` is the mount's unique id, or mountinfo's where the kernel has none; the inode for a namespace. `shared` says
    that the mount is in a peer group: copies of it in other namespaces go when it goes. `copies` are those that were in
    the same other namespace at both looks.
    """

    kind: Kind
    owner: Owner
    id: int
    where: str
    device: str
    root: str
    here: bool
    shared: bool
    holders: tuple[Holder, ...]
    copies: tuple[Copy, ...] = ()

    @property
    def removable(self) -> int:
        """In how many mount tables `clean` would take it off."""
        return self.here + len(self.copies) if self.kind in (Kind.TEMPORARY, Kind.UNFINISHED) else 0


@dataclass(frozen=True, slots=True)
class Found:
    """All that is left, and what could not be looked at, in words."""

    leaks: tuple[Leak, ...]
    unseen: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of one leak in one table: taken off, or why not ("" when it was, or had gone by itself).

    `namespace` is the inode of the other mount namespace where that was; None for the table that was looked at first.
    """

    leak: Leak
    refused: str
    namespace: int | None = None
