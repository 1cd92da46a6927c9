"""`chown`: a copy of the image's files with the owners changed, for hosts without id-mapped layers. Made for each image
and range; only where somebody asks for it by name. Mount operations: 1."""

from __future__ import annotations

from flatmount.errors import UsageError
from flatmount.plan.facts import HostFacts
from flatmount.plan.operations import (
    ROOT,
    FsConfigCreate,
    FsConfigString,
    FsMount,
    FsOpen,
    MountAttribute,
    MountPlan,
    MountSetattr,
    OpenTree,
    Operation,
    Parameter,
    Slot,
)
from flatmount.strategies.parts import OVERLAY_OPTIONS, SOURCE, UPPER_PATH, below, directories, finished
from flatmount.strategies.spec import Ids, RootfsSpec, Upper

NAME = "chown"


def build(spec: RootfsSpec, facts: HostFacts) -> MountPlan:
    """Mount a plain overlay over the copy; nothing is id-mapped."""
    if spec.shifted is None:
        raise UsageError("the image has no copy with changed owners for this range", hint="`flatmount mount` makes it")
    copy = (Parameter.DATA, "/" + spec.shifted)
    operations: list[Operation] = list(directories(spec, Ids.HOST))
    if spec.upper is Upper.NONE:
        operations += (OpenTree(ROOT, copy), MountSetattr(ROOT, MountAttribute.RDONLY))
        return finished(spec, operations)
    context = Slot("overlay")
    operations += (
        FsOpen(context, "overlay"),
        FsConfigString(context, "source", SOURCE),
        FsConfigString(context, "lowerdir", copy),
        FsConfigString(context, "upperdir", below(UPPER_PATH, "/fs")),
        FsConfigString(context, "workdir", below(UPPER_PATH, "/work")),
        *(FsConfigString(context, option, "off") for option in OVERLAY_OPTIONS),
        FsConfigCreate(context),
        FsMount(ROOT, context),
    )
    return finished(spec, operations)
