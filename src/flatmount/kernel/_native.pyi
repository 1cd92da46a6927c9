"""The extension (native/): the only way to the kernel's mount API."""

from collections.abc import Sequence

class Program:
    """A checked plan, ready to run any number of times, on any number of threads at once.

    `records` and `strings` are as flatmount.plan.encode packs them. Raises ValueError where they are not well-formed.
    """

    def __new__(
        cls,
        records: bytes,
        strings: bytes,
        slots: int,
        lent: int,
        parameters: int,
        flags: int,
        outputs: tuple[int, ...],
    ) -> Program: ...
    def run(
        self, lent: tuple[int, ...], parameters: tuple[bytes, ...], ids: tuple[int, int, int, int]
    ) -> tuple[int, int, int, int, str, tuple[int, ...], bytes]:
        """Run all operations with the interpreter's lock released.

        `lent` descriptors stay the caller's. `ids` are fsuid, fsgid, uid and gid of the host.
        Returns operations done, mount operations done, the place of the first failure, its errno (0: none), the
        kernel's own message, the output descriptors (the caller's now) and nanoseconds for each operation as native
        uint32.
        """
    def burst(
        self,
        runs: tuple[tuple[tuple[int, ...], tuple[bytes, ...], tuple[int, int, int, int]], ...],
        crew: int,
        copies: int,
        template: int,
    ) -> tuple[int, tuple[int, ...], tuple[tuple[tuple[int, int, int, int, str], int], ...]]:
        """Start many runs at the same moment on `crew` threads of their own, in the calling thread's mount namespace.

        Each run is what `run` takes; where `copies` is not 0, a task copies the mount namespace so often after it, from
        the namespace `template` or (-1) from the host's, and ends. A failed run is not undone, and outputs are closed.
        Returns nanoseconds until the first thread ran, until each run (and its copies) was done, and for each run
        (operations done, mount operations done, place of the failure, errno, the kernel's message) with the errno of
        its copies. Raises OSError where the threads cannot be made.
        """

    def run_many(
        self, jobs: list[tuple[tuple[int, ...], tuple[bytes, ...], tuple[int, int, int, int]]], threads: int
    ) -> list[tuple[int, int, int, int, str, tuple[int, ...], bytes]]:
        """Run the program once for each job, `threads` at a time, on native threads; as `run` for each.

        The interpreter's lock is released once for all of them.
        """

def adopt_thread() -> None:
    """Give the calling thread a working directory of its own, for good (unshare(CLONE_FS)).

    Plans with relative strings then run on it directly; elsewhere they run on a thread made for them (about 20 us).
    """

def unshare_mounts() -> None:
    """Move the calling thread into a copy of its mount namespace. Needs CAP_SYS_ADMIN."""

def enter_mounts(fd: int) -> None:
    """Move the calling thread into the mount namespace of `fd`, at its root. Needs CAP_SYS_ADMIN, CAP_SYS_CHROOT."""

def empty_mount_namespace(source: int) -> int:
    """Make a mount namespace that holds one empty tmpfs and nothing else, and return a descriptor of it.

    A copy of `source` (a descriptor of a mount namespace, or -1 for the caller's) is emptied for that. It lives as
    long as a descriptor of it is open. Needs CAP_SYS_ADMIN, and CAP_SYS_CHROOT for a `source`. Raises OSError.
    """

def try_open_tree_attr() -> int:
    """The errno of an `open_tree_attr` on no descriptor: ENOSYS where the kernel lacks the call (before 6.15)."""

def user_namespaces(maps: list[tuple[bytes, bytes]], threads: int) -> list[int]:
    """Make a user namespace for each pair of uid and gid maps (the text of /proc/PID/uid_map); returns descriptors.

    Nothing is forked: a task that shares our memory holds each namespace until its descriptor is open. All or none.
    Raises OSError: EPERM without CAP_SETUID/CAP_SETGID, EINVAL for a map the kernel refuses, ENOSPC at
    user.max_user_namespaces.
    """

