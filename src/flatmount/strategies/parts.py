"""Pieces that several strategies are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import (
    HELPER,
    HOME,
    IMAGE_ROOT,
    LAYERS,
    ROOT,
    SUPERBLOCK,
    UPPERS,
    USER_NAMESPACE,
    AssumeIds,
    Chown,
    Fchdir,
    FsConfigCreate,
    FsConfigFlag,
    FsConfigString,
    FsMount,
    FsOpen,
    Mkdir,
    MountAttribute,
    MountPlan,
    MountSetattr,
    MoveMount,
    Open,
    OpenTree,
    Operation,
    Parameter,
    Rmdir,
    RunIds,
    Setns,
    Slot,
    Text,
    Unmount,
    UnmountFlag,
    Utimes,
)
from flatmount.strategies.spec import Attach, Ids, RootfsSpec, Upper

# Flattening must never meet a redirect, and an upper must not depend on file handles of its lowers.
OVERLAY_OPTIONS = ("redirect_dir", "metacopy", "index")
UPPER_PATH: Text = (Parameter.UPPERS, "/", Parameter.UPPER)
TARGET: Text = (Parameter.TARGET,)
# Of every root file system: an image's device nodes lead nowhere. A runtime mounts a /dev of its own.
ROOT_ATTRIBUTES = MountAttribute.NODEV
EROFS = "erofs"
SOURCE: Text = ("flatmount-", Parameter.UPPER)  # tells whose it is in the mount table

_CONTEXT = Slot("overlay")
_TREE = Slot("tree")


def below(path: Text, name: str) -> Text:
    """`path` with `name` put behind it; plain where both are."""
    return path + name if isinstance(path, str) else (*path, name)


def _parts(text: Text) -> tuple[str | Parameter, ...]:
    return (text,) if isinstance(text, str) else text


def directories(spec: RootfsSpec, ids: Ids) -> Iterator[Operation]:
    """The container's own directories: upper and work, and the target where the plan is to make it."""
    if spec.upper is not Upper.NONE and spec.fresh_upper:
        top = below(UPPER_PATH, "/fs")
        if not spec.upper_made:
            yield Mkdir(UPPER_PATH)
        yield Mkdir(top, spec.root.mode)
        if ids is Ids.HOST:
            yield Chown(top, RunIds.ROOT)
        elif (spec.root.uid, spec.root.gid) != (0, 0):
            yield Chown(top, (spec.root.uid, spec.root.gid))
        yield Mkdir(below(UPPER_PATH, "/work"))
        if spec.root.mtime_ns is not None:
            yield Utimes(top, spec.root.mtime_ns)
    if spec.make_target and spec.attach is Attach.HOST:
        yield Mkdir(TARGET)


def upper_ids(spec: RootfsSpec, facts: HostFacts) -> Ids:
    """In whose ids an upper is kept by the strategies with a pinned parent: the container's, where that can be."""
    return Ids.CONTAINER if spec.upper is Upper.STORE and facts.idmapped_upper else Ids.HOST


def pinned_overlay(spec: RootfsSpec, facts: HostFacts, key: str, lowers: Iterable[str]) -> MountPlan:
    """An overlay whose lowers are named from the pinned id-mapped parent, attached once or not at all.

    Upper and work go through a detached clone as well: by host path, each costs a look at every mount beside them.
    Names are relative to the pinned descriptors: three calls fewer for each than descriptors of their own.
    Without `lowers`, the one lower is the specification's EROFS image, pinned for the range.
    Without detached layers (before Linux 6.15) the parents are attached in a helper namespace, and the overlay is made
    in there: overlayfs takes only layers of the caller's own namespace. Names are absolute then: the parser before 6.5
    looks at all of them at the end, from one working directory.
    """
    ids = upper_ids(spec, facts)
    own = ids is Ids.CONTAINER
    operations: list[Operation] = list(directories(spec, ids))
    if own:
        operations.append(AssumeIds())
    uppers: Text = f"{spec.uppers}/" if own else ""
    names: list[Text] = list(lowers)
    if facts.detached_layers:
        to_layers: list[Operation] = [Fchdir(LAYERS if names else IMAGE_ROOT)]
        to_uppers: list[Operation] = [Fchdir(UPPERS)] if not own else [] if names else [Fchdir(LAYERS)]
        names = names or ["."]
    else:
        operations.append(Setns(HELPER))
        to_layers = to_uppers = []
        uppers = (Parameter.LAYERS_AT, f"/{spec.uppers}/") if own else (Parameter.UPPERS_AT, "/")
        names = [(Parameter.LAYERS_AT, "/", *_parts(name)) for name in names] or [(Parameter.IMAGE_AT,)]
    operations += (FsOpen(_CONTEXT, "overlay"), FsConfigString(_CONTEXT, "source", SOURCE), *to_layers)
    operations += (FsConfigString(_CONTEXT, key, name) for name in names)
    if spec.upper is not Upper.NONE:
        base: Text = (*_parts(uppers), Parameter.UPPER)
        operations += to_uppers
        operations.append(FsConfigString(_CONTEXT, "upperdir", below(base, "/fs")))
        operations.append(FsConfigString(_CONTEXT, "workdir", below(base, "/work")))
    operations += (FsConfigString(_CONTEXT, option, "off") for option in OVERLAY_OPTIONS)
    attributes = ROOT_ATTRIBUTES | (MountAttribute.RDONLY if spec.upper is Upper.NONE else MountAttribute.NONE)
    operations += (FsConfigCreate(_CONTEXT), FsMount(ROOT, _CONTEXT, attributes))
    if not facts.detached_layers:
        operations.append(Setns(HOME))
    return finished(spec, operations)


