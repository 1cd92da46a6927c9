"""Assembly: starts per second by strategy, against the bare kernel cost in C, layers and live containers."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from functools import partial

from bench.images import generated_image
from bench.measure import (
    Figures,
    assemble_all,
    build_program,
    mappings,
    place,
    ratio,
    rounds,
    run_floor,
    show_ratio,
)
from flatmount.cli.image_demo import import_demo
from flatmount.kernel.executor import adopt_thread
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import probe_store, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import Store, StoredImage
from flatmount.strategies import Choice

CONTAINERS = 200
LAYERS = 50
THREADS = 2
ROUNDS = 7
STRATEGIES = ("per-layer", "common-parent", "detached", "flat")
METHOD = f"""\
{CONTAINERS} containers of {LAYERS} layers, {THREADS} at a time, a range of its own for each; {ROUNDS} rounds.
Counted: directories, user namespace and range (unless "ahead"), plan, Python, every kernel call. Not counted: undoing.
The floor is a C loop of the same kernel operations. Microseconds of wall time a container: median (range).
"""


class Bench:
    """One store, one image, and the assemblers of every strategy over them."""

    def __init__(self, store: Store, image: StoredImage, directory: str) -> None:
        self.store = store
        self.image = image
        self.facts = probe_store(store).facts
        self.roots = os.path.join(directory, "roots")
        self.scratch = os.path.join(directory, "tmp", "ovl-")
        self.uppers = os.path.join(store.data, "uppers")
        self.flat = store.ensure_flat(image)
        for path in (self.roots, os.path.dirname(self.scratch)):
            os.makedirs(path, exist_ok=True)

    def assembler(self, strategy: str, pool: RangePool) -> Assembler:
        spec = specification(self.store, self.image, Choice(strategy, ""), make_target=True, scratch=self.scratch)
        return Assembler(spec, strategy, pool, uppers=self.uppers, scratch=self.scratch, ephemeral=True)

    def burst(self, strategy: str, tag: str, *, ahead: bool) -> float:
        pool = RangePool(self.store.data, self.facts)
        made = self.assembler(strategy, pool)
        took = assemble_all(made, pool, self.roots, tag, CONTAINERS, at_once=THREADS, ahead=ahead)
        pool.close()
        return took

    def floor(self, program: str, tag: str, *, ahead: bool) -> float:
        mode = "ahead" if ahead else "fresh"
        arguments = [self.store.data, self.flat, self.roots, str(CONTAINERS), str(THREADS), mode]
        return run_floor(program, arguments, CONTAINERS, self.uppers, tag)


def strategies(bench: Bench, program: str, where: str, *, ahead: bool, targets: bool) -> None:
    """Every strategy and the floor."""
    mode = "ahead" if ahead else "fresh"
    measures = {name: partial(_burst, bench, name, ahead) for name in STRATEGIES}
    measures["floor in C"] = lambda number: bench.floor(program, f"floor{mode}{number}", ahead=ahead)
    seen = rounds(measures, ROUNDS)
    print(f"{where}, ranges {mode}, us a container")
    for name, figures in seen.items():
        print(f"  {name:<16} {figures}   {1e6 / figures.median:8.0f} starts/s")
    wanted = (20, 2.5) if ahead else (8, 1.3)
    for other, least in zip(("per-layer", "common-parent"), wanted, strict=True):
        target = f">= {least:g}" if targets else ""
        show_ratio(f"starts/s of flat over {other}", ratio(seen[other], seen["flat"]), target=target)
    show_ratio(
        "wall time of flat over the floor in C",
        ratio(seen["flat"], seen["floor in C"]),
        target="<= 2" if targets else "",
    )
    print()


def _burst(bench: Bench, strategy: str, ahead: bool, number: int) -> float:
    return bench.burst(strategy, f"{strategy}{'a' if ahead else 'f'}{number}", ahead=ahead)


def constant_in_layers(store: Store, directory: str) -> None:
    """`flat` on an image of one layer and on the same files in a thousand."""
    images = {n: store.import_image(generated_image(os.path.join(directory, f"g{n}"), layers=n)) for n in (1, 1000)}
    benches = {n: Bench(store, image, directory) for n, image in images.items()}
    seen = rounds(
        {str(n): partial(_burst, bench, "flat", True) for n, bench in benches.items()},
        2 * ROUNDS,
    )
    print("flat on 1 layer and on 1,000, the same files, ranges ahead, us a container")
    for n, figures in seen.items():
        print(f"  {n:>5} layers {figures}")
    show_ratio("wall time at 1,000 layers over 1 layer", ratio(seen["1000"], seen["1"]), target="<= 1.2")
    print()


def constant_in_live_containers(bench: Bench) -> None:
    """The cost of the first containers and of the thousandth, while the others live."""
    count, sample = 1000, 50
    adopt_thread()
    first: list[float] = []
    last: list[float] = []
    for number in range(ROUNDS):
        pool = RangePool(bench.store.data, bench.facts)
        made = bench.assembler("flat", pool)
        ranges = mappings(count)
        pool.prepare(ranges)
        took, live = [], []
        for i, mapping in enumerate(ranges):
            begun = time.perf_counter_ns()
            live.append(made.assemble(mapping, f"l{number}-{i}", f"{bench.roots}/l{number}-{i}"))
            took.append((time.perf_counter_ns() - begun) / 1000)
        for rootfs in live:
            rootfs.undo()
        pool.close()
        first.append(statistics.median(took[:sample]))
        last.append(statistics.median(took[-sample:]))
    early, late = Figures(tuple(first)), Figures(tuple(last))
    print(f"flat while others live, one at a time, ranges ahead, median of {sample}, us a container")
    print(f"  the first {sample:<8} {early}")
    print(f"  up to the 1,000th  {late}")
    show_ratio("the 1,000th over the first", ratio(late, early), target="<= 1.3")
    print()


def run() -> None:
    """The whole section."""
    print(METHOD)
    with place() as ram:
        program = build_program(ram, "floor", "-pthread")
        with Store.open(f"{ram}/store", create=True) as store:
            image = import_demo(store, layers=LAYERS, name="demo", progress=lambda text: None)
            bench = Bench(store, image, ram)
            for ahead in (False, True):
                strategies(bench, program, "store and uppers on tmpfs", ahead=ahead, targets=True)
            constant_in_layers(store, ram)
            constant_in_live_containers(bench)
        disk = os.path.abspath(f".cache/bench.{os.getpid()}")
        os.makedirs(disk)
        try:
            with Store.open(f"{disk}/store", create=True) as store:
                on_disk = Bench(store, import_demo(store, layers=LAYERS, name="demo", progress=lambda text: None), disk)
                for ahead in (False, True):
                    strategies(on_disk, program, "store and uppers on this checkout's disk", ahead=ahead, targets=False)
        finally:
            shutil.rmtree(disk)
