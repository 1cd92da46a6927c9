"""The store: images on disk, for any number of processes at once."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Self

from flatmount.errors import FlatmountError, InUse, StoreError, UnknownImage, from_os_error
from flatmount.image import ImageSource, open_source
from flatmount.image.layout_writer import LayoutWriter
from flatmount.image.model import image_config
from flatmount.image.partial import Partial, collect_partials, partials
from flatmount.kernel.tree import RemovedTree
from flatmount.plan.mapping import Mapping
from flatmount.store.catalogue import publish
from flatmount.store.costs import Costs, costs_of
from flatmount.store.database import Database, is_booked
from flatmount.store.disk import Disk
from flatmount.store.exporting import Told, export_images
from flatmount.store.fsck import Checked, Finding, Report, check
from flatmount.store.importing import Progress, import_image
from flatmount.store.model import FlatForm, Holder, Owners, Removed, RootAttributes, Span, StoredImage, StoredLayer
from flatmount.store.origins import Origins, book_origin, origins
from flatmount.store.ranges import Ranges
from flatmount.store.references import check_name, digest_prefix, resolve
from flatmount.store.removal import take_away
from flatmount.store.repair import Repair, repair
from flatmount.store.reserve import Reserve
from flatmount.store.trees import Trees


class Store:
    """An open store. A context manager; its methods may be called from any thread.

    Two processes may use one store at once: what one does is visible to the other when it is complete and on
    disk.
    """

    def __init__(self, disk: Disk, database: Database) -> None:
        self._disk = disk
        self._database = database
        self._trees = Trees(disk, database, self._publish)

    @classmethod
    def open(cls, root: str, *, create: bool = False) -> Store:
        """Open the store at `root`, or make it there with `create`.

        What a killed process left half done is taken away. A store of a newer schema can be read and not changed.

        Raises: StoreError.
        """
        disk = Disk.open(os.path.abspath(root), create=create)
        path = os.path.join(disk.base, "state.db")
        try:
            if not create and not os.path.exists(path):
                raise StoreError(f"there is no store at {root}", hint="import an image first, or name another --root")
            reserve = Reserve(disk.base)
            store = cls(disk, Database.create(path, reserve=reserve) if create else Database(path, reserve=reserve))
        except OSError as error:
            disk.close()
            raise from_os_error(error, "open the store") from error
        except BaseException:
            disk.close()
            raise
        store._sweep()
        store._publish()
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the book and the descriptors."""
        self._database.close()
        self._disk.close()

    @property
    def root(self) -> str:
        """The store's directory."""
        return self._disk.root

    @property
    def data(self) -> str:
        """The absolute path of the directory that layers' and flat trees' paths are relative to."""
        return self._disk.data

    @property
    def data_fd(self) -> int:
        """A descriptor of `data`, which stays the store's."""
        return self._disk.data_fd

    # Images.

    def import_image(self, source: str, *, name: str | None = None, progress: Progress | None = None) -> StoredImage:
        """Import the image at `source`, PATH or PATH:NAME, under `name` or the name that it brings along.

        Both digests of every layer are verified and everything is on disk before the image is visible; a
        failure leaves the store as it was. A name that another image has moves to this one.

        Raises: BadImage, StoreError, UsageError for a name that is none.
        """
        if name is not None:
            check_name(name)
        image = open_source(source)
        try:
            return self.import_from(image, name=name or _usable(image.name), progress=progress)
        finally:
            image.close()

    def import_from(
        self, image: ImageSource, *, name: str | None = None, progress: Progress | None = None
    ) -> StoredImage:
        """As `import_image`, from an open source, which stays the caller's and whose own name is not used."""
        if name is not None:
            check_name(name)
        digest = image.manifest.digest
        with self._database.reading() as db:
            there = db.execute("SELECT 1 FROM images WHERE digest = ?", (digest,)).fetchone()
        if there is None:
            import_image(self._disk, self._database, image, name, progress)
        elif name is not None or image.origin is not None:
            self._rename(digest, name, image.origin)
        self._publish()
        with self._database.reading() as db:
            return self._load(db, digest, name)

    def images(self) -> tuple[StoredImage, ...]:
        """All images, once for each name, in the order of their import."""
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT digest, name FROM images LEFT JOIN names ON image = digest ORDER BY imported_ns, digest, name"
            ).fetchall()
            return tuple(self._load(db, digest, name) for digest, name in rows)

    def image(self, reference: str) -> StoredImage:
        """The image that a name, a digest, or the beginning of exactly one digest stands for.

        Raises: UnknownImage.
        """
        with self._database.reading() as db:
            digest, name = self._resolve(db, reference)
            return self._load(db, digest, name)

    def remove_image(self, reference: str) -> Removed:
        """Remove a name, and the image with its last one; a digest removes the image with all its names.

        Layers that other images share stay. Trees are moved out of sight first and deleted after.

        Raises: UnknownImage; InUse, while somebody holds the image.
        """
        with self._disk.working():
            with self._database.transaction() as db:
                digest, name = self._resolve(db, reference)
                names = tuple(row[0] for row in db.execute("SELECT name FROM names WHERE image = ?", (digest,)))
                only_name = name == reference and len(names) > 1
                if only_name:
                    db.execute("DELETE FROM names WHERE name = ?", (name,))
                else:
                    self._refuse_held(db, digest, reference)
                    db.execute("DELETE FROM images WHERE digest = ?", (digest,))
                trees = [] if only_name else _unused(db)
            return self._take_away((reference,) if only_name else names, () if only_name else (digest,), trees)

    def _take_away(self, names: tuple[str, ...], images: tuple[str, ...], trees: list[str]) -> Removed:
        """What the book no longer knows. A kill from here on leaves it to the next sweep."""
        self._publish()
        return take_away(self._disk, names, images, trees)

    def _refuse_held(self, db: sqlite3.Connection, digest: str, reference: str) -> None:
        holders = [row[0] for row in db.execute("SELECT holder FROM leases WHERE image = ? ORDER BY holder", (digest,))]
        if holders:
            more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
            raise InUse(
                f"image {reference} is used by {', '.join(holders[:3])}{more}",
                hint="unmount what uses it first",
            )

    # Trees.

    def ensure_flat(self, image: StoredImage, form: FlatForm = FlatForm.HARDLINK) -> str:
        """The image's flat tree, as a path relative to `data`. Built when there is none; others wait for it.

        A tree of hard links begins with that of the longest chain beneath that has one; an EROFS image is a file.
        Raises: StoreError, UnknownImage.
        """
        return self._trees.ensure(image, form)

    def flat_tree(self, image: StoredImage, form: FlatForm = FlatForm.HARDLINK) -> str | None:
        """The image's flat tree, relative to `data`, or None while there is none."""
        return self._trees.find(image.chain_id, form)

    def flat_form(self, image: StoredImage) -> FlatForm:
        """The form of flat tree that containers of the image get where they can: the one asked for last."""
        return self._trees.preferred(image.chain_id)

    def has_flat_trees(self, form: FlatForm) -> bool:
        """Whether any image has a flat tree of this form."""
        return self._trees.any(form)

    def prefer_flat(self, image: StoredImage, form: FlatForm) -> None:
        """Let containers of the image get this form, from their next start on."""
        self._trees.prefer(image.chain_id, form)

    def drop_flat(self, image: StoredImage, form: FlatForm) -> RemovedTree:
        """Take the image's flat tree of one form away; it is built again when it is next needed.

        Nothing there is no error. Raises: InUse, while somebody holds the image.
        """
        with self._disk.working():
            with self._database.transaction() as db:
                for (digest,) in db.execute(
                    "SELECT digest FROM images WHERE chain_id = ?", (image.chain_id,)
                ).fetchall():
                    self._refuse_held(db, digest, digest)
                tree = self._trees.forget(db, image.chain_id, form)
            self._publish()
            return RemovedTree(0, 0) if tree is None else self._disk.discard(tree)

    def building(self) -> bool:
        """Whether somebody builds a tree in this store now."""
        return self._disk.is_building()

    def ensure_shifted(self, image: StoredImage, mapping: Mapping) -> str:
        """A copy of the flat tree whose owners are the host's ids of `mapping`, as a path relative to `data`.

        Raises: MappingError, StoreError, UnknownImage.
        """
        return self._trees.ensure_shifted(image, mapping)

    def ensure_root(self, image: StoredImage) -> str | None:
        """An empty directory with the attributes of the image's root, or None where its topmost layer has them.

        For overlays without an upper, whose root is that of their topmost lower. Raises: StoreError, UnknownImage.
        """
        return self._trees.ensure_root(image)

    def costs(self, image: StoredImage) -> Costs:
        """What the image costs on disk, and what of it other images share; see flatmount.store.costs."""
        return costs_of(self._disk, self._database, image)

    # Leases.

    def hold(self, image: StoredImage, holder: str, *, trees: Iterable[str] = ()) -> None:
        """Keep `image` until `holder` releases it. On disk when this returns; twice is once.

        `trees`, relative to `data`, are what the holder is about to use: a repair replaces those that nobody holds.
        Raises: UnknownImage, when it was removed meanwhile; FlatmountError, when one of `trees` was.
        """
        with self._database.transaction() as db:
            if db.execute("SELECT 1 FROM images WHERE digest = ?", (image.digest,)).fetchone() is None:
                raise UnknownImage(f"image {image.digest} was removed meanwhile", hint="import it again")
            if not all(is_booked(db, tree) for tree in trees):
                raise FlatmountError(f"image {image.digest} was repaired meanwhile", hint="try again")
            db.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?)", (holder, image.digest, time.time_ns()))

    def release(self, holder: str) -> None:
        """Give back everything that `holder` holds. Nothing held is no error."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM leases WHERE holder = ?", (holder,))

    def holders(self) -> tuple[Holder, ...]:
        """Who holds what, in the order of time."""
        with self._database.reading() as db:
            rows = db.execute("SELECT holder, image, since_ns FROM leases ORDER BY since_ns, holder").fetchall()
        return tuple(Holder(*row) for row in rows)

    # Out of it.

    def export(self, images: Sequence[StoredImage], layout: LayoutWriter, told: Told | None = None) -> None:
        """Write images to an OCI image layout that is being made; see flatmount.store.exporting."""
        with self._disk.working():
            with self._database.reading() as db:
                configs = [
                    db.execute(
                        "SELECT content FROM documents JOIN images ON config_digest = documents.digest"
                        " WHERE images.digest = ?",
                        (image.digest,),
                    ).fetchone()
                    for image in images
                ]
            export_images(
                self._disk, layout, [(i, config[0]) for i, config in zip(images, configs, strict=True) if config], told
            )

    # Looking after it.

    def check(self, *, content: bool = True, report: Report | None = None) -> Checked:
        """Hold everything in the store against what was stored; see flatmount.store.fsck."""
        return check(self._disk, self._database, content=content, report=report)

    def repair(self, findings: Sequence[Finding], sources: Sequence[ImageSource] = ()) -> tuple[Repair, ...]:
        """Put right what `check` found; see flatmount.store.repair. `sources` stay the caller's."""
        done = repair(self._disk, self._database, findings, sources)
        self._publish()
        return done

    def origins(self, image: StoredImage) -> Origins:
        """What is known of where an image came from; see flatmount.store.origins."""
        return origins(self._database, image.digest)

    def broken_pulls(self, *, collect: bool = False) -> tuple[Partial, ...]:
        """What broken pulls left for the next one and nobody works on now; with `collect`, it is deleted."""
        try:
            return collect_partials(self._disk.partial) if collect else partials(self._disk.partial)
        except OSError as error:
            raise from_os_error(error, "delete what broken pulls left, in the store's") from error

    def unused_images(self) -> tuple[StoredImage, ...]:
        """Images that have no name and that nobody holds: what `collect` takes away."""
        with self._database.reading() as db:
            return tuple(self._load(db, digest, None) for (digest,) in db.execute(_UNUSED_IMAGES).fetchall())

    def collect(self) -> Removed:
        """Remove every image that has no name and that nobody holds, with what only they needed."""
        with self._disk.working():
            with self._database.transaction() as db:
                gone = tuple(row[0] for row in db.execute(_UNUSED_IMAGES).fetchall())
                db.executemany("DELETE FROM images WHERE digest = ?", [(digest,) for digest in gone])
                trees = _unused(db)
            return self._take_away((), gone, trees)

    @property
    def ranges(self) -> Ranges:
        """The host ids that containers of this store have."""
        return Ranges(self._database)

    # Within.

    def _sweep(self) -> None:
        """What cannot be swept now, for want of rights or because somebody works, waits for the next one."""
        if not self._may_write():
            return
        try:
            with self._disk.alone() as alone:
                if alone:
                    self._disk.sweep(self._database.known_trees())
        except OSError as error:
            self.close()
            raise from_os_error(error, "look through the store:") from error

    def _may_write(self) -> bool:
        return self._database.writable and os.access(self._disk.base, os.W_OK)

    def _publish(self) -> None:
        """What others may know of the store is as the book has it."""
        if self._may_write():
            publish(self._disk.base, self._database, self.images)

    def _rename(self, digest: str, name: str | None, origin: str | None) -> None:
        with self._database.transaction() as db:
            if name is not None:
                db.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, digest))
            book_origin(db, digest, origin)

    def _resolve(self, db: sqlite3.Connection, reference: str) -> tuple[str, str | None]:
        row = db.execute("SELECT image FROM names WHERE name = ?", (reference,)).fetchone()
        if row is not None:
            return str(row[0]), reference
        prefix = digest_prefix(reference)
        rows = db.execute("SELECT digest FROM images WHERE substr(digest, 1, ?) = ? LIMIT 2", (len(prefix), prefix))
        digest = resolve(reference, {str(found): str(found) for (found,) in rows.fetchall()})
        named = db.execute("SELECT name FROM names WHERE image = ? ORDER BY name LIMIT 1", (digest,)).fetchone()
        return digest, None if named is None else str(named[0])

    def _load(self, db: sqlite3.Connection, digest: str, name: str | None) -> StoredImage:
        config_digest, chain_id, config = db.execute(
            "SELECT config_digest, chain_id, content FROM images"
            " JOIN documents ON documents.digest = config_digest WHERE images.digest = ?",
            (digest,),
        ).fetchone()
        rows = db.execute(
            "SELECT number, diff_id, entries, files, size_bytes, dropped_xattrs, owners, root"
            " FROM image_layers JOIN layers ON number = layer WHERE image = ? ORDER BY position",
            (digest,),
        ).fetchall()
        owners = Owners(((0, 0),), ((0, 0),))
        root = RootAttributes()
        for *_, layer_owners, layer_root in rows:
            owners = owners.union(Owners(*map(_spans, json.loads(layer_owners))))
            root = RootAttributes(*json.loads(layer_root)) if layer_root is not None else root
        return StoredImage(
            name=name,
            digest=digest,
            config=image_config(config, f"config {config_digest}"),
            layers=tuple(StoredLayer(row[1], f"layers/{row[0]}", row[2], row[4]) for row in rows),
            chain_id=chain_id,
            files=sum(row[3] for row in rows),
            root=root,
            owners=owners,
            dropped_xattrs=sum(row[5] for row in rows),
        )


