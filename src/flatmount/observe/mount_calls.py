"""System calls that work on mounts, and what each does to the mount tables: told from its name and its flags alone."""

from __future__ import annotations

from enum import StrEnum

from flatmount.observe.events import Event

CLONE_NEWNS = 0x00020000
CLONE_THREAD = 0x00010000
_OPEN_TREE_CLONE = 0x1
_MS_REMOUNT = 0x20
_MS_PROPAGATION = 0x20000 | 0x40000 | 0x80000 | 0x100000  # UNBINDABLE, PRIVATE, SLAVE, SHARED
_MS_MAGIC_MASK, _MS_MAGIC = 0xFFFF0000, 0xC0ED0000  # which mount(2) still drops


class Effect(StrEnum):
    """What a call does. Attaching and detaching are the mount operations: they happen in a mount table."""

    ATTACH = "attach"
    DETACH = "detach"
    CHANGE = "change"  # of a mount that stays where it is: remounted, id-mapped, its propagation
    PREPARE = "prepare"  # of something detached, which no table shows
    COPY = "copy"  # of a whole mount namespace


# As the kernel names them in its events: umount2(2) is `umount` there. 5.2 has all but the ones with a later number.
CALLS = (
    "mount",
    "umount",
    "move_mount",
    "pivot_root",
    "open_tree",
    "open_tree_attr",  # 6.15
    "mount_setattr",  # 5.12
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "unshare",
)
NEW_TASK = "task/task_newtask"  # the only place that shows the flags of clone3
EXEC = "sched/sched_process_exec"

_EFFECTS = {
    "umount": Effect.DETACH,
    "move_mount": Effect.ATTACH,
    "pivot_root": Effect.ATTACH,
    "open_tree_attr": Effect.PREPARE,
    "mount_setattr": Effect.CHANGE,
    "fsopen": Effect.PREPARE,
    "fsconfig": Effect.PREPARE,
    "fsmount": Effect.PREPARE,
    "fspick": Effect.PREPARE,
}


def call_name(event: Event) -> str | None:
    """The name of the system call that an event is the beginning or the end of; None for other events."""
    name = event.name.removeprefix("sys_")
    return name if name != event.name and name in CALLS else None


def effect_of(name: str, arguments: dict[str, int]) -> Effect | None:
    """What a call does if it succeeds; None where it does nothing to mounts."""
    if name == "mount":
        flags = arguments.get("flags", 0)
        if flags & _MS_MAGIC_MASK == _MS_MAGIC:
            flags &= ~_MS_MAGIC_MASK
        return Effect.CHANGE if flags & (_MS_REMOUNT | _MS_PROPAGATION) else Effect.ATTACH
    if name == "open_tree":
        return Effect.PREPARE if arguments.get("flags", 0) & _OPEN_TREE_CLONE else None
    if name == "unshare":
        return Effect.COPY if arguments.get("unshare_flags", 0) & CLONE_NEWNS else None
    return _EFFECTS[name]