def check_start(
    user_namespace: int, root: int, read_path: bytes, write_path: bytes, most: int, copies: int
) -> tuple[str, int, int, int, int, bytes]:
    """Enter a root file system as its container's root, read one file and create another.

    A task that shares our memory copies the mount namespace `copies` times, changes its root to `root`, enters the user
    namespace, reads at most `most` bytes of `read_path` and creates `write_path`.
    Returns the step that failed ("" when none did), its errno, owner uid and gid of the file read, owner uid of the
    file written (all as seen inside), and what was read.
    """

# mounts.c. A namespace is named by its 64-bit id; 0 is the calling thread's.

# unique id, parent's, id, parent's; attributes, propagation, peer group, master; major, minor;
# root, mount point, type, subtype, source, options.
StatmountRecord = tuple[
    int, int, int, int, int, int, int, int, int, int, bytes, bytes, bytes, bytes, bytes, bytes
]  # fmt: skip

def count_mounts(namespace_id: int, /) -> int: ...
def list_mounts(namespace_id: int, /) -> list[int]: ...
def stat_mounts(namespace_id: int, /) -> list[StatmountRecord]: ...
def statmount_fields() -> int: ...
def mount_namespace_id(namespace_fd: int, /) -> int: ...
def open_mount_events(namespace_fd: int, /) -> int: ...
def drain_mount_events(queue_fd: int, /) -> tuple[int, int]: ...
def follow_mountinfo(mountinfo_fd: int, stop_fd: int, /) -> tuple[int, int, int]: ...
def die_with_parent(parent_pid: int, /) -> None: ...

# tree.c. See flatmount.kernel.tree.

def flatten(root_fd: int, sources: Sequence[str], target: str, root_source: int, /) -> tuple[int, int, int]: ...
def remove_tree(parent_fd: int, name: str, /) -> tuple[int, int]: ...
def copy_tree(
    from_fd: int, to_fd: int, uids: Sequence[tuple[int, int, int]], gids: Sequence[tuple[int, int, int]], /
) -> int: ...
def create_file(
    directory_fd: int,
    name: bytes,
    data: bytes | memoryview,
    uid: int,
    gid: int,
    mode: int,
    seconds: int,
    nanoseconds: int,
    /,
) -> None: ...
def sync_filesystem(fd: int, /) -> None: ...

# locks.c. Kinds of locks by number: flatmount.cpu.locks.Kind.

def contend_for_lock(
    kind: int, cpus: tuple[int, ...], preheat_ns: int, run_ns: int, sample: int, /
) -> tuple[tuple[tuple[int, int, int, int, int, bytes], ...], int]:
    """Let one thread pinned to each of `cpus` take one lock again and again for `run_ns` after `preheat_ns`.

    Returns for each thread: sections, those whose lock came from another processor, a reader's repeats, nanoseconds it
    counted, whether it was moved to another processor, and every `sample`-th section's nanoseconds (uint32; 0: none);
    and how many exclusive sections were lost, which is 0 for a lock that excludes.
    Raises OSError: EINVAL for a processor that is offline or not allowed.
    """

def ping_pong(
    cpu: int, other: int, home: int, batches: int, rounds: int, limit_ns: int, /
) -> tuple[list[float], int, int]:
    """Send one cache line of a fresh page, first touched by the processor `home`, to and fro between two others.

    Returns the one-way nanoseconds of each batch that was finished within `limit_ns`, the NUMA node of the page (-1:
    not known), and whether a thread was moved. Raises OSError as above.
    """

def pause_ns() -> float: ...
def open_file_in_root(root_fd: int, path: bytes, /) -> int:
    """Open a regular file for reading, looked up inside `root_fd` as if that were the root directory.

    Raises OSError: EINVAL for what is no regular file, which is then never opened.
    """

def make_uppers(data_fd: int, uppers: list[tuple[int, bool, bool, bool, int, int, int]], /) -> list[int]:
    """See flatmount.kernel.tree.make_uppers."""
