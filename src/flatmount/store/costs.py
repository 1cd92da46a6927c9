"""What an image costs on disk: inodes and bytes, by layer and by form of flat tree, and what others have of it."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass

from flatmount.store.database import Database
from flatmount.store.disk import Disk
from flatmount.store.model import FlatForm, StoredImage
from flatmount.store.verify import walk


@dataclass(frozen=True, slots=True)
class Usage:
    """`inodes` of the store's file system, and `size_bytes` of blocks on it, that are there for this alone."""

    inodes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer's own inodes and blocks; hard links into lower layers are theirs. `shared_with`: other images."""

    path: str
    usage: Usage
    shared_with: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FlatCost:
    """A flat tree: names are `directories` and `links`. What links lead to is counted with the layers.

    An EROFS image has copies of its own: one inode of the store, and as many within it.
    """

    form: FlatForm
    path: str
    directories: int
    links: int
    copies: int
    usage: Usage
    shared_with: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """The whole, and `own`: what removing the image would free."""

    layers: tuple[LayerCost, ...]
    flat: tuple[FlatCost, ...]
    total: Usage
    own: Usage


def costs_of(disk: Disk, database: Database, image: StoredImage) -> Costs:
    """Walk the image's trees and count. Nothing is changed; a tree that vanishes meanwhile costs nothing.

    Reads every directory and no file: a second for some hundred thousand names.
    """
    counted: set[int] = set()
    layers = tuple(
        LayerCost(layer.path, _usage(disk, layer.path, counted), _layer_users(database, image, layer.path))
        for layer in image.layers
    )
    with database.reading() as db:
        flats = db.execute(
            "SELECT 'flat/' || number, directories, links, copies FROM flats WHERE chain_id = ?"
            " UNION ALL SELECT 'erofs/' || number, directories, inodes - directories, 0 FROM erofs WHERE chain_id = ?",
            (image.chain_id, image.chain_id),
        ).fetchall()
        same_chain = _others(db, image, "chain_id = ?", image.chain_id)
    forms = tuple(
        FlatCost(
            FlatForm.EROFS if path.startswith("erofs/") else FlatForm.HARDLINK,
            path,
            directories,
            links,
            copies,
            _usage(disk, path, counted),
            same_chain,
        )
        for path, directories, links, copies in flats
    )
    parts: tuple[LayerCost | FlatCost, ...] = (*layers, *forms)
    return Costs(layers, forms, _sum(parts), _sum(tuple(part for part in parts if not part.shared_with)))


def _usage(disk: Disk, path: str, counted: set[int]) -> Usage:
    """What is at `path` and not `counted` yet: several names of an inode cost once, and it is the lowest layer's."""
    base = os.fsencode(path)
    inodes = blocks = 0
    try:
        top = os.stat(base, dir_fd=disk.data_fd, follow_symlinks=False)
        found = walk(disk.data_fd, base) if path.partition("/")[0] != "erofs" else iter([(b"", top)])
        for _, status in found:
            if status.st_ino not in counted:
                counted.add(status.st_ino)
                inodes += 1
                blocks += status.st_blocks
    except FileNotFoundError:
        pass
    return Usage(inodes, blocks * 512)


def _sum(parts: tuple[LayerCost | FlatCost, ...]) -> Usage:
    return Usage(sum(part.usage.inodes for part in parts), sum(part.usage.size_bytes for part in parts))


def _layer_users(database: Database, image: StoredImage, path: str) -> tuple[str, ...]:
    with database.reading() as db:
        where = "digest IN (SELECT image FROM image_layers WHERE layer = ?)"
        return _others(db, image, where, int(path.rpartition("/")[2]))


def _others(db: sqlite3.Connection, image: StoredImage, where: str, value: str | int) -> tuple[str, ...]:
    """Other images, each by one of its names or by its digest."""
    rows = db.execute(
        "SELECT ifnull((SELECT min(name) FROM names WHERE names.image = digest), digest) FROM images"
        f" WHERE {where} AND digest != ? ORDER BY 1",
        (value, image.digest),
    )
    return tuple(row[0] for row in rows.fetchall())
