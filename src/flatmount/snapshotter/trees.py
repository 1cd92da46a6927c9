"""The snapshots' directories below the store's data directory.

    snapshots/N/fs      the snapshot's own files; overlayfs's upper while it is active
    snapshots/N/work    overlayfs's work directory, of active ones
    snapshots/N/none    an empty lower, of layers that are unpacked before their parent is known
    snapshots/N/flat    the flat tree of the chain that ends in N: there and durable, or not there
    snapshots/N/flat.new    one that is being made

What the book does not know is nobody's: it is moved to the store's trash and deleted from there.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from flatmount.errors import StoreError, from_os_error
from flatmount.kernel.tree import copy_tree, flatten, remove_tree, sync_filesystem
from flatmount.plan.mapping import IdRange, Mapping
from flatmount.snapshotter.model import Kind, Snapshot, Usage
from flatmount.store.disk import Disk

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Trees:
    """The directories of one store's snapshots. Borrows `disk`; its methods may be called from any thread.

    `lost` is the highest number that there was when a write to the disk failed, or 0: what was written until then into
    snapshots up to that number may be lost, and the kernel tells of it once only.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._fd = disk.data_fd
        self._highest = 0
        self._failures = 0
        self._syncing = threading.Lock()
        self.lost = 0
        self.stopping = False

    def make(self, snapshot: Snapshot, parent: int | None) -> None:
        """Make the directories of a fresh snapshot; its root takes mode and owner from the parent's root.

        Owners are those of the container, or the host's where the snapshot keeps host ids.
        Raises: MappingError, when the root's owner has no host id; StoreError.
        """
        mode, uid, gid = 0o755, 0, 0
        try:
            if parent is not None:
                root = os.stat(f"snapshots/{parent}/fs", dir_fd=self._fd, follow_symlinks=False)
                mode, uid, gid = stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid
            if snapshot.host_ids and snapshot.mapping is not None:
                uid, gid = snapshot.mapping.host_uid(uid), snapshot.mapping.host_gid(gid)
            self._make_top(snapshot.number)
            fs = snapshot.fs
            os.mkdir(fs, 0o755, dir_fd=self._fd)
            if (uid, gid) != (0, 0):
                os.chown(fs, uid, gid, dir_fd=self._fd, follow_symlinks=False)
            os.chmod(fs, mode, dir_fd=self._fd)
            if snapshot.info.kind is Kind.ACTIVE:
                os.mkdir(snapshot.work, 0o711, dir_fd=self._fd)
            if snapshot.unpacked:
                os.mkdir(snapshot.nothing, 0o755, dir_fd=self._fd)
        except OSError as error:
            raise _told(error, f"make the directories of snapshot {snapshot.info.name!r}:") from error

    def _make_top(self, number: int) -> None:
        self._highest = max(self._highest, number)
        try:
            os.mkdir(f"snapshots/{number}", 0o700, dir_fd=self._fd)
        except FileExistsError:
            # Left by a commit of the book that failed; no snapshot in the book has this number.
            self._hide(f"snapshots/{number}")
            os.mkdir(f"snapshots/{number}", 0o700, dir_fd=self._fd)

    def repair(self, snapshot: Snapshot, parent: int | None) -> bool:
        """Make an active snapshot's directories again where a power cut took them. Returns whether it had to."""
        needed = (snapshot.fs, snapshot.work) if snapshot.info.kind is Kind.ACTIVE else (snapshot.fs,)
        if all(self._exists(path) for path in needed):
            return False
        if snapshot.info.kind is Kind.COMMITTED:
            raise StoreError(
                f"snapshot {snapshot.info.name!r} has lost its files ({self._disk.data}/{snapshot.fs})",
                hint="remove the image in containerd and pull it again",
            )
        self.make(snapshot, parent)
        return True

    def rebase(self, snapshot: Snapshot, parent: int | None) -> None:
        """Make a layer that was unpacked without a parent fit for the one it gets, or for none.

        A root directory that the layer said nothing of takes mode and owner from the parent's; without a parent there
        is nothing that whiteouts could hide. Raises: StoreError.
        """
        try:
            if parent is None:
                self._drop_whiteouts(snapshot.fs)
                return
            own = os.stat(snapshot.fs, dir_fd=self._fd, follow_symlinks=False)
            root = os.stat(f"snapshots/{parent}/fs", dir_fd=self._fd, follow_symlinks=False)
            if (stat.S_IMODE(own.st_mode), own.st_uid, own.st_gid) == (0o755, 0, 0):
                os.chown(snapshot.fs, root.st_uid, root.st_gid, dir_fd=self._fd, follow_symlinks=False)
                os.chmod(snapshot.fs, stat.S_IMODE(root.st_mode), dir_fd=self._fd)
        except OSError as error:
            raise _told(error, f"rebase snapshot {snapshot.info.name!r}:") from error

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
            raise _told(error, f"flatten {number}:") from error

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
            raise _told(error, "measure a snapshot:") from error
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
            raise _told(error, f"commit snapshot {snapshot.info.name!r} in its container's ids:") from error

    def sync(self) -> None:
        """Everything written so far is on disk when this returns: syncfs(2). Raises: StoreError, once for a failure.

        Who did not get the error must look at `lost`: one open file stands for all, and is told once.
        """
        # One at a time: nobody is told that all is well before whoever was told otherwise has noted it.
        with self._syncing:
            try:
                sync_filesystem(self._fd)
            except OSError as error:
                self.lost = self._highest
                self._failures += 1
                raise _told(error, f"write {self._disk.data} to disk:") from error

    def hide_unknown(self, known: set[int], busy: Callable[[int], bool]) -> int:
        """Move every snapshot that is neither `known` nor `busy` out of sight. Returns how many."""
        hidden = 0
        self._highest = max(self._highest, *known, 0)
        for name in os.listdir(f"{self._disk.data}/snapshots"):
            if not name.isdigit() or (int(name) not in known and not busy(int(name))):
                self._hide(f"snapshots/{name}")
                hidden += 1
        return hidden

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
        name = path.replace("/", "-")
        for attempt in range(1000):
            try:
                os.mkdir(f"trash/{name}.{attempt}", 0o700, dir_fd=self._fd)
            except FileExistsError:
                continue
            with suppress(FileNotFoundError):
                os.rename(path, f"trash/{name}.{attempt}/0", src_dir_fd=self._fd, dst_dir_fd=self._fd)
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
    told = from_os_error(error, attempted)
    return told if isinstance(told, StoreError) else StoreError(str(told), hint=told.hint)
