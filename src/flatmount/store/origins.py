"""Where an image came from: its documents, and the registries that have its layers."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Final

from flatmount.errors import UnknownImage
from flatmount.store.database import Database

_KEPT: Final = 4


@dataclass(frozen=True, slots=True)
class Origins:
    """The bytes of an image's manifest and config, and the references it was pulled by, the last one first."""

    manifest_raw: bytes
    config_raw: bytes
    references: tuple[str, ...]


def origins(database: Database, digest: str) -> Origins:
    """What is known of the image with this digest. Raises: UnknownImage, when it was removed meanwhile."""
    query = (
        "SELECT manifest.content, config.content FROM images JOIN documents AS manifest"
        " ON manifest.digest = images.digest JOIN documents AS config ON config.digest = config_digest"
        " WHERE images.digest = ?"
    )
    with database.reading() as db:
        row = db.execute(query, (digest,)).fetchone()
        told = db.execute("SELECT reference FROM origins WHERE image = ? ORDER BY seen_ns DESC, reference", (digest,))
        references = tuple(str(reference) for (reference,) in told)
    if row is None:
        raise UnknownImage(f"image {digest} was removed meanwhile", hint="import it again")
    return Origins(bytes(row[0]), bytes(row[1]), references)


def book_origin(db: sqlite3.Connection, image: str, origin: str | None) -> None:
    """Remember where `image` can be had again: the places that were used last, a few of them."""
    if origin is None:
        return
    db.execute("INSERT OR REPLACE INTO origins VALUES (?, ?, ?)", (image, origin, time.time_ns()))
    db.execute(
        "DELETE FROM origins WHERE image = ? AND reference NOT IN"
        " (SELECT reference FROM origins WHERE image = ? ORDER BY seen_ns DESC, reference LIMIT ?)",
        (image, image, _KEPT),
    )
