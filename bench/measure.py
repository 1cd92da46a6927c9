"""How every section measures: interleaved rounds, medians with ranges, ratios within a round."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.plan.mapping import Mapping as IdMapping
from flatmount.rootfs.assembler import Assembler, Request, Rootfs
from flatmount.rootfs.ranges import RangePool
from flatmount.rootfs.workplace import workplace

FIRST_ID = 1 << 20


@dataclass(frozen=True, slots=True)
class Figures:
    """One number from each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:9.1f}  ({min(self.values):.1f} - {max(self.values):.1f})"


def rounds(measures: Mapping[str, Callable[[int], float]], count: int) -> dict[str, Figures]:
    """Call every measure once a round, in an order that rotates, and keep what it returns."""
    names = list(measures)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            seen[name].append(measures[name](number))
    return {name: Figures(tuple(values)) for name, values in seen.items()}


def ratio(above: Figures, below: Figures) -> Figures:
    """The ratio of two figures, round by round: what disturbed a round disturbed both."""
    return Figures(tuple(a / b for a, b in zip(above.values, below.values, strict=True)))


def show_ratio(what: str, figures: Figures, *, target: str = "") -> None:
    """Print a ratio with its range and, where one is set, what it should be."""
    said = f"   target {target}" if target else ""
    print(f"  {what:<66} {figures.median:6.2f}  ({min(figures.values):.2f} - {max(figures.values):.2f}){said}")


def mappings(count: int) -> list[IdMapping]:
    """A range of its own for each container."""
    return [IdMapping.single(FIRST_ID + 65536 * i) for i in range(count)]


def assemble_all(
    assembler: Assembler, pool: RangePool, roots: str, tag: str, count: int, *, at_once: int, ahead: bool
) -> float:
    """Assemble `count` containers, `at_once` at a time; returns microseconds of wall time for each, undoing apart."""
    requests = [Request(mapping, f"{tag}-{i}", f"{roots}/{tag}-{i}") for i, mapping in enumerate(mappings(count))]
    if ahead:
        pool.prepare((request.mapping for request in requests), pinned=assembler.pins, image=assembler.image)
    begun = time.perf_counter_ns()
    made = assembler.assemble_many(requests, at_once=at_once)
    took = time.perf_counter_ns() - begun
    for rootfs in made:
        if not isinstance(rootfs, Rootfs):
            raise rootfs
        rootfs.undo()
    return took / count / 1000


def build_program(directory: str, name: str, *flags: str) -> str:
    """Compile the C program `name` of this package into `directory`; returns its path."""
    program = os.path.join(directory, name)
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(["cc", "-O2", "-o", program, str(source), *flags], check=True)
    return program


def run_floor(program: str, arguments: Sequence[str], count: int, uppers: str, tag: str) -> float:
    """Run the C loop; returns microseconds of wall time for each container."""
    done = subprocess.run([program, *arguments, tag], check=True, capture_output=True, text=True)
    for name in os.listdir(uppers):
        if name.startswith(f"{tag}-"):
            shutil.rmtree(os.path.join(uppers, name))
    return int(done.stdout) / count / 1000


@contextmanager
def place() -> Iterator[str]:
    """A tmpfs of the bench's own, in a mount namespace of its own."""
    enter_private_mounts()
    with workplace(os.environ.get("FLATMOUNT_RUN", "/run/flatmount"), "bench") as path:
        yield path


def machine() -> str:
    """What the figures were measured on, in one line."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"Linux {os.uname().release}, {os.cpu_count()} processors, load {load}"
