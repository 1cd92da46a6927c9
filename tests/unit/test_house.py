"""The house's own rules, as far as a program can check them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "flatmount"
DOORS = ("kernel", "cpu")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_imports_run_downwards() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=SOURCES.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCES)))
def test_only_the_doors_open_the_extension(path: Path) -> None:
    if path.relative_to(SOURCES).parts[0] not in DOORS:
        assert not {name for name in imports(path) if name.endswith("._native")}


def test_no_module_outgrows_a_reader() -> None:
    long = {path.name: n for path in SOURCES.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long
