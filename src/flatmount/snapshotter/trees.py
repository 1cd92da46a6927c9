"""The snapshots' directories below the store's data directory.

    snapshots/N/fs      the snapshot's own files; overlayfs's upper while it is active
    snapshots/N/work    overlayfs's work directory, of active ones
    snapshots/N/none    an empty lower, of layers that are unpacked before their parent is known
    snapshots/N/flat    the flat tree of the chain that ends in N: there and durable, or not there
    snapshots/N/flat.new    one that is being made

What the book does not know is nobody's: it is moved to the store's trash and deleted from there.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from flatmount.errors import FlatmountError, StoreError, from_os_error
from flatmount.kernel.tree import copy_tree, flatten, make_uppers, remove_tree, sync_filesystem
from flatmount.plan.mapping import IdRange, Mapping
from flatmount.snapshotter.model import Kind, Snapshot, Usage
from flatmount.store.disk import Disk

# Mode and owner of a root directory that nobody said anything of.
_PLAIN = (0o755, 0, 0)
_MOST_ROOTS = 4096
# On the directory of all snapshots: `lost`, for the next process.
_LOST = "trusted.flatmount.lost"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Upper:
    """The directories of one fresh snapshot.

    `parent` lends its root's mode and owner, which `owners` moves to host ids. `made` says that they were made
    ahead (flatmount.snapshotter.ahead); `work` and `none` say which there are beside the snapshot's files.
    """

    number: int
    name: str
    parent: int | None
    owners: Mapping | None
    made: bool
    work: bool
    none: bool

    @classmethod
    def of(cls, snapshot: Snapshot, parent: int | None, *, made: bool = False) -> Upper:
        """Those of a snapshot on `parent`."""
        owners = snapshot.mapping if snapshot.host_ids else None
        work = snapshot.info.kind is Kind.ACTIVE
        return cls(snapshot.number, snapshot.info.name, parent, owners, made, work, snapshot.unpacked)


class Trees:
    """The directories of one store's snapshots. Borrows `disk`; its methods may be called from any thread.

    `highest` is the highest number of what there has been, also of directories made ahead. `lost` is what that was when
    a write to the disk failed, or 0: what was written until then into snapshots up to that number may be lost, and the
    kernel tells of it once only. It outlives the process, where the disk still takes an attribute.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._fd = disk.data_fd
        self._roots: dict[int, tuple[int, int, int]] = {}
        self.highest = 0
        self._noting = threading.Lock()
        self._failures = 0
        self._syncing = threading.Lock()
        self.lost = self._known_lost()
        self.stopping = False

    def note(self, number: int) -> None:
        """Something is about to be written for `number`."""
        with self._noting:
            self.highest = max(self.highest, number)

    def make(self, uppers: Sequence[Upper]) -> list[FlatmountError | None]:
        """Make the directories of fresh snapshots; each root takes mode and owner from its parent's root.

        Returns what went wrong with each: MappingError, when the root's owner has no host id; StoreError. What is there
        of such a one goes with a later cleanup.
        """
        found: list[FlatmountError | None] = [None] * len(uppers)
        entries = []
        for place, upper in enumerate(uppers):
            self.note(upper.number)
            try:
                mode, uid, gid = self._root_of(upper)
            except OSError as error:
                found[place] = _told(error, f"make the directories of snapshot {upper.name!r}")
            except FlatmountError as error:
                found[place] = error
            else:
                entries.append((place, (upper.number, upper.made, upper.work, upper.none, mode, uid, gid)))
        for (place, entry), number in zip(entries, make_uppers(self._fd, [e for _, e in entries]), strict=True):
            if number == errno.EEXIST and not uppers[place].made:
                # Left by the committer, whose rows were refused: no number is given twice.
                try:
                    self._hide(f"snapshots/{uppers[place].number}")
                    (number,) = make_uppers(self._fd, [entry])
                except StoreError as error:
                    found[place] = error
                    continue
            if number:
                found[place] = _told(
                    OSError(number, os.strerror(number)), f"make the directories of snapshot {uppers[place].name!r}"
                )
        return found

    def entries(self, uppers: Sequence[Upper]) -> list[tuple[int, bool, bool, bool, int, int, int]] | None:
        """What `make_uppers` takes for fresh snapshots, without a look at the disk; None where that takes one.

        Who makes them without `make` takes this for made.
        """
        found = []
        for upper in uppers:
            if upper.parent is not None and upper.parent not in self._roots:
                return None
            try:
                mode, uid, gid = self._root_of(upper)
            except FlatmountError:
                return None
            found.append((upper.number, upper.made, upper.work, upper.none, mode, uid, gid))
            self.note(upper.number)
        return found

    def _root_of(self, upper: Upper) -> tuple[int, int, int]:
        """Mode and owner of a fresh snapshot's root. What is committed keeps those of its own."""
        found = _PLAIN
        if upper.parent is not None:
            known = self._roots.get(upper.parent)
            if known is None:
                known = self._root_at(f"snapshots/{upper.parent}/fs")
                if len(self._roots) >= _MOST_ROOTS:
                    self._roots.clear()
                self._roots[upper.parent] = known
            found = known
        mode, uid, gid = found
        if upper.owners is not None:
            uid, gid = upper.owners.host_uid(uid), upper.owners.host_gid(gid)
        return mode, uid, gid

    def repair(self, snapshot: Snapshot, parent: int | None) -> bool:
        """Make a snapshot's directories again as far as a power cut took them. Returns whether it had to.

        A root that was made ahead may have lost the mode and the owner that it was given later: one that no container
        has had mounted, or written to, gets them again. Raises: StoreError, for files that nobody can make again.
        """
        if not self._exists(snapshot.fs):
            if snapshot.info.kind is Kind.COMMITTED:
                raise StoreError(
                    f"snapshot {snapshot.info.name!r} has lost its files ({self._disk.data}/{snapshot.fs})",
                    hint="remove the image in containerd and pull it again",
                )
            self._hide(f"snapshots/{snapshot.number}")
            (error,) = self.make([Upper.of(snapshot, parent)])
            if error is not None:
                raise error
            return True
        if snapshot.info.kind is not Kind.ACTIVE:
            return False
        repaired = False
        try:
            for path, mode, needed in ((snapshot.work, 0o711, True), (snapshot.nothing, 0o755, snapshot.unpacked)):
                if needed and not self._exists(path):
                    os.mkdir(path, mode, dir_fd=self._fd)
                    repaired = True
            if self._is_empty(snapshot.fs) and self._is_empty(snapshot.work):
                wanted, found = self._root_of(Upper.of(snapshot, parent)), self._root_at(snapshot.fs)
                if found != wanted and (found[0] == _PLAIN[0] or found[1:] == _PLAIN[1:]):
                    os.chown(snapshot.fs, wanted[1], wanted[2], dir_fd=self._fd, follow_symlinks=False)
                    os.chmod(snapshot.fs, wanted[0], dir_fd=self._fd)
                    repaired = True
        except OSError as error:
            raise _told(error, f"repair snapshot {snapshot.info.name!r}") from error
        return repaired

    def _make_top(self, number: int) -> None:
        # It is not there: no number is given twice, and `start` has taken away what the book does not know.
        self.note(number)
        os.mkdir(f"snapshots/{number}", 0o700, dir_fd=self._fd)

    def rebase(self, snapshot: Snapshot, parent: int | None) -> None:
        """Make a layer that was unpacked without a parent fit for the one it gets, or for none.

        A root directory that the layer said nothing of takes mode and owner from the parent's; without a parent there
        is nothing that whiteouts could hide. Raises: StoreError.
        """
        try:
            if parent is None:
                self._drop_whiteouts(snapshot.fs)
                return
            mode, uid, gid = self._root_at(f"snapshots/{parent}/fs")
            if self._root_at(snapshot.fs) == _PLAIN:
                os.chown(snapshot.fs, uid, gid, dir_fd=self._fd, follow_symlinks=False)
                os.chmod(snapshot.fs, mode, dir_fd=self._fd)
        except OSError as error:
            raise _told(error, f"rebase snapshot {snapshot.info.name!r}") from error

    def _drop_whiteouts(self, path: str) -> None:
        pending = [f"/proc/self/fd/{self._fd}/{path}"]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                            os.unlink(entry.path)

    def _root_at(self, path: str) -> tuple[int, int, int]:
        root = os.stat(path, dir_fd=self._fd, follow_symlinks=False)
        return stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid

    def _is_empty(self, path: str) -> bool:
        with os.scandir(f"/proc/self/fd/{self._fd}/{path}") as entries:
            return next(entries, None) is None

    def _exists(self, path: str) -> bool:
        try:
            os.stat(path, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def flats(self, numbers: Iterable[int]) -> set[int]:
        """Which of the snapshots have a flat tree. Takes away those that were not finished."""
        found = set()
        for number in numbers:
            if self._exists(f"snapshots/{number}/flat"):
                found.add(number)
            if self._exists(f"snapshots/{number}/flat.new"):
                self._hide(f"snapshots/{number}/flat.new")
        return found

    def flatten(self, number: int, sources: tuple[str, ...]) -> None:
        """Make the flat tree of a chain from its layers, or from a flat tree lower in it, topmost first.

        It is on disk before it has its name. Raises: StoreError, with nothing left behind.
        """
        new, place = f"snapshots/{number}/flat.new", f"snapshots/{number}/flat"
        failures = self._failures
        try:
            flatten(self._fd, sources, new, root_source=0)
            self.sync()
            if self._failures != failures:
                raise StoreError(f"flatten {number}: a write to {self._disk.data} failed meanwhile")
            os.rename(new, place, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            self._sync_directory(f"snapshots/{number}")
        except (OSError, StoreError) as error:
            self._drop(f"snapshots/{number}", "flat.new")
            if isinstance(error, StoreError):
                raise
            raise _told(error, f"flatten {number}") from error

    def measure(self, path: str) -> Usage:
        """Blocks and inodes of a tree, files with several names once. Raises: StoreError."""
        size = count = 0
        seen: set[int] = set()
        base = f"/proc/self/fd/{self._fd}/{path}"
        try:
            pending = [base]
            status = os.stat(base, follow_symlinks=False)
            size, count = status.st_blocks * 512, 1
            while pending:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if stat.S_ISDIR(status.st_mode):
                            pending.append(entry.path)
                        elif status.st_nlink > 1:
                            if status.st_ino in seen:
                                continue
                            seen.add(status.st_ino)
                        size += status.st_blocks * 512
                        count += 1
        except FileNotFoundError:
            if not count:
                raise StoreError(f"{self._disk.data}/{path} is not there", hint="restart the snapshotter") from None
        except OSError as error:
            raise _told(error, "measure a snapshot") from error
        return Usage(size, count)

    def copy_to_container_ids(self, snapshot: Snapshot, number: int) -> None:
        """Copy an upper that holds host ids to snapshots/`number`/fs, with the container's ids: what a commit enters.

        Raises: StoreError, where a file belongs to nobody in the mapping; nothing is left then.
        """
        assert snapshot.mapping is not None
        inverse = inverted(snapshot.mapping)
        top = f"snapshots/{number}"
        try:
            self._make_top(number)
            root = os.stat(snapshot.fs, dir_fd=self._fd, follow_symlinks=False)
            os.mkdir(f"{top}/fs", 0o755, dir_fd=self._fd)
            owner = inverse.host_uid(root.st_uid), inverse.host_gid(root.st_gid)
            os.chown(f"{top}/fs", *owner, dir_fd=self._fd, follow_symlinks=False)
            os.chmod(f"{top}/fs", stat.S_IMODE(root.st_mode), dir_fd=self._fd)
            source = os.open(snapshot.fs, _DIRECTORY, dir_fd=self._fd)
            try:
                target = os.open(f"{top}/fs", _DIRECTORY, dir_fd=self._fd)
                try:
                    copy_tree(source, target, inverse)
                finally:
                    os.close(target)
            finally:
                os.close(source)
        except OSError as error:
            with suppress(OSError):
                self._disk.discard(top)
            raise _told(error, f"commit snapshot {snapshot.info.name!r} in its container's ids") from error

    def sync(self) -> None:
        """Everything written so far is on disk when this returns: syncfs(2). Raises: StoreError, once for a failure.

        Who did not get the error must look at `lost`: one open file stands for all, and is told once.
        """
        # One at a time: nobody is told that all is well before whoever was told otherwise has noted it.
        with self._syncing:
            try:
                sync_filesystem(self._fd)
            except OSError as error:
                self.lost = self.highest
                self._failures += 1
                self._remember_lost()
                raise _told(error, f"write {self._disk.data} to disk") from error

    def _known_lost(self) -> int:
        try:
            return int(os.getxattr(f"{self._disk.data}/snapshots", _LOST, follow_symlinks=False))
        except (OSError, ValueError):
            return 0

    def _remember_lost(self) -> None:
        # On a disk that fails this may fail too, and then it is forgotten with the process.
        with suppress(OSError):
            os.setxattr(f"{self._disk.data}/snapshots", _LOST, b"%d" % self.lost, follow_symlinks=False)

    def hide_unknown(self, known: Container[int], last: int, busy: Callable[[int], bool]) -> int:
        """Move every snapshot that is neither `known` nor `busy` out of sight, but for those after the number `last`.

        Returns how many.
        """
        hidden = 0
        for name in os.listdir(f"{self._disk.data}/snapshots"):
            number = int(name) if name.isdigit() else None
            if number is not None and (number > last or number in known or busy(number)):
                continue
            self._hide(f"snapshots/{name}")
            hidden += 1
        return hidden

    def discard(self, number: int) -> None:
        """Delete the directories of a number that no snapshot has. What cannot go now goes with a later cleanup."""
        with suppress(OSError, StoreError):
            self._disk.discard(f"snapshots/{number}")

    def empty_trash(self) -> list[str]:
        """Delete what is out of sight. Returns what could not be: a mount in it, for one, is never gone through.

        Ends early when the service is `stopping`; the next cleanup goes on.
        """
        left = []
        trash = os.open("trash", _DIRECTORY, dir_fd=self._fd)
        try:
            for name in os.listdir(trash):
                if self.stopping:
                    break
                try:
                    remove_tree(trash, name)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    left.append(f"{self._disk.data}/trash/{name}: {error.strerror}")
        finally:
            os.close(trash)
        return left

    def _hide(self, path: str) -> None:
        # No directory is made for it: a full disk has no room for one.
        name = path.replace("/", "-")
        for attempt in range(1000):
            try:
                os.rename(path, f"trash/{name}.{attempt}", src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
                    continue
                raise _told(error, "move what no snapshot owns away") from error
            return
        raise StoreError(f"{self._disk.data}/trash is full of {name}", hint="see what keeps them from being deleted")

    def _drop(self, parent: str, name: str) -> None:
        with suppress(OSError):
            fd = os.open(parent, _DIRECTORY, dir_fd=self._fd)
            try:
                remove_tree(fd, name)
            finally:
                os.close(fd)

    def _sync_directory(self, path: str) -> None:
        fd = os.open(path, _DIRECTORY, dir_fd=self._fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def inverted(mapping: Mapping) -> Mapping:
    """The mapping that leads from host ids back to the container's.

    The host's root, which makes overlayfs's whiteouts and what a runtime puts into a root file system, becomes the
    container's.
    """

    def turn(ranges: tuple[IdRange, ...]) -> tuple[IdRange, ...]:
        back = tuple(IdRange(r.host, r.container, r.size) for r in ranges)
        return back if any(r.container == 0 for r in back) else (IdRange(0, 0, 1), *back)

    return Mapping(turn(mapping.uids), turn(mapping.gids))


def _told(error: OSError, attempted: str) -> StoreError:
    told = from_os_error(error, f"{attempted}:" if error.filename else attempted)
    return told if isinstance(told, StoreError) else StoreError(str(told), hint=told.hint)
