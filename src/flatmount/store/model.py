"""What the store holds, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from flatmount.errors import MappingError
from flatmount.image import ImageConfig
from flatmount.plan.mapping import IdRange, Mapping

Span = tuple[int, int]


class FlatForm(StrEnum):
    """How the layers of a chain are merged on disk."""

    HARDLINK = "hardlink"  # a directory tree of hard links into the layers
    EROFS = "erofs"  # an EROFS image with a copy of everything


@dataclass(frozen=True, slots=True)
class RootAttributes:
    """What the root directory of a container of the image has."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Owners:
    """The ids that own something in an image, as sorted ranges of first and last."""

    uids: tuple[Span, ...]
    gids: tuple[Span, ...]

    def require(self, mapping: Mapping) -> None:
        """Do nothing when `mapping` has a host id for every owner.

        Raises: MappingError, naming one that has none.
        """
        for kind, spans, ranges in (("uid", self.uids, mapping.uids), ("gid", self.gids, mapping.gids)):
            missing = next((id_ for span in spans if (id_ := _uncovered(span, ranges)) is not None), None)
            if missing is not None:
                covered = ",".join(map(str, ranges))
                raise MappingError(
                    f"the mapping {covered} has no host {kind} for the image's {kind} {missing}",
                    hint=_wider(kind, missing, spans[-1][1], ranges),
                )

    def union(self, other: Owners) -> Owners:
        """The owners of both."""
        return Owners(merge(self.uids + other.uids), merge(self.gids + other.gids))


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer on disk.

    `path` is relative to the data directory; `size_bytes` is the content of its files.
    """

    diff_id: str
    path: str
    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image: layers bottom to top, and what holds for the whole.

    `files` counts everything but directories in all layers, also what upper layers hide.
    """

    name: str | None
    digest: str
    config: ImageConfig
    layers: tuple[StoredLayer, ...]
    chain_id: str
    files: int
    root: RootAttributes
    owners: Owners
    dropped_xattrs: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal took away. An image that has another name left, or a layer that others use, stays.

    `stuck` says of each tree that could not be deleted why; it is out of the book, and the next command tries again.
    """

    names: tuple[str, ...]
    images: tuple[str, ...]
    layers: int
    entries: int
    size_bytes: int
    stuck: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who uses an image, which cannot be removed meanwhile."""

    holder: str
    digest: str
    since_ns: int


def _wider(kind: str, missing: int, last: int, ranges: tuple[IdRange, ...]) -> str:
    text = f"use a mapping that covers {kind} {missing}"
    return text if missing == last or _uncovered((last, last), ranges) is None else f"{text} and reaches {kind} {last}"


def merge(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorted spans that neither overlap nor touch."""
    result: list[Span] = []
    for first, last in sorted(spans):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return tuple(result)


def _uncovered(span: Span, ranges: tuple[IdRange, ...]) -> int | None:
    at = span[0]
    for entry in sorted(ranges):
        if entry.container <= at < entry.container + entry.size:
            at = entry.container + entry.size
    return at if at <= span[1] else None
