"""containerd's own suite of snapshotters, compiled from Debian's package of its sources, against our socket."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conformance.conftest import FORMS
from tests.snapshotting import Client, Daemon

SOURCES = Path(__file__).with_name("client")
PACKAGES = Path("/usr/share/gocode")
PASSING = 20


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite as a program. The first build takes half a minute, later ones come from Go's own cache."""
    program = tmp_path_factory.mktemp("suite") / "suite"
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": str(PACKAGES), "GOFLAGS": ""}
    command = ["go", "test", "-c", "-o", str(program), "."]
    done = subprocess.run(command, cwd=SOURCES, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n`tools/setup --tests` installs what this needs"
    return program


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_the_upstream_suite_passes(suite: Path, daemon: Daemon, client: Client, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = [str(suite), "-test.run", "TestSuite", "-test.v", "-test.timeout", "120s", "-socket", str(daemon.socket)]
    environment = {**os.environ, "TMPDIR": str(work)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    verdicts = {name: verdict for verdict, name in re.findall(r"--- (PASS|FAIL|SKIP): TestSuite/(\S+)", done.stdout)}
    assert done.returncode == 0, done.stdout[-5000:]
    # Upstream skips Rename itself, with every snapshotter; tests/conformance/test_cases.py has it.
    assert [name for name, verdict in verdicts.items() if verdict != "PASS"] == ["Rename"]
    assert len(verdicts) == PASSING + 1
