"""Looking where something is not there: that part is left out and named, the rest works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatmount.errors import MissingFeature
from flatmount.kernel.mounts import read_table
from flatmount.observe import tracefs
from flatmount.observe.doctor.gather import gather
from flatmount.observe.perf import CONTENTION, SWITCH
from flatmount.observe.profile import Recorder
from flatmount.observe.trace import trace
from flatmount.observe.watch import Watch

# Everything is loaded first: the interpreter itself may be where only root can read.
NOBODY = """
import codecs, os, sys
from flatmount.cli.main import main, parser
parser(), codecs.lookup("ascii"), codecs.lookup("idna")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
raise SystemExit(main(sys.argv[1:]))
"""


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NOBODY, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=60)


@pytest.fixture
def no_tracefs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise MissingFeature("tracefs: Operation not permitted", hint="it takes root")

    monkeypatch.setattr(tracefs, "_detached_tracefs", refuse)


def without_events(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """As on a kernel that has none of these events: they cannot be switched on, and are not there."""
    real_enable, real_has = tracefs.TraceInstance.enable, tracefs.TraceInstance.has

    def enable(self: tracefs.TraceInstance, event: str, *, condition: str = "") -> bool:
        if event in missing:
            self.missing.append(event)
            return False
        return real_enable(self, event, condition=condition)

    monkeypatch.setattr(tracefs.TraceInstance, "enable", enable)
    monkeypatch.setattr(
        tracefs.TraceInstance, "has", lambda self, event: event not in missing and real_has(self, event)
    )


def mount_once(ram: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "x", ram], check=True)
    subprocess.run(["umount", ram], check=True)


@pytest.mark.usefixtures("no_tracefs")
def test_without_tracefs_the_doctor_sees_the_rest(ram: Path) -> None:
    state = gather(look_s=0.2)
    assert any(what.startswith("who makes mount calls: tracefs") for what in state.unseen)
    assert state.table.mounts == len(read_table())
    assert state.causes == ()


@pytest.mark.usefixtures("no_tracefs")
def test_without_tracefs_watch_counts_events_and_knows_no_causes(ram: Path) -> None:
    with Watch() as watch:
        mount_once(ram)
        sample = watch.sample()
    assert (sample.attached, sample.detached) == (1, 1)
    assert sample.causes is None and sample.locks is None
    assert any(what.startswith("causes and lock waits: tracefs") for what in sample.unseen)


@pytest.mark.usefixtures("no_tracefs")
def test_without_tracefs_a_profile_has_the_table_and_says_what_it_lacks() -> None:
    with Recorder() as recorder:
        recorder.start()
        profile = recorder.stop()
    assert any(what.startswith("mount calls: tracefs") for what in profile.missing)
    assert any(what.startswith("lock waits") for what in profile.missing)
    assert any(what.startswith("grace periods") for what in profile.missing)
    assert profile.moments[0].mounts and profile.operations == () and profile.waits == ()


def test_without_lock_events_a_profile_still_has_stacks_and_calls(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_events(monkeypatch, CONTENTION)
    with Recorder() as recorder:
        recorder.start()
        mount_once(ram)
        sum(range(3_000_000))
        profile = recorder.stop()
    assert [what for what in profile.missing if "lock:contention_begin" in what] == list(profile.missing)
    assert sum(call.done for one in profile.operations for call in one.calls) >= 2
    assert profile.cpu


def test_without_switches_there_are_no_grace_periods_but_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_events(monkeypatch, SWITCH)
    with Recorder() as recorder:
        recorder.start()
        profile = recorder.stop()
    assert profile.missing == ("grace periods: this kernel has no sched:sched_switch event",)


def test_without_one_system_call_event_the_others_are_counted(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_events(monkeypatch, "syscalls/sys_enter_open_tree_attr", "syscalls/sys_exit_open_tree_attr")
    run = trace(["sh", "-c", f"mount -t tmpfs x {ram}; umount {ram}"])
    assert run.operations == 2
    assert run.missing == ("enter_open_tree_attr", "exit_open_tree_attr")


def test_without_lock_events_watch_says_so(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_events(monkeypatch, CONTENTION)
    with Watch() as watch:
        mount_once(ram)
        sample = watch.sample()
    assert any("lock:contention_begin" in what for what in sample.unseen)
    assert sample.attached == 1 and sample.causes


def test_a_perf_that_does_not_work_is_named_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "perf"
    broken.write_text("#!/bin/sh\necho 'perf not found for this kernel' >&2\nexit 2\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Recorder() as recorder:
        recorder.start()
        profile = recorder.stop()
    assert any("perf not found for this kernel" in what for what in profile.missing)
    assert profile.moments[0].mounts


def test_nothing_runs_bpftrace_and_nothing_needs_the_debug_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "bpftrace"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    trap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # Beneath what hides it tracefs stays in the mount table, which perf would believe.
    tracefs_there = any(entry.mount_point == "/sys/kernel/tracing" for entry in read_table())
    if not tracefs_there:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], check=True)
    for hidden in ("/sys/kernel/debug", "/sys/kernel/tracing"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=000", "nothing", hidden], check=True)
    try:
        with Recorder() as recorder:
            recorder.start()
            sum(range(5_000_000))
            profile = recorder.stop()
    finally:
        laid = ("/sys/kernel/tracing", "/sys/kernel/debug")
        for point in (*laid, *(() if tracefs_there else ("/sys/kernel/tracing",))):
            subprocess.run(["umount", point], check=True)
    assert profile.missing == () and profile.cpu
    assert not (tmp_path / "called").exists()


def test_leaks_without_root_names_what_it_did_not_see() -> None:
    done = as_nobody("leaks", "--json")
    assert done.returncode in (0, 1), done.stderr
    assert any("run as root" in what for what in json.loads(done.stdout)["unseen"])


def test_watch_without_root_compares_looks_and_says_so() -> None:
    done = as_nobody("watch", "--jsonl", "--for", "0.4s", "--interval", "0.2s")
    assert done.returncode == 0, done.stderr
    sample = json.loads(done.stdout.splitlines()[0])
    assert sample["polled"] and sample["mounts"] > 0
    assert sample["causes"] is None and len(sample["unseen"]) == 2


@pytest.mark.parametrize("words", [("profile", "--for", "1s"), ("leaks", "--clean"), ("trace", "--", "true")])
def test_what_takes_root_says_so_in_one_line(words: tuple[str, ...]) -> None:
    done = as_nobody(*words)
    assert done.returncode not in (0, None)
    assert "root" in done.stderr and "Traceback" not in done.stderr
