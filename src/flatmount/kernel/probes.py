"""What this host can do: each feature is tried, in a mount namespace that is thrown away.

Version numbers say little (distributions carry fixes back, security modules and seccomp filters take calls away), and
id-mapped mounts depend on the store's file system as well.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from flatmount.errors import FlatmountError, MissingFeature, OperationFailed
from flatmount.kernel import _native
from flatmount.kernel.erofs import FSTYPE, write_erofs
from flatmount.kernel.executor import run_once
from flatmount.kernel.loop import loop_device
from flatmount.kernel.mounts import MountEvents, TableSource, table_source
from flatmount.kernel.namespaces import (
    Namespace,
    apart,
    empty_mount_namespace,
    enter_mounts,
    enter_private_mounts,
    user_namespace,
)
from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.kernel.tree import remove_tree
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import (
    LAYERS,
    USER_NAMESPACE,
    AssumeIds,
    Fchdir,
    FsConfigCreate,
    FsConfigFd,
    FsConfigFlag,
    FsConfigString,
    FsMount,
    FsOpen,
    Mount,
    MountFlag,
    MountPlan,
    MountSetattr,
    MoveMount,
    Open,
    OpenTree,
    Operation,
    Slot,
    Unmount,
    UnmountFlag,
)

_PREFIX = "probe"
_INSIDE = "/scratch"
_MAPPING = Mapping.single(100000)
_IDS = (100000, 100000, 100000, 100000)
_CONTEXT = Slot("overlay")
_TREE = Slot("tree")
_ATTACHED = Slot("attached")


@dataclass(frozen=True, slots=True)
class Feature:
    """One probe's answer. `said` is the kernel's word where it refused; `since` is the first version that has it."""

    name: str
    title: str
    since: str
    available: bool
    said: str = ""


@dataclass(frozen=True, slots=True)
class Probes:
    """All answers for one directory's file system."""

    directory: str
    features: tuple[Feature, ...]

    @property
    def facts(self) -> HostFacts:
        """The answers as what strategies take."""
        return HostFacts(**{feature.name: feature.available for feature in self.features})


# name (a field of HostFacts), title, first kernel version
_FEATURES = (
    ("idmapped_mounts", "id-mapped mounts on this file system", "5.12"),
    ("idmapped_layers", "overlayfs over id-mapped layers", "5.19"),
    ("idmapped_upper", "an id-mapped upper, kept in the container's ids", "5.19"),
    ("lowerdir_append", "layers one by one (lowerdir+)", "6.7"),
    ("layer_descriptors", "layers as descriptors", "6.13"),
    ("detached_layers", "detached layers", "6.15"),
    ("open_tree_attr", "open_tree_attr", "6.15"),
    ("statmount", "listmount and statmount", "6.8"),
    ("mount_events", "mount events by fanotify", "6.15"),
    ("erofs_files", "EROFS images from files, id-mapped", "6.12"),
    ("erofs_devices", "EROFS images through loop devices, id-mapped", "5.19"),
)
_TRIED = tuple(name for name, _, _ in _FEATURES[:6])
_IMAGES = ("erofs_files", "erofs_devices")


def probe(directory: str, *, images: bool = True) -> Probes:
    """Try every feature for the file system that holds `directory`; those of EROFS images only if `images`.

    Takes some milliseconds however long the host's mount table is: an empty mount namespace, a user namespace and a few
    mounts, all gone when it returns, and a small directory below `directory`, removed again. Needs CAP_SYS_ADMIN and
    write access there; what cannot be tried counts as absent, with the kernel's word.
    """
    answers = dict.fromkeys(_IMAGES, "not tried: there is no image")
    try:
        with closing(empty_mount_namespace()) as empty:
            answers |= _answers_inside(directory, empty, user_namespace(_MAPPING), images)
    except (OSError, FlatmountError) as error:
        answers = dict.fromkeys((*_TRIED, *_IMAGES), _not_tried(error))
    answers["open_tree_attr"] = "no such call" if _native.try_open_tree_attr() == errno.ENOSYS else ""
    answers["statmount"] = "" if table_source() is TableSource.STATMOUNT else "no such call"
    answers["mount_events"] = _refusal(lambda: MountEvents().close())
    return Probes(
        directory,
        tuple(Feature(name, title, since, not answers[name], answers[name]) for name, title, since in _FEATURES),
    )


def _answers_inside(directory: str, empty: Namespace, namespace: Namespace, images: bool) -> dict[str, str]:
    """Try what needs mounts, where nothing can be seen but a clone of a scratch directory of `directory`."""

    def attempts(scratch: str, clone: int) -> dict[str, str]:
        try:
            enter_mounts(empty)
        except OSError:
            enter_private_mounts()  # setns(2) is refused, which is no answer about mounts: a copy of the host's table
            inside = scratch
        else:
            inside = _INSIDE
            os.mkdir(inside, 0o700)
            # The clone of a shared mount is its peer: what is attached below it would appear on the host as well.
            private = Mount("none", inside, None, MountFlag.PRIVATE)
            run_once(MountPlan((MoveMount(LAYERS, inside), private)), {LAYERS: clone})
        return {name: _refusal(attempt) for name, attempt in _attempts(inside, namespace).items()}

    with _scratch(directory) as scratch:
        clone = run_once(MountPlan((OpenTree(_TREE, scratch),), outputs=(_TREE,))).outputs[0]
        try:
            # Nothing of EROFS is attached to be tried, and loop devices are the host's.
            return apart(lambda: attempts(scratch, clone)) | (_image_answers(scratch, namespace) if images else {})
        finally:
            os.close(clone)


