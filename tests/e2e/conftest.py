"""The command line as a person runs it: a process, a store and a run directory of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flatmount.cli.image_demo import import_demo
from flatmount.kernel.mounts import read_table
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.store import Store

LAYERS = 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="real mounts need root"))


@dataclass(frozen=True)
class CommandLine:
    """Runs `flatmount` with a store and a run directory."""

    root: Path
    run_directory: Path
    extra: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        own = {"FLATMOUNT_ROOT": str(self.root), "FLATMOUNT_RUN": str(self.run_directory), "NO_COLOR": "1"}
        return {**os.environ, **own, **self.extra}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flatmount", *arguments]
        return subprocess.Popen(command, env=self.environment(), text=True, **options)

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        command = [sys.executable, "-m", "flatmount", *arguments]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if expect == 0 else done.stderr

    def json(self, *arguments: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self(*arguments, "--json"))
        return facts

    def refused(self, *arguments: str, code: int) -> str:
        """The one line a person gets."""
        said = self(*arguments, expect=code)
        assert said.count("\n") == 1, said
        assert said.startswith("flatmount: ")
        return said


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the demo image in it, made once; read by many tests, so none may change its images."""
    root = tmp_path_factory.mktemp("store") / "root"
    with Store.open(str(root), create=True) as store:
        store.ensure_flat(import_demo(store, layers=LAYERS, name="demo", progress=lambda text: None))
    return root


@pytest.fixture
def flatmount(demo_store: Path, tmp_path: Path) -> Iterator[CommandLine]:
    """The command line on the demo store; afterwards no mount, workplace or upper of the test may be left.

    "The host" is a private copy of the machine's mount namespace, so that only the test's own mounts are seen there.
    """
    enter_private_mounts()
    before = {entry.mount_point for entry in read_table()}
    line = CommandLine(demo_store, tmp_path / "run")
    yield line
    assert not {entry.mount_point for entry in read_table()} - before
    assert not leftovers(line)


def leftovers(line: CommandLine) -> list[str]:
    """What a command left in its run directory and in the store's uppers."""
    places = (line.run_directory / "work", line.run_directory / "mounts", line.root / "v1/data/uppers")
    return [f"{place}/{name}" for place in places if place.exists() for name in os.listdir(place) if name != ".lock"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    return directory
