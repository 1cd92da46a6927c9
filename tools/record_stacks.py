"""Record what tasks wait for in a short per-layer storm, as test data for the tables of lock functions.

    python tools/record_stacks.py DIRECTORY OUTPUT      (root, perf; DIRECTORY takes id-mapped mounts)

One line for each distinct stack: how often, microseconds together, the event's word for the lock (`spin`, `sleep`, or
`switch` for a task that goes to sleep uninterruptibly), which lock it was by its address, and the stack, leaf first.
The lock is `namespace_sem`, `mount_lock`, a number of this file's own, or `-` where it was waited for little. That is
what makes this a test: an address knows nothing of names of functions. `tools/kernels` runs this on other kernels.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from flatmount.kernel.executor import adopt_thread
from flatmount.observe.perf import PerfRecord
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import choose_for, probe_store, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import Store
from flatmount.strategies import Upper

_CONTAINERS, _LAYERS, _THREADS = 48, 12, 8
_HEADER = re.compile(r"\s*(.+?)\s+(\d+)/(\d+)\s+(\d+)\.(\d{9}):\s+(\S+):(?:\s+(.*))?\n?")
_INSIDE_BYTES = 64  # the little lock within a semaphore, and the spinning lock within a sequence lock
_MOST_BYTES = 30_000
_MOST_NUMBERS = 40

Key = tuple[str, str, tuple[str, ...]]  # the event's word, the lock, the stack
Sums = dict[Key, list[float]]  # how often, microseconds
_SWITCH = re.compile(r"prev_pid=(\d+) .*prev_state=(\S+) ==>")


def _storm(directory: str) -> None:
    image, root = f"{directory}/image", f"{directory}/store"
    write_tiny_image(image, _LAYERS)
    with Store.open(root, create=True) as store:
        stored = store.import_image(image, name="tiny")
        facts = probe_store(store).facts
        choice = choose_for("per-layer", store, stored, facts)
        os.makedirs(f"{directory}/uppers")
        scratch = f"{directory}/s-"
        spec = specification(store, stored, choice, upper=Upper.ELSEWHERE, make_target=True, scratch=scratch)
        pool = RangePool(store.data, facts)
        uppers = f"{directory}/uppers"
        assembler = Assembler(spec, choice.name, pool, uppers=uppers, scratch=scratch, ephemeral=True)

        def one(number: int) -> None:
            mapping = Mapping.single((1 << 20) + (number << 16))
            assembler.assemble(mapping, f"c{number}", f"{directory}/r{number}").undo()

        stop = threading.Event()
        reader = threading.Thread(target=_read_tables, args=(stop,))
        # A process of its own: a fork of this one would hold descriptors of mounts, and their umount would fail.
        copier = subprocess.Popen(["sh", "-c", "while unshare -m true; do :; done"], start_new_session=True)
        reader.start()
        try:
            with ThreadPoolExecutor(_THREADS, initializer=adopt_thread) as threads:
                list(threads.map(one, range(_CONTAINERS)))
        finally:
            stop.set()
            reader.join()
            os.killpg(copier.pid, signal.SIGKILL)
            copier.wait()
        pool.close()


def _read_tables(stop: threading.Event) -> None:
    while not stop.is_set():
        with open("/proc/self/mountinfo", "rb") as file:
            file.read()


def _addresses() -> dict[str, int]:
    with open("/proc/kallsyms", encoding="ascii") as file:
        words = [line.split() for line in file]
    return {name: int(address, 16) for address, _, name, *_ in words if name in ("namespace_sem", "mount_lock")}


def _name_of(address: str, known: dict[str, int], numbers: dict[str, int]) -> str:
    value = int(address, 16)
    symbol = next((name for name, begin in known.items() if begin and 0 <= value - begin < _INSIDE_BYTES), None)
    return symbol or (f"@{numbers[address]}" if numbers.get(address, _MOST_NUMBERS) < _MOST_NUMBERS else "-")


def _events(lines: Iterable[str]) -> Iterable[tuple[tuple[str, ...], list[str]]]:
    head: tuple[str, ...] | None = None
    stack: list[str] = []
    for line in lines:
        if line.startswith("\t"):
            stack.append(line.split(maxsplit=1)[1].strip())
            continue
        if head is not None and line.strip():
            yield head, stack
            head = None
        match = _HEADER.fullmatch(line)
        if match is not None:
            head, stack = tuple(word or "" for word in match.groups()), []
    if head is not None:
        yield head, stack


def _ordered(sums: Sums, known: dict[str, int], numbers: dict[str, int]) -> list[tuple[Key, list[float]]]:
    merged: Sums = {}
    for (kind, address, stack), (count, us) in sums.items():
        entry = merged.setdefault((kind, _name_of(address, known, numbers), stack), [0, 0.0])
        entry[0] += count
        entry[1] += us
    return sorted(merged.items(), key=lambda item: (-item[1][1], -item[1][0]))


def main(directory: str, output: str) -> None:
    """Run the storm under perf and write what was waited for."""
    known = _addresses()
    sums: Sums = defaultdict(lambda: [0, 0.0])
    total_us: Counter[str] = Counter()
    pending: dict[tuple[str, str], tuple[int, str, tuple[str, ...]]] = {}
    with tempfile.TemporaryDirectory(dir=directory) as place:
        perf = PerfRecord(f"{place}/perf.data", contention=True, switches=True)
        try:
            _storm(place)
            perf.stop()
            with perf.script() as script:
                assert script.stdout
                for (_, _, task, seconds, nanoseconds, event, text), frames in _events(script.stdout):
                    at_ns = int(seconds) * 10**9 + int(nanoseconds)
                    address = text.split(" ", 1)[0]
                    if event == "lock:contention_begin":
                        kind = "spin" if "SPIN" in text and "MUTEX" not in text else "sleep"
                        pending.setdefault((task, address), (at_ns, kind, tuple(frames)))
                    elif event == "lock:contention_end" and (task, address) in pending:
                        begun_ns, kind, stack = pending.pop((task, address))
                        entry = sums[kind, address, stack]
                        entry[0] += 1
                        entry[1] += (at_ns - begun_ns) / 1e3
                        total_us[address] += round((at_ns - begun_ns) / 1e3)
                    elif event == "sched:sched_switch" and frames:
                        match = _SWITCH.search(text)
                        if match is not None and match[2].startswith("D"):
                            sums["switch", "0", tuple(frames)][0] += 1
        finally:
            perf.close()
    with open(output, "w", encoding="ascii") as file:
        uname = os.uname()
        file.write(f"# {uname.release} {uname.version}\n# count us event lock-by-address stack (leaf first)\n")
        file.write(f"# addresses known: {' '.join(name for name, begin in known.items() if begin) or 'none'}\n")
        written = 0
        numbers = {address: number for number, (address, _) in enumerate(total_us.most_common())}
        for (kind, address, stack), (count, us) in _ordered(sums, known, numbers):
            line = f"{count:.0f} {us:.0f} {kind} {address} {' '.join(stack)}\n"
            written += len(line)
            if written > _MOST_BYTES:
                file.write("# and more, with less time\n")
                break
            file.write(line)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