def _image_answers(scratch: str, namespace: Namespace) -> dict[str, str]:
    # On a full disk no image can be made to be tried with, which says nothing about anything else.
    try:
        return _erofs(scratch, namespace)
    except (OSError, FlatmountError) as error:
        return dict.fromkeys(_IMAGES, _not_tried(error))


def _not_tried(error: OSError | FlatmountError) -> str:
    return f"not tried: {os.strerror(error.errno or 0) if isinstance(error, OSError) else error}"


def _refusal(attempt: Callable[[], object]) -> str:
    """What was said against it, "" where it works."""
    try:
        attempt()
    except FlatmountError as refusal:
        return str(refusal).rpartition(", operation")[0] or str(refusal)
    except OSError as refusal:
        return f"{refusal.filename or 'loop device'}: {refusal.strerror}"
    return ""


@contextmanager
def _scratch(directory: str) -> Iterator[str]:
    """A directory with two lowers, an upper and a work directory; those that killed probes left are taken along."""
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    name = owned_name(f"{_PREFIX}-{threading.get_native_id()}")
    try:
        for stale in os.listdir(parent):
            if stale.startswith(f"{_PREFIX}-") and owner_is_gone(stale):
                remove_tree(parent, stale)
        os.mkdir(name, 0o700, dir_fd=parent)
        path = os.path.join(directory, name)
        for part in ("a", "b", "point", "uppers", "uppers/fs", "uppers/work"):
            os.mkdir(os.path.join(path, part), 0o755)
        yield path
    finally:
        remove_tree(parent, name)
        os.close(parent)


def _attempts(scratch: str, namespace: Namespace) -> dict[str, Callable[[], object]]:
    lent = {USER_NAMESPACE: namespace.fileno()}
    clone: tuple[Operation, ...] = (OpenTree(_TREE, scratch), MountSetattr(_TREE, userns=USER_NAMESPACE))
    point = f"{scratch}/point"
    attach = (*clone, MoveMount(_TREE, point), Open(_ATTACHED, point), Fchdir(_ATTACHED))
    detach = Unmount(point, UnmountFlag.DETACH)
    context = FsOpen(_CONTEXT, "overlay")

    def overlay(**options: str) -> tuple[Operation, ...]:
        strings = (FsConfigString(_CONTEXT, key, value) for key, value in options.items())
        return (context, *strings, FsConfigCreate(_CONTEXT))

    def run(*operations: Operation) -> Callable[[], object]:
        return lambda: run_once(MountPlan(operations), lent, ids=_IDS)

    def detached_layers() -> None:
        pinned = run_once(MountPlan(clone, outputs=(_TREE,)), lent).outputs[0]
        try:
            run_once(MountPlan((Fchdir(LAYERS), *overlay(lowerdir="a:b"))), {LAYERS: pinned})
        finally:
            os.close(pinned)

    def lowerdir_append() -> None:
        run(context, FsConfigString(_CONTEXT, "lowerdir+", f"{scratch}/a"))()
        # Before 6.5 overlayfs keeps what it is given as one string and looks at it only when it mounts.
        try:
            run(context, FsConfigFlag(_CONTEXT, "flatmount-no-such-option"))()
        except OperationFailed:
            return
        raise MissingFeature("overlayfs takes any option before it mounts: the parser before Linux 6.5")

    lower = Slot("lower")
    return {
        "idmapped_mounts": run(*clone),
        "idmapped_layers": run(*attach, *overlay(lowerdir="a:b"), detach),
        "idmapped_upper": run(
            *attach, AssumeIds(), *overlay(lowerdir="a", upperdir="uppers/fs", workdir="uppers/work"), detach
        ),
        "lowerdir_append": lowerdir_append,
        "layer_descriptors": run(context, Open(lower, f"{scratch}/a"), FsConfigFd(_CONTEXT, "lowerdir+", lower)),
        "detached_layers": detached_layers,
    }


def _erofs(scratch: str, namespace: Namespace) -> dict[str, str]:
    """Mount an image of an empty directory, from its file or else from a loop device, and id-map it."""
    path = f"{scratch}/image"
    tree = os.open(f"{scratch}/a", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        image = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_erofs(tree, image, "probe")
        finally:
            os.close(image)
    finally:
        os.close(tree)
    directory, context = Slot("directory"), Slot(FSTYPE)

    def mount(source: str) -> None:
        plan = MountPlan(
            (
                Open(directory, scratch),
                Fchdir(directory),
                FsOpen(context, FSTYPE),
                FsConfigString(context, "source", source),
                FsConfigFlag(context, "ro"),
                FsConfigCreate(context),
                FsMount(_TREE, context),
                MountSetattr(_TREE, userns=USER_NAMESPACE),
            )
        )
        run_once(plan, {USER_NAMESPACE: namespace.fileno()})

    def mount_device() -> None:
        with loop_device(path) as device:
            mount(device)

    refused = _refusal(lambda: mount("image"))
    # A loop device is everybody's to see: none is taken where files do.
    return {"erofs_files": refused, "erofs_devices": _refusal(mount_device) if refused else "not tried: files do"}
