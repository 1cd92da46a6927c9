"""The operations of a mount plan: frozen data, named as the kernel names them.

A descriptor is a `Slot`, never a live number; a string that is only known when the plan runs is a `Parameter`, so that
one plan serves every container of an image. `LENT` slots are given by whoever runs the plan and stay theirs; all others
are closed when the run ends, but those a plan names as outputs.

Nothing here calls the kernel: `encode` turns a plan into what the executor takes, `explain` into what a person reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag


class Parameter(Enum):
    """A string that is given when the plan runs."""

    TARGET = "TARGET"  # where the root file system is attached; absolute, its last component not a symbolic link
    UPPERS = "UPPERS"  # the directory that holds the uppers of all containers; absolute
    UPPER = "UPPER"  # the container's name, and that of its own directory there, which holds `fs` and `work`
    SCRATCH = "SCRATCH"  # a path nobody else uses, beginning of the names of temporary mount points
    DATA = "DATA"  # the store's data directory, the parent of all layers
    RANGE = "RANGE"  # where a range's parent is to be attached, in a helper namespace
    LAYERS_AT = "LAYERS_AT"  # where LAYERS is attached, in a helper namespace
    UPPERS_AT = "UPPERS_AT"  # where UPPERS is attached, in a helper namespace
    IMAGE = "IMAGE"  # an EROFS image: a file, relative to the store's data directory, or a block device
    IMAGE_AT = "IMAGE_AT"  # where IMAGE_ROOT is attached, in a helper namespace
    SUPERBLOCK_AT = "SUPERBLOCK_AT"  # where SUPERBLOCK is attached, in a helper namespace


Text = str | tuple[str | Parameter, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a descriptor while a plan runs."""

    name: str

    def __str__(self) -> str:
        return self.name


USER_NAMESPACE = Slot("userns")  # the container's user namespace
LAYERS = Slot("layers")  # the store's data directory, id-mapped for this range, detached or in a helper namespace
UPPERS = Slot("uppers")  # a detached clone of the directory that holds all uppers
SUPERBLOCK = Slot("superblock")  # an EROFS image, mounted once for all ranges
IMAGE_ROOT = Slot("image-root")  # a clone of SUPERBLOCK that is id-mapped for this range
HELPER = Slot("helper-namespace")  # a mount namespace of our own with nothing in it but what a range pins
HOME = Slot("home-namespace")  # the mount namespace in which the root file system is attached

LENT = (USER_NAMESPACE, LAYERS, UPPERS, SUPERBLOCK, IMAGE_ROOT, HELPER, HOME)

ROOT = Slot("root")  # the assembled root file system, not attached: the output of a plan that does not attach


class MountAttribute(IntFlag):
    """Attributes of one mount, for `mount_setattr` and `fsmount` (MOUNT_ATTR_*)."""

    NONE = 0
    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4


class MountFlag(IntFlag):
    """Flags of `mount` (MS_*)."""

    NONE = 0
    RDONLY = 0x1
    NODEV = 0x4
    BIND = 0x1000
    REC = 0x4000
    PRIVATE = 0x40000


class UnmountFlag(IntFlag):
    """Flags of `umount2`."""

    NONE = 0
    DETACH = 0x2
    NOFOLLOW = 0x8


class RunIds(Enum):
    """Ids that are only known when the plan runs."""

    ROOT = "the host's ids of the image's root directory owner"


@dataclass(frozen=True, slots=True)
class Mkdir:
    path: Text
    mode: int = 0o700


@dataclass(frozen=True, slots=True)
class Rmdir:
    """Remove an empty directory; with `if_empty`, one that holds something stays without being an error."""

    path: Text
    if_empty: bool = False


@dataclass(frozen=True, slots=True)
class Chown:
    path: Text
    owner: tuple[int, int] | RunIds


@dataclass(frozen=True, slots=True)
class Utimes:
    path: Text
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ReadFile:
    """Read a small file and drop what it says, as engines do with the user database; it may be absent.

    `path` is looked up inside `root` and its links lead nowhere else; only a regular file is opened.
    """

    root: Text
    path: str


