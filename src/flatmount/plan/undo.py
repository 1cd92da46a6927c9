"""The plan that takes back what another one did."""

from __future__ import annotations

from flatmount.plan.operations import (
    Mkdir,
    Mount,
    MountPlan,
    MoveMount,
    Operation,
    Rmdir,
    Text,
    Unmount,
    UnmountFlag,
)


def undo(plan: MountPlan, done: int | None = None) -> MountPlan:
    """The operations that take back the first `done` operations of `plan` (all of them by default), last first.

    Mounts that the plan itself took off again and directories it removed are left alone; what an undoing meets that is
    already gone does not stop it. Files that a container wrote below its upper are not the plan's: a directory that is
    not empty stays.
    """
    mounted: list[Text] = []
    made: list[Text] = []
    order: list[Operation] = []
    for operation in plan.operations[:done]:
        match operation:
            case MoveMount(_, target) | Mount(_, target, _, _, _):
                mounted.append(target)
                order.append(Unmount(target, UnmountFlag.NOFOLLOW))
            case Unmount(target, _, False):
                mounted.remove(target)
                order.remove(Unmount(target, UnmountFlag.NOFOLLOW))
            case Mkdir(path, _):
                made.append(path)
                order.append(Rmdir(path, if_empty=True))
            case Rmdir(path) if path in made:
                made.remove(path)
                order.remove(Rmdir(path, if_empty=True))
    return MountPlan(tuple(reversed(order)), keep_going=True)
