"""What is made of a chain's layers when it is needed: trees of hard links, EROFS images, shifted copies, roots.

All are derived: any of them can be taken away and built again. One is built at a time, in staging, and becomes durable
before it becomes visible.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from flatmount.errors import FlatmountError, StoreError, UnknownImage, from_os_error
from flatmount.image import digest as digests
from flatmount.kernel.erofs import ErofsImage, write_erofs
from flatmount.kernel.tree import Flattened, copy_tree, flatten
from flatmount.plan.mapping import Mapping
from flatmount.store.attributes import read_xattrs, set_xattrs
from flatmount.store.database import Database, is_booked
from flatmount.store.disk import Disk
from flatmount.store.image_file import digest_of
from flatmount.store.model import FlatForm, StoredImage

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TABLES: Final = {FlatForm.HARDLINK: ("flat", "flats"), FlatForm.EROFS: ("erofs", "erofs")}
_ATTEMPTS: Final = 3
_Book = Callable[[sqlite3.Connection, int], None]
_Result = TypeVar("_Result")


class _SourceGone(Exception):
    """A tree that another one was made of was taken away meanwhile: the image was repaired, or a flat tree dropped."""


class Trees:
    """The derived trees of one store. `publish` is called after what others may know of them has changed."""

    def __init__(self, disk: Disk, database: Database, publish: Callable[[], None]) -> None:
        self._disk = disk
        self._database = database
        self._publish = publish

    def find(self, chain_id: str, form: FlatForm) -> str | None:
        """The flat tree of a chain in a form, relative to the data directory."""
        kind, table = _TABLES[form]
        with self._database.reading() as db:
            row = db.execute(f"SELECT number FROM {table} WHERE chain_id = ?", (chain_id,)).fetchone()
        return None if row is None else f"{kind}/{row[0]}"

    def any(self, form: FlatForm) -> bool:
        """Whether there is a flat tree of this form."""
        with self._database.reading() as db:
            return db.execute(f"SELECT 1 FROM {_TABLES[form][1]} LIMIT 1").fetchone() is not None

    def forget(self, db: sqlite3.Connection, chain_id: str, form: FlatForm) -> str | None:
        """Take a flat tree out of the book; returns it, still on disk."""
        kind, table = _TABLES[form]
        row = db.execute(f"DELETE FROM {table} WHERE chain_id = ? RETURNING number", (chain_id,)).fetchone()
        return None if row is None else f"{kind}/{row[0]}"

    def preferred(self, chain_id: str) -> FlatForm:
        """The form that was asked for last."""
        with self._database.reading() as db:
            row = db.execute("SELECT preferred FROM erofs WHERE chain_id = ?", (chain_id,)).fetchone()
            linked = db.execute("SELECT 1 FROM flats WHERE chain_id = ?", (chain_id,)).fetchone()
        return FlatForm.EROFS if row is not None and (row[0] or linked is None) else FlatForm.HARDLINK

    def prefer(self, chain_id: str, form: FlatForm) -> None:
        """Let containers have this form where a chain has both."""
        if self.preferred(chain_id) is not form:
            with self._database.transaction() as db:
                wanted = int(form is FlatForm.EROFS)
                db.execute("UPDATE erofs SET preferred = ? WHERE chain_id = ?", (wanted, chain_id))
            self._publish()

    def ensure(self, image: StoredImage, form: FlatForm) -> str:
        """The image's flat tree, built when there is none; others wait for it."""
        found = self.find(image.chain_id, form)
        if found is None:
            build = self._build_flat if form is FlatForm.HARDLINK else self._build_erofs

            def attempt() -> str:
                with self._disk.building():
                    return self.find(image.chain_id, form) or build(image)

            found = self._attempted(image, attempt)
        return found

    def ensure_shifted(self, image: StoredImage, mapping: Mapping) -> str:
        """A copy of the flat tree with the host's ids of `mapping` as owners."""
        image.owners.require(mapping)

        def attempt() -> str:
            flat = self.ensure(image, FlatForm.HARDLINK)
            with self._disk.building():
                return self._shifted(image.chain_id, mapping) or self._build_shifted(image, flat, mapping)

        return self._attempted(image, attempt)

    def ensure_root(self, image: StoredImage) -> str | None:
        """An empty directory with the attributes of the image's root, where the topmost layer's own root has others."""

        def attempt() -> str | None:
            layers, given = self._layers(image)
            giving = next((path for path in reversed(layers) if path in given), None)
            if giving is None or giving == layers[-1]:
                return None
            with self._disk.building():
                with self._database.reading() as db:
                    row = db.execute("SELECT number FROM roots WHERE chain_id = ?", (image.chain_id,)).fetchone()
                return f"roots/{row[0]}" if row is not None else self._build_root(image, giving)

        return self._attempted(image, attempt)

    def _attempted(self, image: StoredImage, attempt: Callable[[], _Result]) -> _Result:
        """Again, with what the image consists of by then, where a source was taken away meanwhile."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return attempt()
            except _SourceGone:
                continue
        try:
            return attempt()
        except _SourceGone as gone:
            if isinstance(gone.__cause__, OSError):
                raise from_os_error(gone.__cause__, f"build a tree of {image.digest}:") from gone
            raise FlatmountError(
                f"what image {image.digest} consists of is replaced as fast as a tree is made of it", hint="try again"
            ) from None

    def _layers(self, image: StoredImage) -> tuple[list[str], set[str]]:
        """The image's layers as they are now, lowest first, and which layers have an entry for their root.

        A repair gives a layer another number. Raises: UnknownImage.
        """
        with self._database.reading() as db:
            given = {f"layers/{row[0]}" for row in db.execute("SELECT number FROM layers WHERE root IS NOT NULL")}
            rows = db.execute(
                "SELECT layer FROM image_layers WHERE image ="
                " (SELECT digest FROM images WHERE chain_id = ? ORDER BY digest != ? LIMIT 1) ORDER BY position",
                (image.chain_id, image.digest),
            ).fetchall()
        if len(rows) != len(image.layers):
            raise _removed(image)
        return [f"layers/{number}" for (number,) in rows], given

    def _shifted(self, chain_id: str, mapping: Mapping) -> str | None:
        with self._database.reading() as db:
            row = db.execute(
                "SELECT number FROM shifted WHERE chain_id = ? AND mapping = ?", (chain_id, str(mapping))
            ).fetchone()
        return None if row is None else f"shifted/{row[0]}"

    def _build_flat(self, image: StoredImage) -> str:
        sources, root_source = self._flat_sources(image)
        counts: list[Flattened] = []

        def build(target: str) -> None:
            counts.append(flatten(self._disk.data_fd, sources, target, root_source=root_source))

        def book(db: sqlite3.Connection, number: int) -> None:
            (made,) = counts
            db.execute(
                "INSERT INTO flats VALUES (?, ?, ?, ?, ?)",
                (number, image.chain_id, made.directories, made.links, made.copies),
            )

        return self._build("flat", image, build, book, sources)

    def _flat_sources(self, image: StoredImage) -> tuple[list[str], int | None]:
        """Topmost first: the layers above the longest chain that is flat already, and that one."""
        chain = digests.chain_ids(tuple(layer.diff_id for layer in image.layers))
        layers, given = self._layers(image)
        sources: list[str] = []
        for layer, chain_id in zip(reversed(layers), reversed(chain), strict=True):
            flat = self.find(chain_id, FlatForm.HARDLINK)
            if flat is not None:
                sources.append(flat)
                given.add(flat)
                break
            sources.append(layer)
        return sources, next((at for at, source in enumerate(sources) if source in given), None)

    def _build_erofs(self, image: StoredImage) -> str:
        """Written from the tree of hard links: the image's own, or one made for the moment."""
        sources, root_source = self._flat_sources(image)
        tree = self.find(image.chain_id, FlatForm.HARDLINK)
        made: list[tuple[ErofsImage, str]] = []

        def build(target: str) -> None:
            if tree is not None:
                made.append(self._write_image(tree, target, image.chain_id))
                return
            merged = f"{target}.tree"
            try:
                flatten(self._disk.data_fd, sources, merged, root_source=root_source)
                made.append(self._write_image(merged, target, image.chain_id))
            finally:
                self._disk.discard(merged)

        def book(db: sqlite3.Connection, number: int) -> None:
            ((counts, digest),) = made
            db.execute(
                "INSERT INTO erofs VALUES (?, ?, ?, ?, ?, ?, 1)",
                (number, image.chain_id, counts.directories, counts.inodes, counts.size_bytes, digest),
            )

        return self._build("erofs", image, build, book, sources if tree is None else [tree], synced=True)

    def _write_image(self, tree: str, target: str, name: str) -> tuple[ErofsImage, str]:
        tree_fd = os.open(tree, _DIRECTORY, dir_fd=self._disk.data_fd)
        try:
            fd = os.open(target, _CREATE, 0o400, dir_fd=self._disk.data_fd)
            try:
                counts = write_erofs(tree_fd, fd, name)
                os.fsync(fd)
                return counts, digest_of(fd)
            finally:
                os.close(fd)
        finally:
            os.close(tree_fd)

    def _build_shifted(self, image: StoredImage, flat: str, mapping: Mapping) -> str:
        def build(target: str) -> None:
            os.mkdir(target, 0o700, dir_fd=self._disk.data_fd)
            from_fd = os.open(flat, _DIRECTORY, dir_fd=self._disk.data_fd)
            try:
                to_fd = os.open(target, _DIRECTORY, dir_fd=self._disk.data_fd)
                try:
                    copy_tree(from_fd, to_fd, mapping)
                finally:
                    os.close(to_fd)
            finally:
                os.close(from_fd)

        def book(db: sqlite3.Connection, number: int) -> None:
            db.execute("INSERT INTO shifted VALUES (?, ?, ?)", (number, image.chain_id, str(mapping)))

        return self._build("shifted", image, build, book, [flat])

    def _build_root(self, image: StoredImage, giving: str) -> str:
        def build(target: str) -> None:
            os.mkdir(target, 0o700, dir_fd=self._disk.data_fd)
            fd = os.open(target, _DIRECTORY, dir_fd=self._disk.data_fd)
            try:
                os.fchown(fd, image.root.uid, image.root.gid)
                os.fchmod(fd, image.root.mode)
                set_xattrs(fd, b".", read_xattrs(self._disk.data_fd, os.fsencode(giving)))
                os.utime(fd, ns=(image.root.mtime_ns, image.root.mtime_ns))
            finally:
                os.close(fd)

        def book(db: sqlite3.Connection, number: int) -> None:
            db.execute("INSERT INTO roots VALUES (?, ?)", (number, image.chain_id))

        return self._build("roots", image, build, book, [giving])

    def _build(
        self,
        kind: str,
        image: StoredImage,
        build: Callable[[str], None],
        book: _Book,
        sources: Sequence[str],
        *,
        synced: bool = False,
    ) -> str:
        """Build a tree in staging, then make it durable, unless `build` has `synced` it, then visible.

        Nobody keeps others from taking `sources` away meanwhile, and what was read of one that went may be a part of
        it: all of them must be in the book still when the tree gets there. Raises: _SourceGone, StoreError.
        """
        (number,) = self._database.next_numbers(1)
        try:
            build(f"staging/{number}")
            if not synced:
                self._disk.sync()
            self._disk.publish(kind, [number])
            with self._database.transaction() as db:
                if db.execute("SELECT 1 FROM images WHERE chain_id = ?", (image.chain_id,)).fetchone() is None:
                    raise _removed(image)
                if not all(is_booked(db, source) for source in sources):
                    raise _SourceGone
                book(db, number)
        except BaseException as error:
            for unknown in self._database.unbooked(kind, [number]):
                self._disk.discard(f"staging/{unknown}")
                self._disk.discard(f"{kind}/{unknown}")
            if isinstance(error, FileNotFoundError):
                raise _SourceGone from error
            if isinstance(error, OSError):
                raise from_os_error(error, f"build the {kind} tree of {image.digest}:") from error
            if isinstance(error, StoreError):
                raise StoreError(f"image {image.digest}: {error}", hint=error.hint) from error
            raise
        self._publish()
        return f"{kind}/{number}"


def _removed(image: StoredImage) -> UnknownImage:
    return UnknownImage(f"image {image.digest} was removed meanwhile", hint="import it again")