_UNUSED_IMAGES = """
    SELECT digest FROM images
    WHERE digest NOT IN (SELECT image FROM names UNION SELECT image FROM leases) ORDER BY imported_ns, digest
"""


def _usable(name: str | None) -> str | None:
    """The name that an image brings along, unless it is none; nobody asked for it."""
    try:
        if name is not None:
            check_name(name)
    except FlatmountError:
        return None
    return name


def _spans(pairs: list[list[int]]) -> tuple[Span, ...]:
    return tuple((first, last) for first, last in pairs)


def _unused(db: sqlite3.Connection) -> list[str]:
    """Take what no image needs any more out of the book; returns the trees, which are still on disk."""
    db.execute(
        "DELETE FROM documents WHERE digest NOT IN (SELECT digest FROM images UNION SELECT config_digest FROM images)"
    )
    queries = (
        (
            "layers",
            "DELETE FROM layers WHERE number NOT IN (SELECT layer FROM image_layers) RETURNING number",
        ),
        ("flat", "DELETE FROM flats WHERE chain_id NOT IN (SELECT chain_id FROM images) RETURNING number"),
        (
            "shifted",
            "DELETE FROM shifted WHERE chain_id NOT IN (SELECT chain_id FROM images) RETURNING number",
        ),
        ("erofs", "DELETE FROM erofs WHERE chain_id NOT IN (SELECT chain_id FROM images) RETURNING number"),
        ("roots", "DELETE FROM roots WHERE chain_id NOT IN (SELECT chain_id FROM images) RETURNING number"),
    )
    return [f"{kind}/{number}" for kind, query in queries for (number,) in db.execute(query).fetchall()]
