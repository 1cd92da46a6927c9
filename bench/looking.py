"""What looking costs and shows: a storm under `watch` and under `profile` beside one without, and who waits."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.images import generated_image
from bench.measure import Figures, machine, show_ratio
from flatmount.store import Store
from flatmount.storm.results import StormReport, StrategyLocks

ROUNDS = 5
LOCK_ROUNDS = 3
LAYERS, CONTAINERS = 50, 100
STRATEGIES = ("per-layer", "flat")
WAYS = ("alone", "watch", "profile")
METHOD = f"{CONTAINERS} containers of {LAYERS} layers, 16 at a time; {ROUNDS} rounds interleaved, ratios within a round"
FLATMOUNT = (sys.executable, "-m", "flatmount")
EVENTS_PER_S, WATCHED_S, LEARNING_S = 1000, 25, 10

# Attaches and detaches a tmpfs so often that there are so many events a second, catching up where it was late.
PACED = """
import ctypes, sys, time
libc, point, pairs_per_s, seconds = ctypes.CDLL(None), sys.argv[1].encode(), int(sys.argv[2]), float(sys.argv[3])
begun = time.monotonic()
done = 0
while (now := time.monotonic() - begun) < seconds:
    while done < now * pairs_per_s:
        assert libc.mount(b"x", point, b"tmpfs", 0, None) == 0 and libc.umount2(point, 0) == 0
        done += 1
    time.sleep(0.005)
print(2 * done / (time.monotonic() - begun))
"""


def run() -> None:
    """The whole section."""
    print(f"{METHOD}; {machine()}")
    with tempfile.TemporaryDirectory(prefix="flatmount-bench-", dir="/dev/shm") as ram:
        layout = generated_image(f"{ram}/layers", layers=LAYERS)
        with Store.open(f"{ram}/store", create=True) as store:
            store.import_image(layout, name="layers")
        _cost(ram)
        _watching(ram)
        _waits(ram)
    print()


def _cost(ram: str) -> None:
    seen: dict[tuple[str, str], list[float]] = {}
    for number in range(ROUNDS):
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            for strategy, rate in _storm(ram, way).items():
                seen.setdefault((way, strategy), []).append(rate)
    for way in WAYS[1:]:
        for strategy in STRATEGIES:
            pairs = zip(seen[way, strategy], seen["alone", strategy], strict=True)
            figures = Figures(tuple(one / two for one, two in pairs))
            show_ratio(f"{strategy}: starts a second under `{way}`, by those without", figures)


def _storm(ram: str, way: str) -> dict[str, float]:
    out = f"{ram}/storm.json"
    command = _storm_command(ram, out)
    if way == "profile":
        command = [*FLATMOUNT, "profile", "--", *command]
    with _watched(way == "watch"):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {result.strategy: result.starts_per_s for result in _read(out).results}


def _storm_command(ram: str, out: str) -> list[str]:
    command = [*FLATMOUNT, "storm", "layers", "--root", f"{ram}/store", "--strategies", ",".join(STRATEGIES)]
    return [*command, "--containers", str(CONTAINERS), "--concurrency", "16", "--repeats", "1", "--json", out]


def _read(path: str) -> StormReport:
    with open(path, encoding="utf-8") as file:
        return StormReport.from_json(json.load(file))


@contextmanager
def _watched(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    with subprocess.Popen([*FLATMOUNT, "watch", "--jsonl"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout
        watch.stdout.readline()
        yield
        watch.terminate()
        watch.communicate()


def _watching(ram: str) -> None:
    """`watch` beside so many events a second in its own table: what it says of itself, and what the kernel says."""
    point = f"{ram}/point"
    os.mkdir(point)
    paced = [sys.executable, "-c", PACED, point, str(EVENTS_PER_S // 2), str(WATCHED_S)]
    with subprocess.Popen([*FLATMOUNT, "watch", "--jsonl"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout
        watch.stdout.readline()
        with subprocess.Popen(paced, stdout=subprocess.PIPE, text=True) as events:
            time.sleep(LEARNING_S)
            begun, used = time.monotonic(), _cpu_s(watch.pid)
            said, _ = events.communicate()
            measured = (_cpu_s(watch.pid) - used) / (time.monotonic() - begun)
        watch.terminate()
        lines, _ = watch.communicate()
    shares = [json.loads(line)["own_cpu_share"] for line in lines.splitlines()]
    known, learning = shares[LEARNING_S : WATCHED_S - 1], shares[:LEARNING_S]
    print(f"  `watch` beside {float(said):,.0f} mount events a second in its table, of one processor:")
    print(f"    {'as it says itself, median and at most':<64} {statistics.median(known):7.2%}  {max(known):.2%}")
    print(f"    {'as the kernel counts it':<64} {measured:7.2%}   target < 1 %")
    print(f"    {f'in the first {LEARNING_S} seconds, while it learns, median and at most':<64} ", end="")
    print(f"{statistics.median(learning):7.2%}  {max(learning):.2%}")


def _cpu_s(pid: int) -> float:
    """Processor time of all threads of a process, in nanosecond steps."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as file:
            total += int(file.read().split()[0])
    return total / 1e9


def _waits(ram: str) -> None:
    seen: dict[str, list[StrategyLocks]] = {name: [] for name in STRATEGIES}
    out = f"{ram}/locks.json"
    for _ in range(LOCK_ROUNDS):
        subprocess.run([*_storm_command(ram, out), "--profile"], check=True, stdout=subprocess.DEVNULL)
        for one in _read(out).locks:
            seen[one.strategy].append(one)
    for name in STRATEGIES:
        locks = Figures(tuple(one.mount_locks_us_each for one in seen[name]))
        grace = Figures(tuple(one.grace_period_us_each for one in seen[name]))
        each = statistics.median(one.grace_periods / one.containers for one in seen[name])
        print(f"  {name + ': waited for the mount locks, us each':<58} {locks}")
        print(f"  {name + ': for grace periods, us each':<58} {grace}  in {each:.1f} waits")
    pairs = list(zip(seen["flat"], seen["per-layer"], strict=True))
    _share("the mount locks, flat by per-layer", [a.mount_locks_us_each / b.mount_locks_us_each for a, b in pairs], 2)
    _share("grace periods, flat by per-layer", [a.grace_period_us_each / b.grace_period_us_each for a, b in pairs])
    unknown = [
        one.unclassified_ms / (one.namespace_sem_ms + one.mount_lock_ms + one.other_locks_ms + one.unclassified_ms)
        for one in seen["per-layer"]
    ]
    _share("lock waiting that is unclassified, per-layer", unknown, 10)


def _share(what: str, shares: list[float], target: int | None = None) -> None:
    said = "" if target is None else f"   target <= {target} %"
    print(f"  {what:<58} {statistics.median(shares):8.3%}  ({min(shares):.3%} - {max(shares):.3%}){said}")
