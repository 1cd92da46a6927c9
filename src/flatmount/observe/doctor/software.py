"""Engines on a node: versions, images with their layers, where layers are kept, and time-outs in the journal."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from flatmount.errors import FlatmountError
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import MountEntry
from flatmount.kernel.namespaces import user_namespace
from flatmount.observe.doctor.state import Engine, Image, LayerStore, TimeOut
from flatmount.observe.processes import Process, is_trusted
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import USER_NAMESPACE, MountPlan, MountSetattr, OpenTree, Slot

_PROGRAMS = ("containerd", "runc", "crun", "crio", "podman", "dockerd")
_VERSION = re.compile(r"(?<![\d.])v?(\d+)\.(\d+)(?:\.(\d+))?")
_VERSION_S = 2.0
_CONTENT = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256"
_STORAGE = "/var/lib/containers/storage"
_STORES = (
    ("containerd", "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs"),
    ("podman or CRI-O", f"{_STORAGE}/overlay"),
    ("docker", "/var/lib/docker/overlay2"),
    ("flatmount", "/var/lib/flatmount/v1/data"),
)
_MOST_CONFIG_BYTES = 1 << 18
_IMAGES_S = 1.0
_MAPPING = Mapping.single(100000)

_JOURNAL = (
    *("journalctl", "--quiet", "--no-pager", "--output=cat", "--since=-15min", "--lines=20000"),
    *("-u", "kubelet", "-u", "containerd", "-u", "crio", "-u", "docker"),
)
_JOURNAL_S = 2.5
_MOST_EXAMPLE = 160
_TIME_OUTS = (
    ("PLEG is not healthy", re.compile(r"PLEG is not healthy")),
    ("a container name is still reserved", re.compile(r"failed to reserve container name")),
    ("a pod sandbox was not made in time", re.compile(r"(?i)sandbox.*(?:context deadline exceeded|DeadlineExceeded)")),
    ("a container was not made in time", re.compile(r"(?i)container.*(?:context deadline exceeded|DeadlineExceeded)")),
    ("a deadline was exceeded", re.compile(r"context deadline exceeded|DeadlineExceeded")),
)


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The first version number in what a program says about itself: `1.6.20~ds1` is (1, 6, 20)."""
    match = _VERSION.search(text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def engines(processes: Sequence[Process]) -> tuple[Engine, ...]:
    """The engines that run here or are installed, each asked for its version once.

    Asking executes: of what runs only binaries of root's or our own processes that nobody else could have put there.
    """
    running = {
        process.name: process.pid for process in processes if process.name in _PROGRAMS and is_trusted(process.pid)
    }
    found = []
    for name in _PROGRAMS:
        path = _program(name, running.get(name))
        if path is None:
            continue
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=_VERSION_S, check=False
            ).stdout
            line = next((line for line in said.splitlines() if line.strip()), "")
            version = parse_version(line)
            if version is not None:
                found.append(Engine(name, version, line.strip(), path, name in running))
    return tuple(found)


def _program(name: str, pid: int | None) -> str | None:
    # The binary that runs may not be the one in PATH; one in a container's own root is none of this node's.
    if pid is not None:
        with suppress(OSError):
            path = os.readlink(f"/proc/{pid}/exe")
            if only_ours_to_change(path) and os.path.samestat(os.stat(path), os.stat(f"/proc/{pid}/exe")):
                return path
    # An empty path would be the current directory.
    path = os.environ.get("PATH") or os.defpath
    return shutil.which(name, path=f"{path}:/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin")


def only_ours_to_change(path: str) -> bool:
    """Whether a file and every directory above it are root's or ours and nobody else may write to them.

    An absolute path without symbolic links, which anybody may write to. Raises: OSError.
    """
    while True:
        status = os.lstat(path)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


def images() -> tuple[Image, ...]:
    """Images in the stores of engines, with their layers; those that can be read within a second."""
    until = time.monotonic() + _IMAGES_S
    return (*content_images(_CONTENT, until), *storage_images(_STORAGE))


