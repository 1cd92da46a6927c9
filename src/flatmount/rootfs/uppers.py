"""Uppers that outlive their mount: made with a mark of whose they are, used again only for what they were made for.

UPPERS/<name>/upper.json     image, ids, mapping, and the mount that made it
UPPERS/<name>/{fs,work}      made by the plan
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flatmount.errors import UsageError
from flatmount.kernel.tree import remove_tree
from flatmount.plan.mapping import Mapping
from flatmount.strategies import Ids, Upper

UPPER_RECORD = "upper.json"


@dataclass(frozen=True, slots=True)
class UpperPlace:
    """Where an upper is: directory `name` in `uppers`."""

    kind: Upper
    uppers: str
    name: str

    @property
    def path(self) -> str:
        """The upper's own directory."""
        return os.path.join(self.uppers, self.name)


def make_upper(place: UpperPlace, *, mount_id: str, image: str, ids: Ids, mapping: Mapping, ephemeral: bool) -> None:
    """Make the upper's directory with its mark in it; the mark is there before anything else is.

    Raises: UsageError where somebody made it meanwhile.
    """
    try:
        os.mkdir(place.path, 0o700)
    except FileExistsError:
        raise UsageError(f"{place.path} exists by now", hint="name another --upper") from None
    mark = {"image": image, "ids": ids.value, "map": str(mapping), "ephemeral": ephemeral, "mount": mount_id}
    draft = os.path.join(place.path, f".{UPPER_RECORD}")
    with open(draft, "x", encoding="utf-8") as file:
        json.dump(mark, file)
    os.rename(draft, os.path.join(place.path, UPPER_RECORD))


def check_reuse(place: UpperPlace, *, image: str, ids: Ids, mapping: Mapping) -> None:
    """An upper that exists may only be used for what it was made for: other ids in it would be other owners.

    Raises: UsageError, with what it was made for.
    """
    known = _mark(place.uppers, place.name)
    if known is None:
        raise UsageError(f"{place.path} exists and is no upper of ours", hint="name one that does not exist")
    if known["image"] != image:
        raise UsageError(f"the upper {place.path} belongs to image {known['image']}", hint="name another one")
    if known["ids"] != ids.value:
        raise UsageError(
            f"the upper {place.path} keeps the ids of the {known['ids']}, this strategy those of the {ids.value}",
            hint="use the strategy it was made with",
        )
    if ids is Ids.HOST and known["map"] != str(mapping):
        raise UsageError(
            f"the upper {place.path} keeps host ids of the mapping {known['map']}", hint="use that mapping"
        )


def remove_own_upper(uppers: str, name: str, mount_id: str) -> None:
    """Remove the upper that the mount `mount_id` made. What does not carry its mark is not ours, and stays.

    An empty directory goes too: a kill between its making and its mark leaves one.
    """
    known = _mark(uppers, name)
    if known is None or known["mount"] != mount_id:
        with suppress(OSError):
            os.rmdir(os.path.join(uppers, name))
        return
    parent = os.open(uppers, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, name)
    finally:
        os.close(parent)


def _mark(uppers: str, name: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(uppers, name, UPPER_RECORD), encoding="utf-8") as file:
            known = json.load(file)
    except (OSError, ValueError):
        return None
    fields = {"image", "ids", "map", "mount"}
    return known if isinstance(known, dict) and fields <= known.keys() else None
