"""What looking costs: reading the mount table, following it, counting its events, and the health probe.

    python bench/observe.py [MOUNTS ...]

prints best-of-five milliseconds beside a table of each length, and ratios against libmount where it is installed.
It mounts in a namespace of its own, which goes with it. Needs root.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from flatmount.kernel.mounts import (
    FollowedTable,
    MountEvents,
    TableSource,
    follow_mountinfo,
    mount_count,
    read_table,
    table_source,
)
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.storm.probe import HealthProbe

MS_BIND = 1 << 12
CHANGES = 200

libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, fs_type: str | None = None, flags: int = 0) -> None:
    words = [word and word.encode() for word in (source, target, fs_type)]
    if libc.mount(*words, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def umount(target: str) -> None:
    if libc.umount2(target.encode(), 0):
        raise OSError(ctypes.get_errno(), f"umount {target}")


def best_ms(work: Callable[[], object]) -> float:
    took = []
    for _ in range(5):
        begun = time.perf_counter_ns()
        work()
        took.append(time.perf_counter_ns() - begun)
    return min(took) / 1e6


def changes(target: str) -> float:
    """Microseconds for each of many attaches and detaches."""
    begun = time.perf_counter_ns()
    for _ in range(CHANGES):
        mount(target, target, flags=MS_BIND)
        umount(target)
    return (time.perf_counter_ns() - begun) / 2e3 / CHANGES


def followed(target: str) -> tuple[float, float]:
    """Processor milliseconds for each time that a follower reads the table again, and changes for each such time."""
    stop_read, stop_write = os.pipe()
    mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY)
    result: list[tuple[FollowedTable, float]] = []

    def follow() -> None:
        before = resource.getrusage(resource.RUSAGE_THREAD)
        told = follow_mountinfo(mountinfo, stop_read)
        after = resource.getrusage(resource.RUSAGE_THREAD)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result.append((told, used))

    thread = threading.Thread(target=follow)
    thread.start()
    changes(target)
    time.sleep(0.2)
    os.close(stop_write)
    thread.join()
    os.close(stop_read)
    os.close(mountinfo)
    ((told, used),) = result
    return used * 1e3 / told.rereads, 2 * CHANGES / told.rereads


def libmount_ms() -> float | None:
    name = ctypes.util.find_library("mount")
    if name is None:
        return None
    libmount = ctypes.CDLL(name)
    libmount.mnt_new_table_from_file.restype = ctypes.c_void_p
    libmount.mnt_unref_table.argtypes = [ctypes.c_void_p]
    return best_ms(lambda: libmount.mnt_unref_table(libmount.mnt_new_table_from_file(b"/proc/self/mountinfo")))


def probe_share() -> float:
    """Percent of one processor that the health probe takes, and the programs it starts."""
    with HealthProbe() as probe:
        (pid,) = subprocess.check_output(["pgrep", "--parent", str(os.getpid()), "python"]).split()

        def used_ticks() -> int:
            with open(f"/proc/{int(pid)}/stat") as file:
                return sum(map(int, file.read().rpartition(")")[2].split()[11:15]))

        begun, before = time.monotonic_ns(), used_ticks()
        time.sleep(5)
        after, end = used_ticks(), time.monotonic_ns()
        probe.between(begun, end)
    return 100 * (after - before) / os.sysconf("SC_CLK_TCK") / ((end - begun) / 1e9)


def main() -> None:
    enter_private_mounts()
    place = tempfile.mkdtemp(prefix="flatmount-bench-", dir="/dev/shm")
    mount("bench", place, "tmpfs")
    target = f"{place}/target"
    os.mkdir(target)
    os.mkdir(f"{place}/source")
    made = 0
    print(f"the table is read from {table_source().value}")
    for wanted in [int(word) for word in sys.argv[1:]] or [1000, 10000]:
        while mount_count() < wanted:
            made += 1
            os.mkdir(f"{place}/{made}")
            mount(f"{place}/source", f"{place}/{made}", flags=MS_BIND)
        alone = changes(target)
        with MountEvents():
            counted = changes(target)
        again, coalesced = followed(target)
        other = libmount_ms()
        print(f"{mount_count():,} mounts")
        for source in TableSource:
            count = best_ms(lambda source=source: mount_count(source=source))
            table = best_ms(lambda source=source: read_table(source=source))
            print(f"  {source.value:10}  count {count:8.3f} ms   table {table:8.2f} ms")
        print(f"  following: {again:.2f} ms of processor for each reading, {coalesced:.1f} changes for each")
        if other is not None:
            print(f"  libmount parses the same table in {other:.2f} ms: following costs {again / other:.2f} of that")
        print(
            f"  an attach or detach: {alone:.1f} us, {counted:.1f} us with its events counted ({counted / alone:.2f})"
        )
        print(f"  the health probe takes {probe_share():.1f} % of one processor")
    libc.umount2(place.encode(), 2)
    os.rmdir(place)


if __name__ == "__main__":
    main()
