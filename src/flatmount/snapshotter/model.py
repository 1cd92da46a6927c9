"""Snapshots as frozen values, and what can be wrong with a request for one.

They are tuples: a frozen dataclass takes four times as long to make, and every call makes some.
"""

from __future__ import annotations

from collections.abc import Mapping as Labels
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import NamedTuple

from flatmount.errors import FlatmountError
from flatmount.plan.mapping import Mapping

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"
REF_LABEL = "containerd.io/snapshot.ref"


class Kind(IntEnum):
    """What a snapshot is; the values are those of the wire format."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Form(Enum):
    """What containerd is given to mount for a snapshot that has a parent."""

    OVERLAY = "overlay"  # an overlay over one flat lower, through the range's shared id-mapped tree
    BIND = "bind"  # a bind of a root file system that is assembled already
    HELPER = "helper"  # a type for which containerd runs flatmount-assemble


class Info(NamedTuple):
    """What the service tells of one snapshot. Times are nanoseconds since 1970; `parent` is "" for none."""

    name: str
    parent: str
    kind: Kind
    created_ns: int
    updated_ns: int
    labels: Labels[str, str] = MappingProxyType({})


class Snapshot(NamedTuple):
    """One snapshot as the book knows it.

    `number` names its directory below `snapshots/`. `mapping` is the user range of the container it is for, and
    `host_ids` says that its own files are kept in that range's host ids. `remapped` marks one that containerd itself
    has chowned.
    """

    number: int
    info: Info
    mapping: Mapping | None
    form: Form
    host_ids: bool
    remapped: bool

    @property
    def fs(self) -> str:
        """The snapshot's own files, relative to the data directory."""
        return f"snapshots/{self.number}/fs"

    @property
    def unpacked(self) -> bool:
        """Whether it is a layer that is being unpacked, on a parent that may only be told at the commit."""
        return self.info.kind is Kind.ACTIVE and not self.info.parent and REF_LABEL in self.info.labels

    @property
    def nothing(self) -> str:
        """An empty directory: the lower of a layer whose parent is not known yet."""
        return f"snapshots/{self.number}/none"

    @property
    def work(self) -> str:
        """overlayfs's work directory beside them."""
        return f"snapshots/{self.number}/work"

    @property
    def flat(self) -> str:
        """The flat tree of the chain that ends here, once it has been made."""
        return f"snapshots/{self.number}/flat"


class Usage(NamedTuple):
    """What a snapshot itself takes on disk, without its parents. `size_bytes` counts blocks."""

    size_bytes: int
    inodes: int


class Mount(NamedTuple):
    """One mount for containerd to make; options as in fstab(5)."""

    type: str
    source: str
    options: tuple[str, ...]


class SnapshotError(FlatmountError):
    """A request that cannot be served. The subclass says which status code the client gets."""


class SnapshotNotFound(SnapshotError):
    """There is no snapshot of that name."""


class SnapshotExists(SnapshotError):
    """The name is taken, or the wanted content is there already."""


class InvalidRequest(SnapshotError):
    """The request itself is wrong."""


class Precondition(SnapshotError):
    """The snapshot is not in the state that the request needs."""