@dataclass(frozen=True, slots=True)
class Open:
    """Open a directory with O_PATH, relative to `at` or absolute."""

    out: Slot
    path: Text
    at: Slot | None = None


@dataclass(frozen=True, slots=True)
class OpenTree:
    """Clone the mount at a path, detached, with what is mounted below if `recursive`; `namespace_sem` for writing."""

    out: Slot
    path: Text
    at: Slot | None = None
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class MountSetattr:
    """Id-map a detached mount (`userns`), and set attributes; of all mounts in it if `recursive`."""

    tree: Slot
    attributes: MountAttribute = MountAttribute.NONE
    userns: Slot | None = None
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class MoveMount:
    """Attach a detached mount. A mount operation."""

    tree: Slot
    target: Text


@dataclass(frozen=True, slots=True)
class FsOpen:
    out: Slot
    fstype: str


@dataclass(frozen=True, slots=True)
class FsConfigFlag:
    context: Slot
    key: str


@dataclass(frozen=True, slots=True)
class FsConfigString:
    context: Slot
    key: str
    value: Text


@dataclass(frozen=True, slots=True)
class FsConfigFd:
    context: Slot
    key: str
    value: Slot


@dataclass(frozen=True, slots=True)
class FsConfigCreate:
    """Make the superblock: overlayfs clones and checks every lower here."""

    context: Slot


@dataclass(frozen=True, slots=True)
class FsMount:
    out: Slot
    context: Slot
    attributes: MountAttribute = MountAttribute.NONE


@dataclass(frozen=True, slots=True)
class Mount:
    """`mount(2)`: make and attach in one call. A mount operation."""

    source: Text
    target: Text
    fstype: str | None
    flags: MountFlag = MountFlag.NONE
    data: Text | None = None


@dataclass(frozen=True, slots=True)
class Unmount:
    """`umount2`. A mount operation, unless `expect_gone`: then it only makes sure that nothing is left."""

    target: Text
    flags: UnmountFlag = UnmountFlag.NONE
    expect_gone: bool = False


@dataclass(frozen=True, slots=True)
class Fchdir:
    """Make a directory the base of relative strings; on a task with a working directory of its own."""

    directory: Slot


@dataclass(frozen=True, slots=True)
class Chdir:
    path: Text


@dataclass(frozen=True, slots=True)
class Setns:
    """Enter a mount namespace; on a thread of the executor's own."""

    namespace: Slot


@dataclass(frozen=True, slots=True)
class AssumeIds:
    """Take the first host ids of the mapping's first ranges as file-system ids, keeping capabilities.

    These are the ids of the container's root where the ranges begin at its id 0. overlayfs keeps the credentials of
    its mounter and makes files with them; through an id-mapped upper the host's root has no id (EOVERFLOW), an id of
    the mapping has.
    """


@dataclass(frozen=True, slots=True)
class Close:
    slot: Slot


Operation = (
    Mkdir
    | Rmdir
    | Chown
    | Utimes
    | ReadFile
    | Open
    | OpenTree
    | MountSetattr
    | MoveMount
    | FsOpen
    | FsConfigFlag
    | FsConfigString
    | FsConfigFd
    | FsConfigCreate
    | FsMount
    | Mount
    | Unmount
    | Fchdir
    | Chdir
    | Setns
    | AssumeIds
    | Close
)


def is_mount_operation(operation: Operation) -> bool:
    """Whether it attaches or detaches a mount in a mount namespace."""
    if isinstance(operation, Unmount):
        return not operation.expect_gone
    return isinstance(operation, MoveMount | Mount)


@dataclass(frozen=True, slots=True)
class MountPlan:
    """The kernel operations that build one root file system (or pin what a range shares), in order.

    `outputs` are slots whose descriptors the caller owns after success. A plan that keeps going reports its first
    failure and does the rest all the same: an undoing is one.
    """

    operations: tuple[Operation, ...]
    outputs: tuple[Slot, ...] = ()
    keep_going: bool = False

    @property
    def mount_operations(self) -> int:
        """How many operations attach or detach a mount in a mount namespace."""
        return sum(map(is_mount_operation, self.operations))
