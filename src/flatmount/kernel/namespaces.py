"""User namespaces by mapping, and mount namespaces of our own."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from flatmount.kernel import _native
from flatmount.kernel.executor import run_once
from flatmount.plan.mapping import IdRange, Mapping
from flatmount.plan.operations import Mount, MountFlag, MountPlan

Result = TypeVar("Result")

_PF_KTHREAD: Final = 0x200000


class Namespace:
    """A namespace that lives as long as this object: its descriptor is closed when the object is dropped."""

    __slots__ = ("__weakref__", "_close", "_fd")

    def __init__(self, fd: int) -> None:
        """Take over `fd`."""
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)

    def fileno(self) -> int:
        """The descriptor; it stays this object's. Raises: ValueError once it is closed: the number may be another's."""
        if self.closed:
            raise ValueError("the namespace's descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._close.alive

    def close(self) -> None:
        """Close the descriptor now instead of when the object is dropped; for those who share it with nobody."""
        self._close()


_user_namespaces: WeakValueDictionary[Mapping, Namespace] = WeakValueDictionary()
_lock = threading.Lock()


def user_namespace(mapping: Mapping) -> Namespace:
    """The user namespace of a mapping: made once, shared by all who ask while anybody holds it.

    Making one takes about 0.13 ms and forks nothing; writing its maps needs CAP_SETUID and CAP_SETGID.
    Raises: OSError (ENOSPC at user.max_user_namespaces, EPERM without the capabilities).
    Kernel: 3.8; more than five ranges 4.15. See: user_namespaces(7).
    """
    return user_namespaces((mapping,))[0]


def user_namespaces(mappings: Sequence[Mapping], *, at_once: int = 1) -> list[Namespace]:
    """As `user_namespace` for each of several mappings, those that must be made `at_once` at a time."""
    with _lock:
        held = {mapping: namespace for mapping in mappings if (namespace := _held(mapping)) is not None}
    missing = [mapping for mapping in dict.fromkeys(mappings) if mapping not in held]
    if missing:
        texts = [(_map_text(mapping.uids), _map_text(mapping.gids)) for mapping in missing]
        made = [Namespace(fd) for fd in _native.user_namespaces(texts, at_once)]
        with _lock:
            for mapping, namespace in zip(missing, made, strict=True):
                held[mapping] = _held(mapping) or namespace
                _user_namespaces[mapping] = held[mapping]
    return [held[mapping] for mapping in mappings]


def _held(mapping: Mapping) -> Namespace | None:
    # A closed one stays in the table for as long as somebody keeps the object.
    known = _user_namespaces.get(mapping)
    return None if known is None or known.closed else known


def _map_text(ranges: tuple[IdRange, ...]) -> bytes:
    return b"".join(b"%d %d %d\n" % (r.container, r.host, r.size) for r in ranges)


def empty_mount_namespace() -> Namespace:
    """A mount namespace that holds an empty tmpfs and nothing else.

    A namespace is only ever made as a copy (before Linux 7.1). What is copied is the one that the kernel's own thread
    for `/dev` has, of two mounts, so that the cost does not depend on the host's table; where that cannot be had
    (`small_source` says), it is the caller's, at 1.4-1.9 us for each mount there.

    Needs CAP_SYS_ADMIN. Raises: OSError.
    """
    source = small_source()
    if source is not None:
        try:
            return Namespace(_native.empty_mount_namespace(source.fileno()))
        except OSError:
            pass  # setns(2) is refused (it takes CAP_SYS_CHROOT): the copy of our own does without
        finally:
            source.close()
    return Namespace(_native.empty_mount_namespace(-1))


def small_source() -> Namespace | None:
    """The mount namespace of the kernel thread kdevtmpfs, in which there is nothing but the host's `/dev`; or None.

    It is not there without CONFIG_DEVTMPFS, where `/proc` is of a pid namespace inside another, and for those who may
    not look at the kernel's threads. The descriptor is the caller's. Nothing changes.
    """
    pid = _kdevtmpfs()
    try:
        return None if pid is None else Namespace(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return None


@cache
def _kdevtmpfs() -> int | None:
    """A kernel's thread keeps its pid, so one search is enough: 0.7 ms, as it is among the first."""
    try:
        with open("/proc/2/task/2/children", encoding="ascii") as file:
            candidates = [int(pid) for pid in file.read().split()]
    except OSError:
        candidates = list(range(3, 1024))  # no CONFIG_PROC_CHILDREN
    return kernel_thread("kdevtmpfs", candidates)


def kernel_thread(wanted: str, candidates: Iterable[int]) -> int | None:
    """The first of the processes that is a thread of the kernel's of that name. Anybody can take a name, not the flag.

    See: proc_pid_stat(5), flags; PF_KTHREAD in include/linux/sched.h.
    """
    for pid in candidates:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                name, _, rest = file.read().partition(" (")[2].rpartition(") ")
        except OSError:
            continue
        if name == wanted and int(rest.split()[6]) & _PF_KTHREAD:
            return pid
    return None


def enter_mounts(namespace: Namespace) -> None:
    """Move the calling thread into `namespace`, at its root, for good. Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT.

    Raises: OSError.
    """
    _native.enter_mounts(namespace.fileno())


def own_mount_namespace() -> Namespace:
    """The mount namespace of the calling thread."""
    return Namespace(os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))


def enter_private_mounts() -> None:
    """Move the calling thread into a private copy of its mount namespace, for good.

    Nothing it mounts is seen outside, and nothing mounted outside from now on is seen by it. Threads it starts later
    are in there too. Needs CAP_SYS_ADMIN. Raises: OSError, OperationFailed.
    """
    _native.unshare_mounts()
    run_once(MountPlan((Mount("none", "/", None, MountFlag.REC | MountFlag.PRIVATE),)))


def apart(work: Callable[[], Result]) -> Result:
    """Run `work` on a thread of its own, which may leave its mount namespace for good; the caller stays where it is.

    What that thread mounted in a namespace of its own goes when the thread ends.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="apart")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