def content_images(blobs: str, until: float) -> tuple[Image, ...]:
    """Images of containerd's content store: its configurations, called by their digests."""
    found = []
    with suppress(OSError), os.scandir(blobs) as entries:
        for entry in entries:
            if time.monotonic() > until:
                break
            with suppress(OSError, ValueError):
                if entry.stat().st_size > _MOST_CONFIG_BYTES:
                    continue
                with open(entry.path, "rb") as file:
                    content = file.read()
                if b'"diff_ids"' in content:
                    layers = json.loads(content)["rootfs"]["diff_ids"]
                    found.append(Image("containerd", f"image {entry.name[:12]}", len(layers)))
    return tuple(found)


def storage_images(storage: str) -> tuple[Image, ...]:
    """Images of containers/storage, with their layers counted along the parents of the top one."""
    try:
        with open(f"{storage}/overlay-images/images.json", encoding="utf-8") as file:
            listed: list[dict[str, Any]] = json.load(file)
        with open(f"{storage}/overlay-layers/layers.json", encoding="utf-8") as file:
            parents = {layer["id"]: layer.get("parent") for layer in json.load(file)}
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(
        Image(
            "podman or CRI-O",
            (image.get("names") or [f"image {str(image.get('id'))[:12]}"])[0],
            sum(1 for _ in _chain(image.get("layer"), parents)),
        )
        for image in listed
    )


def _chain(layer: str | None, parents: dict[str, str | None]) -> Iterator[str]:
    seen: set[str] = set()
    while layer and layer in parents and layer not in seen:
        seen.add(layer)
        yield layer
        layer = parents[layer]


def layer_stores(table: Sequence[MountEntry]) -> tuple[LayerStore, ...]:
    """The directories in which engines here keep layers, and whether their file systems can be id-mapped.

    Tried on a detached clone of the directory that is dropped again: nothing is attached, nothing written.
    """
    return tuple(
        LayerStore(engine, path, file_system_of(path, table), try_idmap(path) if os.geteuid() == 0 else None)
        for engine, path in _STORES
        if os.path.isdir(path)
    )


def file_system_of(path: str, table: Iterable[MountEntry]) -> str:
    """The type of the file system that a directory is on, by the mount table."""
    best = max(
        (entry for entry in table if _below(path, entry.mount_point)),
        key=lambda entry: len(entry.mount_point),
        default=None,
    )
    return best.fs_type if best else "?"


def _below(path: str, mount_point: str) -> bool:
    return mount_point == "/" or path == mount_point or path.startswith(mount_point + "/")


def try_idmap(path: str) -> str:
    """ "" where a clone of the directory could be id-mapped, else the kernel's word."""
    tree = Slot("tree")
    try:
        namespace = user_namespace(_MAPPING)
        run_once(
            MountPlan((OpenTree(tree, path), MountSetattr(tree, userns=USER_NAMESPACE))),
            {USER_NAMESPACE: namespace.fileno()},
        )
    except FlatmountError as error:
        return str(error).partition(", operation")[0]
    except OSError as error:
        return f"no user namespace: {error.strerror}"
    return ""


def time_outs() -> tuple[tuple[TimeOut, ...], str]:
    """Time-outs of kubelet and runtimes in the journal of the last quarter of an hour; and why not, "" if they were."""
    if shutil.which(_JOURNAL[0]) is None:
        return (), "there is no journalctl"
    try:
        done = subprocess.run(
            _JOURNAL, capture_output=True, text=True, errors="replace", timeout=_JOURNAL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return (), "reading it took too long"
    except OSError as error:
        return (), str(error)
    return classify_time_outs(done.stdout.splitlines()), ""


def classify_time_outs(lines: Iterable[str]) -> tuple[TimeOut, ...]:
    """Time-outs by kind, in the order of their weight; a line counts once, for the first kind that it is of."""
    found: dict[str, tuple[int, str]] = {}
    for line in lines:
        for what, pattern in _TIME_OUTS:
            if pattern.search(line):
                found[what] = (found.get(what, (0, ""))[0] + 1, line.strip()[:_MOST_EXAMPLE])
                break
    return tuple(TimeOut(what, *found[what]) for what, _ in _TIME_OUTS if what in found)
