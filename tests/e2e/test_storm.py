"""`flatmount storm`: its results, what it leaves, and what a kill leaves to the next command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flatmount.storm.results import StormReport
from tests.conftest import SOAK
from tests.e2e.conftest import LAYERS, CommandLine, leftovers

PLANNED = {"per-layer": 2 * (1 + 2 * LAYERS) + 1, "common-parent": 7, "detached": 1, "flat": 1}
ROUNDS = 100 if SOAK else 10


def test_every_strategy_starts_every_container_and_the_accounts_agree(flatmount: CommandLine, tmp_path: Path) -> None:
    out, page = tmp_path / "storm.json", tmp_path / "storm.html"
    text = flatmount(
        "storm", "demo", "--containers", "20", "--concurrency", "4", "--repeats", "2", "--seed", "7",
        "--copies", "1", "--watchers", "1", "--background", "50", "--json", str(out), "--html", str(page),
    )  # fmt: skip
    data = json.loads(out.read_text())
    assert data["schema"] == "flatmount.storm/1"
    assert data["image"]["layers"] == LAYERS
    assert data["settings"]["seed"] == 7
    results = data["results"]
    assert [result["repeat"] for result in results] == [0] * 4 + [1] * 4
    for result in results:
        name = result["strategy"]
        operations = result["mount_operations"]
        assert result["failed"] == 0, result["failures"]
        assert operations["planned_per_container"] == PLANNED[name]
        assert operations["executed"] == 20 * PLANNED[name]
        assert operations["kernel"] == 20 * PLANNED[name]
        assert result["undo_operations"] == 20
        assert result["mount_table"]["before"] == result["mount_table"]["after"]
        assert result["mount_table"]["peak"] >= result["mount_table"]["before"] + 20
        assert result["mount_table"]["before"] >= 50
        assert len(result["latencies_ms"]) == 20
        # A burst of a few milliseconds can slip between two rounds where the machine is late to begin it.
        assert result["probe_ms"]["p99"] is not None or name != "per-layer"
        assert result["watchers_cpu_s"] > 0
        assert all(value is not None for value in result["phases_ms"].values())
    assert StormReport.from_json(data).results
    assert "per-layer" in text
    assert page.read_text().startswith("<!doctype html>")


def test_who_waits_for_the_mount_locks_is_recorded_by_strategy(flatmount: CommandLine, tmp_path: Path) -> None:
    out, page = tmp_path / "storm.json", tmp_path / "storm.html"
    text = flatmount(
        "storm", "demo", "--containers", "24", "--concurrency", "8", "--repeats", "1", "--strategies", "per-layer,flat",
        "--profile", "--json", str(out), "--html", str(page),
    )  # fmt: skip
    report = StormReport.from_json(json.loads(out.read_text()))
    per_layer, flat = report.locks
    assert (per_layer.strategy, flat.strategy) == ("per-layer", "flat")
    for one in report.locks:
        assert one.containers == 24 and one.missing == () and one.lost == 0
        assert one.samples and 0 <= one.cpu_spinning + one.cpu_under_lock <= 1
        assert one.grace_periods and one.unclassified_ms < 0.1 * (1 + one.namespace_sem_ms + one.mount_lock_ms)
    # Each layer's umount waits for a grace period of its own; flat's one umount takes two, with the overlay's own.
    assert per_layer.grace_periods > LAYERS * 24 > flat.grace_periods
    assert "grace periods" in text and "Who waits for the mount locks" in page.read_text()


def test_uppers_elsewhere_and_on_the_host(flatmount: CommandLine, tmp_path: Path) -> None:
    uppers = tmp_path / "uppers"
    uppers.mkdir()
    text = flatmount(
        "storm", "demo", "--containers", "5", "--repeats", "1", "--strategies", "auto,per-layer", "--on-host",
        "--ranges", "ahead", "--admit", "2", "--uppers", str(uppers), "--json", "-",
    )  # fmt: skip
    results = json.loads(text)["results"]
    assert [result["strategy"] for result in results] == ["flat", "per-layer"]
    assert not any(result["failed"] for result in results)
    assert os.listdir(uppers) == []


def test_a_time_out_is_a_failure_and_exit_1(flatmount: CommandLine) -> None:
    flatmount("storm", "demo", "--containers", "30", "--repeats", "1", "--strategies", "per-layer", "--background",
              "20000", "--copies", "16", "--timeout", "1", "--json", "-", expect=1)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_undoes_everything(flatmount: CommandLine, number: signal.Signals) -> None:
    storm = flatmount.start(
        "storm", "demo", "--containers", "200", "--repeats", "50", "--on-host", stderr=subprocess.PIPE
    )
    work = flatmount.run_directory / "work"
    deadline = time.monotonic() + 60
    while not (work.is_dir() and os.listdir(work)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)
    storm.send_signal(number)
    _, said = storm.communicate(timeout=60)
    assert storm.returncode == 128 + number
    assert "everything is undone" in said
    assert not leftovers(flatmount)


def processes_of(line: CommandLine) -> list[str]:
    """Processes whose environment names the test's run directory, but for our own."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(str(line.run_directory)) in environment:
            found.append(f"{pid} {command!r}")
    return found


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["own namespace", "on host"])
def test_what_a_kill_leaves_the_next_command_clears(
    flatmount: CommandLine, target: Path, seed: int, where: str
) -> None:
    chance = random.Random(f"{seed}-{where}")
    options = ["--on-host"] if where == "on host" else []
    for _ in range(ROUNDS):
        storm = flatmount.start("storm", "demo", "--containers", "40", "--repeats", "20", *options,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(0.3 + chance.random() * 1.5)
        storm.send_signal(signal.SIGKILL)
        storm.wait()
        flatmount("mount", "demo", str(target), "--map", "0:300000:65536", "--ephemeral")
        flatmount("umount", str(target))
        deadline = time.monotonic() + 10
        while processes_of(flatmount) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not processes_of(flatmount)
        assert not leftovers(flatmount)
        assert str(flatmount.run_directory) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_mount_that_was_killed_is_whole_or_gone(flatmount: CommandLine, target: Path, seed: int) -> None:
    chance = random.Random(seed)
    begun = time.monotonic()
    flatmount("mount", "demo", str(target), "--map", "0:300000:65536", "--ephemeral")
    whole = time.monotonic() - begun
    flatmount("umount", str(target))
    for _ in range(ROUNDS):
        command = ["mount", "demo", str(target), "--map", "0:300000:65536", "--ephemeral"]
        killed = flatmount.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.4 + 0.7 * chance.random()))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        # The next command puts right what was half-way; what was whole is still there, and can be taken off.
        flatmount("storm", "demo", "--containers", "1", "--repeats", "1", "--strategies", "flat", "--json", "-")
        if os.path.ismount(target):
            flatmount("umount", str(target))
        assert not leftovers(flatmount)
        assert not os.path.ismount(target)
