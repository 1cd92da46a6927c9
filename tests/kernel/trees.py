"""What a directory tree is, as a value that two trees can be compared by."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any


def fact(path: str) -> dict[str, Any]:
    status = os.lstat(path)
    mode = status.st_mode
    result: dict[str, Any] = {
        "mode": oct(mode),
        "owner": (status.st_uid, status.st_gid),
        "mtime_ns": status.st_mtime_ns,
        "xattrs": {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        },
    }
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            result["content"] = hashlib.sha256(file.read()).hexdigest()
    elif stat.S_ISLNK(mode):
        result["target"] = os.readlink(path)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        result["device"] = status.st_rdev
    return result


def facts(root: str) -> dict[str, dict[str, Any]]:
    """Every path below `root`, and the root itself as "."; names of one inode know each other."""
    found: dict[str, dict[str, Any]] = {".": fact(root)}
    inodes: dict[tuple[int, int], list[str]] = {}
    for here, directories, files in os.walk(root):
        for name in sorted(directories) + sorted(files):
            path = os.path.join(here, name)
            relative = os.path.relpath(path, root)
            found[relative] = fact(path)
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                inodes.setdefault((status.st_dev, status.st_ino), []).append(relative)
    for names in inodes.values():
        for name in names:
            found[name]["links"] = sorted(names)
    return found


def listing(root: str) -> list[str]:
    """The paths alone, sorted."""
    return sorted(path for path in facts(root) if path != ".")
