"""What looking costs and shows: a storm under `watch` and under `profile` beside one without, and who waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from bench.images import generated_image
from bench.measure import Figures, show_ratio
from flatmount.observe.profile_results import Profile, lock_totals, mount_lock_ms, unclassified_share
from flatmount.store import Store

ROUNDS = 3
LAYERS, CONTAINERS = 50, 100
STRATEGIES = ("per-layer", "flat")
METHOD = f"{CONTAINERS} containers of {LAYERS} layers, 16 at a time; {ROUNDS} rounds interleaved, ratios within a round"
FLATMOUNT = (sys.executable, "-m", "flatmount")


def run() -> None:
    """The whole section."""
    print(METHOD)
    with tempfile.TemporaryDirectory(prefix="flatmount-bench-", dir="/dev/shm") as ram:
        layout = generated_image(f"{ram}/layers", layers=LAYERS)
        with Store.open(f"{ram}/store", create=True) as store:
            store.import_image(layout, name="layers")
        _cost(ram)
        _waits(ram)
    print()


def _cost(ram: str) -> None:
    seen: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for way in ("alone", "watch", "profile"):
            for strategy, rate in _storm(ram, way).items():
                seen.setdefault((way, strategy), []).append(rate)
    for way in ("watch", "profile"):
        for strategy in STRATEGIES:
            pairs = zip(seen[way, strategy], seen["alone", strategy], strict=True)
            show_ratio(f"{strategy}: starts a second under `{way}`", Figures(tuple(one / two for one, two in pairs)))


def _storm(ram: str, way: str) -> dict[str, float]:
    out = f"{ram}/storm.json"
    command = [*FLATMOUNT, "storm", "layers", "--root", f"{ram}/store", "--strategies", ",".join(STRATEGIES)]
    command += ["--containers", str(CONTAINERS), "--concurrency", "16", "--repeats", "1", "--json", out]
    if way == "profile":
        command = [*FLATMOUNT, "profile", "--", *command]
    with _watched(way == "watch"):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(out, encoding="utf-8") as file:
        return {result["strategy"]: result["starts_per_s"] for result in json.load(file)["results"]}


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


def _waits(ram: str) -> None:
    waited: dict[str, list[tuple[float, float]]] = {name: [] for name in STRATEGIES}
    unknown = 0.0
    for _ in range(ROUNDS):
        for name in STRATEGIES:
            path = os.path.join(ram, "profile.json")
            command = [*FLATMOUNT, "profile", "--save", path, "--", *FLATMOUNT, "storm", "layers"]
            command += ["--root", f"{ram}/store", "--strategies", name, "--containers", str(CONTAINERS)]
            command += ["--concurrency", "16", "--repeats", "1"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with open(path, encoding="utf-8") as file:
                profile = Profile.from_json(json.load(file))
            totals = lock_totals(profile.waits, command_only=True)
            unknown = max(unknown, unclassified_share(totals))
            waited[name].append((mount_lock_ms(totals), sum(one.total_ms for one in totals)))
    locks, all_waits = (
        Figures(tuple(flat[i] / per[i] for flat, per in zip(waited["flat"], waited["per-layer"], strict=True)))
        for i in (0, 1)
    )
    _share("waiting for the mount locks, flat by per-layer", locks)
    _share("all waiting, grace periods too, flat by per-layer", all_waits)
    print(f"  {'unclassified lock waiting, at most':<66} {unknown:8.3%}   target < 10 %")


def _share(what: str, shares: Figures) -> None:
    low, high = min(shares.values), max(shares.values)
    print(f"  {what:<66} {shares.median:8.3%}  ({low:.3%} - {high:.3%})   target <= 2 %")
