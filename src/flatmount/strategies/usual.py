"""What the usual code does, shared by `per-layer` and `common-parent`: two passes of one overlay over lowers that were
id-mapped and attached for the moment, by `mount(2)` and its one page of options.

The first pass reads the image's user database through a temporary read-only overlay; the second makes the root file
system. Order of calls and flags are containerd's (core/mount/mount_linux.go, mount_idmapped_linux.go and temp.go). In
the first pass the container's upper is the topmost lower, as there. What differs from containerd:

- containerd id-maps and attaches that upper like a layer; here it is only named, which saves its mount operations;
- its clones and overlays are `nodev`, as the roots of all strategies: one bit of flags that are handed over anyway;
- an image of as many layers as overlayfs takes lowers goes through the first pass without its upper; containerd fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flatmount.errors import UsageError
from flatmount.plan.operations import (
    USER_NAMESPACE,
    Chdir,
    Close,
    Mkdir,
    Mount,
    MountAttribute,
    MountFlag,
    MountPlan,
    MountSetattr,
    MoveMount,
    OpenTree,
    Operation,
    Parameter,
    ReadFile,
    Rmdir,
    Slot,
    Text,
    Unmount,
)
from flatmount.strategies.parts import OVERLAY_OPTIONS, ROOT_ATTRIBUTES, TARGET, UPPER_PATH, below, directories
from flatmount.strategies.spec import MOST_LOWERS, Attach, Ids, RootfsSpec, Upper

_PAGE = 4096
_COMPACT_FROM = _PAGE - 512  # from here on containerd changes into the lowers' directory and names them relatively
_MEANINGFUL = ",:\\"  # to mount(2)'s options and to overlayfs's list of lowers
_USER_DATABASE = ("/etc/passwd", "/etc/group")

# Given the place for temporary mount points: operations before, names of the lowers there, operations after.
IdMapping = Callable[[Text], tuple[Sequence[Operation], Sequence[str], Sequence[Operation]]]


def id_mapped_attach(source: Text, target: Text) -> tuple[Operation, ...]:
    """Attach an id-mapped read-only clone of `source` at `target`, in which no device can be opened."""
    tree = Slot("tree")
    return (
        OpenTree(tree, source),
        MountSetattr(tree, MountAttribute.RDONLY | ROOT_ATTRIBUTES, USER_NAMESPACE),
        MoveMount(tree, target),
        Close(tree),
    )


def require_plain_paths(strategy: str, *paths: str) -> None:
    """Refuse paths that cannot stand in the options of `mount(2)`.

    Raises: UsageError, naming the character.
    """
    for path in paths:
        for character in _MEANINGFUL:
            if character in path:
                raise UsageError(
                    f"strategy {strategy} puts {path!r} into mount options, where {character!r} has a meaning",
                    hint="use detached or flat, or a path without it",
                )


def two_passes(spec: RootfsSpec, id_mapping: IdMapping, strategy: str) -> MountPlan:
    """The whole plan of one container, as the usual code makes it."""
    if spec.attach is not Attach.HOST:
        raise UsageError(f"strategy {strategy} can only attach to a directory", hint="use detached or flat with it")
    look: Text = (Parameter.SCRATCH, "-look")
    return MountPlan(
        (
            *directories(spec, Ids.HOST),
            Mkdir(look),
            *_pass(spec, id_mapping, (Parameter.SCRATCH, "-1"), look, first=True),
            *(ReadFile(look, name) for name in _USER_DATABASE),
            Unmount(look),
            Unmount(look, expect_gone=True),
            Rmdir(look),
            *_pass(spec, id_mapping, (Parameter.SCRATCH, "-2"), TARGET, first=False),
        )
    )


def _pass(spec: RootfsSpec, id_mapping: IdMapping, place: Text, target: Text, *, first: bool) -> tuple[Operation, ...]:
    before, lowers, after = id_mapping(place)
    if spec.upper is Upper.NONE and len(lowers) == 1:
        # overlayfs refuses a single lower alone; the clone it is bound from is id-mapped and read-only already.
        return (*before, Mount(below(place, "/" + lowers[0]), target, None, MountFlag.BIND), *after)
    writable = spec.upper is not Upper.NONE
    upper: Text = (",workdir=", *UPPER_PATH, "/work,upperdir=", *UPPER_PATH, "/fs") if writable and not first else ()
    options = "".join(f",{option}=off" for option in OVERLAY_OPTIONS)
    full = sum(spec.scratch_bytes + len(name) + 2 for name in lowers) + len(options) + 2 * spec.scratch_bytes
    compact = full >= _COMPACT_FROM
    listed: list[str | Parameter] = ["lowerdir="]
    if writable and first and len(lowers) < MOST_LOWERS:
        listed += (*UPPER_PATH, "/fs:")
    for i, name in enumerate(lowers):
        listed += (":" if i else "", name) if compact else (":" if i else "", *place, "/", name)
    overlay = Mount("overlay", target, "overlay", MountFlag.NODEV, (*listed, *upper, options))
    # containerd changes directory on a thread that ends with the mount; a task still in there would keep it busy.
    mounting = (Chdir(place), overlay, Chdir("/")) if compact else (overlay,)
    return (*before, *mounting, *after)
