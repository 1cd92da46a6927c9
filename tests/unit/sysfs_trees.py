"""Turns the short form of a recorded sysfs tree (tests/data/sysfs/README) into files."""

from __future__ import annotations

import os
import re
import tempfile
from functools import cache
from pathlib import Path

from flatmount.cpu.topology import Topology, parse_list, read_topology

DATA = Path(__file__).parents[1] / "data" / "sysfs"
NAMES = tuple(sorted(path.stem for path in DATA.glob("*.tree")))

_NUMBERS = re.compile(r"\[([0-9,-]+)\]")
_EXPRESSION = re.compile(r"\{(n[^}]*)\}")


def grow(name: str, root: Path) -> None:
    """Write the tree called `name` below `root`."""
    for line in (DATA / f"{name}.tree").read_text().splitlines():
        path, _, value = line.partition(" ")
        numbers = _NUMBERS.search(path)
        for n in parse_list(numbers[1]) if numbers else (0,):
            target = root / _NUMBERS.sub(str(n), path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_EXPRESSION.sub(lambda match, n=n: str(_value(match[1], n)), value).replace("\\n", "\n"))


def _value(expression: str, n: int) -> int:
    """`n` and a chain of + - * / % with whole numbers, from left to right."""
    result = n
    for operator, digits in re.findall(r"([-+*/%])(\d+)", expression):
        number = int(digits)
        result = {
            "+": result + number,
            "-": result - number,
            "*": result * number,
            "/": result // number,
            "%": result % number,
        }[operator]
    return result


@cache
def recorded(name: str) -> Topology:
    """The topology that is read from that tree; grown once, in memory where there is a place for that."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        grow(name, Path(root))
        return read_topology(root)
