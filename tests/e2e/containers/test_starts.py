"""`flatmount storm --engine`: real containers in waves, and nothing of them afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flatmount.kernel.mounts import mount_count
from tests.conftest import SOAK
from tests.e2e.conftest import CommandLine
from tests.e2e.containers.conftest import left_by, until


def processes_of(line: CommandLine) -> list[str]:
    """Whoever carries the test's own run directory in its arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(line.run_directory) in words:
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def storm(line: CommandLine, *arguments: str) -> list[dict[str, object]]:
    report = json.loads(line("storm", "tiny", *arguments, "--json", "-"))
    assert report["schema"] == "flatmount.starts/1"
    waves: list[dict[str, object]] = report["waves"]
    return waves


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_waves_of_containers_leave_nothing(line: CommandLine) -> None:
    before = mount_count()
    count = "20" if SOAK else "4"
    waves = storm(
        line, "--engine", "flatmount", "--containers", "50" if SOAK else "25", "--waves", count, "--repeats", "1"
    )
    assert [wave["failed"] for wave in waves] == [0] * int(count)
    assert all(wave["mounts_standing"] == wave["mounts_before"] for wave in waves)
    assert mount_count() == before
    assert not left_by(line) and not processes_of(line)
    assert os.listdir(line.run_directory / "work") == []


@pytest.mark.parametrize("engine", ["flatmount-host", "runc", "runc-plain"])
def test_engines_hold_their_containers_and_undo_them(line: CommandLine, engine: str) -> None:
    options = ("--containers", "3", "--waves", "2", "--repeats", "1", "--hold", "--concurrency", "2")
    waves = storm(line, "--engine", engine, *options)
    assert [(wave["running_before"], wave["failed"]) for wave in waves] == [(0, 0), (3, 0)]
    assert all(len(wave["latencies_ms"]) == 3 for wave in waves)  # type: ignore[arg-type]
    assert not left_by(line) and not processes_of(line)


def test_an_engine_that_is_not_there_is_named(line: CommandLine) -> None:
    said = line("storm", "tiny", "--engine", "flatmount,containerd", "--containers", "1", "--repeats", "1")
    assert "containerd was left out: it needs the image as an OCI layout" in said
    assert "no engine 'docker'" in line.refused("storm", "tiny", "--engine", "docker", code=2)
    assert "real containers" in line.refused("storm", "tiny", "--waves", "3", code=2)


def test_a_storm_that_is_killed_leaves_nothing_to_the_next_command(line: CommandLine) -> None:
    options = ("--containers", "10", "--waves", "50", "--hold", "--repeats", "1", "--concurrency", "4")
    process = line.start("storm", "tiny", "--engine", "flatmount", *options, stdout=subprocess.DEVNULL)
    until(
        lambda: (line.run_directory / "containers").exists() and len(os.listdir(line.run_directory / "containers")) > 5
    )
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    until(lambda: not line.json("ps", "--all")["containers"])
    line("storm", "tiny", "--engine", "flatmount", "--containers", "1", "--repeats", "1")
    assert not left_by(line)
    until(lambda: not processes_of(line))
