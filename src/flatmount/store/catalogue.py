"""What everybody may know of a store: ROOT/v1/catalogue, written by its owner for those who cannot open its book.

Names, digests, layers and owners of images, and which have a flat tree; nothing of their configuration (an image's
environment can hold secrets) and no content. The first line says which state of the book it is of, so that an owner
who finds another one there writes it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

from flatmount.errors import StoreError
from flatmount.image import ImageConfig
from flatmount.store.database import Database
from flatmount.store.model import FlatForm, Owners, RootAttributes, StoredImage, StoredLayer
from flatmount.store.references import resolve

SCHEMA: Final = "flatmount.catalogue/1"
_NAME: Final = "catalogue"
_NONE: Final = (None, False)


def publish(base: str, database: Database, images: Callable[[], Sequence[StoredImage]]) -> None:
    """Bring the catalogue below `base` (a store's v1) up to date with the book, if it is not.

    Without room for a new one, the old one goes: none is better than a wrong one.
    """
    path = os.path.join(base, _NAME)
    try:
        with _locked(f"{path}.lock"), database.reading() as db:
            head = json.dumps({"schema": SCHEMA, "book": _fingerprint(db)}) + "\n"
            if _first_line(path) == head:
                return
            flats = dict(db.execute("SELECT chain_id, number FROM flats").fetchall())
            rows = db.execute("SELECT chain_id, number, preferred FROM erofs").fetchall()
            erofs = {chain_id: (number, bool(preferred)) for chain_id, number, preferred in rows}
            body = json.dumps(
                [_as_data(image, flats.get(image.chain_id), *erofs.get(image.chain_id, _NONE)) for image in images()]
            )
            _replace(path, head + body)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)


class Catalogue:
    """A store as its catalogue tells. A context manager, as Store is; its images have no configuration."""

    def __init__(
        self,
        root: str,
        images: tuple[StoredImage, ...],
        flats: dict[tuple[str, FlatForm], str],
        preferring_erofs: frozenset[str],
    ) -> None:
        self.root = root
        self.data = os.path.join(root, "v1", "data")
        self._images = images
        self._flats = flats
        self._preferring_erofs = preferring_erofs

    @classmethod
    def open(cls, root: str) -> Catalogue:
        """Read the catalogue of the store at `root`. Raises: StoreError."""
        path = os.path.join(root, "v1", _NAME)
        try:
            with open(path, encoding="utf-8") as file:
                head = json.loads(file.readline())
                entries = json.load(file)
            if head["schema"] != SCHEMA:
                raise StoreError(f"{path} is of another version", hint="run as the store's owner, usually root")
            images = tuple(_from_data(entry) for entry in entries)
            flats = {
                (entry["chain_id"], form): f"{kind}/{entry[kind]}"
                for entry in entries
                for form, kind in ((FlatForm.HARDLINK, "flat"), (FlatForm.EROFS, "erofs"))
                if entry.get(kind) is not None
            }
            preferring = frozenset(entry["chain_id"] for entry in entries if entry.get("erofs_preferred"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not readable"
            raise StoreError(
                f"the store at {root} is another user's, and {path}: {why}",
                hint="run as the store's owner, usually root; a command of the owner makes the catalogue",
            ) from error
        return cls(root, images, flats, preferring)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def images(self) -> tuple[StoredImage, ...]:
        """As Store.images."""
        return self._images

    def image(self, reference: str) -> StoredImage:
        """As Store.image. Raises: UnknownImage."""
        named = [image for image in self._images if image.name == reference]
        return named[0] if named else resolve(reference, {image.digest: image for image in reversed(self._images)})

    def flat_tree(self, image: StoredImage, form: FlatForm = FlatForm.HARDLINK) -> str | None:
        """As Store.flat_tree."""
        return self._flats.get((image.chain_id, form))

    def flat_form(self, image: StoredImage) -> FlatForm:
        """As Store.flat_form."""
        linked = self.flat_tree(image) is not None and image.chain_id not in self._preferring_erofs
        there = self.flat_tree(image, FlatForm.EROFS) is not None
        return FlatForm.EROFS if there and not linked else FlatForm.HARDLINK


def _fingerprint(db: sqlite3.Connection) -> str:
    state = hashlib.sha256()
    for query in (
        "SELECT last FROM numbers",
        "SELECT digest, imported_ns FROM images ORDER BY digest",
        "SELECT name, image FROM names ORDER BY name",
        "SELECT number FROM flats ORDER BY number",
        "SELECT number, preferred FROM erofs ORDER BY number",
    ):
        state.update(repr(db.execute(query).fetchall()).encode())
    return state.hexdigest()


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


@contextmanager
def _locked(path: str) -> Iterator[None]:
    # Whoever writes last has read the book last.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: str, text: str) -> None:
    draft = f"{path}.new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, 0o644)
            file.write(text)
        os.rename(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def _as_data(image: StoredImage, flat: int | None, erofs: int | None, erofs_preferred: bool) -> dict[str, Any]:
    return {
        "name": image.name,
        "digest": image.digest,
        "chain_id": image.chain_id,
        "platform": [image.config.os, image.config.architecture, image.config.variant],
        "layers": [[layer.diff_id, layer.path, layer.entries, layer.size_bytes] for layer in image.layers],
        "flat": flat,
        "erofs": erofs,
        "erofs_preferred": erofs_preferred,
        "files": image.files,
        "root": [image.root.mode, image.root.uid, image.root.gid, image.root.mtime_ns],
        "owners": {"uids": image.owners.uids, "gids": image.owners.gids},
        "dropped_xattrs": image.dropped_xattrs,
    }


def _from_data(entry: dict[str, Any]) -> StoredImage:
    os_name, architecture, variant = entry["platform"]
    layers = tuple(StoredLayer(*layer) for layer in entry["layers"])
    uids, gids = (tuple((first, last) for first, last in entry["owners"][kind]) for kind in ("uids", "gids"))
    config = ImageConfig(
        architecture=architecture,
        os=os_name,
        variant=variant,
        user="",
        env=(),
        entrypoint=(),
        cmd=(),
        workdir="",
        stop_signal="",
        labels=(),
        diff_ids=tuple(layer.diff_id for layer in layers),
        created="",
    )
    return StoredImage(
        name=entry["name"],
        digest=entry["digest"],
        config=config,
        layers=layers,
        chain_id=entry["chain_id"],
        files=entry["files"],
        root=RootAttributes(*entry["root"]),
        owners=Owners(uids, gids),
        dropped_xattrs=entry["dropped_xattrs"],
    )
