"""Images into the store beside `umoci unpack` and `skopeo copy` to containers-storage, on the same file system."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from time import perf_counter_ns

import flatmount
from bench.images import real_images
from bench.measure import Figures, ratio, rounds, show_ratio
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.store import Store

ROUNDS = 3
METHOD = f"""\
Whole commands, one after the other, each into fresh directories; {ROUNDS} rounds, the order rotates. Milliseconds of
wall time, then of the command's processor time (user and system): median (range). flatmount's modules are compiled
beforehand, as an installation has them. "ext4" is one of its own, in a file in /var/tmp, so that what ours waits for
(it ends with a syncfs) are its own writes. umoci ends in the page cache; unpack also hashes what it unpacked, as ours
does, raw unpack does not.
"""


def run() -> None:
    """The whole section."""
    print(METHOD)
    enter_private_mounts()
    with tempfile.TemporaryDirectory(prefix="flatmount-bench-", dir="/var/tmp") as place:
        images = real_images(place)
        with _installed(place):
            for kind, (what, image) in product(("tmpfs", "ext4"), images.items()):
                with _mounted(kind, place) as target:
                    _section(f"{what}, on {kind}", image, target)


@contextmanager
def _mounted(kind: str, place: str) -> Iterator[str]:
    """A file system of the section's own."""
    target, file = os.path.join(place, "target"), os.path.join(place, "disk.img")
    os.mkdir(target)
    command = ["mount", "-t", "tmpfs", "bench", target]
    if kind == "ext4":
        with open(file, "wb") as out:
            out.truncate(4 << 30)
        _quiet("mkfs.ext4", "-q", file)
        command = ["mount", "-o", "loop", file, target]
    subprocess.run(command, check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)
        os.rmdir(target)
        if kind == "ext4":
            os.unlink(file)


def _section(what: str, image: str, place: str) -> None:
    flatten: list[float] = []
    again: list[float] = []
    processor: dict[str, list[float]] = {}

    def fresh(name: str, measure: Callable[[str], None]) -> Callable[[int], float]:
        def timed(number: int) -> float:
            with tempfile.TemporaryDirectory(prefix="round-", dir=place) as directory:
                used, begun = _children_ms(), perf_counter_ns()
                measure(directory)
                took = perf_counter_ns() - begun
                processor.setdefault(name, []).append(_children_ms() - used)
                _tidy(directory, flatten, again, image)
            return took / 1e6

        return timed

    commands: dict[str, Callable[[str], None]] = {"flatmount image import": lambda d: _flatmount(image, d)}
    if shutil.which("umoci"):
        commands["umoci unpack"] = lambda d: _quiet("umoci", "unpack", "--image", image, f"{d}/bundle")
        commands["umoci raw unpack"] = lambda d: _quiet("umoci", "raw", "unpack", "--image", image, f"{d}/root")
    if shutil.which("skopeo"):
        commands["skopeo copy"] = lambda d: _skopeo(image, d)
    measures = {name: fresh(name, command) for name, command in commands.items()}
    seen = rounds(measures, ROUNDS)
    print(what)
    for name, figures in seen.items():
        print(f"  {name:<34} {figures}   processor {Figures(tuple(processor[name]))}")
    ours = seen["flatmount image import"]
    print(f"  {'flatten, as hard links':<34} {Figures(tuple(flatten))}")
    print(f"  {'the same import again, whole':<34} {Figures(tuple(again))}")
    for name in list(measures)[1:]:
        show_ratio(f"{name} / flatmount image import", ratio(seen[name], ours), target="1.0 or more")
    show_ratio("flatten / import", ratio(Figures(tuple(flatten)), ours), target="0.25 or less")
    print()


def _flatmount(image: str, directory: str) -> None:
    command = [sys.executable, "-m", "flatmount", "image", "import", image, "--flatten", "first-use"]
    _quiet(*command, "--root", f"{directory}/store", "--name", "i")


@contextmanager
def _installed(place: str) -> Iterator[None]:
    """Commands find their modules compiled, as an installation has them, whatever this environment says of that."""
    said = {name: os.environ.pop(name, None) for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    os.environ["PYTHONPYCACHEPREFIX"] = f"{place}/compiled"
    try:
        _quiet(sys.executable, "-m", "compileall", "-q", os.path.dirname(flatmount.__file__))
        _quiet(sys.executable, "-m", "flatmount", "image", "list", "--help")
        yield
    finally:
        del os.environ["PYTHONPYCACHEPREFIX"]
        os.environ.update({name: value for name, value in said.items() if value is not None})


def _children_ms() -> float:
    """Processor time of the commands that have ended, in milliseconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e3


def _skopeo(image: str, directory: str) -> None:
    _quiet(
        "skopeo", "--insecure-policy", "copy", "-q", f"oci:{image}",
        f"containers-storage:[overlay@{directory}/graph+{directory}/run]i",
    )  # fmt: skip


def _tidy(directory: str, flatten: list[float], again: list[float], image: str) -> None:
    """What is measured on a store that was just filled, and what containers-storage leaves mounted."""
    if os.path.isdir(f"{directory}/store"):
        with Store.open(f"{directory}/store") as store:
            begun = perf_counter_ns()
            store.import_image(image, name="i")
            again.append((perf_counter_ns() - begun) / 1e6)
            begun = perf_counter_ns()
            store.ensure_flat(store.image("i"))
            flatten.append((perf_counter_ns() - begun) / 1e6)
    if os.path.isdir(f"{directory}/graph/overlay"):
        subprocess.run(["umount", f"{directory}/graph/overlay"], check=False, stderr=subprocess.DEVNULL)


def _quiet(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
