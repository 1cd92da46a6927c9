"""Is everything in the store what it was when it was stored? Findings only; `repair` acts on them."""

from __future__ import annotations

import enum
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from flatmount.errors import FlatmountError, StoreError
from flatmount.image import digest as digests
from flatmount.image import model
from flatmount.store import entries
from flatmount.store.database import Database
from flatmount.store.disk import Disk
from flatmount.store.entries import LayerEntry
from flatmount.store.erofs_check import erofs_differences
from flatmount.store.model import RootAttributes
from flatmount.store.verify import LayerCheck, flat_differences, layer_differences

_SHOWN = 20


class Part(enum.Enum):
    """What a finding is about."""

    BOOK = "book"
    LAYER = "layer"
    FLAT = "flat tree"
    SHIFTED = "shifted tree"
    ROOT = "root directory"
    STRAY = "stray"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was stored.

    `subject` is a path relative to v1, or a digest; `details` are the first differences of `total`, `images`
    those that have it, by name or digest.
    """

    part: Part
    subject: str
    details: tuple[str, ...]
    total: int
    images: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """The book's number of the tree."""
        return int(self.subject.rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class Checked:
    """What was looked at, and what was found."""

    layers: int
    flat_trees: int
    entries: int
    content: bool
    findings: tuple[Finding, ...]


Report = Callable[[str], None]


def check(disk: Disk, database: Database, *, content: bool = True, report: Report | None = None) -> Checked:
    """Hold every layer, flat tree and document against the book; nothing is changed.

    `content`: read every file and compare its digest. `report` is told what is being looked at. What is removed
    by somebody else meanwhile is no finding.

    Raises: StoreError, when the book cannot be read at all.
    """
    return _Check(disk, database, content, report or (lambda what: None)).run()


class _Check:
    def __init__(self, disk: Disk, database: Database, content: bool, report: Report) -> None:
        self._disk = disk
        self._database = database
        self._content = content
        self._report = report
        self._entries = 0

    def run(self) -> Checked:
        findings = list(self._book())
        with self._database.reading() as db:
            layers = [row[0] for row in db.execute("SELECT number FROM layers ORDER BY number")]
            flats = [row[0] for row in db.execute("SELECT number FROM flats ORDER BY number")]
            shifted = [row[0] for row in db.execute("SELECT number FROM shifted ORDER BY number")]
            images = [row[0] for row in db.execute("SELECT number FROM erofs ORDER BY number")]
            roots = [row[0] for row in db.execute("SELECT number FROM roots ORDER BY number")]
        for number in layers:
            findings += self._tree("layers", Part.LAYER, number, self._layer)
        for number in flats:
            findings += self._tree("flat", Part.FLAT, number, self._flat)
        for number in images:
            findings += self._tree("erofs", Part.FLAT, number, self._erofs)
        for number in roots:
            findings += self._tree("roots", Part.ROOT, number, self._root)
        for number in shifted:
            findings += self._tree("shifted", Part.SHIFTED, number, self._shifted)
        with self._disk.alone() as alone:
            if alone:
                known = self._database.known_trees()
                findings += [
                    Finding(Part.STRAY, path, ("nothing in the book is called that",), 1)
                    for path in self._disk.strays(known)
                ]
        return Checked(len(layers), len(flats) + len(images), self._entries, self._content, tuple(findings))

    def _book(self) -> Iterator[Finding]:
        with self._database.reading() as db:
            told = [row[0] for row in db.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
            told += [f"table {row[0]}, row {row[1]}: no {row[2]}" for row in db.execute("PRAGMA foreign_key_check")]
            documents = db.execute("SELECT digest, content FROM documents").fetchall()
            images = db.execute("SELECT digest, config_digest, chain_id FROM images").fetchall()
            layers = {
                digest: db.execute(
                    "SELECT position, diff_id FROM image_layers JOIN layers ON number = layer"
                    " WHERE image = ? ORDER BY position",
                    (digest,),
                ).fetchall()
                for digest, _, _ in images
            }
        if told:
            yield Finding(Part.BOOK, "state.db", tuple(told[:_SHOWN]), len(told))
        content = dict(documents)
        for digest, raw in documents:
            if digests.of(raw, digests.algorithm(digest)) != digest:
                yield Finding(Part.BOOK, digest, ("the document has another digest",), 1)
        for digest, config_digest, chain_id in images:
            if config_digest not in content:
                continue
            try:
                config = model.image_config(content[config_digest], f"config {config_digest}")
            except FlatmountError as error:
                yield Finding(Part.BOOK, digest, (str(error),), 1)
                continue
            if layers[digest] != list(enumerate(config.diff_ids)) or digests.chain_ids(config.diff_ids)[-1] != chain_id:
                yield Finding(Part.BOOK, digest, ("its layers are not those of its config",), 1)

    def _tree(
        self, kind: str, part: Part, number: int, differences: Callable[[int], Iterator[str]]
    ) -> Iterator[Finding]:
        path = f"data/{kind}/{number}"
        self._report(path)
        try:
            told = list(differences(number))
        except (OSError, FlatmountError) as error:
            told = [str(error)]
        if told and number in self._database.known_trees()[kind]:
            yield Finding(part, path, tuple(islice(told, _SHOWN)), len(told), self._users(kind, number))

    def _layer(self, number: int) -> Iterator[str]:
        with self._database.reading() as db:
            row = db.execute("SELECT diff_id, entries, root FROM layers WHERE number = ?", (number,)).fetchone()
            below = [
                f"layers/{lower}"
                for (lower,) in db.execute(
                    "SELECT DISTINCT lower.layer FROM image_layers AS upper JOIN image_layers AS lower"
                    " ON lower.image = upper.image AND lower.position < upper.position WHERE upper.layer = ?",
                    (number,),
                )
            ]
        if row is None:
            return
        diff_id, count, root = row
        recorded = self._recorded(number, diff_id)
        self._entries += len(recorded)
        if len(recorded) != count:
            yield f"its manifest of entries has {len(recorded)} of {count}"
        attributes = None if root is None else RootAttributes(*json.loads(root))
        check = LayerCheck(f"layers/{number}", recorded, attributes, tuple(below), self._content)
        yield from layer_differences(self._disk.data_fd, check)

    def _recorded(self, number: int, diff_id: str) -> dict[bytes, LayerEntry]:
        try:
            fd = self._disk.open_entries(number)
        except FileNotFoundError:
            raise StoreError("its manifest of entries is missing") from None
        with open(fd, "rb") as file:
            return dict(entries.read(file.fileno(), diff_id))

    def _flat(self, number: int) -> Iterator[str]:
        yield from flat_differences(self._disk.data_fd, f"flat/{number}", self._chain("flats", number))

    def _erofs(self, number: int) -> Iterator[str]:
        with self._database.reading() as db:
            row = db.execute("SELECT digest FROM erofs WHERE number = ?", (number,)).fetchone()
        if row is not None:
            path, layers = f"erofs/{number}", self._chain("erofs", number)
            yield from erofs_differences(self._disk, path, row[0], layers, content=self._content)

    def _root(self, number: int) -> Iterator[str]:
        if not self._disk.has_tree(f"roots/{number}"):
            yield "it is missing"

    def _chain(self, table: str, number: int) -> list[tuple[str, dict[bytes, LayerEntry]]]:
        """The layers that a flat tree was made of, bottom to top, with what was unpacked into them."""
        with self._database.reading() as db:
            image = db.execute(
                f"SELECT images.digest FROM images JOIN {table} USING (chain_id) WHERE number = ? LIMIT 1", (number,)
            ).fetchone()
            rows = db.execute(
                "SELECT number, diff_id FROM image_layers JOIN layers ON number = layer"
                " WHERE image = ? ORDER BY position",
                image or ("",),
            ).fetchall()
        return [(f"layers/{layer}", self._recorded(layer, diff_id)) for layer, diff_id in rows]

    def _shifted(self, number: int) -> Iterator[str]:
        if not self._disk.has_tree(f"shifted/{number}"):
            yield "its tree is missing"

    def _users(self, kind: str, number: int) -> tuple[str, ...]:
        with self._database.reading() as db:
            return tuple(name or digest for name, digest in _images_of(db, kind, number))


def _images_of(db: sqlite3.Connection, kind: str, number: int) -> list[tuple[str | None, str]]:
    chosen = {
        "layers": "digest IN (SELECT image FROM image_layers WHERE layer = ?)",
        "flat": "chain_id IN (SELECT chain_id FROM flats WHERE number = ?)",
        "shifted": "chain_id IN (SELECT chain_id FROM shifted WHERE number = ?)",
        "erofs": "chain_id IN (SELECT chain_id FROM erofs WHERE number = ?)",
        "roots": "chain_id IN (SELECT chain_id FROM roots WHERE number = ?)",
    }
    query = f"SELECT name, digest FROM images LEFT JOIN names ON image = digest WHERE {chosen[kind]} ORDER BY name"
    return db.execute(query, (number,)).fetchall()
