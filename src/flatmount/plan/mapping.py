"""Which ids of a container are which ids of the host."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from flatmount.errors import MappingError

_IDS = 2**32 - 1  # 4294967295 is (uid_t)-1, which no file and no process can have
_KERNEL_EXTENTS = 340  # user_namespaces(7): lines in uid_map since Linux 4.15


@dataclass(frozen=True, slots=True, order=True)
class IdRange:
    """`size` consecutive ids: `container` and up inside are `host` and up outside."""

    container: int
    host: int
    size: int

    def __str__(self) -> str:
        return f"{self.container}:{self.host}:{self.size}"


@dataclass(frozen=True, slots=True)
class Mapping:
    """The uid and gid ranges of one container. Hashable: user namespaces are cached by it."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]

    @classmethod
    def parse(cls, uid_map: str, gid_map: str | None = None) -> Mapping:
        """Read `CONTAINER:HOST:SIZE[,…]`; the uid map serves for gids too unless one is given.

        Raises: MappingError, with the offending part.
        """
        uids = parse_ranges(uid_map)
        return cls(uids, parse_ranges(gid_map) if gid_map is not None else uids)

    @classmethod
    def single(cls, host: int, size: int = 65536) -> Mapping:
        """Container ids from 0 as `size` host ids from `host`."""
        ranges = (IdRange(0, host, size),)
        return cls(ranges, ranges)

    def host_uid(self, uid: int) -> int:
        """The host's uid of a container's uid. Raises: MappingError where it has none."""
        return _translate(self.uids, uid, "uid")

    def host_gid(self, gid: int) -> int:
        """The host's gid of a container's gid. Raises: MappingError where it has none."""
        return _translate(self.gids, gid, "gid")

    def __str__(self) -> str:
        uids = ",".join(map(str, self.uids))
        gids = ",".join(map(str, self.gids))
        return uids if uids == gids else f"{uids} (gids {gids})"


@lru_cache(maxsize=4096)
def parse_ranges(text: str) -> tuple[IdRange, ...]:
    """Read a comma list of `CONTAINER:HOST:SIZE`, as `/proc/PID/uid_map` takes them.

    Raises: MappingError for a malformed part, an empty or overflowing range, and ranges that overlap on either side.
    """
    ranges: list[IdRange] = []
    for part in text.split(","):
        fields = part.split(":")
        if len(fields) != 3 or not all(f.isascii() and f.isdigit() for f in fields):
            raise MappingError(f"mapping {text!r}: {part!r} is not CONTAINER:HOST:SIZE", hint="as in 0:100000:65536")
        entry = IdRange(*map(int, fields))
        if entry.size == 0:
            raise MappingError(f"mapping {text!r}: {part!r} maps nothing", hint="give a size of at least 1")
        if max(entry.container, entry.host) + entry.size > _IDS:
            raise MappingError(
                f"mapping {text!r}: {part!r} goes past the last id, {_IDS - 1}", hint="use a smaller range"
            )
        ranges.append(entry)
    if len(ranges) > _KERNEL_EXTENTS:
        raise MappingError(f"mapping has {len(ranges)} ranges", hint=f"the kernel takes {_KERNEL_EXTENTS}")
    for side in ("container", "host"):
        spans = sorted((getattr(r, side), getattr(r, side) + r.size, r) for r in ranges)
        for (_, end, one), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                raise MappingError(
                    f"mapping {text!r}: {one} and {other} overlap on the {side}'s side",
                    hint="make the ranges disjoint",
                )
    return tuple(ranges)


def _translate(ranges: tuple[IdRange, ...], container_id: int, kind: str) -> int:
    for entry in ranges:
        if entry.container <= container_id < entry.container + entry.size:
            return entry.host + container_id - entry.container
    covered = ",".join(map(str, ranges))
    raise MappingError(
        f"the mapping {covered} has no host {kind} for the image's {kind} {container_id}",
        hint="use a larger range",
    )
