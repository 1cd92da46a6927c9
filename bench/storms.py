"""A burst with two copies of the mount namespace for each container, and what a health check feels meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from flatmount.cli.image_demo import import_demo
from flatmount.store import Store

METHOD = (
    "200 containers of 50 layers at once, two namespace copies each, the storm's own process; 3 repeats, interleaved"
)


def run() -> None:
    """The whole section."""
    print(METHOD)
    with tempfile.TemporaryDirectory(prefix="flatmount-bench-", dir="/dev/shm") as ram:
        with Store.open(f"{ram}/store", create=True) as store:
            import_demo(store, layers=50, name="demo", progress=lambda text: None)
        options = ["--containers", "200", "--copies", "2", "--strategies", "per-layer,flat", "--repeats", "3"]
        done = subprocess.run(
            [sys.executable, "-m", "flatmount", "storm", "demo", "--root", f"{ram}/store", *options, "--json", "-"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    for name in ("per-layer", "flat"):
        mine = [result for result in results if result["strategy"] == name]
        wall = statistics.median(result["wall_s"] for result in mine)
        p99 = statistics.median(result["probe_ms"]["p99"] for result in mine)
        worst = max(result["probe_ms"]["max"] for result in mine)
        print(f"  {name:<12} {wall:7.3f} s   health probe p99 {p99:8.1f} ms, at worst {worst:.1f} ms")
    walls = [
        statistics.median(result["wall_s"] for result in results if result["strategy"] == name)
        for name in ("per-layer", "flat")
    ]
    print(f"  the burst is over {walls[0] / walls[1]:.1f} times sooner by flat")
    print()
