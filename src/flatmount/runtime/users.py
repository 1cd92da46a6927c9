"""Who a container runs as: names looked up in the image's own user database, without mounting or leaving it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from flatmount.errors import FlatmountError, UsageError
from flatmount.kernel.lookup import read_in_root
from flatmount.plan.mapping import Mapping

_PASSWD = "/etc/passwd"
_GROUP = "/etc/group"
_MOST_BYTES = 8 << 20  # a database that is larger is an attack on whoever reads it
_LAST_ID = 2**32 - 2  # 2^32 - 1 is nobody's: (uid_t)-1


@dataclass(frozen=True, slots=True)
class User:
    """Ids as the container sees them. `home` is "" where the database does not say."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(root_fd: int, asked: str) -> User:
    """The user that `asked` names: USER, USER:GROUP, either of them a name or an id; "" is root.

    `root_fd` is the borrowed root directory of the container. An id need not be in the database, a name must be; ids
    go before names that look like ids.

    Raises: FlatmountError for what is not in the image; UsageError for an id that no process can have.
    """
    name, colon, group = asked.partition(":")
    name = name or "0"
    accounts = list(_entries(root_fd, _PASSWD, 7))
    groups = list(_entries(root_fd, _GROUP, 4))
    uid = _id(name, "user")
    account = next((entry for entry in accounts if entry[0] == name), None) if uid is None else None
    if uid is not None:
        account = next((entry for entry in accounts if _number(entry[2]) == uid), None)
    elif account is None or (uid := _number(account[2])) is None:
        raise FlatmountError(f"the user {name!r} is not in the image", hint=f"give an id, or a name of its {_PASSWD}")
    gid = (_number(account[3]) if account is not None else 0) or 0
    if colon and group:
        return User(uid, _group(group, groups), (), account[5] if account is not None else "")
    login = account[0] if account is not None else None
    also = {number for entry in groups if login in entry[3].split(",") if (number := _number(entry[2])) is not None}
    return User(uid, gid, tuple(sorted(also - {gid})), account[5] if account is not None else "")


def require_mapped(user: User, mapping: Mapping) -> None:
    """Refuse a user whose ids the container's range does not have. Raises: MappingError."""
    mapping.host_uid(user.uid)
    for gid in (user.gid, *user.groups):
        mapping.host_gid(gid)


def _group(asked: str, groups: list[list[str]]) -> int:
    gid = _id(asked, "group")
    if gid is None:
        entry = next((entry for entry in groups if entry[0] == asked), None)
        gid = _number(entry[2]) if entry is not None else None
    if gid is None:
        raise FlatmountError(f"the group {asked!r} is not in the image", hint=f"give an id, or a name of its {_GROUP}")
    return gid


def _id(text: str, kind: str) -> int | None:
    """`text` as an id, or None where it is a name."""
    if not (text.isascii() and text.isdigit()):
        return None
    number = _number(text)
    if number is None:
        raise UsageError(f"no process can have the {kind} id {text[:40]}", hint=f"the last one is {_LAST_ID}")
    return number


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) > _LAST_ID:
        return None
    return int(text)


def _entries(root_fd: int, path: str, fields: int) -> Iterator[list[str]]:
    """Lines of a colon-separated database with at least so many fields; others are left out, as libraries do."""
    try:
        content = read_in_root(root_fd, path, most_bytes=_MOST_BYTES)
    except OSError as error:
        what = "is larger than any user database" if error.errno == errno.EFBIG else "is not a file that can be read"
        raise FlatmountError(f"the image's {path} {what}: {os.strerror(error.errno or 0)}") from error
    for line in (content or b"").decode("utf-8", "surrogateescape").split("\n"):
        parts = line.split(":")
        if len(parts) >= fields and parts[0] and not line.startswith("#"):
            yield parts
