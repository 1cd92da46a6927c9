"""Every error a person can meet, its exit code and its hint.

One line for a person: what was attempted, on what, the kernel's word for it, and what to do.
`str(error)` is the first half, `error.hint` the second. Exit codes are one table for the whole command line:

    0  fine                       125  `run`, `exec`: flatmount itself failed
    1  a finding, or a failed     126  `run`, `exec`: the command cannot be executed
       operation                  127  `run`, `exec`: the command was not found
    2  usage, or a bad reference
"""

from __future__ import annotations

import errno as errno_names
import os

EXIT_FINE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2


class FlatmountError(Exception):
    """Base of every error that is shown to a person as one line. `hint` says what to do about it."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def line(self) -> str:
        """The message and the hint as the one line that a person reads."""
        text = str(self)
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(FlatmountError):
    """The call itself is wrong: an argument, a mapping, a path that cannot be meant."""

    exit_code = EXIT_USAGE


class MappingError(UsageError):
    """A user or group mapping that overlaps, overflows, or does not cover the image's owners."""


class UnknownImage(UsageError):
    """A reference that names no image of the store, or more than one."""


class BadImage(FlatmountError):
    """Something that claims to be an image and is not, or is damaged, or tries to leave its layer."""


class RegistryError(FlatmountError):
    """A registry that cannot be reached, refuses, or does not send what it promised."""


class StoreError(FlatmountError):
    """The store on disk cannot do what was asked: no space, a newer schema, no permission."""


class InUse(FlatmountError):
    """What should be removed or overwritten is used by a container or a mount."""


class MissingFeature(FlatmountError):
    """This kernel, file system or set of privileges lacks what was asked for by name."""


class TooManyLayers(UsageError):
    """More lowers than overlayfs takes, for a strategy that hands every layer to it."""


class OperationFailed(FlatmountError):
    """One operation of a plan failed; whatever the plan had done before was undone.

    `operation` is the kernel's name of it, `position` its place in the plan from 0 (behind the last one for what is no
    operation of the plan), `errno` the kernel's answer, `kernel_message` what the file-system context said, or "".
    `not_undone` says why the undoing failed, or "": something that the plan did is still there then.
    """

    def __init__(
        self,
        operation: str,
        subject: str,
        errno: int,
        *,
        position: int,
        total: int,
        kernel_message: str = "",
        hint: str = "",
        not_undone: str = "",
    ) -> None:
        name = errno_names.errorcode.get(errno, str(errno))
        place = f"operation {position + 1} of {total}" if position < total else f"beside the plan's {total} operations"
        left = f"; and undoing failed: {not_undone}" if not_undone else ""
        said = f" (the kernel: {kernel_message})" if kernel_message else ""
        super().__init__(
            f"{operation} {subject}: {os.strerror(errno)} [{name}]{said}, {place}{left}",
            hint=hint or hint_for(operation, errno),
        )
        self.operation = operation
        self.subject = subject
        self.errno = errno
        self.position = position
        self.kernel_message = kernel_message
        self.not_undone = not_undone


# What `from_os_error` is told was attempted where ENOSPC is a limit and not a disk.
MAKE_USER_NAMESPACE = "make a user namespace"

# (operation, errno) -> what to do. The operation "*" stands for any.
_HINTS: dict[tuple[str, int], str] = {
    ("*", errno_names.EPERM): "run as root: mounts need CAP_SYS_ADMIN in the initial user namespace",
    ("*", errno_names.EACCES): "run as root, and look for a security module that denies mounts",
    (
        "*",
        errno_names.ENOSYS,
    ): "this kernel lacks the call; `flatmount probe` shows which strategies it allows",
    ("*", errno_names.EMFILE): "raise the limit of open files (ulimit -n)",
    ("*", errno_names.ENFILE): "raise fs.file-max",
    ("*", errno_names.EDQUOT): "the quota of the upper's file system is used up",
    ("*", errno_names.EROFS): "the file system is read-only: remount it, or name another place",
    ("mkdir", errno_names.ENOSPC): "free space or inodes on the uppers' file system",
    ("mkdir", errno_names.EEXIST): "it is already there: name another id, or undo the earlier mount",
    (
        MAKE_USER_NAMESPACE,
        errno_names.ENOSPC,
    ): "raise user.max_user_namespaces: each user range in use counts against it",
    (
        MAKE_USER_NAMESPACE,
        errno_names.EPERM,
    ): "run as root, and look whether a security module denies user namespaces",
    ("open_tree", errno_names.ENOSPC): "raise user.max_mnt_namespaces: each detached mount counts against it",
    ("open_tree", errno_names.ENOENT): "the store is damaged, or the directory was removed meanwhile",
    ("fsmount", errno_names.ENOSPC): "raise user.max_mnt_namespaces: each detached mount counts against it",
    ("fsconfig create", errno_names.ENOSPC): "free space or inodes on the uppers' file system",
    ("fsconfig create", errno_names.EBUSY): "upper or work directory is in use by another overlay",
    ("fsconfig create", errno_names.EINVAL): "`flatmount probe` shows what overlayfs takes on this kernel",
    ("move_mount", errno_names.ENOSPC): "raise fs.mount-max: the mount table of this namespace is full",
    ("move_mount", errno_names.EINVAL): "the target is a symbolic link, or in another mount namespace",
    ("move_mount", errno_names.ENOTDIR): "the target is not a directory (a symbolic link is not followed)",
    ("move_mount", errno_names.ENOENT): "the target does not exist",
    ("mount", errno_names.ENOSPC): "raise fs.mount-max: the mount table of this namespace is full",
    (
        "mount_setattr",
        errno_names.EINVAL,
    ): "this file system does not take id-mapped mounts; `flatmount probe` tells",
    (
        "umount2",
        errno_names.EBUSY,
    ): "something still uses it: a process with its working directory there, an open file",
    ("umount2", errno_names.EINVAL): "it is not mounted (any more)",
}


def hint_for(operation: str, errno: int) -> str:
    """What a person can do about `errno` from `operation`; "" where nothing helpful is known."""
    return _HINTS.get((operation, errno)) or _HINTS.get(("*", errno), "")


def from_os_error(error: OSError, attempted: str) -> FlatmountError:
    """An `OSError` from a plain file operation as one line: what was attempted, on what, and the hint."""
    code = error.errno or errno_names.EIO
    where = f" {os.fsdecode(error.filename)}" if error.filename else ""
    name = errno_names.errorcode.get(code, str(code))
    on_disk = attempted != MAKE_USER_NAMESPACE
    storage = on_disk and code in (errno_names.ENOSPC, errno_names.EDQUOT, errno_names.EROFS)
    kind = StoreError if storage else FlatmountError
    hint = hint_for(attempted, code)
    if storage and code == errno_names.ENOSPC:
        hint = "free space or inodes there and try again; nothing half-written was kept"
    return kind(f"{attempted}{where}: {os.strerror(code)} [{name}]", hint=hint)
