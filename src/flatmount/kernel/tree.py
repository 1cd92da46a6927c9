"""Work on whole directory trees, natively and without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatmount.kernel import _native
from flatmount.plan.mapping import Mapping


@dataclass(frozen=True, slots=True)
class Flattened:
    """What a flat tree consists of.

    `copies` are files whose inode already had all the links its file system allows.
    """

    directories: int
    links: int
    copies: int


@dataclass(frozen=True, slots=True)
class RemovedTree:
    """What went away. `size_bytes` counts the blocks of files that had no other name."""

    entries: int
    size_bytes: int


def flatten(root_fd: int, sources: Sequence[str], target: str, *, root_source: int | None = None) -> Flattened:
    """Merge layers into the new directory `target`: hard links for all but directories, whiteouts resolved.

    `sources` and `target` are relative to the borrowed descriptor `root_fd`, the sources topmost first, in
    overlayfs's form (char 0:0 hides a name, trusted.overlay.opaque a directory's lower content). A flat tree
    serves as a source. Directories get the topmost attributes; the new root those of `sources[root_source]`,
    else mode 0755, owner 0 and time 0. Nothing is synced. What a failure leaves at `target` is the caller's
    to remove.

    Errors: OSError with the path from the target; EXDEV, when the sources are on another file system than the
    target or hold a mount; ENAMETOOLONG, past 256 levels; EEXIST, when the target exists.
    Kernel: openat2 (5.6); CAP_SYS_ADMIN to read trusted.* attributes, CAP_FOWNER to link files of others.
    See: https://docs.kernel.org/filesystems/overlayfs.html
    """
    return Flattened(*_native.flatten(root_fd, sources, target, -1 if root_source is None else root_source))


def remove_tree(parent_fd: int, name: str) -> RemovedTree:
    """Remove `name` below the borrowed descriptor `parent_fd`, with everything in it.

    No link is followed and no mount is entered: a mount stops it with EXDEV or EBUSY, its content untouched;
    what was read before is gone by then, so rename a tree away first. Trees deeper than any path are removed
    too.

    Errors: OSError with the path from `name`; ENOENT, when there is none.
    Kernel: openat2 (5.6).
    """
    return RemovedTree(*_native.remove_tree(parent_fd, name))


def copy_tree(from_fd: int, to_fd: int, mapping: Mapping) -> int:
    """Copy the content of one directory into another, empty one, owners moved from container ids to host ids.

    Both descriptors are borrowed. Modes, times, attributes, holes and hard links are kept; owners in POSIX
    ACLs move as well, and file capabilities become those of the mapping's root (version 3). Blocks are shared
    where the file system can (FICLONE). Returns the number of entries. Nothing is synced.

    Errors: OSError with the path; EOVERFLOW, where the mapping has no host id for an owner.
    Kernel: openat2 (5.6); CAP_CHOWN, CAP_MKNOD, CAP_SETFCAP.
    """
    uids = [(r.container, r.host, r.size) for r in mapping.uids]
    gids = [(r.container, r.host, r.size) for r in mapping.gids]
    return _native.copy_tree(from_fd, to_fd, uids, gids)


def create_file(
    directory_fd: int, name: bytes, data: bytes | memoryview, *, owner: tuple[int, int], mode: int, mtime_ns: int
) -> None:
    """Make the file `name` in the borrowed directory `directory_fd`, with content, owner, mode and time, in one go.

    `name` is one component, and nothing by that name may exist. `owner` is uid and gid; the time of access becomes
    that of modification. Nothing is synced, and a failure leaves what is there by then.

    Errors: OSError; EEXIST, when there is such a name; EINVAL for a name of more than one component, "." and "..".
    Kernel: CAP_CHOWN for another owner than the caller; CAP_FSETID for its setuid and setgid bits.
    """
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    _native.create_file(directory_fd, name, data, *owner, mode, seconds, nanoseconds)


def sync_filesystem(fd: int) -> None:
    """Write all of the file system that the borrowed descriptor is on to disk, and wait: syncfs(2)."""
    _native.sync_filesystem(fd)


def make_uppers(data_fd: int, uppers: list[tuple[int, bool, bool, bool, int, int, int]]) -> list[int]:
    """Make the directories of new snapshots below the borrowed descriptor `data_fd`, all in one go.

    Each is (number, made, work, none, mode, uid, gid): snapshots/NUMBER/fs with that mode and owner, and beside it
    `work` and `none`; one that is `made` has the first two already, with mode 0755 and owner 0. Returns an errno (0 for
    none) for each; what a failure leaves is the caller's to remove.
    """
    return _native.make_uppers(data_fd, uppers)
