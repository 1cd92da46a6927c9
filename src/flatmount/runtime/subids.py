"""The host's ids that containers may be given."""

from __future__ import annotations

import os
import re
from typing import Final

from flatmount.errors import MissingFeature, UsageError
from flatmount.plan.mapping import Mapping
from flatmount.store.ranges import HostIds

RANGE_SIZE: Final = 65536
_LAST = 2**32 - 2
_ROOT = ("root", "0")


def pool(configured: str | None, *, directory: str = "/etc") -> tuple[HostIds, ...]:
    """Ids to take ranges from: `configured` (FIRST:COUNT[,…]), or what root has in both subuid and subgid.

    Raises: UsageError for a pool that cannot be meant; MissingFeature where root has no such ids.
    """
    if configured:
        return tuple(_parse(part, configured) for part in configured.split(","))
    uids, gids = (_of_root(os.path.join(directory, name)) for name in ("subuid", "subgid"))
    both = tuple(
        HostIds(first, end - first)
        for a in uids
        for b in gids
        if (first := max(a.first, b.first)) < (end := min(a.end, b.end))
    )
    if not both:
        raise MissingFeature(
            f"root has no ids in {directory}/subuid and {directory}/subgid that --map auto could take",
            hint="put `root:1048576:67108864` into both, or name ids with --pool FIRST:COUNT or --map",
        )
    return both


def host_ids(mapping: Mapping) -> tuple[HostIds, ...]:
    """The host's ids that a mapping uses, for users and groups together, merged."""
    found: list[HostIds] = []
    for one in sorted({HostIds(r.host, r.size) for r in (*mapping.uids, *mapping.gids)}):
        if found and one.first <= found[-1].end:
            found[-1] = HostIds(found[-1].first, max(found[-1].end, one.end) - found[-1].first)
        else:
            found.append(one)
    return tuple(found)


def _parse(part: str, whole: str) -> HostIds:
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", part)
    if match is None or int(match[2]) == 0 or int(match[1]) + int(match[2]) - 1 > _LAST:
        raise UsageError(f"pool {whole!r}: {part!r} is not FIRST:COUNT", hint="as in 1048576:67108864")
    return HostIds(int(match[1]), int(match[2]))


def _of_root(path: str) -> list[HostIds]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        fields = line.strip().split(":")
        if len(fields) == 3 and fields[0] in _ROOT and fields[1].isdigit() and fields[2].isdigit() and int(fields[2]):
            found.append(HostIds(int(fields[1]), int(fields[2])))
    return found
