"""`flatmount storm`: its results, what it leaves, and what a kill leaves to the next command."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flatmount.cli.main import main
from flatmount.kernel.executor import Outcome
from flatmount.rootfs import workplace as workplaces
from flatmount.rootfs.assembler import Rootfs
from flatmount.rootfs.image import probe_store
from flatmount.store import Store
from flatmount.storm import engine
from flatmount.storm.engine import run_storm
from flatmount.storm.results import Settings, StormReport
from tests.conftest import SOAK
from tests.e2e.conftest import LAYERS, CommandLine, leftovers
from tests.waiting import until

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


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Somebody stays in the first root file system that is undone, and in the third: their targets."""
    undo, users, targets = Rootfs.undo, list[int](), list[str]()
    calls = itertools.count()
    lock = threading.Lock()

    def undo_in_use(rootfs: Rootfs) -> Outcome | None:
        with lock:
            if next(calls) in (0, 2):
                users.append(os.open(rootfs.target, os.O_RDONLY | os.O_DIRECTORY))
                targets.append(rootfs.target)
        return undo(rootfs)

    monkeypatch.setattr(Rootfs, "undo", undo_in_use)
    yield targets
    for user in users:
        os.close(user)


STORM = ("storm", "demo", "--containers", "5", "--repeats", "2", "--strategies", "flat,detached", "--on-host")


def test_what_cannot_be_undone_is_told_beside_the_results(
    flatmount: CommandLine, in_use: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATMOUNT_RUN", str(flatmount.run_directory))
    out, page = tmp_path / "storm.json", tmp_path / "storm.html"
    assert main([*STORM, "--root", str(flatmount.root), "--json", str(out), "--html", str(page)]) == 1
    report = StormReport.from_json(json.loads(out.read_text()))
    assert [(run.strategy, run.failed, len(run.latencies_ms)) for run in report.results] == [
        ("flat", 0, 5), ("detached", 0, 5), ("detached", 0, 5), ("flat", 0, 5)
    ]  # fmt: skip
    assert all(run.phases_ms.undo and run.undo_operations == 5 for run in report.results)
    (line,) = report.not_undone
    assert line.startswith("flat, the kernel's account: 2 root file systems could not be undone: ")
    assert any(target in line for target in in_use) and "something still uses it" in line
    assert line.endswith(f"; gone with {in_use[0].rpartition('/roots/')[0]}")
    assert "What could not be undone" in page.read_text()


def test_what_was_not_undone_counts_for_no_time_of_undoing(
    flatmount: CommandLine, in_use: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a storm that is not counted by the kernel first: the burst that is timed is the one that fails."""
    with Store.open(str(flatmount.root)) as store:
        facts = probe_store(store).facts
        settings = Settings(3, 3, ("flat",), 1, 30.0, 0, 0, 0, True, "fresh", None, "here", store.root, 1)
        report = run_storm(
            store, store.image("demo"), settings, facts=facts, run=str(flatmount.run_directory), uppers=None,
            progress=lambda text: None, account=False,
        )  # fmt: skip
    (run,) = report.results
    assert (run.failed, len(run.latencies_ms), run.undo_operations) == (0, 3, 1)
    assert run.phases_ms.undo
    assert run.mount_table.after == run.mount_table.before + 2
    (line,) = report.not_undone
    assert line.startswith("flat, repeat 1: 2 root file systems could not be undone: ")


def test_an_interrupted_storm_does_not_say_that_everything_is_undone(
    flatmount: CommandLine, in_use: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a directory that cannot be cleared is named with what does it."""
    monkeypatch.setenv("FLATMOUNT_RUN", str(flatmount.run_directory))
    real = engine.undo_burst

    def interrupt(*arguments: Any, **options: Any) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    def fail(path: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr(engine, "undo_burst", interrupt)
    with monkeypatch.context() as inner:
        inner.setattr(workplaces, "_clear", fail)
        assert main([*STORM, "--root", str(flatmount.root)]) == 128 + signal.SIGTERM
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flatmount: interrupted")]
    place = in_use[0].rpartition("/roots/")[0]
    assert line.startswith(
        "flatmount: interrupted; flat, the kernel's account: 2 root file systems could not be undone"
    )
    assert line.endswith(f"; {place} is still there: the next `flatmount storm`, `mount` or `umount` clears it")
    workplaces._clear(place)


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
    _, said = storm.communicate(timeout=200)
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
        until(lambda: not processes_of(flatmount))
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
