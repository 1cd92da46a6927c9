"""Where things lie in a store, and the moves that make them visible or take them away.

    ROOT/v1/state.db        the book: what is not in it does not exist
    ROOT/v1/data/           0700, the one parent of all trees; nothing is ever mounted beneath it
        layers/N flat/N shifted/N    N is the book's number, never used twice
        erofs/N                      a flat tree as an EROFS image: a file
        roots/N                      an empty directory, a root for a chain whose topmost layer has none
        uppers/                      made by whoever mounts
        snapshots/N/                 the snapshot service's, which looks after them itself
        staging/N trash/             not yet and no longer visible
    ROOT/v1/partial/        beginnings of blobs that a broken pull left; see flatmount.image.partial
    ROOT/v1/entries/N       what was unpacked into layers/N
    ROOT/v1/entries/N.tar   the archive of layers/N without its contents
    ROOT/v1/catalogue       0644, what everybody may know; see flatmount.store.catalogue
    ROOT/v1/reserve/        room for the book on a full disk; see flatmount.store.reserve
    ROOT/v1/lock            held shared by whoever has something in staging, exclusively by whoever sweeps
    ROOT/v1/build.lock      held by whoever builds a flat or shifted tree
    ROOT/v1/background.lock a byte for each build that a command began behind it; see flatmount.cli.flatten

A tree appears in this order: staging, syncfs, rename, fsync of the directory, the book. It goes in the
opposite order. So after a kill at any moment there are only trees that the book does not know, and `sweep`
takes those away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import Final

from flatmount.errors import StoreError, from_os_error
from flatmount.image import partial
from flatmount.kernel.tree import RemovedTree, remove_tree, sync_filesystem

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DATA: Final = ("layers", "flat", "erofs", "shifted", "roots", "uppers", "snapshots", "staging", "trash")
TREES: Final = ("layers", "flat", "erofs", "shifted", "roots")


class Disk:
    """The files of one store.

    Owns a descriptor of `v1` and one of `v1/data`; every path here is relative to one.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.base = os.path.join(root, "v1")
        self.data = os.path.join(self.base, "data")
        self.partial = os.path.join(self.base, "partial")
        self.base_fd = os.open(self.base, _DIRECTORY)
        try:
            self.data_fd = os.open("data", _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.base_fd)
        except BaseException:
            os.close(self.base_fd)
            raise

    @classmethod
    def open(cls, root: str, *, create: bool) -> Disk:
        """The store at `root`; `create` makes what is missing. Raises: StoreError."""
        try:
            if create:
                _create(root)
            return cls(root)
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no store at {root}", hint="import an image first, or name another --root"
            ) from error
        except PermissionError as error:
            raise StoreError(
                f"{error.filename}: {error.strerror}", hint="run as the store's owner, usually root"
            ) from error
        except OSError as error:
            raise from_os_error(error, "open the store") from error

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self.data_fd)
        os.close(self.base_fd)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Nobody sweeps meanwhile."""
        with self._locked("lock", fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Nobody sweeps and nobody else builds meanwhile."""
        with self._locked("build.lock", fcntl.LOCK_EX), self.working():
            yield

    def is_building(self) -> bool:
        """Whether somebody builds now."""
        try:
            with self._locked("build.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except BlockingIOError:
            return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """True when nobody else has anything in staging, and then nobody can until the block is left."""
        try:
            with self._locked("lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield True
        except BlockingIOError:
            yield False

    @contextlib.contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        # A description of its own for each holder: flock then also holds between the threads of one process.
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.base_fd)
        except OSError as error:
            raise from_os_error(error, f"lock the store {self.root}:") from error
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        """What the file system of the store has left."""
        status = os.fstatvfs(self.data_fd)
        # ramfs counts nothing.
        return status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62

    def keeping(self) -> str:
        """The directory for what a pull fetches, made where an older flatmount made the store. Raises: StoreError."""
        try:
            _make(self.partial, 0o700)
        except OSError as error:
            raise from_os_error(error, "keep what is fetched") from error
        return self.partial

    def roomy(self) -> bool:
        """Whether a tenth of the file system of the store is free: what only saves time may take room then."""
        status = os.fstatvfs(self.data_fd)
        inodes = not status.f_files or status.f_favail * 10 >= status.f_files
        return inodes and status.f_bavail * 10 >= status.f_blocks

    def sync(self) -> None:
        """Everything written so far is on disk when this returns."""
        sync_filesystem(self.data_fd)

    def publish(self, kind: str, numbers: list[int]) -> None:
        """Move synced trees from staging to their place, durably. The book does not know them yet."""
        # A store of an older flatmount has not the directories of all kinds.
        with contextlib.suppress(FileExistsError):
            os.mkdir(kind, 0o700, dir_fd=self.data_fd)
            os.fsync(self.data_fd)
        for number in numbers:
            os.rename(f"staging/{number}", f"{kind}/{number}", src_dir_fd=self.data_fd, dst_dir_fd=self.data_fd)
        self._sync_directory(self.data_fd, kind)

    def discard(self, path: str) -> RemovedTree:
        """Take a tree away, `path` relative to data: out of sight first, then gone.

        Nothing there is no error.
        """
        kind, _, name = path.partition("/")
        out_of_sight = f"{kind}-{name}"
        with self._opened(self.data_fd, "trash") as trash:
            with contextlib.suppress(FileNotFoundError), self._opened(self.data_fd, kind) as place:
                os.rename(name, out_of_sight, src_dir_fd=place, dst_dir_fd=trash)
            try:
                return remove_tree(trash, out_of_sight)
            except FileNotFoundError:
                return RemovedTree(0, 0)

    def create_entries(self, number: int) -> int:
        """A descriptor for the manifest of a layer's entries, which the caller writes and closes."""
        return self._create(f"entries/{number}")

    def create_archive(self, number: int) -> int:
        """A descriptor for the records of a layer's archive, which the caller writes and closes."""
        return self._create(f"entries/{number}.tar")

    def open_archive(self, number: int) -> int:
        """A descriptor for reading the records of a layer's archive, which the caller closes."""
        return os.open(f"entries/{number}.tar", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.base_fd)

    def drop_archive(self, number: int) -> None:
        """Remove the records of a layer's archive."""
        self._drop(f"{number}.tar")

    def _create(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o600, dir_fd=self.base_fd)

    def has_tree(self, path: str) -> bool:
        """Whether there is a directory at `path`, relative to data."""
        try:
            return stat.S_ISDIR(os.stat(path, dir_fd=self.data_fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    def open_entries(self, number: int) -> int:
        """A descriptor for reading the manifest of a layer's entries, which the caller closes."""
        return os.open(f"entries/{number}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.base_fd)

    def drop_entries(self, number: int) -> None:
        """Remove the manifest of a layer's entries, and the records of its archive."""
        self.drop_archive(number)
        self._drop(str(number))

    def _drop(self, name: str) -> None:
        with self._opened(self.base_fd, "entries") as place, contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)

    def strays(self, known: dict[str, set[int]]) -> tuple[str, ...]:
        """What the book does not know, relative to v1, the trash first.

        `known` are the numbers of each kind of tree. Call it `alone`: otherwise it may be somebody's work.
        """
        found = [f"data/{place}/{name}" for place in ("trash", "staging") for name in self._names(f"data/{place}")]
        for kind in TREES:
            found += [f"data/{kind}/{name}" for name in _unknown(self._names(f"data/{kind}"), known[kind])]
        found += [f"entries/{name}" for name in _unknown(self._names("entries"), known["layers"])]
        found += [f"partial/{name}" for name in partial.strangers(self.partial)]
        return tuple(found)

    def sweep(self, known: dict[str, set[int]]) -> None:
        """Take away what the book does not know, and what a pull kept that nobody came back for; as `strays`."""
        with contextlib.suppress(OSError):
            partial.collect_partials(self.partial, older_than_s=partial.KEPT_S)
        for path in self.strays(known):
            if path.startswith("data/"):
                self._sweep_one(path.removeprefix("data/"))
            else:
                directory, _, name = path.partition("/")
                with contextlib.suppress(OSError), self._opened(self.base_fd, directory) as place:
                    os.unlink(name, dir_fd=place)

    def _names(self, directory: str) -> list[str]:
        try:
            return os.listdir(os.path.join(self.base, directory))
        except FileNotFoundError:
            return []  # of a kind that the flatmount which made this store did not know

    def _sweep_one(self, path: str) -> None:
        # What cannot go now, because something is mounted in it, stays out of sight; the next sweep tries
        # again.
        with contextlib.suppress(OSError):
            if path.startswith("trash/"):
                with self._opened(self.data_fd, "trash") as trash:
                    remove_tree(trash, path.removeprefix("trash/"))
            else:
                self.discard(path)

    def _sync_directory(self, parent_fd: int, name: str) -> None:
        with self._opened(parent_fd, name) as fd:
            os.fsync(fd)

    @contextlib.contextmanager
    def _opened(self, parent_fd: int, name: str) -> Iterator[int]:
        """A directory of the store's own, never what a link of its name leads to."""
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
        try:
            yield fd
        finally:
            os.close(fd)


def _unknown(names: list[str], known: set[int]) -> list[str]:
    stems = ((name, name.removesuffix(".tar")) for name in names)
    return [name for name, stem in stems if not stem.isdigit() or int(stem) not in known]


def _create(root: str) -> None:
    """0711 above the data, because a runtime inside a user namespace walks through; 0700 from there on."""
    os.makedirs(os.path.dirname(root), exist_ok=True)
    for path, mode in ((root, 0o711), (os.path.join(root, "v1"), 0o711)):
        _make(path, mode)
    base = os.path.join(root, "v1")
    for name in ("data", "entries", "partial", *(f"data/{name}" for name in _DATA)):
        _make(os.path.join(base, name), 0o700)


def _make(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    os.chmod(path, mode)
    # A default ACL of the parent would give every file of the store a mode that no image asked for.
    with contextlib.suppress(OSError):
        os.removexattr(path, "system.posix_acl_default")
