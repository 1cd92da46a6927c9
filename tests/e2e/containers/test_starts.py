"""`flatmount storm --engine`: real containers in waves, and nothing of them afterwards."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.errors import FlatmountError
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.image import probe_store
from flatmount.rootfs.workplace import take_off_below
from flatmount.runtime import cgroups
from flatmount.runtime.request import Attachment
from flatmount.store import Store
from flatmount.storm.engines import containerd
from flatmount.storm.engines.base import Arrivals, Ask
from flatmount.storm.engines.own import FlatmountEngine, Started
from tests.conftest import SOAK
from tests.e2e.conftest import CommandLine
from tests.e2e.containers.census import Family, Standing, descendants, groups_left, subreaper
from tests.e2e.containers.conftest import left_by, new_name
from tests.waiting import until


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
@pytest.mark.timeout(3600)
def test_waves_of_containers_leave_nothing(line: CommandLine, tmp_path: Path) -> None:
    """100 containers in waves of 50 (1,000 in soak): everything that they were seen to have is gone afterwards."""
    count = 20 if SOAK else 2
    options = ("--engine", "flatmount", "--containers", "50", "--waves", str(count), "--repeats", "1", "--json", "-")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    line.extra["TMPDIR"] = str(temporary)
    storm(line, "--engine", "flatmount", "--containers", "1", "--repeats", "1")  # makes the directories that stay
    before, family = Standing.of(line, temporary), Family()
    with subreaper():
        process = line.start("storm", "tiny", *options, stdout=subprocess.PIPE)
        while process.poll() is None and not select.select([process.stdout], [], [], 0.2)[0]:
            family.look()
        said, _ = process.communicate(timeout=600)
        until(lambda: not family.look())
    waves = json.loads(said)["waves"]
    assert [wave["failed"] for wave in waves] == [0] * count
    assert all(wave["mounts_standing"] == wave["mounts_before"] for wave in waves)
    # The storm, and for each container its shim and its first process; most of them were there at once.
    assert family.most > 60 and len(family.groups) > 30
    assert family.kinds() >= {"mnt", "user", "net", "pid", "ipc", "uts"}
    assert groups_left(family.groups) == []
    after = Standing.of(line, temporary)
    assert not after.files ^ before.files
    assert after == before
    assert not left_by(line) and not processes_of(line)
    assert os.listdir(line.run_directory / "work") == []


def test_a_starter_that_lives_long_keeps_nothing_of_its_containers(line: CommandLine, tmp_path: Path) -> None:
    with Store.open(str(line.root)) as store:
        facts = probe_store(store).facts
        image = store.image("tiny")
        arrivals = Arrivals(tempfile.mkdtemp(dir=line.run_directory.parent) + "/first")
        own = (store, image, str(line.run_directory), facts, arrivals.directory, Attachment.PRIVATE)
        with arrivals, FlatmountEngine(*own) as engine:
            seen = []
            for number in range(12):
                ask = Ask(f"{new_name()}-{number}", Mapping.single((1 << 20) + (number << 16)), holds=True)
                started = engine.start(ask)
                arrivals.wait(ask.name, time.monotonic() + 60)
                engine.undo(started)
                gc.collect()
                seen.append((Standing.of(line), threading.active_count(), descendants(os.getpid())))
            assert seen[-1] == seen[1]
    assert not left_by(line)


@pytest.mark.parametrize("engine", ["flatmount-host", "runc", "runc-plain", "containerd", "podman"])
def test_engines_hold_their_containers_and_undo_them(line: CommandLine, engine: str, tiny_layout: Path) -> None:
    if engine in ("containerd", "podman") and shutil.which(engine) is None:
        pytest.skip(f"machine cannot: {engine} is not installed")
    options = ("--containers", "3", "--waves", "2", "--repeats", "1", "--hold", "--concurrency", "2")
    options += ("--layout", str(tiny_layout))
    waves = storm(line, "--engine", engine, *options)
    assert [(wave["running_before"], wave["failed"]) for wave in waves] == [(0, 0), (3, 0)]
    assert all(len(wave["latencies_ms"]) == 3 for wave in waves)  # type: ignore[arg-type]
    assert not left_by(line) and not processes_of(line)


def test_containerd_without_its_directory_is_undone_in_time(
    line: CommandLine, tiny_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody deletes the state of a daemon whose containers run: what they were is gone all the same."""
    monkeypatch.setattr(containerd, "_UNDO_S", 3.0)
    with Store.open(str(line.root)) as store:
        image = store.image("tiny")
    place = line.run_directory.parent
    arrivals = Arrivals(f"{place}/first")
    with arrivals:
        with containerd.ContainerdEngine(image, str(tiny_layout), arrivals.directory, str(place)) as engine:
            asks = [Ask(new_name(), Mapping.single(1 << 20), holds=True) for _ in range(3)]
            started = [engine.start(ask) for ask in asks]
            for ask in asks:
                arrivals.wait(ask.name, time.monotonic() + 60)
            pids = {int(pid) for ask in asks for pid in pids_in(ask.name)}
            assert len(pids) == 3
            subprocess.run(["rm", "-rf", f"{place}/containerd/state", f"{place}/containerd/root"], check=False)
            os.kill(engine._daemon.pid, signal.SIGSTOP)  # type: ignore[union-attr]
            for one in started:
                with suppress(FlatmountError):
                    engine.undo(one)
            os.kill(engine._daemon.pid, signal.SIGCONT)  # type: ignore[union-attr]
        assert not any(pids_in(ask.name) for ask in asks)
    take_off_below(str(place))
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def pids_in(name: str) -> list[str]:
    return [pid for group in cgroups.groups(name) for pid in Path(group, "cgroup.procs").read_text().split()][:1]


@pytest.mark.parametrize("hold", [(), ("--hold",)], ids=["ended", "held"])
def test_what_cannot_be_ended_is_told_beside_the_results(
    line: CommandLine, hold: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One container is not ended, as far as its engine can tell, and then the engine itself is not."""
    undo, leave = FlatmountEngine.undo, FlatmountEngine.__exit__
    problems = iter([FlatmountError("it is busy")])

    def undo_and_fail(engine: FlatmountEngine, started: Started) -> None:
        undo(engine, started)
        for problem in problems:
            raise problem

    def leave_and_fail(engine: FlatmountEngine, *error: BaseException | None) -> None:
        leave(engine, *error)
        raise FlatmountError("it stays")

    monkeypatch.setattr(FlatmountEngine, "undo", undo_and_fail)
    monkeypatch.setattr(FlatmountEngine, "__exit__", leave_and_fail)
    monkeypatch.setenv("FLATMOUNT_RUN", str(line.run_directory))
    options = ("--containers", "2", "--waves", "2", "--repeats", "1", "--engine", "flatmount", *hold)
    code = main(["storm", "tiny", "--root", str(line.root), *options, "--json", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report").read_text())
    assert code == 1
    assert [(wave["failed"], len(wave["latencies_ms"])) for wave in report["waves"]] == [(0, 2)] * 2
    container, engine = report["left"]
    assert re.fullmatch("flatmount: s[^ ]+ could not be ended: it is busy", container)
    assert engine == "it stays"
    assert not left_by(line)


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
