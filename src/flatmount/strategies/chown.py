"""`chown`: a copy of the image's files with the owners changed, for hosts without id-mapped layers. Made for each image
and range; only where somebody asks for it by name. Mount operations: 1."""

from __future__ import annotations

from flatmount.errors import UsageError
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import (
    ROOT,
    Fchdir,
    FsConfigCreate,
    FsConfigString,
    FsMount,
    FsOpen,
    MountAttribute,
    MountPlan,
    MountSetattr,
    Open,
    OpenTree,
    Operation,
    Parameter,
    Slot,
    Text,
)
from flatmount.strategies.parts import (
    OVERLAY_OPTIONS,
    ROOT_ATTRIBUTES,
    SOURCE,
    UPPER_PATH,
    below,
    directories,
    finished,
)
from flatmount.strategies.spec import Ids, RootfsSpec, Upper

NAME = "chown"


def build(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """Mount a plain overlay over the copy; nothing is id-mapped."""
    if spec.shifted is None:
        raise UsageError("the image has no copy with changed owners for this range", hint="`flatmount mount` makes it")
    operations: list[Operation] = list(directories(spec, Ids.HOST))
    if spec.upper is Upper.NONE:
        operations += (
            OpenTree(ROOT, (Parameter.DATA, "/" + spec.shifted)),
            MountSetattr(ROOT, MountAttribute.RDONLY | ROOT_ATTRIBUTES),
        )
        return finished(spec, operations)
    context = Slot("overlay")
    data = Slot("data")
    to_uppers, upper = _upper(spec, facts)
    operations += (
        FsOpen(context, "overlay"),
        FsConfigString(context, "source", SOURCE),
        Open(data, (Parameter.DATA,)),
        Fchdir(data),
        FsConfigString(context, "lowerdir", spec.shifted),
        *to_uppers,
        FsConfigString(context, "upperdir", below(upper, "/fs")),
        FsConfigString(context, "workdir", below(upper, "/work")),
        *(FsConfigString(context, option, "off") for option in OVERLAY_OPTIONS),
        FsConfigCreate(context),
        FsMount(ROOT, context, ROOT_ATTRIBUTES),
    )
    return finished(spec, operations)


def _upper(spec: RootfsSpec, facts: HostFacts) -> tuple[tuple[Operation, ...], Text]:
    """How to get to the uppers, and the container's from there.

    fsconfig takes strings of 255 bytes, and overlayfs divides `lowerdir` at each colon: paths are named from an open
    directory, however long and whatever they are called. The parser before 6.5 looks at all of them at the end, from
    one working directory: an upper outside the store is absolute there.
    """
    if spec.upper is Upper.STORE:
        return (), (f"{spec.uppers}/", Parameter.UPPER)
    if not facts.lowerdir_append:  # 6.7: where it is, each path is looked at as it comes
        return (), UPPER_PATH
    uppers = Slot("uppers' directory")
    return (Open(uppers, (Parameter.UPPERS,)), Fchdir(uppers)), (Parameter.UPPER,)
