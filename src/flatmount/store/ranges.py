"""Which host ids which container has: no two have one in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flatmount.errors import InUse, MissingFeature
from flatmount.store.database import Database


@dataclass(frozen=True, slots=True, order=True)
class HostIds:
    """`size` ids of the host from `first`."""

    first: int
    size: int

    @property
    def end(self) -> int:
        """The first id behind it."""
        return self.first + self.size

    def overlaps(self, other: HostIds) -> bool:
        """Whether an id is in both."""
        return self.first < other.end and other.first < self.end

    def __str__(self) -> str:
        return f"{self.first}:{self.size}"


class Ranges:
    """The host ids that are taken, in the store's book, by the name of whoever holds them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take_free(
        self, holder: str, pool: Sequence[HostIds], size: int, *, also_taken: Iterable[HostIds] = ()
    ) -> HostIds:
        """Take the lowest `size` consecutive ids of `pool` that nobody has. On disk when this returns.

        `also_taken` are ids that the book does not know of. Raises: MissingFeature where the pool has none left.
        """
        with self._database.transaction() as db:
            taken = sorted([*also_taken, *(HostIds(*row) for row in db.execute("SELECT first, size FROM ranges"))])
            found = next((free for part in pool if (free := _first_free(part, taken, size)) is not None), None)
            if found is None:
                named = ", ".join(map(str, pool)) or "which is empty"
                raise MissingFeature(
                    f"no {size} consecutive ids are free in the pool ({named})",
                    hint="remove containers that ended, or give root more ids in /etc/subuid and /etc/subgid",
                )
            db.execute("INSERT INTO ranges VALUES (?, ?, ?)", (holder, found.first, found.size))
        return found

    def take(self, holder: str, wanted: Sequence[HostIds]) -> None:
        """Take these ids. On disk when this returns. Raises: InUse where somebody has one of them."""
        with self._database.transaction() as db:
            for other, first, size in db.execute("SELECT holder, first, size FROM ranges ORDER BY first").fetchall():
                clash = next((ids for ids in wanted if ids.overlaps(HostIds(first, size))), None)
                if clash is not None:
                    raise InUse(
                        f"host ids {clash} overlap with {first}:{size}, which {other} has",
                        hint="--map auto takes a free range",
                    )
            db.executemany("INSERT INTO ranges VALUES (?, ?, ?)", [(holder, one.first, one.size) for one in wanted])

    def release(self, holder: str) -> None:
        """Give back everything that `holder` has. Nothing is no error."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM ranges WHERE holder = ?", (holder,))

    def holders(self) -> frozenset[str]:
        """Who has ids."""
        with self._database.reading() as db:
            return frozenset(row[0] for row in db.execute("SELECT DISTINCT holder FROM ranges"))


def _first_free(part: HostIds, taken: Sequence[HostIds], size: int) -> HostIds | None:
    """`taken` is sorted by its first ids; parts of it may overlap."""
    at = part.first
    for one in taken:
        if one.end <= at:
            continue
        if one.first >= at + size:
            break
        at = one.end
    return HostIds(at, size) if at + size <= part.end else None
