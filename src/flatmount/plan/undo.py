"""The plan that takes back what another one did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flatmount.plan.operations import (
    HOME,
    Mkdir,
    Mount,
    MountFlag,
    MountPlan,
    MoveMount,
    Operation,
    Rmdir,
    Setns,
    Slot,
    Unmount,
    UnmountFlag,
)

_Undoing = tuple[Slot, Operation]  # the namespace it belongs to, and what takes the operation back


def undo(plan: MountPlan, done: int | None = None) -> MountPlan:
    """The operations that take back the first `done` operations of `plan` (all of them by default), last first.

    Mounts that the plan itself took off again and directories it removed are left alone; what an undoing meets that is
    already gone does not stop it. Files that a container wrote below its upper are not the plan's: a directory that is
    not empty stays. What was done in another namespace is taken back in there: the undoing begins in HOME, as the plan
    did, and ends there.
    """
    namespace = HOME
    order: list[_Undoing] = []
    for operation in plan.operations[:done]:
        match operation:
            case Setns(slot):
                namespace = slot
            case Mount(_, _, _, flags, _) if flags & MountFlag.PRIVATE:
                continue  # changes how a mount propagates and attaches nothing
            case MoveMount(_, target) | Mount(_, target, _, _, _):
                order.append((namespace, Unmount(target, UnmountFlag.NOFOLLOW)))
            case Unmount(target, _, False):
                _forget(order, (namespace, Unmount(target, UnmountFlag.NOFOLLOW)))
            case Mkdir(path, _):
                order.append((namespace, Rmdir(path, if_empty=True)))
            case Rmdir(path):
                _forget(order, (namespace, Rmdir(path, if_empty=True)))
    return MountPlan(tuple(_entering(order[::-1])), keep_going=True)


def _forget(order: list[_Undoing], undoing: _Undoing) -> None:
    """Leave out the last one like it: two mounts may lie on one target."""
    for i in reversed(range(len(order))):
        if order[i] == undoing:
            del order[i]
            return


def _entering(order: Iterable[_Undoing]) -> Iterator[Operation]:
    here = HOME
    for namespace, operation in order:
        if namespace != here:
            yield Setns(namespace)
            here = namespace
        yield operation
    if here != HOME:
        yield Setns(HOME)
