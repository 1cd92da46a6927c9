"""Real containers, from the request to the first instruction: what a start costs, and what that cost grows with."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.images import generated_image
from bench.measure import Figures, show_ratio
from flatmount.kernel.namespaces import apart, enter_private_mounts
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.rootfs.workplace import workplace
from flatmount.store import Store
from flatmount.storm.engine import background_mounts

ROUNDS = 3
METHOD = (
    "each figure the median over a wave, ratios within a round, 3 rounds interleaved; the same runc for all; "
    "containerd without user namespaces, since with them its releases 1.x copy the image for each container"
)
OWN, HOST, BARE, CONTAINERD = "flatmount", "runc", "runc-plain", "containerd"
MANY_MOUNTS = 10000
SINGLE = 10  # commands in a round


def run(part: str = "") -> None:
    """The whole section, or one part of it."""
    if part and part not in PARTS:
        sys.exit(f"bench: starts has no part {part!r}; there are {', '.join(PARTS)}")
    print(METHOD)
    with tempfile.TemporaryDirectory(prefix="flatmount-bench-", dir="/dev/shm") as ram:
        os.chmod(ram, 0o755)
        layouts = {layers: generated_image(f"{ram}/layers{layers}", layers=layers) for layers in (5, 60, 500)}
        with Store.open(f"{ram}/store", create=True) as store:
            for layers, layout in layouts.items():
                store.ensure_flat(store.import_image(layout, name=f"layers{layers}"))
            write_tiny_image(f"{ram}/tiny", 60)
            store.ensure_flat(store.import_image(f"{ram}/tiny", name="tiny"))
        for name in [part] if part else PARTS:
            PARTS[name](ram, layouts[60])
    print()


def _layers(ram: str, _: str) -> None:
    names = (OWN, HOST)
    options = ("--containers", "15", "--concurrency", "1", "--no-probe", "--engine", ",".join(names))
    seen: dict[tuple[str, int], list[float]] = {}
    for _round in range(ROUNDS):
        for layers in (5, 500):
            for wave in _storm(ram, f"layers{layers}", *options):
                seen.setdefault((wave["engine"], layers), []).append(wave["latency_ms"]["p50"])
    for name in names:
        _compare(f"{name}: 500 layers against 5", seen[name, 500], seen[name, 5], "1.1" if name == OWN else "")


def _mounts(ram: str, layout: str) -> None:
    names = (OWN, HOST, CONTAINERD)
    options = ("--containers", "15", "--concurrency", "1", "--no-probe", "--engine", ",".join(names))
    seen: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for mounts in (0, MANY_MOUNTS):
            for wave in _storm(ram, "layers60", *options, "--layout", layout, "--background", str(mounts)):
                seen.setdefault((wave["engine"], mounts), []).append(wave["latency_ms"]["p50"])
    for name in names:
        if (name, 0) in seen:
            said = f"{name}: {MANY_MOUNTS:,} mounts in the host's table against none"
            _compare(said, seen[name, MANY_MOUNTS], seen[name, 0], "1.1" if name == OWN else "")


def _single(ram: str, _: str) -> None:
    """Whole commands, from the shell's view: each makes its own template."""
    environment = {**os.environ, "FLATMOUNT_RUN": f"{ram}/run", "FLATMOUNT_POOL": "1048576:67108864"}
    for attach in ("private", "host"):
        call = [sys.executable, "-P", "-m", "flatmount", "run", "--rm", "--attach", attach, "--root", f"{ram}/store"]
        seen: dict[int, list[float]] = {0: [], MANY_MOUNTS: []}

        def measure(mounts: int, command: tuple[str, ...], into: list[float]) -> None:
            enter_private_mounts()
            with workplace(f"{ram}/run", "bench") as place:
                background_mounts(place, mounts)
                took = []
                for _ in range(SINGLE):
                    begun = time.perf_counter()
                    subprocess.run(command, check=True, env=environment)
                    took.append((time.perf_counter() - begun) * 1000)
            into.append(statistics.median(took))

        subprocess.run([*call, "tiny"], check=True, env=environment)  # makes the flat tree
        for _round in range(ROUNDS):
            for mounts, into in seen.items():
                apart(partial(measure, mounts, (*call, "tiny"), into))
        said = f"flatmount run --attach {attach}: {MANY_MOUNTS:,} mounts against none"
        _compare(said, seen[MANY_MOUNTS], seen[0], "1.1" if attach == "private" else "")


def _held(ram: str, layout: str) -> None:
    names = (OWN, HOST, CONTAINERD)
    options = ("--containers", "20", "--concurrency", "1", "--no-probe", "--waves", "15", "--hold", "--layout", layout)
    first: dict[str, list[float]] = {}
    last: dict[str, list[float]] = {}
    for _ in range(2):
        for wave in _storm(ram, "layers60", *options, "--engine", ",".join(names)):
            place = {0: first, 14: last}.get(wave["wave"])
            if place is not None:
                place.setdefault(wave["engine"], []).append(wave["latency_ms"]["p50"])
    for name in first:
        target = "1.2" if name == OWN else ""
        _compare(f"{name}: the 281st to 300th held against the first 20", last[name], first[name], target)


def _at_once(ram: str, layout: str) -> None:
    names = (OWN, BARE, CONTAINERD)
    options = ("--containers", "50", "--engine", ",".join(names), "--layout", layout, "--repeats", str(ROUNDS))
    rate: dict[str, list[float]] = {}
    probe: dict[str, list[float]] = {}
    for wave in _storm(ram, "layers60", *options):
        if wave["failed"]:
            print(f"  {wave['engine']}: {wave['failed']} failed: {wave['failures'][0]}")
        rate.setdefault(wave["engine"], []).append(wave["starts_per_s"])
        probe.setdefault(wave["engine"], []).append(wave["probe_ms"]["p99"])
    for name, values in rate.items():
        p99 = statistics.median(probe[name])
        print(f"  50 at once, {name:<12} {statistics.median(values):7.1f} starts/s   probe p99 {p99:7.1f} ms")
    for name, target in ((BARE, "0.8"), (CONTAINERD, "1.5")):
        if name in rate:
            show_ratio(
                f"50 at once: {OWN} against {name}, starts per second", _ratio(rate[OWN], rate[name]), target=target
            )


def _storm(ram: str, image: str, *options: str) -> list[dict[str, Any]]:
    call = [sys.executable, "-m", "flatmount", "storm", image, "--root", f"{ram}/store", "--json", "-"]
    peers = os.environ.get("FLATMOUNT_CONTAINERD")
    call += ["--containerd", peers] if peers else []
    repeats = () if "--repeats" in options else ("--repeats", "1")
    environment = {**os.environ, "FLATMOUNT_RUN": f"{ram}/run"}
    done = subprocess.run([*call, *repeats, *options], stdout=subprocess.PIPE, text=True, env=environment, check=False)
    report = json.loads(done.stdout)
    for one in report["skipped"]:
        print(f"  {one['engine']} was left out: {one['reason']}")
    waves: list[dict[str, Any]] = report["waves"]
    return waves


def _compare(what: str, above: list[float], below: list[float], target: str) -> None:
    show_ratio(what, _ratio(above, below), target=f"at most {target}" if target else "")
    for values in (above, below):
        print(f"      {Figures(tuple(values))} ms")


def _ratio(above: list[float], below: list[float]) -> Figures:
    return Figures(tuple(a / b for a, b in zip(above, below, strict=True)))


PARTS: dict[str, Callable[[str, str], None]] = {
    "layers": _layers,
    "mounts": _mounts,
    "single": _single,
    "held": _held,
    "once": _at_once,
}
