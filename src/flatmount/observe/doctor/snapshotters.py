"""Which snapshotter containerd is configured for, read from its configuration, and what that means for mounts.

Read and not asked: a doctor talks to no daemon. Versions 1, 2 and 3 of the file, its `imports`, and the `--config` of a
containerd that runs. See: containerd's docs/man/containerd-config.toml.5.md and docs/PLUGINS.md.
"""

from __future__ import annotations

import glob
import os
import stat
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flatmount.observe.doctor.findings import Finding, Severity
from flatmount.observe.leaks import own_namespace
from flatmount.observe.processes import Process, is_trusted
from flatmount.snapshotter import containerd

DEFAULT_PATH = "/etc/containerd/config.toml"
_K3S_PATH = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"
_MOST_BYTES = 1 << 20
_MOST_IMPORTS = 50
_CRI_TABLES = (
    ("plugins", "io.containerd.cri.v1.images"),  # version 3
    ("plugins", "io.containerd.grpc.v1.cri", "containerd"),  # version 2
    ("plugins", "cri", "containerd"),  # version 1
)
DEFAULT = "overlayfs"
_COPYING = frozenset(("native",))
_BLOCK = frozenset(("devmapper", "blockfile", "zfs", "btrfs"))
_BUILT_IN = frozenset((DEFAULT, "erofs", "aufs", *_COPYING, *_BLOCK))
_FUSE = frozenset(("stargz", "soci", "nydus", "overlaybd", "fuse-overlayfs", "cvmfs-snapshotter"))


@dataclass(frozen=True, slots=True)
class Snapshotter:
    """What containerd's configuration names for images of Kubernetes; `name` is overlayfs where it names none.

    `version` is the file's, 0 where there is no file. `address` is the socket of a proxy plugin, "" for one that is
    built in, None where nothing of this name is configured. `remap_ids`: containerd leaves shifting owners to it.
    `ours`: flatmount's is one of the proxy plugins, for Kubernetes or not. `unpacked_for` are the snapshotters that the
    transfer service is told to unpack for, none where its list is containerd's own.
    """

    name: str
    path: str
    version: int
    address: str | None
    remap_ids: bool
    ours: bool = False
    unpacked_for: tuple[str, ...] = ()


def read_snapshotter(path: str) -> Snapshotter:
    """What the file says. Raises: OSError, ValueError (also what is no TOML)."""
    top = _merged(path)
    version = top.get("version", 1)
    if not isinstance(version, int):
        raise ValueError(f"its version is {version!r}")
    named = (_table(top, keys).get("snapshotter") for keys in _CRI_TABLES)
    name = next((word for word in named if isinstance(word, str) and word), DEFAULT)
    proxy = _table(top, ("proxy_plugins", name))
    address = str(proxy.get("address", "")) if proxy else "" if name in _BUILT_IN else None
    capabilities = proxy.get("capabilities", ())
    remap = isinstance(capabilities, list) and "remap-ids" in capabilities
    ours = bool(_table(top, ("proxy_plugins", containerd.NAME)))
    return Snapshotter(name, path, version, address, remap, ours, tuple(containerd.unpacking_for(top)))


def containerd_here(processes: Iterable[Process]) -> int | None:
    """The pid of the containerd whose files are ours: root's or our own, in our mount namespace and root directory.

    Without root the namespace and root directory of another user's process cannot be seen, and are taken to be ours.
    """
    for process in processes:
        if process.name == "containerd" and process.namespace in (None, own_namespace()) and is_trusted(process.pid):
            try:
                root = os.readlink(f"/proc/{process.pid}/root")
            except PermissionError:
                root = "/"
            except OSError:
                continue
            if root == "/":
                return process.pid
    return None


def find_snapshotter(running_pid: int | None) -> tuple[Snapshotter | None, str]:
    """The configured snapshotter, and why it is not known ("" where it is, or where there is no containerd).

    Args:
        running_pid: of the containerd that runs, for its own `--config`.
    """
    path = _named_by(running_pid) if running_pid is not None else ""
    try:
        if running_pid is not None and path and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/{running_pid}/cwd"), path)
        path = path or next((one for one in (DEFAULT_PATH, _K3S_PATH) if os.path.exists(one)), "")
        if not path:
            return (Snapshotter(DEFAULT, DEFAULT_PATH, 0, "", False), "") if running_pid is not None else (None, "")
        return read_snapshotter(path), ""
    except OSError as error:
        return None, f"containerd's snapshotter: {path}: {error.strerror}"
    except ValueError as error:
        return None, f"containerd's snapshotter: {path}: {error}"