def read_only_clone(spec: RootfsSpec, tree: str) -> MountPlan:
    """One tree as a read-only root: an id-mapped clone of it and no overlay, which refuses a single lower alone."""
    operations: list[Operation] = list(directories(spec, Ids.HOST))
    operations += (
        OpenTree(ROOT, (Parameter.DATA, "/" + tree)),
        MountSetattr(ROOT, MountAttribute.RDONLY | ROOT_ATTRIBUTES, USER_NAMESPACE),
    )
    return finished(spec, operations)


def read_only_image(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """An EROFS image as a read-only root: one more clone of the range's own, which is id-mapped already."""
    operations: list[Operation] = list(directories(spec, Ids.HOST))
    if facts.detached_layers:
        operations.append(OpenTree(ROOT, "", IMAGE_ROOT))
    else:
        # Only from within a namespace are its mounts cloned.
        operations += (Setns(HELPER), OpenTree(ROOT, (Parameter.IMAGE_AT,)), Setns(HOME))
    operations.append(MountSetattr(ROOT, MountAttribute.RDONLY | ROOT_ATTRIBUTES))
    return finished(spec, operations)


def finished(spec: RootfsSpec, operations: list[Operation]) -> MountPlan:
    """The plan with the root file system attached, or handed to the caller."""
    if spec.attach is Attach.NONE:
        return MountPlan(tuple(operations), outputs=(ROOT,))
    return MountPlan((*operations, MoveMount(ROOT, TARGET)))


def pin(path: Text, facts: HostFacts, *, id_mapped: bool) -> MountPlan:
    """Clone a directory's mount for as long as a descriptor of it is open; one output.

    Made once for a user range (`id_mapped`) or for the process, and shared by all containers of it. Never attached to
    the host: detached, or, where overlayfs takes no detached layers, attached in a helper namespace.
    """
    operations: list[Operation] = [OpenTree(_TREE, path)]
    if id_mapped:
        operations.append(MountSetattr(_TREE, userns=USER_NAMESPACE))
    return _pinned(operations, facts)


def pin_superblock(facts: HostFacts) -> MountPlan:
    """Mount an EROFS image (IMAGE) for as long as a descriptor of it is open; one output.

    Once for all containers of a pool: each mount of a file is a superblock of its own, with a page cache of its own.
    """
    context, data = Slot("erofs"), Slot("data")
    operations: list[Operation] = [
        # fsconfig takes strings of 255 bytes: a short name from an open directory, however long the store's path is.
        Open(data, (Parameter.DATA,)),
        Fchdir(data),
        FsOpen(context, EROFS),
        FsConfigString(context, "source", (Parameter.IMAGE,)),
        FsConfigFlag(context, "ro"),
        FsConfigCreate(context),
        FsMount(_TREE, context, MountAttribute.RDONLY | ROOT_ATTRIBUTES),
    ]
    return _pinned(operations, facts)


def pin_image(facts: HostFacts) -> MountPlan:
    """Clone a pinned EROFS image and id-map the clone for a range; one output."""
    mapping = MountSetattr(_TREE, userns=USER_NAMESPACE)
    if facts.detached_layers:
        return _pinned([OpenTree(_TREE, "", SUPERBLOCK), mapping], facts)
    return _pinned([Setns(HELPER), OpenTree(_TREE, (Parameter.SUPERBLOCK_AT,)), mapping], facts)


def _pinned(operations: list[Operation], facts: HostFacts) -> MountPlan:
    """What made the detached mount `_TREE`, and keeps it: as it is, or attached in the helper namespace."""
    if facts.detached_layers:
        return MountPlan(tuple(operations), outputs=(_TREE,))
    place: Text = (Parameter.RANGE,)
    pinned = Slot("pinned")
    inside = any(isinstance(operation, Setns) for operation in operations)
    entering = () if inside else (Setns(HELPER),)
    keeping = (Mkdir(place), MoveMount(_TREE, place), Open(pinned, place), Setns(HOME))
    return MountPlan((*operations, *entering, *keeping), outputs=(pinned,))


def unpin() -> MountPlan:
    """Take a pinned parent out of the helper namespace again."""
    place: Text = (Parameter.RANGE,)
    return MountPlan((Setns(HELPER), Unmount(place, UnmountFlag.DETACH), Rmdir(place), Setns(HOME)), keep_going=True)