def check(snapshotter: Snapshotter, version: tuple[int, int, int] | None) -> Iterator[Finding]:
    """What follows from the configuration, for a containerd of this version (None: it is not known)."""
    yield from _by_name(snapshotter, version)
    told, cri = snapshotter.unpacked_for, snapshotter.name == containerd.NAME
    if snapshotter.ours and containerd.NAME not in told and (version is None or version >= containerd.UNPACKS_SINCE):
        yield Finding(
            "snapshotter-not-unpacked",
            Severity.WARNING,
            f"containerd pulls no image for its snapshotter {containerd.NAME}",
            (
                f"{snapshotter.path}: [proxy_plugins.{containerd.NAME}] is there, and the transfer service's "
                + (f"unpack_config names {', '.join(told)} only" if told else "list is containerd's own"),
                'pulls by CRI and `ctr` end with "no unpack platforms defined"',
            ),
            "the administrator",
            f"{containerd.adding_it(snapshotter.path, cri=cri)}; then restart containerd",
            True,
        )


def _by_name(snapshotter: Snapshotter, version: tuple[int, int, int] | None) -> Iterator[Finding]:
    name, said = snapshotter.name, f"{snapshotter.path}: snapshotter = {snapshotter.name!r}"
    if snapshotter.address is None and name not in _FUSE:
        yield Finding(
            "snapshotter-missing",
            Severity.WARNING,
            f"containerd is configured for a snapshotter that is not there: {name}",
            (said, f"no [proxy_plugins.{name}], and it is none of those built in"),
            "the administrator",
            "name one that is there, or add its proxy plugin; `ctr plugins ls` shows what containerd has",
            True,
        )
    elif name in _COPYING:
        yield Finding(
            "snapshotter-copies",
            Severity.WARNING,
            f"containerd's snapshotter {name} copies the whole image for each container",
            (said, "few mounts, but time and space of a start grow with the size of the image"),
            "the administrator",
            'configure "overlayfs", unless the file system cannot do it',
            True,
        )
    elif name in _FUSE:
        yield Finding(
            "snapshotter-fuse",
            Severity.NOTE,
            f"containerd's snapshotter {name} has a FUSE mount for each layer it reads remotely",
            (said, "the mount table grows with the layers of the images, and stays so while they are used"),
            name,
            "watch the table's length (`flatmount watch`); FUSE takes id-mapped mounts from Linux 6.12 on, if it asks",
            False,
        )
    elif snapshotter.address and not snapshotter.remap_ids and (version is None or version >= (2, 0, 0)):
        yield Finding(
            "snapshotter-no-remap",
            Severity.WARNING,
            f"containerd changes the owners of a copy although its snapshotter {name} may shift ids",
            (said, f'[proxy_plugins.{name}] has no capabilities = ["remap-ids"]'),
            "the administrator",
            f'add capabilities = ["remap-ids"] to [proxy_plugins.{name}] if it does shift them',
            False,
        )


def _named_by(pid: int) -> str:
    """The `--config` of a process, as it sees it; "" where it has none or may not be read."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")
    except OSError:
        return ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--config", "-c"):
            return following
        if word.startswith("--config="):
            return word.partition("=")[2]
    return ""


def _merged(path: str) -> dict[str, Any]:
    """The file with what it imports laid over it; what cannot be read of that counts as empty."""
    top = _parsed(path)
    patterns = top.get("imports", [])
    for pattern in patterns if isinstance(patterns, list) else []:
        where = os.path.join(os.path.dirname(path), str(pattern))
        for imported in sorted(glob.glob(where))[:_MOST_IMPORTS]:
            if os.path.realpath(imported) != os.path.realpath(path):
                _lay_over(top, _parsed(imported))
    return top


def _parsed(path: str) -> dict[str, Any]:
    # Without waiting for a writer, where it is a fifo.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        return tomllib.loads(file.read(_MOST_BYTES).decode())


def _lay_over(under: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(name), dict):
            _lay_over(under[name], value)
        elif name != "imports":
            under[name] = value


def _table(top: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    table: Any = top
    for key in keys:
        table = table.get(key, {}) if isinstance(table, dict) else {}
    return table if isinstance(table, dict) else {}
